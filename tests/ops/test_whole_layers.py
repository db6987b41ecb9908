"""The definitions of whole layers, against PyTorch's own encoder layer and a literal double loop."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastmmkd import ops
from fastmmkd.ops import explain, reference, use_provider
from fastmmkd.ops.composition import OTHERS, CrossmodalWeights, EncoderWeights
from fastmmkd.testing.layers import draw_crossmodal, draw_encoder


def doubles(case):
    case.inputs, case.grad = [x.double() for x in case.inputs], case.grad.double()
    return case


def test_an_encoder_layer_is_that_of_pytorch() -> None:
    heads, d = 2, 10
    case = doubles(draw_encoder((3,), [[4, 1, 6]], 1, heads, d // heads, present=0.6, spare=0))
    case.masks[0][:, case.layout.last[0]] = True  # PyTorch's has no answer without keys
    x, weights = case.inputs[0], EncoderWeights(*case.inputs[1:])
    out = reference.encoder_layer(x, case.masks[0], case.layout, heads, weights)
    for g in range(3):
        w = EncoderWeights(*(weight[g] for weight in weights))
        twin = torch.nn.TransformerEncoderLayer(d, heads, 4 * d, dropout=0.0, batch_first=True, dtype=torch.float64)
        state = {
            "self_attn.in_proj_weight": w.query_key_value.T,
            "self_attn.in_proj_bias": torch.zeros(3 * d),
            "self_attn.out_proj.weight": w.out.T,
            "self_attn.out_proj.bias": w.out_bias,
            "linear1.weight": w.expand.T,
            "linear1.bias": w.expand_bias,
            "linear2.weight": w.contract.T,
            "linear2.bias": w.contract_bias,
            "norm1.weight": w.norm,
            "norm1.bias": w.norm_bias,
            "norm2.weight": w.last_norm,
            "norm2.bias": w.last_norm_bias,
        }
        twin.load_state_dict(state)
        for start, end in case.layout.starts[0].unfold(0, 2, 1).tolist():
            expected = twin(x[g, None, start:end], src_key_padding_mask=~case.masks[0][:, start:end])[0]
            torch.testing.assert_close(out[g, start:end], expected)


def literal_crossmodal(streams, masks, heads, weights: CrossmodalWeights):
    """Of one sample of one model: three streams `[T, d]`, masks `[T]` and the model's weights."""

    def attend(z, target, block, sources):
        d = z.shape[-1]
        query = z @ weights.query[target, block]
        keys, values = (torch.cat([streams[s] for s in sources]) @ weights.key_value[target, block]).chunk(2, -1)
        mask = torch.cat([masks[s] for s in sources])
        attended = torch.zeros_like(z)
        for h in range(heads):
            part = slice(h * d // heads, (h + 1) * d // heads)
            if mask.any():
                scores = query[:, part] @ keys[mask][:, part].T / math.sqrt(d // heads)
                attended[:, part] = scores.softmax(-1) @ values[mask][:, part]
        out = attended @ weights.out[target, block] + weights.out_bias[target, block]
        return F.layer_norm(out + z, (d,), weights.norm[target, block], weights.norm_bias[target, block])

    results = []
    for t, z in enumerate(streams):
        z_c = attend(z, t, 0, (0, 1, 2))
        z_f = sum(attend(z_c, t, 1 + i, (t, other)) for i, other in enumerate(OTHERS[t]))
        hidden = (z_f @ weights.expand[t] + weights.expand_bias[t]).relu()
        out = hidden @ weights.contract[t] + weights.contract_bias[t] + z_f
        results.append(F.layer_norm(out, z.shape[-1:], weights.last_norm[t], weights.last_norm_bias[t]))
    return results


@pytest.mark.parametrize("present", [0.0, 0.6])
def test_a_crossmodal_layer_is_its_equations(present) -> None:
    heads = 2
    case = doubles(draw_crossmodal(2, [[4, 1, 6], [3, 2, 2]], heads, 3, present=present))
    streams, weights = case.inputs[:3], CrossmodalWeights(*case.inputs[3:])
    out = reference.crossmodal_layer(streams, case.masks, case.layout, heads, weights)
    for s in range(2):
        of_model = CrossmodalWeights(*(weight[s] for weight in weights))
        for start, end in case.layout.starts[s].unfold(0, 2, 1).tolist():
            of_sample = ([x[s, start:end] for x in of] for of in (streams, case.masks))
            expected = literal_crossmodal(*of_sample, heads, of_model)
            for x, y in zip(out, expected, strict=True):
                torch.testing.assert_close(x[s, start:end], y)
        assert all((x[s, case.layout.starts[s, -1] :] == 0).all() for x in out)


@pytest.mark.parametrize(
    "case",
    [
        draw_encoder((2,), [[2, 1], [1, 1]], 2, 1, 3, spare=1),
        draw_crossmodal(1, [[2, 1]], 1, 3, spare=1),
    ],
    ids=lambda case: case.op,
)
def test_gradients_are_those_of_finite_differences(case) -> None:
    function = doubles(case).call(getattr(reference, case.op))
    inputs = [x.requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["encoder_layer", "crossmodal_layer"])
def test_what_has_no_kernels_of_the_layer_composes_it(name, monkeypatch) -> None:
    case = draw_encoder((1, 3), [[3, 2]], 1, 2, 5) if name == "encoder_layer" else draw_crossmodal(1, [[3, 2]], 2, 5)
    calls = []
    attention = reference.cross_attention

    def counted(*args):
        if len(args) > 5:  # it calls itself with padded rows
            calls.append(args)
        return attention(*args)

    monkeypatch.setattr(reference, "cross_attention", counted)
    half = [x.to(torch.float16) for x in case.inputs]
    assert explain(name, half[0]).provider == "composed"
    assert case.call(getattr(ops, name))(*half).dtype == torch.float16
    assert len(calls) == (1 if name == "encoder_layer" else 2)
    with use_provider("reference"):
        assert explain(name).provider == "reference"
    with use_provider("triton"):
        assert explain(name) == ops.dispatch.Choice(name, "composed", "forced by use_provider")
