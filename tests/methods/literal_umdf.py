"""UMDF once more, written the long way from the paper: one sample, one target, one attention at a time, no groups.

It reads weights from a `fastmmkd.methods.umdf.UMDF` of one model and shares no computation with it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

OTHERS = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


def attention(target, source, usable, w_q, w_k, w_v, heads):
    """Eq. 7 per head; `[T, d]` and `[T_s, d]`."""
    query, key, value = target @ w_q, source @ w_k, source @ w_v
    if not usable.any():
        return torch.zeros_like(query)
    outs = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        scores = q @ k.T / math.sqrt(q.shape[-1])
        outs.append(torch.softmax(scores.masked_fill(~usable, -math.inf), -1) @ v)
    return torch.cat(outs, -1)


def feed_forward(x, module, at):
    w1, b1 = module.expand.weight[at], module.expand.bias[at]
    w2, b2 = module.contract.weight[at], module.contract.bias[at]
    hidden = torch.relu(x @ w1 + b1)
    return F.layer_norm(hidden @ w2 + b2 + x, x.shape[-1:], module.norm.weight[at], module.norm.bias[at])


def mcim_layer(layer, z, usable, heads):
    """Eqs. 8 and 9 for the three targets of one sample; `z` holds three `[T_m, d]`, `usable` three `[T_m]`."""

    def ca(target, sources, t, block):
        d = target.shape[-1]
        w_k, w_v = layer.key_value[0, t, block].split(d, -1)
        source, mask = torch.cat([s for s, _ in sources]), torch.cat([m for _, m in sources])
        out = attention(target, source, mask, layer.query[0, t, block], w_k, w_v, heads)
        return out @ layer.out.weight[0, t, block] + layer.out.bias[0, t, block]

    def ln(x, t, block):
        return F.layer_norm(x, x.shape[-1:], layer.norm.weight[0, t, block], layer.norm.bias[0, t, block])

    pairs = list(zip(z, usable, strict=True))
    result = []
    for t in range(3):
        s1, s2 = OTHERS[t]
        if layer.crossmodal:
            coarse = ln(ca(z[t], pairs, t, 0) + z[t], t, 0)
            fine_1 = ln(ca(coarse, [pairs[t], pairs[s1]], t, 1) + coarse, t, 1)
            fine_2 = ln(ca(coarse, [pairs[t], pairs[s2]], t, 2) + coarse, t, 2)
        else:
            coarse = ln(ca(z[t], [pairs[t]], t, 0) + z[t], t, 0)
            fine_1 = ln(ca(coarse, [(coarse, usable[t])], t, 1) + coarse, t, 1)
            fine_2 = ln(ca(coarse, [(coarse, usable[t])], t, 2) + coarse, t, 2)
        result.append(feed_forward(fine_1 + fine_2, layer.feed_forward, (0, t)))
    return result


def encoder(module, x, usable, heads):
    for layer in module.layers:
        w_q, w_k, w_v = layer.query_key_value[0].chunk(3, -1)
        attended = attention(x, x, usable, w_q, w_k, w_v, heads) @ layer.out.weight[0] + layer.out.bias[0]
        x = F.layer_norm(attended + x, x.shape[-1:], layer.norm.weight[0], layer.norm.bias[0])
        x = feed_forward(x, layer.feed_forward, 0)
    return x


def convolve(x, weight, bias):
    """Kernel 3, padding 1, as `torch.nn.functional.conv1d` does it; weight `[3 d_in, d_out]`."""
    kernel = weight.view(3, x.shape[-1], -1).permute(2, 1, 0)
    return F.conv1d(x.T[None], kernel, bias, padding=1)[0].T


def positions(steps, d):
    table = torch.zeros(steps, d)
    for t in range(steps):
        for i in range(0, d, 2):
            table[t, i] = math.sin(t / 10000 ** (i / d))
            if i + 1 < d:
                table[t, i + 1] = math.cos(t / 10000 ** (i / d))
    return table


def joint_representation(model, features, usable, heads):
    """`H_k [T, 3 d]` of one aligned sample; `usable` holds three masks, or the first layer's and the later layers'."""
    z = []
    for conv, x in zip(model.embedding.convolutions, features, strict=True):
        embedded = convolve(x, conv.weight[0], conv.bias[0])
        z.append(embedded + positions(*embedded.shape).to(embedded.dtype))
    z = mcim_layer(model.mcim[0], z, usable[:3], heads)
    later = usable[3:] or usable
    for layer in list(model.mcim)[1:]:
        z = mcim_layer(layer, z, later, heads)
    return encoder(model.encoder, torch.cat(z, -1), later[0] | later[1] | later[2], heads)


def enhance(dfim, h, usable):
    scores = (h @ dfim.frame_score.weight[0] + dfim.frame_score.bias[0])[:, 0]
    usable = usable.clone()
    usable[-1] = True
    weights = torch.zeros_like(scores)
    weights[usable] = torch.softmax(scores[usable], 0) * usable.sum()
    return weights[:, None] * h


def predict(model, h_a, h_b, usable_a, usable_b, heads):
    """DFIM (eqs. 10, 11) and the head, one sample: logits `[O]`."""
    if not model.has_dfim:
        return torch.cat((h_a[-1], h_b[-1])) @ model.head.weight[0] + model.head.bias[0]
    h_a, h_b = enhance(model.dfim, h_a, usable_a), enhance(model.dfim, h_b, usable_b)
    mu = torch.sigmoid(convolve(torch.cat((h_a, h_b), -1), model.dfim.gate.weight[0], model.dfim.gate.bias[0]))
    refined = encoder(model.dfim.encoder, mu * h_a + (1 - mu) * h_b, usable_a | usable_b, heads)[-1]
    return (
        torch.relu(refined @ model.hidden.weight[0] + model.hidden.bias[0]) @ model.head.weight[0] + model.head.bias[0]
    )
