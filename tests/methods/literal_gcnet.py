"""GCNet once more, written the long way: one sample, one node, dense adjacencies, loops over frames.

It reads weights from a `fastmmkd.methods.gcnet.GCNet` and shares no computation with it. A sample is `features`, three
`[T_m, d_m]`, `present`, three `[T_m]` bool, and `usable`, `[T_m]` bool: three that serve every layer, or the first
layer's three and the later layers' three.
"""

from __future__ import annotations

import torch
from literal_corrkd import task_loss

from tests.literal_recurrence import literal


def affine(layer, x):
    return x @ layer.weight[0] + layer.bias[0]


def bilstm(recurrence, x, counts):
    """`[T, d_in]` -> `[T, 2 d]`; a node that does not count is no step, and has zeros."""
    return torch.cat(literal(recurrence, x, counts)[0], -1)


def adjacency(counts, first, last):
    """`A [T, T]`: 1 where column t' is a node from `first` to `last` frames after row t."""
    a = torch.zeros(len(counts), len(counts), dtype=torch.float64)
    for t in range(len(counts)):
        for other in range(len(counts)):
            if first <= other - t <= last and counts[other]:
                a[t, other] = 1
    return a


def relational(module, u, relations):
    """`h_t = W_0 u_t + b + sum_r W_r mean_{N_r(t)} u`, of dense adjacencies, one each relation."""
    rows = []
    for t in range(len(u)):
        h = u[t] @ module.own.weight[0] + module.own.bias[0]
        for r, a in enumerate(relations):
            if a[t].sum() > 0:
                h = h + (a[t] @ u / a[t].sum()) @ module.relations[0, r]
        rows.append(h)
    return torch.stack(rows)


def graph(module, u, counts, relations, window):
    h_1 = relational(module.relational, u, [adjacency(counts, *band) for band in relations])
    near = adjacency(counts, -window, window) @ h_1
    h_2 = affine(module.neighbourhood.own, h_1) + near @ module.neighbourhood.neighbours[0]
    return torch.relu(affine(module.out, bilstm(module.recurrence, torch.cat((u, h_2), -1), counts)))


def resample(x, there, bins):
    """Adaptive mean pooling over the frames that are there."""
    n, pooled, some = len(x), [], []
    for i in range(bins):
        inside = [t for t in range(i * n // bins, -(-(i + 1) * n // bins)) if there[t]]
        pooled.append(sum((x[t] for t in inside), torch.zeros_like(x[0])) / max(len(inside), 1))
        some.append(bool(inside))
    return torch.stack(pooled), some


def nodes(features, present):
    """`x [T_L, D]`, and per modality who has it."""
    made = [resample(x, there, len(features[0])) for x, there in zip(features, present, strict=True)]
    return torch.cat([x for x, _ in made], -1), [some for _, some in made]


def represent(network, features, present, usable, model, masked):
    """`Q [T, 3 d]`, who has what, and who is a node."""
    x, some = nodes(features, present)
    steps = range(len(x))
    there = [any(of[t] for of in some) for t in steps]
    first = there if masked else [bool(usable[0][t]) for t in steps]
    later = [bool(usable[3][t]) for t in steps] if len(usable) > 3 else first
    u = bilstm(network.recurrence, x, first)
    w, kinds = model.window, []
    if model.temporal:
        kinds.append([(-w, -1), (0, 0), (1, w)])
    if model.speaker:
        kinds.append([(-w, w)])
    q = sum(graph(module, u, later, kind, w) for module, kind in zip(network.graphs, kinds, strict=True))
    return q, some, later


def read(q, later, readout):
    counted = [q[t] for t in range(len(q)) if later[t]]
    if readout == "mean":
        return sum(counted, torch.zeros_like(q[0])) / max(len(counted), 1)
    return counted[-1] if counted else q[-1]


def losses(network, missing, complete, targets, model, masked):
    """`L_task` and `L_rec`; `missing`: features, present, usable of each sample, `complete`: features, present, and how
    many of the nodes are real."""
    logits, error, real = [], 0.0, 0
    for (features, present, usable), (whole, has, frames) in zip(missing, complete, strict=True):
        q, some, later = represent(network, features, present, usable, model, masked)
        logits.append(affine(network.head, read(q, later, model.readout)))
        if hasattr(network, "reconstruction"):
            guess = affine(network.reconstruction, q)
            x, had = nodes(whole, has)
            real += frames
            for t in range(len(x)):
                at = 0
                for m, d in enumerate(network.dims):
                    if had[m][t] and not some[m][t]:
                        error = error + ((guess[t, at : at + d] - x[t, at : at + d]) ** 2).sum() / d
                    at += d
    problems = network.task.problems if network.weights.task == "own" else 1
    found = {"task": problems * task_loss(logits, targets, network.task)}
    return found | {"rec": error / real} if hasattr(network, "reconstruction") else found
