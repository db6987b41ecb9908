"""The update of all parameters at once: Adam on one flat tensor, in a handful of launches, the host waiting for none.

DeepSpeed's optimiser in half precision looks at every parameter by itself and waits for the device between. Here fp32
master weights, their gradients and Adam's moments are one tensor each, a row per model; the parameters are views into
another, in the precision they are trained in, and all is in place, so that a CUDA graph can hold it. DeepSpeed is
handed this optimiser and keeps the engine, the schedule and the checkpoints.

Decision: a model whose gradient is not finite (its norm in fp32 is not) skips that step: weights, moments and step
count stay as they are, as under a loss scale, and the other models take theirs. Nobody waits for it; the step counts
tell later how many were skipped. The schedule of the learning rate, which all models share, goes on.

What it should gain on a GPU stands in docs/gpu_predictions.md.

Shape legend: S models, P weights of a model with what fills up rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from fastmmkd.distributed import world_size
from fastmmkd.errors import UserError

ALIGNMENT = 8
"""Elements; a parameter starts at a multiple: 16 bytes in bf16, which kernels that load vectors ask for."""
CHUNK = 1024
"""Elements whose norm is taken first, then the norm of the norms: as exact as a sum over parameters."""
PIECES = 36
"""What a row is cut into for torch's fused Adam: as many tensors as one launch of it takes, each a block at least."""
BOOK_KEEPING = ("timers", "wall_clock_breakdown", "dump_state", "tensorboard", "csv_monitor", "wandb", "comms_logger")


class FlatAdam(torch.optim.Optimizer):
    """Adam or AdamW of models that share nothing, with clipping, averaging over processes and master weights.

    Args:
        parameters: fp32, `[S, ...]` each; they become views of `dtype`. One without a gradient counts as gradient 0.
        dtype: fp32 or bf16, what the parameters are trained in.
        clip: largest Euclidean norm of all gradients of a model; 0 = none.
        decoupled: weight decay as AdamW has it.
        models: S, where parameters need not have it as their first axis, as with one model; None = they have.
        lr, betas, eps, weight_decay: as torch's Adam has them.

    Raises:
        ValueError: the parameters are not those of one number of models.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        dtype: torch.dtype,
        clip: float,
        decoupled: bool,
        models: int | None = None,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
    ) -> None:
        if weight_decay is None:
            weight_decay = 1e-2 if decoupled else 0.0  # torch's defaults
        own = [p for p in parameters if p.requires_grad]
        super().__init__(own, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.clip, self.adam = clip, torch._fused_adamw_ if decoupled else torch._fused_adam_
        self.parameters: list[torch.nn.Parameter] = own
        sizes = {tuple(p.shape[:1]) for p in own}
        if models is None and (len(sizes) != 1 or sizes == {()}):
            raise ValueError(f"parameters of {sorted(sizes)} models; expected one number of models as their first axis")
        self.models = models or next(iter(sizes))[0]
        self._lay_out(dtype)

    @torch.no_grad()
    def _lay_out(self, dtype: torch.dtype) -> None:
        own, models = self.parameters, self.models
        widths = [p.numel() // models for p in own]
        spans = [-(-width // ALIGNMENT) * ALIGNMENT for width in widths]
        spans[-1] += -sum(spans) % CHUNK
        *starts, total = accumulate(spans, initial=0)
        device = own[0].device
        self.weights = torch.zeros(models, total, device=device)
        for p, start, width in zip(own, starts, widths, strict=True):
            self.weights[:, start : start + width] = p.detach().reshape(models, width)
        self.gradient, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.weights) for _ in range(3))
        self.steps = torch.zeros(models, device=device)
        self.state[own[0]] = self._state()  # where those look who put a state back after a rehearsal
        self.bound = torch.full((models,), math.inf, device=device)
        """`[S]`: a model whose gradient norm is below it takes its step; 0 = it has stopped."""
        self.stopped: list[int] = []
        gaps = [span - width for span, width in zip(spans, widths, strict=True)]
        self._gaps = [torch.zeros(models, gap, device=device, dtype=dtype) if gap else None for gap in gaps]
        piece = -(-total // (PIECES * CHUNK)) * CHUNK
        flats = (self.weights, self.gradient, self.exp_avg, self.exp_avg_sq)
        self._pieces = [[list(x[model].split(piece)) for x in flats] for model in range(models)]
        self._skips = torch.zeros(models, device=device)
        self._order: torch.Tensor | None = None
        if models > 1:  # the weights of a parameter, all models', lie together: kernels want them contiguous
            kind = torch.int32 if models * total < 2**31 else torch.int64
            order = torch.zeros(models * total, dtype=kind, device=device)
            rows = torch.arange(models * total, dtype=kind, device=device).view(models, total)
            for start, width in zip(starts, widths, strict=True):
                order[models * start : models * (start + width)] = rows[:, start : start + width].flatten()
            self._order = order
        alias = models == 1 and dtype == torch.float32
        self.flat = self.weights[0] if alias else torch.zeros(models * total, dtype=dtype, device=device)
        for p, start, width in zip(own, starts, widths, strict=True):
            p.data = self.flat[models * start : models * (start + width)].view(p.shape)
        self._write_back()

    def _state(self) -> dict[str, torch.Tensor]:
        return {"weights": self.weights, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Average the gradients over processes, clip each model's, and update those whose gradient is finite."""
        self._gather()
        if world_size() > 1:
            dist.all_reduce(self.gradient)
            self.gradient.div_(world_size())
        chunks = torch.linalg.vector_norm(self.gradient.view(self.models, -1, CHUNK), dim=2)
        norm = torch.linalg.vector_norm(chunks, dim=1)
        takes = norm < self.bound  # not if it is NaN
        self.steps.add_(takes)
        torch.logical_not(takes, out=self._skips)
        scales: Sequence[torch.Tensor | None] = [None] * self.models
        if self.clip:
            scales = ((norm + 1e-6) / self.clip).clamp_(min=1).unbind()
        (group,) = self.param_groups
        rows = zip(self._pieces, self.steps.unbind(), self._skips.unbind(), scales, strict=True)
        for (weights, gradient, exp_avg, exp_avg_sq), taken, skips, scale in rows:
            self.adam(
                weights,
                gradient,
                exp_avg,
                exp_avg_sq,
                [],
                [taken] * len(weights),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=skips,
            )
        self._write_back()

    def _gather(self) -> None:
        """The gradients of all parameters, in fp32."""
        rows: list[torch.Tensor] = []
        for p, gap in zip(self.parameters, self._gaps, strict=True):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            rows.append(gradient.reshape(self.models, -1))
            if gap is not None:
                rows.append(gap)
        if self.flat.dtype == torch.float32:
            torch.cat(rows, dim=1, out=self.gradient)
        else:
            self.gradient.copy_(torch.cat(rows, dim=1))

    def _write_back(self) -> None:
        """Give the parameters the master weights' values."""
        if self._order is not None:
            weights = self.weights.to(self.flat.dtype).view(-1)
            torch.index_select(weights, 0, self._order, out=self.flat)
        elif self.flat.dtype != torch.float32:  # else they are the master weights
            self.flat.copy_(self.weights.view(-1))

    def stop(self, models: Sequence[int]) -> None:
        """These models, and no others, are trained no more: nothing of them changes."""
        if self.stopped != list(models):
            self.stopped = list(models)
            live = [0.0 if model in self.stopped else math.inf for model in range(self.models)]
            self.bound.copy_(torch.tensor(live))

    def skipped(self, steps: int) -> list[float]:
        """How many of the steps that were taken so far each model skipped; the host waits for the device."""
        return [steps - taken for taken in self.steps.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """The master weights, Adam's state, and the settings."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        for group in settings:
            group["lr"] = float(group["lr"])  # a captured step has it on the device
        return {"state": self._state(), "param_groups": settings}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Restore what `state_dict` gave, to the last bit.

        Raises:
            UserError: it is the state of another optimiser, or of other models.
        """
        saved, own = (state_dict or {}).get("state", {}), self._state()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in saved.items() if torch.is_tensor(v)}:
            raise UserError("a checkpoint with another optimiser's state; expected flat master weights and moments")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        for group, settings in zip(self.param_groups, (state_dict or {})["param_groups"], strict=True):
            group.update(settings)
        self._write_back()


def flat_adam(block: dict[str, Any], models: int = 1) -> Callable[[Iterable[torch.nn.Parameter]], FlatAdam] | None:
    """The optimiser that a `deepspeed` block asks for, where it can be `FlatAdam`; None: it is DeepSpeed's to make.

    That is torch's Adam or AdamW in fp32 or bf16 where one process owns everything: ZeRO stage 0, or 1 with one
    process, where there is nothing to divide. A block with settings that would not be honoured stays DeepSpeed's.
    """
    bf16, zero = block.get("bf16", {}), block.get("zero_optimization", {})
    optimizer = block.get("optimizer", {})
    kind, given = str(optimizer.get("type")).lower(), dict(optimizer.get("params", {}))
    known = {"train_batch_size", "optimizer", "scheduler", "gradient_clipping", "zero_optimization", "bf16", "fp16"}
    known |= {"gradient_accumulation_steps", "steps_per_print", *BOOK_KEEPING}
    if not (
        block.keys() <= known
        and not block.get("fp16", {}).get("enabled")
        and bf16.keys() <= {"enabled"}
        and zero.keys() <= {"stage"}
        and zero.get("stage", 0) <= (1 if world_size() == 1 else 0)
        and kind in ("adam", "adamw")
        and given.pop("torch_adam", False)
        and given.pop("fused", True)
    ):
        return None
    decoupled = given.pop("adam_w_mode", True) or kind == "adamw"  # DeepSpeed's default
    given.pop("capturable", None)
    if not given.keys() <= {"lr", "betas", "eps", "weight_decay"}:
        return None
    dtype = torch.bfloat16 if bf16.get("enabled") else torch.float32
    clip = float(block.get("gradient_clipping", 1.0))  # DeepSpeed's default
    return lambda parameters: FlatAdam(parameters, dtype, clip, decoupled, models, **given)
