"""Every operation on a CUDA device, forward and backward, against what PyTorch offers: `python -m bench.gpu_kernels`.

Contenders are checked against the reference before they are timed. Two times are taken of each, medians of at least 30:
"eager", a call as a program makes it, launches included, and "replayed", the same call in a CUDA graph, which is what
the device itself needs and what a captured training step costs. `--dry-run` rehearses it on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench import entry
from bench.attention import scaled_dot_product
from fastmmkd import ops
from fastmmkd.errors import UserError
from fastmmkd.evaluation import markdown
from fastmmkd.files import write_json
from fastmmkd.ops import reference, use_provider
from fastmmkd.ops.providers import obstacle

RUNS, PER_GRAPH = 30, 10
HALF = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Against the reference in the same precision, relative to the largest value; the parity wall is far stricter."""

Outputs = list[torch.Tensor]


class Case(NamedTuple):
    """One operation at one size."""

    op: str
    size: str
    dtype: torch.dtype
    leaves: list[torch.Tensor]
    """Inputs that have gradients."""
    call: Callable[..., Any]
    """`call(function, *leaves)`: runs an implementation with the public arguments."""
    others: dict[str, Callable[..., torch.Tensor]] = {}  # noqa: RUF012
    """PyTorch's own implementations, with the arguments of the operation."""


def normal(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def attention(device: torch.device, dtype: torch.dtype, sizes: dict[str, int], mix: bool) -> Case:
    """Keys and values packed as the models project them; `mix`: modalities and frames missing as in training."""
    g, b, t, n, heads, width = (sizes[k] for k in ("G", "B", "T", "segments", "heads", "width"))
    query = normal(device, dtype, g, b, t, width)
    packed = [normal(device, dtype, g, b, t, 2 * width, seed=1 + i) for i in range(n)]
    generator = torch.Generator().manual_seed(9)
    kept = torch.rand(n, 1, b, 1, generator=generator) < (0.57 if mix else 1.0)
    masks = [(torch.rand(1, b, t, generator=generator) < (0.65 if mix else 1.0)) & kept[i] for i in range(n)]
    masks = [mask.expand(g, -1, -1).to(device) for mask in masks]

    def call(function: Callable[..., torch.Tensor], query: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        keys, values = zip(*(x.chunk(2, -1) for x in packed), strict=True)
        return function(query, keys, values, masks, heads)

    size = f"G={g}, B={b}, {t} x {n * t}, {heads} heads of {width // heads}" + (", training mix" if mix else "")
    others = {"scaled_dot_product": scaled_dot_product} | ({"flex_attention": flexible} if not mix else {})
    return Case("cross_attention", size, dtype, [query, *packed], call, others)


@cache
def _flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flexible(query, keys, values, masks, heads) -> torch.Tensor:
    """FlexAttention, which wants head widths of a power of two from 16: heads are padded."""
    mask = torch.cat(masks, 2).flatten(0, 1)
    width = query.shape[-1] // heads
    padded = [
        F.pad(
            x.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(0, 1),
            (0, max(16, 1 << (width - 1).bit_length()) - width),
        )
        for x in (query, torch.cat(keys, 2), torch.cat(values, 2))
    ]

    def masked(score, b, h, q, k):
        return torch.where(mask[b, k], score, -float("inf"))

    attended = _flex()(*padded, score_mod=masked, scale=width**-0.5)[..., :width]
    return attended.unflatten(0, query.shape[:2]).transpose(2, 3).flatten(-2)


def cases(device: torch.device, dry: bool) -> list[Case]:
    """The sizes of the shipped configs (batch 16, two versions), and large ones."""
    paper = {"G": 3, "B": 32, "T": 50, "segments": 3, "heads": 8, "width": 40}
    long = paper | {"G": 1, "T": 375}
    dtypes = [d for d in HALF if not obstacle("triton", "cross_attention", device, [d])] or [torch.float32]
    if dry:
        paper |= {"G": 1, "B": 2, "T": 5}
        long = paper | {"T": 7}
    found = []
    for dtype in dtypes:
        for sizes in (paper, paper | {"G": 6, "segments": 2}, paper | {"G": 1, "segments": 1, "width": 120}, long):
            found += [attention(device, dtype, sizes, mix) for mix in (False, True)]
        for shape in ((3, 32, 50, 40), (1, 32, 50, 120)):
            x, residual = (normal(device, dtype, *shape, seed=i) for i in range(2))
            affine = [normal(device, dtype, shape[0], shape[-1], seed=i) for i in (2, 3)]
            size = " x ".join(map(str, shape))
            found.append(Case("residual_layer_norm", size, dtype, [x, residual, *affine], lambda f, *args: f(*args)))
        found += losses(device, dtype, dry)
    return found


def losses(device: torch.device, dtype: torch.dtype, dry: bool) -> list[Case]:
    """At a method's batch, at a large global batch, and pairwise at one that no N x N x d tensor fits."""
    found = []
    for n in (16,) if dry else (16, 128, 1024):
        pair = [normal(device, dtype, 1, n, 120, seed=i) for i in range(2)]
        hidden = [normal(device, dtype, 1, n, 64, seed=i) for i in range(2)]
        network = [normal(device, dtype, 1, 64, seed=2), normal(device, dtype, 1, seed=3)]
        logits = [normal(device, dtype, 1, n, 7, seed=i) for i in range(2)]
        classes = torch.arange(n, device=device).remainder(2)[None]
        size = f"N={n}"
        found += [
            Case("gaussian_mmd", size, dtype, pair, lambda f, x, y: f(x, y)),
            Case("jsd_mutual_information", size, dtype, hidden + network, lambda f, *args: f(*args)),
            Case("js_divergence", size, dtype, logits, lambda f, x, y: f(x, y)),
            Case(
                "prototype_similarity",
                size,
                dtype,
                pair[:1],
                lambda f, x, y=pair[1], c=classes: f(x, y, c, 2),
            ),
            Case(
                "pairwise_contrastive",
                size,
                dtype,
                pair[:1],
                lambda f, x, y=pair[1]: f(x, y, 15.0, 0, "mean"),
            ),
        ]
    return found


def differentiate(case: Case, function: Callable[..., torch.Tensor], leaves: Outputs, grad: torch.Tensor) -> Outputs:
    """The result and the gradients of all leaves."""
    out = case.call(function, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def contenders(case: Case, device: torch.device) -> dict[str, tuple[str | None, Callable[..., torch.Tensor]]]:
    """Name -> the provider to force, and the function."""
    public = getattr(ops, case.op)
    found: dict[str, tuple[str | None, Callable[..., torch.Tensor]]] = {}
    for provider in ("triton", "cuda", "cpp"):
        if not obstacle(provider, case.op, device, [case.dtype]):
            found[provider] = provider, public
    found["reference"] = None, getattr(reference, case.op)
    if device.type == "cuda":
        found["compiled reference"] = None, torch.compile(getattr(reference, case.op), dynamic=False)
        found |= {name: (None, function) for name, function in case.others.items()}
    return found


def measure(case: Case, device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """A record per contender; one that fails says so and does not stop the others."""
    leaves = [x.detach().requires_grad_() for x in case.leaves]
    with torch.no_grad():
        shape = case.call(getattr(reference, case.op), *leaves)
    grad = normal(device, shape.dtype, *shape.shape, seed=8)
    expected = differentiate(case, getattr(reference, case.op), leaves, grad)
    records = []
    for name, (provider, function) in contenders(case, device).items():
        record: dict[str, Any] = {"op": case.op, "size": case.size, "dtype": HALF[case.dtype], "contender": name}
        step = partial(differentiate, case, function, leaves, grad)
        try:
            with use_provider(provider or "reference"):
                record["error"] = worst(step(), expected)
                if record["error"] > TOLERANCE[case.dtype]:
                    raise ValueError(f"differs from the reference by {record['error']:.1e}")
                record["eager_ms"] = eager(step, device, dry)
                record["replayed_ms"] = None if dry else replayed(step)
        except Exception as error:
            record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        records.append(record)
    return records


def worst(found: Outputs, expected: Outputs) -> float:
    """The largest error, relative to the largest value of its tensor; infinite where something is not finite."""
    errors = [
        (a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-20)
        for a, b in zip(found, expected, strict=True)
    ]
    error = torch.stack(errors).max().item()
    return error if error == error else float("inf")


def eager(step: Callable[[], Outputs], device: torch.device, dry: bool) -> float:
    """Median milliseconds of a call, the host's work included."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    found = []
    for i in range(5 if dry else RUNS + 5):
        synchronize()
        started = time.perf_counter()
        step()
        synchronize()
        if i >= (2 if dry else 5):
            found.append(1e3 * (time.perf_counter() - started))
    return median(found)


def replayed(step: Callable[[], Outputs]) -> float:
    """Median milliseconds of a call within a CUDA graph of several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(PER_GRAPH):
            step()
    found = []
    for _ in range(RUNS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / PER_GRAPH)
    return median(found[3:])


def render(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; the fastest of ours has no ratio."""

    def cell(value: float | None) -> str:
        return markdown.NONE if value is None else f"{value:.4g}"

    rows = [
        [
            r["op"],
            r["size"],
            r["dtype"],
            r["contender"],
            *(cell(r.get(k)) for k in ("eager_ms", "replayed_ms", "error")),
            r.get("failed", ""),
        ]
        for r in records
    ]
    return markdown.markdown_table(["op", "size", "dtype", "contender", "eager ms", "replayed ms", "error", ""], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code is 1 where one of ours failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels", description="Time every operation on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--op", help="this operation only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the records here, as JSON")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("bench.gpu_kernels: torch sees no CUDA device; --dry-run rehearses it on a CPU")
    device = torch.device("cpu" if args.dry_run else "cuda")
    records: list[dict[str, Any]] = []
    for case in cases(device, args.dry_run):
        if args.op in (None, case.op):
            records += measure(case, device, args.dry_run)
            if args.out:
                write_json(args.out, records)
    print(render(records))
    ours = [r for r in records if r["contender"] in ("triton", "cuda", "cpp")]
    failed = [f"{r['op']} {r['size']} {r['dtype']} {r['contender']}" for r in ours if "failed" in r]
    print(f"{len(ours) - len(failed)} of {len(ours)} of ours measured" + "".join(f"; failed: {x}" for x in failed))
    return int(bool(failed))


if __name__ == "__main__":
    entry.run(main)
