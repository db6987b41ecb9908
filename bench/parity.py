"""How exact the compiled operations are: `python -m bench.parity [--provider cpp] [--out FILE] [--record]`.

Value and every gradient of each operation against the fp64 reference on the same inputs, beside the error that plain
PyTorch makes in the same precision. The cases are those of `tests/parity`, at a few shapes that training has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import entry, records
from fastmmkd import ops
from fastmmkd.errors import UserError
from fastmmkd.evaluation import tables
from fastmmkd.files import write_text
from fastmmkd.ops import OPERATIONS, reference, use_provider
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.providers import DTYPES, INTERPRETED, PROVIDERS, obstacle
from fastmmkd.testing import attention, layers, losses, norm
from fastmmkd.testing.parity import value_and_gradients

KIND = "parity"
COMPILED = tuple(name for name in PROVIDERS if name != "reference")
ATTENTION = [(1, 8, 50, (50, 50, 50), 8, 5), (6, 4, 50, (50, 50), 8, 5), (1, 2, 100, (100, 100, 100), 8, 5)]
NORM = [(1, 32, 50, 120), (3, 32, 50, 40)]
ENCODER = [(3, 8, 50, 8, 5), (1, 8, 50, 8, 15)]
CROSSMODAL = [(1, 8, 50, 8, 5)]
LINEAR = [(1, 512, 120), (3, 512, 40)]
CONVOLUTION = [(8, 50, 300, 40)]
OF_LINEAR = ("out", "grad x", "grad weight", "grad bias")
LOSSES = [(1, 16, 120), (6, 16, 120), (1, 128, 120)]
if INTERPRETED:  # every program takes milliseconds
    ATTENTION, NORM, LOSSES = [(1, 2, 20, (20, 20, 20), 8, 5)], [(1, 2, 5, 40)], [(2, 16, 40)]

Implementation = Callable[..., torch.Tensor]


class ParityCase(NamedTuple):
    """One call of an operation."""

    shape: str
    inputs: list[torch.Tensor]
    """What is differentiated, fp32."""
    names: list[str]
    """Of the value and of every gradient."""
    call: Callable[[Implementation], Callable[..., torch.Tensor]]
    """From an implementation of the operation to a function of the inputs."""
    grad: torch.Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description="Report how exact the kernels are.")
    parser.add_argument("--provider", choices=COMPILED, help="default: the one that runs here by itself")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to this Markdown file")
    parser.add_argument("--record", action="store_true", help="append a record under bench/results/speed")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and args.provider != "cpp" else "cpu")
    provider = args.provider or ops.explain("cross_attention", device).provider
    body = {"provider": provider, "interpreted": INTERPRETED, "rows": measure(provider, device)}
    text = render(body)
    print(text)
    if args.out:
        write_text(args.out, text)
    if args.record:
        print(records.append(KIND, body, device))
    return 0


def measure(provider: str, device: torch.device) -> list[dict[str, Any]]:
    """A row per operation, precision, shape and output.

    Raises:
        UserError: the provider cannot run here.
    """
    rows = []
    for op, described in OPERATIONS.items():
        if provider not in described.kernels:
            continue
        reason = obstacle(provider, described, device, [])
        if reason:
            raise UserError(f"--provider {provider}: {op} cannot run: {reason}")
        for dtype in DTYPES.get(provider, ()):
            if obstacle(provider, described, device, [dtype]):
                continue
            name = str(dtype).removeprefix("torch.")
            for case in cases(op):
                for row in errors(op, case, provider, device, dtype):
                    rows.append({"op": op, "dtype": name, "shape": case.shape, **row})
    return rows


def cases(op: str) -> Iterator[ParityCase]:
    """Of an operation, at the shapes that training has."""
    if op == "cross_attention":
        for shape in ATTENTION:
            drawn = attention.draw(*shape)
            label = f"G={shape[0]} B={shape[1]} T={shape[2]} keys={sum(shape[3])}"
            yield ParityCase(label, drawn.inputs, drawn.names(), partial(_attend, drawn), drawn.grad)
    elif op == "residual_layer_norm":
        for groups, batch, frames, width in NORM:
            inputs, grad = norm.draw((groups, batch, frames, width))
            label = f"G={groups} rows={batch * frames} d={width}"
            yield ParityCase(label, inputs, list(norm.NAMES), lambda implementation: implementation, grad)
    elif op == "encoder_layer":
        for groups, batch, frames, heads, width in ENCODER:
            layer = layers.draw_encoder((1, groups), [[frames] * batch], 1, heads, width, spare=0)
            yield ParityCase(f"G={groups} B={batch} T={frames}", layer.inputs, layer.names(), layer.call, layer.grad)
    elif op == "crossmodal_layer":
        for models, batch, frames, heads, width in CROSSMODAL:
            layer = layers.draw_crossmodal(models, [[frames] * batch] * models, heads, width, spare=0)
            yield ParityCase(f"S={models} B={batch} T={frames}", layer.inputs, layer.names(), layer.call, layer.grad)
    elif op == "grouped_linear":
        for groups, rows, width in LINEAR:
            inputs, grad = layers.draw_linear((groups,), (rows,), width, width)
            label = f"G={groups} rows={rows} d={width}"
            yield ParityCase(label, inputs, list(OF_LINEAR), lambda implementation: implementation, grad)
    elif op == "temporal_convolution":
        for batch, frames, features, width in CONVOLUTION:
            inputs, layout, grad = layers.draw_convolution(1, [[frames] * batch], features, width, spare=0)
            label = f"B={batch} T={frames} {features} to {width}"
            yield ParityCase(label, inputs, list(OF_LINEAR), partial(_with_layout, layout), grad)
    elif op in losses.CASES:
        for groups, rows, width in LOSSES:
            case = losses.CASES[op](groups, rows, width)
            names = ["value", *(f"grad {i}" for i in range(len(case.inputs)))]
            label = f"G={groups} N={rows} d={width}"
            yield ParityCase(label, list(case.inputs), names, partial(_with_constants, case), losses.upstream(groups))


def _attend(drawn: attention.AttentionCase, implementation: Implementation) -> Callable[..., torch.Tensor]:
    def call(query: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        n, masks = len(drawn.masks), [mask.to(query.device) for mask in drawn.masks]
        return implementation(query, rest[:n], rest[n:], masks, drawn.heads)

    return call


def _with_layout(layout: Layout, implementation: Implementation) -> Callable[..., torch.Tensor]:
    return lambda x, weight, bias: implementation(x, layout, weight, bias)


def _with_constants(case: losses.LossCase, implementation: Implementation) -> Callable[..., torch.Tensor]:
    def call(*inputs: torch.Tensor) -> torch.Tensor:
        at = inputs[0].device
        return implementation(*inputs, *(c.to(at) if isinstance(c, torch.Tensor) else c for c in case.constants))

    return call


def errors(
    op: str, case: ParityCase, provider: str, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Of the value and of every gradient: the largest error, and it and plain PyTorch's by the largest value."""
    inputs, grad = [x.to(device, dtype) for x in case.inputs], case.grad.to(device)
    with use_provider(provider):
        fast = value_and_gradients(case.call(getattr(ops, op)), inputs, grad)
    plain, exact = (value_and_gradients(case.call(getattr(reference, op)), x, grad) for x in (inputs, _doubles(inputs)))
    for name, *computed, true in zip(case.names, fast, plain, exact, strict=True):
        scale = true.abs().max().item() or 1.0
        error, plain_error = ((x.double() - true).abs().max().item() for x in computed)
        yield {
            "of": name,
            "largest error": error,
            "relative": error / scale,
            "plain PyTorch, relative": plain_error / scale,
        }


def _doubles(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.double() for x in inputs]


def render(body: dict[str, Any]) -> str:
    """A Markdown table: per operation and precision the worst of each output over all shapes."""
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in body["rows"]:
        key = row["op"], row["dtype"], row["of"]
        if key not in worst or row["relative"] > worst[key]["relative"]:
            worst[key] = row
    rows = [
        [*key, row["shape"], *(f"{row[k]:.1e}" for k in ("largest error", "relative", "plain PyTorch, relative"))]
        for key, row in worst.items()
    ]
    header = ["operation", "precision", "of", "worst at", "largest error", "by the largest value", "plain PyTorch"]
    interpreted = ", interpreted" if body["interpreted"] else ""
    return f"Provider {body['provider']}{interpreted}.\n\n{tables.markdown_table(header, rows)}"


if __name__ == "__main__":
    entry.run(main)
