"""Training steps captured once and replayed: what a step costs on a GPU is launching its kernels, not running them.

A loss is a function of tensors on the device (index vector, seeds, epoch); it draws its batch itself, so that nothing
of a step is left on the host. `GraphedLoss` is its forward and its backward pass as one graph each; the gradient that
comes from above, under fp16 the loss scale, is an input of the second. `GraphedStep` is both and the optimiser's
update in one graph. Tensors that they return are overwritten by the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from fastmmkd.distributed import world_size

WARM_UP = 3
"""Runs before a capture: libraries set themselves up in the first ones."""

CapturableLoss = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""From tensors on the device to the scalar to minimise and its parts, one detached tensor."""


class Capture(Protocol):
    """Records what a function does on the device."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run it as often as it takes before it can be captured."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """The function that repeats what `run` did, and what `run` returned, whose tensors every repetition fills."""


class CudaCapture:
    """CUDA graphs that share one memory pool: they must be replayed in the order they were captured in."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def warm_up(self, run: Callable[[], Any]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(self.stream)

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # The thread in which NCCL watches over its collectives goes on asking the device, which must not end a capture.
        mode = "global" if world_size() == 1 else "thread_local"
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
            output = run()
        return graph.replay, output


class GraphedLoss:
    """A loss whose forward and backward pass are replayed; autograd and DeepSpeed see one operation of the parameters.

    Args:
        loss: what to capture.
        parameters: all that have gradients.
        inputs: tensors like those of every later call.
        capture: records the graphs.
        buffers: what else the loss writes; as before when this returns.
    """

    def __init__(
        self,
        loss: CapturableLoss,
        parameters: Iterable[torch.nn.Parameter],
        inputs: Sequence[torch.Tensor],
        capture: Capture,
        buffers: Iterable[torch.Tensor] = (),
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.inputs = [x.clone() for x in inputs]
        self._total: torch.Tensor | None = None

        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                self._total, parts = loss(*self.inputs)
            return self._total.detach(), parts

        def backward() -> tuple[torch.Tensor | None, ...]:
            assert self._total is not None
            return torch.autograd.grad(self._total, self.parameters, self.upstream, allow_unused=True)

        def both() -> None:
            self.upstream = torch.ones_like(forward()[0])
            backward()

        with _put_back(buffers):
            capture.warm_up(both)
        self.replay_forward, (self.total, self.parts) = capture(forward)
        self.upstream = torch.ones_like(self.total)
        self.replay_backward, self.gradients = capture(backward)
        self._total = None  # autograd's nodes would stay alive with it, those that accumulate gradients among them

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, differentiable in the parameters, and its parts."""
        _copy(self.inputs, inputs)
        return _Replay.apply(self, *self.parameters), self.parts


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphed: GraphedLoss, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.graphed = graphed
        graphed.replay_forward()
        return graphed.total.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        graphed = ctx.graphed
        graphed.upstream.copy_(grad)
        graphed.replay_backward()
        return None, *(None if g is None else g.detach() for g in graphed.gradients)


class GraphedStep:
    """A whole step, the update of the parameters included, as one graph.

    Args:
        loss: what to minimise.
        optimizer: a capturable torch optimiser over the parameters; its state is as before when this returns.
        clip: changes the gradients in place before the update.
        inputs: tensors like those of every later call.
        capture: records the graph.
        buffers: what else the loss writes; as before when this returns.
    """

    def __init__(
        self,
        loss: CapturableLoss,
        optimizer: torch.optim.Optimizer,
        clip: Callable[[], Any],
        inputs: Sequence[torch.Tensor],
        capture: Capture,
        buffers: Iterable[torch.Tensor] = (),
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.optimizer = optimizer
        rates = [float(g["lr"]) for g in optimizer.param_groups]
        self.rates = [torch.tensor(rate, device=self.inputs[0].device) for rate in rates]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

        def step() -> torch.Tensor:
            with torch.enable_grad():
                total, parts = loss(*self.inputs)
            for p, gradient in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
                p.grad = gradient
            clip()
            optimizer.step()
            after()
            return parts

        self._set_rates(self.rates)
        try:
            with _put_back([*parameters, *buffers], optimizer):
                capture.warm_up(step)
            self.replay, self.parts = capture(step)
        except RuntimeError:
            self._set_rates(rates)
            raise
        finally:
            for p in parameters:
                p.grad = None  # it belongs to the graph

    def _set_rates(self, rates: Sequence[Any]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Take a step at the learning rates that the optimiser's groups have now; the parts of the loss before it."""
        _copy(self.inputs, inputs)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:  # a schedule has set it
                rate.fill_(float(group["lr"]))
                group["lr"] = rate
        self.replay()
        return self.parts


@contextmanager
def _put_back(tensors: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Restore what a rehearsal writes, in place: a graph holds on to the tensors themselves.

    State of the optimiser that was made since becomes 0, what it starts from.
    """
    written = list(tensors)
    values = [x.detach().clone() for x in written]
    states = optimizer.state if optimizer else {}
    before = {p: {k: v.clone() for k, v in state.items() if torch.is_tensor(v)} for p, state in states.items()}
    try:
        yield
    finally:
        _copy(written, values)
        with torch.no_grad():
            for p, state in states.items():
                for key, value in state.items():
                    if torch.is_tensor(value):
                        value.copy_(before.get(p, {}).get(key, torch.zeros_like(value)))


@torch.no_grad()
def _copy(to: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for static, x in zip(to, values, strict=True):
        static.copy_(x)
