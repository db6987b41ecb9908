"""HRLF once more, written the long way from the paper: one sample, one modality, one pair at a time, no groups.

It reads weights from a `fastmmkd.methods.hrlf.HRLF` of one model, with its teacher, and shares no computation with
them. A batch is a list of samples, a sample a pair of `features`, three `[T_m, d_m]`, and `usable`, `[T_m]` bool: three
that serve every layer, or the first layer's three and the later layers' three.
"""

from __future__ import annotations

import torch
from literal_corrkd import divergence, encode, mutual_information, task_loss


def affine(layer, x, at=0):
    return x @ layer.weight[at] + layer.bias[at]


def perceptron(module, x, at=0):
    return affine(module.out, torch.relu(affine(module.hidden, x, at)), at)


def represent(network, features, usable, heads):
    """Everything that the paper names, of one sample: `Z, Q, U` per modality, `H, I1, I2, I3, H~` and the logits."""
    z = [e[-1] for e in encode(network, features, usable, heads)]
    found = {"Z": z}
    if network.factorizes:
        found["Q"] = [perceptron(network.frf.sentiment, z[m], (0, m)) for m in range(3)]
        found["U"] = [perceptron(network.frf.modality, z[m], (0, m)) for m in range(3)]
        c = [torch.cat((found["Q"][m], found["U"][m])) for m in range(3)]
    else:
        c = z
    found["H"] = torch.cat(c)
    found["I1"] = torch.relu(affine(network.stack[0], found["H"]))
    found["I2"] = torch.relu(affine(network.stack[1], found["I1"]))
    found["I3"] = torch.relu(affine(network.stack[2], found["I2"]))
    found["H~"] = affine(network.stack[3], found["I3"])
    found["logits"] = affine(network.head, found["H~"])
    return found


def norm(x):
    """Euclidean, with gradient 0 at 0."""
    return torch.sqrt((x**2).sum()) if x.any() else x.sum() * 0


def translate(frf, q, u):
    """`D_r(Q, U)`."""
    return perceptron(frf.decoder, torch.cat((q, u)))


def factorization(frf, batch, gradient):
    """`L_FRF`, which trains "everything" or the "factors"; `batch` holds what `represent` found for every sample."""
    n, self_, cross, recon = 3, 0.0, 0.0, 0.0
    for sample in batch:
        z = [x.detach() if gradient == "factors" else x for x in sample["Z"]]
        q = [perceptron(frf.sentiment, z[m], (0, m)) for m in range(n)]
        u = [perceptron(frf.modality, z[m], (0, m)) for m in range(n)]
        for alpha in range(n):
            self_ = self_ + norm(translate(frf, q[alpha], u[alpha]) - z[alpha])
            for beta in range(n):
                if beta != alpha:
                    cross = cross + norm(translate(frf, q[alpha], u[beta]) - z[beta])
                reread = perceptron(frf.sentiment, translate(frf, q[beta], u[alpha]), (0, alpha))
                recon = recon + norm(reread - q[alpha])
    return (self_ / n + cross / (n * n - n) + recon / (n * n)) / len(batch)


def scales(batch):
    """`E_1, E_2, E_3`, each a list of layers of one width, each a list of rows."""
    return [[[x[layer] for x in batch] for layer in layers] for layers in (("H", "H~"), ("I1", "I3"), ("I2",))]


def joined(layers):
    """The rows of all layers."""
    return [row for rows in layers for row in rows]


def hierarchical_mutual_information(networks, student, teacher, negatives):
    """`L_HMI`; unrelated pairs are of one layer, or of all layers of a scale."""
    total = 0.0
    for network, e_s, e_t in zip(networks, student, teacher, strict=True):
        pools = list(zip(e_t, e_s, strict=True)) if negatives == "layer" else [(joined(e_t), joined(e_s))]
        total = total - sum(mutual_information(network, 0, *pool) for pool in pools) / len(pools)
    return total


def adversarial(discriminators, student, teacher):
    """`L_HAL`: means over rows of `log(1 - D_e(E^s))` and `log D_e(E^t)`, summed over scales."""
    total = 0.0
    for network, *both in zip(discriminators, student, teacher, strict=True):
        e_s, e_t = map(joined, both)

        def judge(x, network=network):
            return torch.sigmoid(affine(network.score, torch.relu(affine(network.hidden, x)))[0])

        total = total + sum(torch.log(1 - judge(x)) for x in e_s) / len(e_s)
        total = total + sum(torch.log(judge(x)) for x in e_t) / len(e_t)
    return total


def losses(model, teacher, missing, complete, targets, heads):
    """Every loss of the student `model`, unweighted; "hal" is the paper's `L_HAL`.

    missing, complete: the batch as the student and as the teacher sees it.
    targets: one score per sample, or one list of class indices (one per problem).
    """
    found = [represent(model.network, *sample, heads) for sample in missing]
    with torch.no_grad():
        taught = [represent(teacher, *sample, heads) for sample in complete]
    logits_s, logits_t = [x["logits"] for x in found], [x["logits"] for x in taught]
    parts = {"task": task_loss(logits_s, targets, model.task)}
    if model.network.factorizes:
        parts["frf"] = factorization(model.network.frf, found, model.network.frf_gradient)
    parts["hmi"] = hierarchical_mutual_information(
        model.statistics, scales(found), scales(taught), model.weights.hmi_negatives
    )
    parts["hal"] = adversarial(model.discriminators, scales(found), scales(taught))
    parts["kl"] = divergence(logits_t, logits_s, model.task)
    return parts
