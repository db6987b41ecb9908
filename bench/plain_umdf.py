"""UMDF as one writes it in plain PyTorch: a baseline that speed is measured against.

One module per attention, one call per target modality, scores and masks as whole matrices; nothing grouped, nothing
fused. Weights are copied from fastmmkd's own models, so that parity can be checked before anything is timed.

Shape legend: B rows, T frames, d width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from fastmmkd.data.batches import by_layer
from fastmmkd.methods.umdf import UMDF
from fastmmkd.nn.crossmodal import OTHERS, CrossmodalInteraction
from fastmmkd.nn.embedding import sinusoidal_positions
from fastmmkd.nn.encoder import EncoderLayer
from fastmmkd.nn.grouped import FeedForward, GroupedLinear, ResidualNorm
from fastmmkd.ops import reference
from fastmmkd.tasks import Task

Attention = Literal["explicit", "sdpa"]


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """`nn.Linear` with these weights: `[d_in, d_out]`, `[d_out]`."""
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def of_grouped(layer: GroupedLinear, *at: int) -> nn.Linear:
    """One group of a grouped layer."""
    return linear(layer.weight[at], layer.bias[at])


def of_norm(norm: ResidualNorm, *at: int) -> nn.LayerNorm:
    """One group of a residual norm, to be applied to the sum."""
    layer = nn.LayerNorm(norm.weight.shape[-1])
    with torch.no_grad():
        layer.weight.copy_(norm.weight[at])
        layer.bias.copy_(norm.bias[at])
    return layer


class MultiHeadAttention(nn.Module):
    """`softmax(Q K' / sqrt(d_k)) V` and an output projection; a query without keys gives the projection's bias."""

    def __init__(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear, heads: int, kind: Attention):
        super().__init__()
        self.query, self.key, self.value, self.out = query, key, value, out
        self.heads, self.kind = heads, kind

    def forward(self, target: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[B, T, d]`, `[B, T_s, d]`, `[B, T_s]` bool -> `[B, T, d]`."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, target), (self.key, source), (self.value, source))
        )
        usable = mask[:, None, None, :]
        if self.kind == "sdpa":
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=usable | ~usable.any(-1, keepdim=True))
        else:
            score = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            attended = score.masked_fill(~usable, torch.finfo(score.dtype).min).softmax(-1) @ v
        attended = attended * usable.any(-1, keepdim=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class PlainFeedForward(nn.Module):
    """`LN(x + W_2 relu(W_1 x))`."""

    def __init__(self, source: FeedForward, *at: int) -> None:
        super().__init__()
        self.expand, self.contract = of_grouped(source.expand, *at), of_grouped(source.contract, *at)
        self.norm = of_norm(source.norm, *at)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, d]` -> `[B, T, d]`."""
        return self.norm(x + self.contract(self.expand(x).relu()))


class PlainEncoderLayer(nn.Module):
    """A post-norm transformer encoder layer."""

    def __init__(self, source: EncoderLayer, kind: Attention, *at: int) -> None:
        super().__init__()
        query, key, value = (linear(w) for w in source.query_key_value[at].chunk(3, -1))
        self.attention = MultiHeadAttention(query, key, value, of_grouped(source.out, *at), source.heads, kind)
        self.norm = of_norm(source.norm, *at)
        self.feed_forward = PlainFeedForward(source.feed_forward, *at)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[B, T, d]` and `[B, T]` bool -> `[B, T, d]`."""
        return self.feed_forward(self.norm(x + self.attention(x, x, mask)))


class PlainInteraction(nn.Module):
    """One MCIM layer (UMDF eqs. 7 to 9), target by target."""

    def __init__(self, source: CrossmodalInteraction, kind: Attention) -> None:
        super().__init__()
        self.attentions, self.norms = nn.ModuleList(), nn.ModuleList()
        for t in range(3):
            for block in range(3):
                key, value = (linear(w) for w in source.key_value[0, t, block].chunk(2, -1))
                query, out = linear(source.query[0, t, block]), of_grouped(source.out, 0, t, block)
                self.attentions.append(MultiHeadAttention(query, key, value, out, source.heads, kind))
                self.norms.append(of_norm(source.norm, 0, t, block))
        self.feed_forwards = nn.ModuleList(PlainFeedForward(source.feed_forward, 0, t) for t in range(3))

    def forward(self, streams: list[torch.Tensor], masks: list[torch.Tensor]) -> list[torch.Tensor]:
        """Per modality `[B, T, d]` and `[B, T]` bool -> per modality `[B, T, d]`."""
        outputs = []
        for t, z in enumerate(streams):
            coarse = self._attend(3 * t, z, streams, masks)
            fine = torch.zeros_like(z)
            for block, s in enumerate(OTHERS[t], start=1):
                fine = fine + self._attend(3 * t + block, coarse, [z, streams[s]], [masks[t], masks[s]])
            outputs.append(self.feed_forwards[t](fine))
        return outputs

    def _attend(
        self, index: int, target: torch.Tensor, sources: list[torch.Tensor], masks: list[torch.Tensor]
    ) -> torch.Tensor:
        attended = self.attentions[index](target, torch.cat(sources, dim=1), torch.cat(masks, dim=1))
        return self.norms[index](attended + target)


class Plain(nn.Module):
    """UMDF on aligned data: the losses of `fastmmkd.methods.umdf.UMDF`, for one model."""

    def __init__(self, source: UMDF, kind: Attention = "explicit") -> None:
        super().__init__()
        self.task: Task = source.task
        self.weights = source.weights
        self.convolutions = nn.ModuleList()
        for layer in source.embedding.convolutions:
            assert isinstance(layer, GroupedLinear)
            convolution = nn.Conv1d(layer.weight.shape[1] // 3, layer.weight.shape[2], kernel_size=3, padding=1)
            with torch.no_grad():
                convolution.weight.copy_(layer.weight[0].unflatten(0, (3, -1)).permute(2, 1, 0))
                convolution.bias.copy_(layer.bias[0])  # type: ignore[union-attr]
            self.convolutions.append(convolution)
        self.mcim = nn.ModuleList(PlainInteraction(layer, kind) for layer in source.mcim)  # type: ignore[arg-type]
        self.encoder = nn.ModuleList(PlainEncoderLayer(layer, kind, 0) for layer in source.encoder.layers)  # type: ignore[arg-type]
        self.f_y = of_grouped(source.f_y, 0)
        self.frame_score, gate = of_grouped(source.dfim.frame_score, 0), source.dfim.gate
        self.gate = nn.Conv1d(gate.weight.shape[1] // 3, gate.weight.shape[2], kernel_size=3, padding=1)
        with torch.no_grad():
            self.gate.weight.copy_(gate.weight[0].unflatten(0, (3, -1)).permute(2, 1, 0))
            self.gate.bias.copy_(gate.bias[0])  # type: ignore[union-attr]
        self.integration = nn.ModuleList(
            PlainEncoderLayer(layer, kind, 0)  # type: ignore[arg-type]
            for layer in source.dfim.encoder.layers
        )
        self.hidden, self.head = of_grouped(source.hidden, 0), of_grouped(source.head, 0)

    def forward(
        self, features: list[torch.Tensor], masks: list[torch.Tensor], position: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The loss of `[2 B, T, d_m]` features, `[2 B, T]` masks (as in `Batch`), `[2 B, T]` int64 positions of frames,
        `[B]` or `[B, problems]` targets."""
        z = [
            convolution(x.transpose(1, 2)).transpose(1, 2)
            for convolution, x in zip(self.convolutions, features, strict=True)
        ]
        z = [x + sinusoidal_positions(x.shape[1], x.shape[2], x.device, x.dtype)[position] for x in z]
        first, later = by_layer(masks)
        for i, layer in enumerate(self.mcim):
            z = layer(z, later if i else first)
        mask = later[0] | later[1] | later[2]
        h = torch.cat(z, dim=-1)
        for layer in self.encoder:
            h = layer(h, mask)
        (h_a, h_b), (mask_a, mask_b) = h.chunk(2), mask.chunk(2)
        logits = self._integrate(h_a, h_b, mask_a, mask_b)
        loss = self.task.loss(logits[None], targets[None])
        last_a, last_b = h_a[:, -1], h_b[:, -1]
        loss = loss + self.weights.lambda_fea * reference.gaussian_mmd(last_a[None], last_b[None])
        a, b = self.f_y(last_a), self.f_y(last_b)
        if self.task.is_regression:
            consistency = (a - b).square().mean()
        else:
            split = (self.task.split_problems(x).flatten(0, 1)[None] for x in (a, b))
            consistency = reference.js_divergence(*split)
        return (loss + self.weights.lambda_logits * consistency).sum()

    def _integrate(
        self, h_a: torch.Tensor, h_b: torch.Tensor, mask_a: torch.Tensor, mask_b: torch.Tensor
    ) -> torch.Tensor:
        h_a, h_b = self._enhance(h_a, mask_a), self._enhance(h_b, mask_b)
        mu = self.gate(torch.cat((h_a, h_b), dim=-1).transpose(1, 2)).transpose(1, 2).sigmoid()
        x = mu * h_a + (1 - mu) * h_b
        for layer in self.integration:
            x = layer(x, mask_a | mask_b)
        return self.head(self.hidden(x[:, -1]).relu())

    def _enhance(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        is_last = torch.arange(mask.shape[1], device=mask.device) == mask.shape[1] - 1
        mask = (mask | is_last).unsqueeze(-1)
        weight = self.frame_score(h).masked_fill(~mask, -torch.inf).softmax(dim=1)
        return h * weight * mask.sum(dim=1, keepdim=True)
