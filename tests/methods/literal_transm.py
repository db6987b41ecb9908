"""TransM once more, written the long way: one sample, one modality, one attention at a time, no groups.

It reads weights from a `fastmmkd.methods.transm.TransM` of one model and shares no computation with it. A sample is
`features`, three `[T_m, d_m]`, and `usable`, `[T_m]` bool: three that serve every layer, or the first layer's three and
the later layers' three.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from literal_corrkd import modality_encoder, task_loss
from literal_umdf import attention, convolve, feed_forward, positions

LANGUAGE, OTHERS = 0, (1, 2)


def affine(layer, x):
    return x @ layer.weight[0] + layer.bias[0]


def attend(module, x, source, usable, at, heads):
    """`LN(X + CA(Y, X))`."""
    w_k, w_v = module.key_value[at].chunk(2, -1)
    attended = attention(x, source, usable, module.query[at], w_k, w_v, heads)
    out = attended @ module.out.weight[at] + module.out.bias[at]
    return F.layer_norm(out + x, x.shape[-1:], module.norm.weight[at], module.norm.bias[at])


def decode(module, cell, x, usable, memory, memory_usable, heads):
    """A decoder's layers; `usable`: the rows of x that its first layer attends to, and those of later layers."""
    at = (0, cell)
    for i, layer in enumerate(module.layers):
        x = attend(layer.itself, x, x, usable[min(i, 1)], at, heads)
        x = attend(layer.memory, x, memory, memory_usable, at, heads)
        x = feed_forward(x, layer.feed_forward, at)
    return x


def translate(network, features, usable, heads):
    """`L, A, V`, and per other modality `e_1, u_1, e_2, u_2`, of one sample."""
    first, later = usable[:3], usable[-3:]
    streams = []
    for conv, x in zip(network.embedding.convolutions, features, strict=True):
        z = convolve(x, conv.weight[0], conv.bias[0])
        streams.append(z + positions(*z.shape).to(z.dtype))
    cells = []
    for cell, m in enumerate(OTHERS):
        depth = len(network.encoder.layers)

        def query(modality):
            steps = len(features[modality])
            if network.query == "position":
                codes = positions(steps, streams[0].shape[-1]).to(streams[0].dtype)
                return codes, [torch.ones(steps, dtype=torch.bool)] * 2
            return streams[modality], [first[modality], later[modality]]

        masks = [first[LANGUAGE]] + [later[LANGUAGE]] * (depth - 1)
        e_1 = modality_encoder(network.encoder, cell, streams[LANGUAGE], masks, heads)
        found = {"e_1": e_1}
        if hasattr(network, "decoder"):
            found["u_1"] = decode(network.decoder, cell, *query(m), e_1, later[LANGUAGE], heads)
        if network.has_backward:
            every = torch.ones(len(features[m]), dtype=torch.bool)
            found["e_2"] = modality_encoder(network.back_encoder, cell, found["u_1"], [every] * depth, heads)
            if hasattr(network, "back_decoder"):
                found["u_2"] = decode(network.back_decoder, cell, *query(LANGUAGE), found["e_2"], every, heads)
        cells.append(found)
    return streams, cells


def mean(x, usable):
    """Over the frames that count; 0 where none does."""
    total, count = torch.zeros_like(x[0]), 0
    for frame, counts in zip(x, usable, strict=True):
        if counts:
            total, count = total + frame, count + 1
    return total / max(count, 1)


def joined(network, streams, cells, usable):
    """What the classifier is given of each stream: its mean, or its last frame."""
    parts = []
    for found in cells:
        parts.append((found["e_1"], usable[-3]))
        if "e_2" in found:
            parts.append((found["e_2"], [True] * len(found["e_2"])))
    parts += zip(streams, usable[-3:], strict=True)
    return torch.cat([x[-1] if network.readout == "last" else mean(x, mask) for x, mask in parts])


def predict(network, features, usable, heads):
    """Logits `[O]`."""
    return affine(network.head, joined(network, *translate(network, features, usable, heads), usable))


def losses(network, missing, complete, targets, heads):
    """`L_task`, summed over problems unless the project's is asked for, and `L_translation` of a batch: lists of
    samples, the complete ones with the frames that they have."""
    logits, made = [], []
    for features, usable in missing:
        streams, cells = translate(network, features, usable, heads)
        logits.append(affine(network.head, joined(network, streams, cells, usable)))
        made.append(cells)
    problems = network.task.problems if network.weights.task == "own" else 1
    found = {"task": problems * task_loss(logits, targets, network.task)}
    if not hasattr(network, "readouts"):
        return found
    translation = 0.0
    for cell, m in enumerate(OTHERS):
        ways = [("u_1", network.readouts[cell], m)]
        if network.has_backward:
            ways.append(("u_2", network.back_readouts[cell], LANGUAGE))
        for name, readout, target in ways:
            total, frames = 0.0, 0
            for cells, (features, there) in zip(made, complete, strict=True):
                translated = affine(readout, cells[cell][name])
                for t in range(len(translated)):
                    if there[target][t]:
                        total = total + (translated[t] - features[target][t]).abs().sum() / features[target].shape[-1]
                        frames += 1
            translation = translation + total / max(frames, 1)
    return found | {"translation": translation}
