"""SMIL once more, written the long way: one sample, one modality, one centroid at a time, and weights that are moved.

It reads weights from a `fastmmkd.methods.smil.SmilNetwork` of one model and shares no computation with it. A sample is
`features`, three `[T_m, d_m]`, `present`, three `[T_m]` bool, and `usable`, `[T_m]` bool: three that serve every layer,
or the first layer's three and the later layers' three.
"""

from __future__ import annotations

import copy

import torch
from literal_corrkd import encode, task_loss


def affine(layer, x, at=0):
    return x @ layer.weight[at] + layer.bias[at]


def softplus(x):
    return torch.log(1 + torch.exp(x))


def forward(network, sample, heads, perturbed, noise=None):
    """`x, x_1` and the logits of one sample; `noise`: eps of both places, or none."""
    features, present, usable = sample
    body, imputation = network.body, network.imputation
    there = [bool(of.any()) for of in present]
    f = [
        e[-1] if a else torch.zeros_like(e[-1])
        for e, a in zip(encode(body, features, usable, heads), there, strict=True)
    ]
    known = torch.cat([*f, torch.tensor(there, dtype=f[0].dtype)])
    filled = []
    for m in range(3):
        if there[m]:
            filled.append(f[m])
            continue
        centroids = imputation.centroids[0, m]
        weights = torch.ones(len(centroids), dtype=f[0].dtype)
        if imputation.has_prior:
            weights = softplus(affine(imputation.weights, known, (0, m)))
        filled.append(sum(w * c for w, c in zip(weights, centroids, strict=True)) / sum(weights))
    x = torch.cat(filled)
    eps = noise or (0.0, 0.0)
    if perturbed and imputation.has_noise:
        x = x + softplus(affine(imputation.of_joint, known) + eps[0])
    x_1 = torch.relu(affine(body.hidden, x))
    if perturbed and imputation.has_noise:
        x_1 = x_1 + softplus(affine(imputation.of_hidden, x) + eps[1])
    return x, x_1, affine(body.head, x_1)


def error(made, targets, task):
    """Of passes: MSE, or cross-entropy summed over problems."""
    return task.problems * task_loss([logits for *_, logits in made], targets, task)


def inner_loss(network, missing, noises, targets, task, heads):
    made = [forward(network, sample, heads, True, noise) for sample, noise in zip(missing, noises, strict=True)]
    return error(made, targets, task)


def outer_losses(network, second, complete, paired, targets, task, heads):
    """Of the samples that are seen complete: `L_task`, and the two distances."""
    rows = [i for i in range(len(second)) if paired[i]]
    filled = [forward(network, second[i], heads, True) for i in rows]
    clean = [forward(network, complete[i], heads, False) for i in rows]
    return {
        "task": error(filled, [targets[i] for i in rows], task),
        "joint": sum(((a[0] - b[0]) ** 2).mean() for a, b in zip(filled, clean, strict=True)) / len(rows),
        "hidden": sum(((a[1] - b[1]) ** 2).mean() for a, b in zip(filled, clean, strict=True)) / len(rows),
    }


def step(network, missing, second, complete, paired, noises, targets, task, heads, weights, alpha):
    """Values of all parts, and the gradients of `inner(theta) + outer(theta')` with `theta'` in place of theta: the
    outer loss is differentiated where the inner step has led, in a copy of the network."""
    inner = inner_loss(network, missing, noises, targets, task, heads)
    names, parameters = zip(*network.named_parameters(), strict=True)
    of_inner = dict(zip(names, torch.autograd.grad(inner, parameters, allow_unused=True), strict=True))
    moved = copy.deepcopy(network)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if name.startswith("body.") and of_inner[name] is not None:
                p -= alpha * of_inner[name]
    outer = outer_losses(moved, second, complete, paired, targets, task, heads)
    total = outer["task"] + weights.lambda_joint * outer["joint"] + weights.lambda_hidden * outer["hidden"]
    of_moved = torch.autograd.grad(total, list(moved.parameters()), allow_unused=True)
    of_outer = dict(zip(names, of_moved, strict=True))
    gradients = {
        name: sum(g for g in (of_inner[name], of_outer[name]) if g is not None)
        for name in names
        if of_inner[name] is not None or of_outer[name] is not None
    }
    return {"inner": inner, **outer}, inner + total, gradients
