"""The definition of every operation, in plain PyTorch. Fast implementations are held to these.

Shape legend: G groups (independent weights or models), S seeds (independent models in one process), B rows of a batch,
N samples in a loss, V missing versions, T frames, d features, h heads, K classes.

Half-precision inputs are computed in float32 and returned in the input's dtype; float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastmmkd.ops.philox import WORD, philox, uniform
from fastmmkd.ops.precision import accumulation

MMD_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""`2^u` for u = -2 .. 2, in units of the mean squared distance."""


def cross_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
) -> torch.Tensor:
    """See `fastmmkd.ops.cross_attention`."""
    key_gbkd, value_gbkd = torch.cat(tuple(keys), dim=2), torch.cat(tuple(values), dim=2)
    mask_gb11k = torch.cat(tuple(key_masks), dim=2)[:, :, None, None, :]

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return accumulation(x).unflatten(-1, (heads, -1)).transpose(2, 3)

    query_gbhqe = per_head(query) * (query.shape[-1] // heads) ** -0.5
    score_gbhqk = query_gbhqe @ per_head(key_gbkd).transpose(-1, -2)
    score_gbhqk.masked_fill_(~mask_gb11k, torch.finfo(score_gbhqk.dtype).min)
    # Where no key is left the softmax is uniform; the last factor turns it, and its gradient, into zeros.
    attended_gbhqe = score_gbhqk.softmax(-1) @ per_head(value_gbkd) * mask_gb11k.any(-1, keepdim=True)
    return attended_gbhqe.transpose(2, 3).flatten(-2).to(query.dtype)


def residual_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """See `fastmmkd.ops.residual_layer_norm`."""
    shape = (weight.shape[0],) + (1,) * (x.dim() - 2) + (weight.shape[-1],)
    normed = F.layer_norm(accumulation(x) + accumulation(residual), x.shape[-1:], eps=eps)
    return (normed * accumulation(weight).view(shape) + accumulation(bias).view(shape)).to(x.dtype)


def gaussian_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """See `fastmmkd.ops.gaussian_mmd`."""
    n = x.shape[1]
    joined = torch.cat((accumulation(x), accumulation(y)), dim=1)
    squared = (joined.unsqueeze(2) - joined.unsqueeze(1)).square().sum(-1)
    sigma = squared.detach().sum((1, 2), keepdim=True) / (2 * n * (2 * n - 1))
    sigma = sigma.clamp_min(torch.finfo(sigma.dtype).tiny)  # all samples identical: every kernel value is 1
    kernel = sum(torch.exp(-squared / (u * sigma)) for u in MMD_BANDWIDTHS)
    assert isinstance(kernel, torch.Tensor)
    within = kernel[:, :n, :n].mean((1, 2)) + kernel[:, n:, n:].mean((1, 2))
    return within - 2 * kernel[:, :n, n:].mean((1, 2))


def js_divergence(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """See `fastmmkd.ops.js_divergence`."""
    log_a, log_b = F.log_softmax(accumulation(logits_a), -1), F.log_softmax(accumulation(logits_b), -1)
    log_mean = torch.logaddexp(log_a, log_b) - math.log(2.0)
    kl_a = (log_a.exp() * (log_a - log_mean)).sum(-1)
    kl_b = (log_b.exp() * (log_b - log_mean)).sum(-1)
    return 0.5 * (kl_a + kl_b).mean(-1)


def pairwise_contrastive(
    student: torch.Tensor, teacher: torch.Tensor, eta: float, offset: int, reduction: str
) -> torch.Tensor:
    """See `fastmmkd.ops.pairwise_contrastive`."""
    student, teacher = accumulation(student), accumulation(teacher)
    n, rows = student.shape[1], teacher.shape[1]
    row = torch.arange(rows, device=student.device)
    own_ij = row == row[offset : offset + n, None]
    squared_gij = (student.unsqueeze(2) - teacher.unsqueeze(1)).square().sum(-1)
    # The square root never sees a 0, where its gradient would be infinite.
    zero_gij = squared_gij == 0
    distance_gij = squared_gij.masked_fill(zero_gij, 1.0).sqrt().masked_fill(zero_gij, 0.0)
    negative = (eta - distance_gij).clamp_min(0.0).square().masked_fill(own_ij, 0.0).sum((1, 2))
    positive = squared_gij.diagonal(offset, 1, 2).sum(-1)
    loss = (rows - 1) * positive + negative
    return loss if reduction == "sum" else loss / max(n * (rows - 1), 1)


def prototype_similarity(
    student: torch.Tensor, teacher: torch.Tensor, classes: torch.Tensor, count: int
) -> torch.Tensor:
    """See `fastmmkd.ops.prototype_similarity`."""
    member_gik = classes.unsqueeze(-1) == torch.arange(count, device=classes.device)
    present = member_gik.any(1).sum(-1)

    def similarity(x: torch.Tensor) -> torch.Tensor:
        x = accumulation(x)
        members_gk1 = member_gik.sum(1).clamp_min(1).unsqueeze(-1)
        prototype_gkd = (x.unsqueeze(2) * member_gik.unsqueeze(-1)).sum(1) / members_gk1
        return (_direction(x).unsqueeze(2) * _direction(prototype_gkd).unsqueeze(1)).sum(-1)

    # The prototype of an absent class is 0: its similarities are 0 in both networks.
    squared = (similarity(student) - similarity(teacher)).square()
    return squared.sum((1, 2)) / (present * student.shape[1]).clamp_min(1)


def jsd_mutual_information(
    left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """See `fastmmkd.ops.jsd_mutual_information`."""
    n = left.shape[1]
    hidden_gijh = (accumulation(left).unsqueeze(2) + accumulation(right).unsqueeze(1)).relu()
    with torch.autocast(left.device.type, enabled=False):  # it would take this product in half precision
        score_gij = (hidden_gijh @ accumulation(weight)[:, None, :, None]).squeeze(-1)
    score_gij = score_gij + accumulation(bias)[:, None, None]
    joint = F.logsigmoid(score_gij.diagonal(0, 1, 2)).mean(-1)  # log sigmoid(x) = -softplus(-x)
    same_ij = torch.eye(n, dtype=torch.bool, device=left.device)
    marginal = F.logsigmoid(-score_gij).masked_fill(same_ij, 0.0).sum((1, 2)) / max(n * (n - 1), 1)
    return joint + marginal


def missing_pattern(
    present: torch.Tensor, sample: torch.Tensor, seed: torch.Tensor, epoch: torch.Tensor, versions: int, p_max: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which modalities each version keeps, and its frame ratio.

    Args:
        present: `[S, B, 3]` bool, modalities that the samples have.
        sample: `[S, B]` int64 sample indices within the split.
        seed: `[S]` int64.
        epoch: 0-dimensional int64.
        versions: V.
        p_max: the ratio is uniform in [0, p_max).

    Returns:
        kept `[S, V, B, 3]` bool (uniform over the non-empty subsets of what is present), p `[S, V, B]` float32.
    """
    version = torch.arange(versions, device=sample.device)[None, :, None]
    words = philox(_counter(torch.zeros_like(version), sample[:, None, :], epoch, version), _key(seed[:, None, None]))
    present = present[:, None]
    rank = present.cumsum(-1) - 1  # position of a modality among those that are present
    subsets = (1 << present.sum(-1)) - 1
    subset = ((words[..., 0] * subsets) >> 32) + 1  # uniform over 1 .. 2^n - 1, its bits in the order of `rank`
    kept = ((subset.unsqueeze(-1) >> rank.clamp_min(0)) & 1).bool() & present
    return kept, uniform(words[..., 1]) * p_max


def dropped_frames(
    frame_mask: torch.Tensor,
    p: torch.Tensor,
    modality: int,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    version: torch.Tensor,
    exact: bool,
) -> torch.Tensor:
    """Which frames of one modality a draw drops.

    Args:
        frame_mask: `[..., T]` bool, real and present frames; leading shape as `p`.
        p: ratio; frames drop independently with probability p, or (exact) `round(p * frames)` of them do.
        sample, seed, epoch, version: int64, broadcastable with `p`.

    Returns:
        `[..., T]` bool; True = dropped.
    """
    steps = frame_mask.shape[-1]
    block = torch.arange(-(-steps // 4), device=frame_mask.device)
    counter = _counter(1 + (modality << 24) + block, sample.unsqueeze(-1), epoch.unsqueeze(-1), version.unsqueeze(-1))
    key = tuple(k.unsqueeze(-1) for k in _key(seed))
    u = uniform(philox(counter, (key[0], key[1]))).flatten(-2)[..., :steps]
    if not exact:
        return frame_mask & (u < p.unsqueeze(-1))
    wanted = torch.round(p * frame_mask.sum(-1)).unsqueeze(-1)
    order = u.masked_fill(~frame_mask, 2.0).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return frame_mask & (order < wanted)


def missing_draw(
    features: Sequence[torch.Tensor],
    frame_masks: Sequence[torch.Tensor],
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    versions: int,
    p_max: float,
    exact: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """See `fastmmkd.ops.missing_draw`."""
    kept, p = missing_pattern(present[sample], sample, seed, epoch, versions, p_max)
    version = torch.arange(versions, device=sample.device)[None, :, None]
    drawn, masks = [], []
    for m, (x, frame_mask) in enumerate(zip(features, frame_masks, strict=True)):
        mask = frame_mask[sample][:, None].expand(-1, versions, -1, -1)
        dropped = dropped_frames(
            mask, p, m, sample[:, None, :], seed[:, None, None], epoch.view(1, 1, 1), version, exact
        )
        mask = mask & kept[..., m, None] & ~dropped
        drawn.append((x[sample][:, None] * mask.unsqueeze(-1)).flatten(1, 2))
        masks.append(mask.flatten(1, 2))
    return drawn, masks


def _direction(x: torch.Tensor) -> torch.Tensor:
    """`x / |x|` over the last axis; 0 with gradient 0 where x is 0.

    Dividing by the largest element first, a constant because the direction does not depend on it, keeps squares and
    their gradients in range.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest < torch.finfo(x.dtype).tiny
    scaled = x / largest.masked_fill(zero, 1.0)
    norm = scaled.square().sum(-1, keepdim=True).masked_fill(zero, 1.0).sqrt()
    return (scaled / norm).masked_fill(zero, 0.0)


def _counter(
    block: torch.Tensor, sample: torch.Tensor, epoch: torch.Tensor, version: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return block & WORD, sample & WORD, epoch & WORD, version & WORD


def _key(seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return seed & WORD, (seed >> 32) & WORD
