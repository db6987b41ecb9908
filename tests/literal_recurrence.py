"""LSTMs and GRUs once more, from their equations: one sample, one frame at a time."""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.nn.recurrent import Recurrence


def literal_states(net: nn.Module, frames: list[torch.Tensor]) -> list[torch.Tensor]:
    """The state after each frame, from the equations."""
    w_x, w_h, b_x, b_h = net.weight_ih_l0, net.weight_hh_l0, net.bias_ih_l0, net.bias_hh_l0
    h = c = w_h.new_zeros(len(w_h[0]))
    states = []
    for x in frames:
        of_x, of_h = w_x @ x + b_x, w_h @ h + b_h
        if isinstance(net, nn.LSTM):
            i, f, g, o = (of_x + of_h).split(len(w_h[0]))
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.split(len(w_h[0])), of_h.split(len(w_h[0]))
            z = (z_x + z_h).sigmoid()
            h = (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h
        states.append(h)
    return states


def literal(net: Recurrence, x: torch.Tensor, counts: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of one sample `[T, d_in]`, `[T]`: per direction the outputs `[T, d]` and the last state `[d]`."""
    inputs = x
    for layer in net.layers:
        outputs, last = [], []
        for direction, alone in enumerate(layer):
            order = [t for t in range(len(x)) if counts[t]]
            order = order[::-1] if direction else order
            states = dict(zip(order, literal_states(alone.module, [inputs[t] for t in order]), strict=True))
            nothing = x.new_zeros(alone.module.hidden_size)
            outputs.append(torch.stack([states.get(t, nothing) for t in range(len(x))]))
            last.append(states[order[-1]] if order else nothing)
        inputs = torch.cat(outputs, dim=-1)
    return outputs, last
