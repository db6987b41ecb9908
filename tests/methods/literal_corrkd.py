"""CorrKD once more, written the long way from the paper: one sample, one pair, one class at a time, no groups.

It reads weights from a `fastmmkd.methods.corrkd.CorrKD` of one model, with its teacher, and shares no computation with
them. A batch is a list of samples, a sample a pair of `features`, three `[T_m, d_m]`, and `usable`, `[T_m]` bool: three
that serve every layer, or the first layer's three and the later layers' three.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from literal_umdf import attention, convolve, feed_forward, positions


def modality_encoder(module, m, x, usable, heads):
    """The transformer encoder of modality m: `[T_m, d]` -> `[T_m, d]`; `usable` holds one mask per layer."""
    at = (0, m)
    for layer, mask in zip(module.layers, usable, strict=True):
        w_q, w_k, w_v = layer.query_key_value[at].chunk(3, -1)
        attended = attention(x, x, mask, w_q, w_k, w_v, heads) @ layer.out.weight[at] + layer.out.bias[at]
        x = F.layer_norm(attended + x, x.shape[-1:], layer.norm.weight[at], layer.norm.bias[at])
        x = feed_forward(x, layer.feed_forward, at)
    return x


def encode(network, features, usable, heads):
    """`E_m = encoder(Conv1d(X_m) + PE)`, three `[T_m, d]`, of one sample."""
    encoded = []
    for m in range(3):
        conv = network.embedding.convolutions[m]
        z = convolve(features[m], conv.weight[0], conv.bias[0])
        z = z + positions(*z.shape).to(z.dtype)
        per_layer = [usable[m]] + [usable[-3:][m]] * (len(network.encoders.encoder.layers) - 1)
        encoded.append(modality_encoder(network.encoders.encoder, m, z, per_layer, heads))
    return encoded


def joint_representation(network, features, usable, heads):
    """`H [3 d]`: the mean over time of each modality's usable frames."""
    means = []
    for e, mask in zip(encode(network, features, usable, heads), usable[-3:], strict=True):
        total, count = torch.zeros_like(e[0]), 0
        for frame, counts in zip(e, mask, strict=True):
            if counts:
                total, count = total + frame, count + 1
        means.append(total / max(count, 1))
    return torch.cat(means)


def classify(network, h):
    """Logits `[O]` of one sample."""
    hidden = torch.relu(h @ network.hidden.weight[0] + network.hidden.bias[0])
    return hidden @ network.head.weight[0] + network.head.bias[0]


def responses(logits, problem, problems):
    """`R [C]`, the softmax of one of the problems that a sample's logits hold."""
    own = logits.view(problems, -1)[problem]
    return torch.exp(own) / torch.exp(own).sum()


def task_loss(logits, targets, task):
    """MSE, or cross-entropy averaged over samples and problems."""
    total = 0.0
    for i in range(len(logits)):
        if task.name == "regression":
            total = total + (logits[i][0] - targets[i]) ** 2
        else:
            for p in range(task.problems):
                surprise = -torch.log(responses(logits[i], p, task.problems)[targets[i][p]])
                total = total + surprise / task.problems
    return total / len(logits)


def divergence(teacher, student, task):
    """`KL(R^t || R^s)` averaged over samples and problems, or the MSE of scores."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        if task.name == "regression":
            total = total + (s[0] - t[0]) ** 2
        else:
            for p in range(task.problems):
                r_t, r_s = responses(t, p, task.problems), responses(s, p, task.problems)
                for k in range(len(r_t)):
                    total = total + r_t[k] * (torch.log(r_t[k]) - torch.log(r_s[k])) / task.problems
    return total / len(teacher)


def distance(x, y):
    """Euclidean, with gradient 0 where it is 0."""
    return torch.sqrt(((x - y) ** 2).sum()) if (x != y).any() else (x - y).sum() * 0


def scd(student, teacher, eta, reduction):
    """Eq. 1; "mean" divides it by `N (N - 1)`."""
    n, total = len(student), 0.0
    for i in range(n):
        for j in range(n):
            if j != i:
                total = total + distance(student[i], teacher[i]) ** 2
                total = total + torch.clamp(eta - distance(student[i], teacher[j]), min=0) ** 2
    return total / (n * (n - 1)) if reduction == "mean" else total


def unit(row):
    return row / torch.sqrt((row**2).sum()) if row.any() else row


def similarities(rows, classes, present):
    """Eqs. 2 and 3: `M_k(i)`, one list per sample."""
    matrix = []
    for row in rows:
        own = []
        for k in present:
            members = [other for other, c in zip(rows, classes, strict=True) if c == k]
            prototype = sum(members) / len(members)
            own.append(unit(row) @ unit(prototype))
        matrix.append(own)
    return matrix


def cpd(student, teacher, classes):
    """Eq. 4 over the classes of the batch; `classes` holds one int per sample."""
    present = sorted(set(classes))
    m_s, m_t = similarities(student, classes, present), similarities(teacher, classes, present)
    total = 0.0
    for i in range(len(student)):
        for k in range(len(present)):
            total = total + (m_s[i][k] - m_t[i][k]) ** 2
    return total / (len(student) * len(present))


def score_class(score, bins):
    """The class of a sentiment score."""
    if bins == 2:
        return 0 if score < 0 else 1
    if bins == 3:
        return 0 if score < 0 else 1 if score == 0 else 2
    return max(-3, min(3, round(float(score)))) + 3


def statistic(network, at, q, u):
    """`F(q, u)`: a network of one hidden layer of the pair `[q, u]`; `at` names it among those of the module."""
    first = torch.cat((network.weight_q[at], network.weight_u[at]))
    hidden = torch.relu(torch.cat((q, u)) @ first + network.hidden_bias[at])
    return hidden @ network.weight[at] + network.bias[at]


def mutual_information(network, at, qs, us):
    """Eq. 6: pairs of one sample are joint, those of two samples marginal."""
    n, joint, marginal = len(qs), 0.0, 0.0
    for i in range(n):
        for j in range(n):
            f = statistic(network, at, qs[i], us[j])
            if i == j:
                joint = joint - torch.log(1 + torch.exp(-f))
            else:
                marginal = marginal + torch.log(1 + torch.exp(f))
    return joint / n - marginal / (n * (n - 1))


def split(response, target):
    """`R_T [1]` and `R_NT [C - 1]` of one sample."""
    others = [response[k] for k in range(len(response)) if k != target]
    return response[target].view(1), torch.stack(others)


def rcd(model, student, teacher, targets):
    """Eq. 7, averaged over problems; logits of N samples each."""
    if model.task.name == "regression":
        return -mutual_information(model.other_statistics, (0, 0), teacher, student)
    problems, total = model.task.problems, 0.0
    for p in range(problems):
        t = [split(responses(x, p, problems), y[p]) for x, y in zip(teacher, targets, strict=True)]
        s = [split(responses(x, p, problems), y[p]) for x, y in zip(student, targets, strict=True)]
        total = total - mutual_information(model.target_statistics, (0, p), [x[0] for x in t], [x[0] for x in s])
        total = total - mutual_information(model.other_statistics, (0, p), [x[1] for x in t], [x[1] for x in s])
    return total / problems


def losses(model, teacher, missing, complete, targets, heads):
    """Every loss of the student `model`, unweighted.

    missing, complete: the batch as the student and as the teacher sees it.
    targets: one score per sample, or one list of class indices (one per problem).
    """
    weights, task = model.weights, model.task
    h_s = [joint_representation(model.network, *sample, heads) for sample in missing]
    h_t = [joint_representation(teacher, *sample, heads).detach() for sample in complete]
    logits_s = [classify(model.network, h) for h in h_s]
    logits_t = [classify(teacher, h).detach() for h in h_t]
    parts = {"task": task_loss(logits_s, targets, task)}
    compared = [[unit(h) for h in rows] if weights.normalise else rows for rows in (h_s, h_t)]
    parts["scd"] = scd(*compared, weights.eta, weights.reduction)
    if task.name == "regression":
        columns = [[score_class(y, weights.prototypes) for y in targets]]
    else:
        columns = [[y[p] for y in targets] for p in range(task.problems)]
    parts["cpd"] = sum(cpd(h_s, h_t, classes) for classes in columns) / len(columns)
    if weights.rcd == "kl":
        parts["rcd"] = divergence(logits_t, logits_s, task)
    else:
        parts["rcd"] = rcd(model, logits_s, logits_t, targets)
    return parts
