"""Layers as compositions of other operations: what a whole layer is, and what runs it where it has no kernels.

With the definitions as its steps, and in float32 or better, a composition is the definition itself
(`fastmmkd.ops.reference`). Half precision is rounded after every step.

Shape legend: S models, G groups, n attentions of a call, R rows, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fastmmkd.ops.constants import constant
from fastmmkd.ops.layout import Layout

Dropout = Callable[[torch.Tensor], torch.Tensor]


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


OTHERS = ((1, 2), (0, 2), (0, 1))
"""Per target modality, the other two: the sources of its fine attentions."""
FINE_SOURCES = tuple((target, other) for target in range(3) for other in OTHERS[target])
"""Per fine attention, targets outermost: the modalities of its two segments of keys."""

Streams = Sequence[torch.Tensor]
"""One of each modality."""


class Steps(NamedTuple):
    """What a layer is composed of."""

    attention: Callable[..., torch.Tensor]
    """As `ops.cross_attention`."""
    norm: Callable[..., torch.Tensor]
    """As `ops.residual_layer_norm`."""
    linear: Callable[..., torch.Tensor]
    """As `ops.grouped_linear`."""
    dropouts: tuple[Dropout, ...] = (_identity,) * 3
    """Of the result of each of the layer's attentions and of its feed-forward network, before the residual connection.
    """


class EncoderWeights(NamedTuple):
    """Those of an encoder's layer; each begins with group axes, whose sizes multiply to G."""

    query_key_value: torch.Tensor
    """`[G, d, 3 d]`."""
    out: torch.Tensor
    """`[G, d, d]`."""
    out_bias: torch.Tensor
    norm: torch.Tensor
    norm_bias: torch.Tensor
    expand: torch.Tensor
    """`[G, d, 4 d]`."""
    expand_bias: torch.Tensor
    contract: torch.Tensor
    """`[G, 4 d, d]`."""
    contract_bias: torch.Tensor
    last_norm: torch.Tensor
    last_norm_bias: torch.Tensor


ENCODER_AXES = (2, 2, 1, 1, 1, 2, 1, 2, 1, 1, 1)
"""How many axes each of them has besides those of groups."""


def compose_encoder_layer(
    steps: Steps,
    x: torch.Tensor,
    mask: torch.Tensor,
    layout: Layout,
    heads: int,
    weights: EncoderWeights,
    eps: float,
) -> torch.Tensor:
    """See `fastmmkd.ops.encoder_layer`."""
    w = EncoderWeights(*(weight.flatten(0, -1 - axes) for weight, axes in zip(weights, ENCODER_AXES, strict=True)))
    dropout, last_dropout, *_ = steps.dropouts
    query, key, value = torch.bmm(x, w.query_key_value).chunk(3, dim=-1)
    attended = steps.attention(query, [key], [value], [mask], heads, layout)
    x = steps.norm(dropout(steps.linear(attended, w.out, w.out_bias)), x, w.norm, w.norm_bias, eps)
    hidden = steps.linear(x, w.expand, w.expand_bias, True)
    feed_forward = steps.linear(hidden, w.contract, w.contract_bias)
    return somebodys(steps.norm(last_dropout(feed_forward), x, w.last_norm, w.last_norm_bias, eps), layout)


class CrossmodalWeights(NamedTuple):
    """Those of a layer of crossmodal interaction. Of its nine attentions they begin with `[S, 3, 3]`: model, target
    modality, block (coarse, fine 1, fine 2); those of the feed-forward network with `[S, 3]`."""

    query: torch.Tensor
    """`[S, 3, 3, d, d]`."""
    key_value: torch.Tensor
    """`[S, 3, 3, d, 2 d]`."""
    out: torch.Tensor
    """`[S, 3, 3, d, d]`."""
    out_bias: torch.Tensor
    norm: torch.Tensor
    norm_bias: torch.Tensor
    expand: torch.Tensor
    """`[S, 3, d, 4 d]`."""
    expand_bias: torch.Tensor
    contract: torch.Tensor
    """`[S, 3, 4 d, d]`."""
    contract_bias: torch.Tensor
    last_norm: torch.Tensor
    last_norm_bias: torch.Tensor


class AttentionWeights(NamedTuple):
    """Of the n attentions of a call, `[S * n, ...]` each."""

    query: torch.Tensor
    key_value: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor
    norm: torch.Tensor
    norm_bias: torch.Tensor


def compose_crossmodal_layer(
    steps: Steps,
    streams: Streams,
    masks: Streams,
    layout: Layout,
    heads: int,
    weights: CrossmodalWeights,
    eps: float,
    crossmodal: bool = True,
) -> list[torch.Tensor]:
    """See `fastmmkd.ops.crossmodal_layer`; one call for the coarse attentions of all targets, one for the fine ones.

    Args:
        crossmodal: False: every attention is a self-attention of its target.
    """
    parts = [[x.flatten(0, 2) for x in weight.split([1, 2], dim=2)] for weight in weights[:6]]
    coarse, fine = (AttentionWeights(*of_call) for of_call in zip(*parts, strict=True))
    dropout_coarse, dropout_fine, dropout = steps.dropouts

    def attend(
        z: torch.Tensor, w: AttentionWeights, key_values: Streams, masks: Streams, drop: Dropout
    ) -> torch.Tensor:
        keys, values = zip(*(kv.chunk(2, dim=-1) for kv in key_values), strict=True)
        attended = steps.attention(torch.bmm(z, w.query), keys, values, masks, heads, layout)
        return steps.norm(drop(steps.linear(attended, w.out, w.out_bias)), z, w.norm, w.norm_bias, eps)

    z = torch.stack(tuple(streams), dim=1).flatten(0, 1)  # [S * 3, R, d]
    if crossmodal:
        z_c = attend(z, coarse, _of_sources(z, coarse.key_value), masks, dropout_coarse)
        z_c = z_c.repeat_interleave(2, dim=0)  # [S * 6, R, d]
        z_f = attend(z_c, fine, _of_pairs(z, fine.key_value), _masks_of_pairs(masks), dropout_fine)
    else:
        of_targets = torch.stack(tuple(masks), dim=1).flatten(0, 1)
        z_c = attend(z, coarse, [torch.bmm(z, coarse.key_value)], [of_targets], dropout_coarse)
        z_c = z_c.repeat_interleave(2, dim=0)
        of_targets = of_targets.repeat_interleave(2, dim=0)
        z_f = attend(z_c, fine, [torch.bmm(z_c, fine.key_value)], [of_targets], dropout_fine)
    z_f = z_f.unflatten(0, (-1, 2)).sum(1)
    w = CrossmodalWeights(*weights[:6], *(weight.flatten(0, 1) for weight in weights[6:]))
    hidden = steps.linear(z_f, w.expand, w.expand_bias, True)
    feed_forward = steps.linear(hidden, w.contract, w.contract_bias)
    z_h = somebodys(steps.norm(dropout(feed_forward), z_f, w.last_norm, w.last_norm_bias, eps), layout)
    return list(z_h.unflatten(0, (-1, 3)).unbind(1))


def _of_sources(z: torch.Tensor, weight: torch.Tensor) -> Streams:
    """Keys and values `[S * 3, R, 2 d]` of each source for every target: one product; views where S is 1."""
    weight = weight.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2)  # [S, d, 3 * 2 d]
    of_all = torch.bmm(z.unflatten(0, (-1, 3)).flatten(1, 2), weight)  # [S, 3 R, 3 * 2 d]
    of_sources = of_all.unflatten(1, (3, -1)).unflatten(-1, (3, -1)).unbind(1)  # [S, R, 3, 2 d]
    return [kv.transpose(1, 2).flatten(0, 1) for kv in of_sources]


def _of_pairs(z: torch.Tensor, weight: torch.Tensor) -> Streams:
    """Keys and values `[S * 6, R, 2 d]` of the target and of the other modality: one product."""
    # A product with ones and zeros is exact; the gradient of an index would be added by atomics, in any order.
    chosen = constant(_one_hot, FINE_SOURCES, device=z.device, dtype=z.dtype)  # [12, 3]
    of_pairs = (chosen @ z.unflatten(0, (-1, 3)).flatten(2)).view(-1, 2 * z.shape[1], z.shape[2])  # [S * 6, 2 R, d]
    return torch.bmm(of_pairs, weight).unflatten(1, (2, -1)).unbind(1)


def _masks_of_pairs(masks: Streams) -> Streams:
    """`[S * 6, R]` of the target and of the other modality."""
    of_target, of_other = ([masks[source] for source in sources] for sources in zip(*FINE_SOURCES, strict=True))
    return [mask.flatten(0, 1) for mask in torch.stack([*of_target, *of_other], dim=1).chunk(2, dim=1)]


def _one_hot(pairs: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """A row for each modality named, which has a 1 there: `[2 * pairs, 3]`."""
    rows = torch.eye(3, device=device).unbind()
    return torch.stack([rows[source] for pair in pairs for source in pair])


def somebodys(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """x `[G, R, d]` with 0 in the rows of nobody."""
    if layout.is_full:
        return x
    return (x.unflatten(0, (len(layout.starts), -1)) * layout.factor(x.dtype)[:, None, :, None]).flatten(0, 1)
