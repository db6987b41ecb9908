"""DMD against its literal twin; the margin against the triple loop; edges that sum to 1."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from literal_umdf import convolve, feed_forward, positions
from whole_batches import (
    BATCH,
    ROWS,
    Sample,
    assert_same_gradients,
    config_of,
    drawn,
    has,
    linear,
    literal_error,
    objective_of,
    samples,
    split_of,
    targets_of,
)

from fastmmkd.distributed import world_size
from fastmmkd.methods.dmd import DMD, PAIRS, TEACHERS, DmdNetwork, GraphDistillation
from fastmmkd.tasks import Task

HEADS, WORLD = 2, 2
MODEL = {"heads": HEADS, "encoder_layers": 2}
TASKS = ("regression", "classification-3", "emotions-binary")


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not a.any() or not b.any():
        return (a * b).sum() * 0
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def attention(target: torch.Tensor, source: torch.Tensor, counts: torch.Tensor, *w: torch.Tensor, causal: bool) -> Any:
    """Query by query; a causal one sees as many more frames as the sequences differ by."""
    query, key, value = target @ w[0], source @ w[1], source @ w[2]
    ahead = abs(len(source) - len(target)) if causal else len(source)
    rows = []
    for t, row in enumerate(query):
        seen = [i for i in range(len(source)) if counts[i] and i <= t + ahead]
        of_heads = zip(row.chunk(HEADS), key[seen].chunk(HEADS, -1), value[seen].chunk(HEADS, -1), strict=True)
        rows.append(torch.cat([(k @ q / len(q) ** 0.5).softmax(0) @ v for q, k, v in of_heads]))
    return torch.stack(rows)


def modality_encoder(module: Any, m: int, x: torch.Tensor, counts: torch.Tensor, causal: bool) -> torch.Tensor:
    for layer in module.layers:
        attended = attention(x, x, counts, *layer.query_key_value[0, m].chunk(3, -1), causal=causal)
        z = linear(layer.out, attended, m) + x
        z = F.layer_norm(z, z.shape[-1:], layer.norm.weight[0, m], layer.norm.bias[0, m])
        x = feed_forward(z, layer.feed_forward, (0, m))
    return x


def crossmodal(
    module: Any, pair: int, target: torch.Tensor, source: torch.Tensor, counts: torch.Tensor, causal: bool
) -> torch.Tensor:
    z, at = target, (0, pair)
    for layer in module.layers:
        attended = attention(z, source, counts, layer.query[at], *layer.key_value[at].chunk(2, -1), causal=causal)
        z = linear(layer.out, attended, pair) + z
        z = F.layer_norm(z, z.shape[-1:], layer.norm.weight[at], layer.norm.bias[at])
        z = feed_forward(z, layer.feed_forward, at)
    return z


def residual(mlp: Any, x: torch.Tensor, *at: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = linear(mlp.hidden, x, *at).relu()
    return x + linear(mlp.out, hidden, *at), hidden


def literal_sample(network: DmdNetwork, sample: Sample, causal: bool) -> dict[str, Any]:
    """Everything that the network makes of one sample."""
    made: dict[str, Any] = {"x": [], "s": [], "c": [], "mean": [], "last": [], "H": []}
    for m, convolution in enumerate(network.embedding.convolutions):
        x = convolve(sample.features[m], convolution.weight[0], convolution.bias[0])
        x = x + positions(*x.shape).to(x.dtype)
        s, c = x @ network.private_weight[0, m], x @ network.shared_weight[0]
        made["x"].append(x)
        made["s"].append(s)
        made["c"].append(c)
        own = [row for row, counts in zip(c, sample.counts[m], strict=True) if counts]
        made["mean"].append(sum(own) / len(own) if own else torch.zeros_like(c[0]))
        encoded = modality_encoder(network.shared_encoders.encoder, m, c, sample.counts[m], causal)
        made["last"].append(encoded[-1])
    for t in range(3):
        complemented = [
            crossmodal(network.crossmodal, i, made["s"][t], made["s"][source], sample.counts[source], causal)
            for i, (target, source) in enumerate(PAIRS)
            if target == t
        ]
        memory = torch.cat(complemented, dim=-1)
        made["H"].append(modality_encoder(network.memory.encoder, t, memory, sample.counts[t], causal)[-1])
    made["C"] = torch.cat(made["last"])
    gates = [linear(network.gate, h, t).sigmoid() for t, h in enumerate(made["H"])]
    joint = torch.cat([*gates, linear(network.fused_gate, made["C"]).sigmoid()])
    made["logits"] = linear(network.head, residual(network.refined, joint)[0])
    return made


def literal_distillation(unit: GraphDistillation, favoured: Any, apart: bool, rows: list[Any]) -> torch.Tensor:
    """`rows`: z, rep and whether it is there of each modality, per sample."""
    prior = torch.tensor([4.0 * (pair in favoured) for pair in PAIRS], dtype=torch.float64).softmax(0)
    edges: list[dict[int, torch.Tensor]] = []
    for z, rep, there in rows:
        nodes = [torch.cat((linear(unit.of_logits, z[m]), linear(unit.of_representation, rep[m]))) for m in range(3)]
        scores = {
            p: (linear(unit.edge, torch.cat((nodes[j], nodes[i])))[0] / 8).exp()
            for p, (j, i) in enumerate(PAIRS)
            if there[j] and there[i]
        }
        edges.append({p: score / sum(scores.values()) for p, score in scores.items()})
    loss = torch.zeros((), dtype=torch.float64)
    for p, (j, i) in enumerate(PAIRS):
        own = [(q[p], *row) for q, row in zip(edges, rows, strict=True) if p in q]
        if not own:
            continue
        distance = [(q + prior[p]) * (z[j] - z[i].detach()).abs().sum() for q, z, _, _ in own]
        mean = sum(q for q, *_ in own) / len(own)
        loss = loss + sum(distance) / len(own) + 10 * (mean - prior[p]) ** 2
        if apart:
            cosines = sum(cosine(rep[j], rep[i].detach()).relu() for _, _, rep, _ in own) / len(own)
            loss = loss + 10 * (mean + prior[p]) * cosines
    return loss


def label_gap(a: Any, b: Any, task: Task) -> float:
    return abs(a - b) if task.is_regression else sum(x != y for x, y in zip(a, b, strict=True))


def literal_margin(vectors: list[tuple[torch.Tensor, Any]], task: Task) -> torch.Tensor:
    """The triple loop."""
    of_rows = []
    for i, (g, y) in enumerate(vectors):
        hinges = [
            (0.15 * label_gap(y, y_k, task) - cosine(g, g_j) + cosine(g, g_k)).clamp(min=0)
            for j, (g_j, y_j) in enumerate(vectors)
            for g_k, y_k in vectors
            if j != i and label_gap(y, y_j, task) == 0 and label_gap(y, y_k, task) > 0
        ]
        if hinges:
            of_rows.append(sum(hinges) / len(hinges))
    return sum(of_rows) / len(of_rows) if of_rows else torch.zeros((), dtype=torch.float64)


def literal_parts(module: DMD, batch: Any, config: Any) -> dict[str, torch.Tensor]:
    task = torch.zeros((), dtype=torch.float64)
    shared, private, vectors = [], [], []
    errors: list[list[torch.Tensor]] = [[], [], []]
    for sample, target in zip(samples(batch.inputs), targets_of(batch), strict=True):
        made = literal_sample(module.network, sample, config.model.causal)
        there = [has(sample, m) for m in range(3)]
        low = [residual(module.shared_mlp, made["mean"][m], m) for m in range(3)]
        high = [residual(module.private_mlp, made["H"][m], m)[0] for m in range(3)]
        z_c = [linear(module.shared_head, low[m][0], m) for m in range(3)]
        z_s = [linear(module.private_head, high[m], m) for m in range(3)]
        fused = linear(module.fused_head, residual(module.fused_mlp, made["C"])[0])
        for z in (made["logits"], fused, *z_c, *z_s):
            task = task + literal_error(z, target, config) / BATCH
        shared.append((z_c, [r for _, r in low], there))
        private.append((z_s, high, there))
        for m in (m for m in range(3) if there[m]):
            vectors.append((linear(module.aligned, made["mean"][m], m), target))
            for x, s, c in zip(made["x"][m], made["s"][m], made["c"][m], strict=True):
                x_hat = torch.cat((s, c)) @ module.decoder[0, m]
                again = x_hat @ module.network.private_weight[0, m]
                error = ((x_hat - x) ** 2).mean() + ((again - s) ** 2).mean() + 0.1 * cosine(s, c).relu()
                errors[m].append(error)
    return {
        "task": task,
        "homo": literal_distillation(module.homo, TEACHERS["shared"], False, shared),
        "hetero": literal_distillation(module.hetero, TEACHERS["private"], True, private),
        "decoupling": sum(sum(of_frames) / max(len(of_frames), 1) for of_frames in errors),
        "margin": literal_margin(vectors, config.task),
    }


@pytest.mark.parametrize("reading", [{}, {"attention_mask": "missing"}, {"causal": True}], ids=str)
@pytest.mark.parametrize(
    ("task", "alignment"),
    [("regression", "aligned"), ("classification-3", "unaligned"), ("emotions-binary", "unaligned, as long")],
)
def test_losses_and_gradients_equal_the_literal_twin(task: str, alignment: str, reading: Any) -> None:
    loss = {"lambda_homo": 0.4, "lambda_hetero": 0.3, "lambda_decoupling": 0.6, "lambda_margin": 0.7}
    config = config_of("dmd", task, MODEL | reading, **loss)
    objective = objective_of(config, split_of(task, alignment))
    batch = drawn(objective)
    total, parts = objective.loss(batch)
    literal = literal_parts(objective.module, batch, config)
    for name, part in literal.items():
        torch.testing.assert_close(
            parts[name][0], part.detach(), rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    expected = sum(part * loss.get(f"lambda_{name}", 1.0) for name, part in literal.items())
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    # Positions are rounded to float32, here and there after different sums.
    assert_same_gradients(objective, total, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("which", ["some", "all alike", "none there"])
def test_the_margin_is_the_triple_loops(task: str, which: str) -> None:
    module = objective_of(config_of("dmd", task, MODEL), split_of(task)).module
    generator = torch.Generator().manual_seed(2)
    c = torch.randn(1, 3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    there = torch.rand(1, 3, 5, generator=generator) < (0.0 if which == "none there" else 0.8)
    y = torch.tensor([1.0, -2, 1, 0, -2]) if task == "regression" else torch.tensor([1, 0, 1, 0, 0])
    if task == "emotions-binary":
        y = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    elif task == "classification-3":
        y = y[:, None]
    if which == "all alike":
        y = torch.ones_like(y)
    found = module.margin(c, y[None], there)
    vectors = [
        (linear(module.aligned, c[0, m, b], m), y[b].tolist())
        for b, m in itertools.product(range(5), range(3))
        if there[0, m, b]
    ]
    expected = literal_margin(vectors, module.task)
    torch.testing.assert_close(found[0], expected)
    assert (which == "some") == bool(found > 0)
    if which == "some":
        torch.testing.assert_close(torch.autograd.grad(found.sum(), c)[0], torch.autograd.grad(expected, c)[0])


def test_edges_sum_to_one_where_a_sample_has_two_modalities() -> None:
    module = objective_of(config_of("dmd", model=MODEL), split_of()).module
    generator = torch.Generator().manual_seed(1)
    z, r = (torch.randn(1, 3, 4, n, generator=generator, dtype=torch.float64) for n in (1, 4))
    there = torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]]).bool()
    exists = torch.stack([there[:, j] & there[:, i] for j, i in PAIRS], dim=-1)
    edges = module.homo.edges(z, r, exists)
    torch.testing.assert_close(edges.sum(-1), torch.tensor([[1.0, 1, 0, 0]], dtype=torch.float64))
    assert (edges[0, 0] > 0).all()
    assert (edges[0, 1] > 0).tolist() == [pair in ((0, 1), (1, 0)) for pair in PAIRS]


def test_language_teaches() -> None:
    """The prior, from its scores: a pair that it favours weighs `e^4` times one that it does not."""
    from fastmmkd.methods.dmd import _prior

    for favoured, number in ((TEACHERS["shared"], 2), (TEACHERS["private"], 3)):
        prior = _prior(favoured, torch.device("cpu"))
        assert prior.sum() == pytest.approx(1)
        assert [pair for pair, weight in zip(PAIRS, prior, strict=True) if weight > 0.2] == sorted(favoured)
        assert prior.max() / prior.min() == pytest.approx(torch.tensor(4.0).exp().item(), rel=1e-5)
        assert len(favoured) == number


def parts_and_gradients(task: str, rows: torch.Tensor) -> Any:
    objective = objective_of(config_of("dmd", task, MODEL), split_of(task))
    total, parts = objective.loss(drawn(objective, rows=rows))
    total.backward()
    found = {f"part {name}": part for name, part in parts.items()}
    found |= {name: p.grad for name, p in objective.module.named_parameters()}
    if world_size() > 1:
        for value in found.values():
            dist.all_reduce(value)
            value /= world_size()
    return found


def work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    found = {task: parts_and_gradients(task, ROWS.chunk(WORLD, dim=1)[rank]) for task in TASKS}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, tmp_path), WORLD)
    of_two = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for task in TASKS:
        expected = parts_and_gradients(task, ROWS)
        for found in of_two:
            torch.testing.assert_close(found[task], expected, rtol=1e-8, atol=1e-10)
