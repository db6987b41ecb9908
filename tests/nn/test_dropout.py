"""Dropout: masks element by element, what they depend on and what not, and that without it nothing runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastmmkd.config import parse_config
from fastmmkd.data.missingness import EVALUATION_VERSION
from fastmmkd.methods.umdf import UMDF
from fastmmkd.nn.dropout import LEVELS, STREAMS, Dropout, kept_elements, number_dropouts
from fastmmkd.nn.encoder import EncoderLayer, ModalityEncoders
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys
from tests.handmade import batch_of, inputs_of, layout_of, network_of, ragged_layout

DIMS, STEPS = (5, 4, 3), (6, 6, 6)
METHODS = ("umdf", "corrkd", "hrlf")


def keys(sample: list[list[int]], seed: list[int], epoch: int = 4) -> DrawKeys:
    return DrawKeys(torch.tensor(sample), torch.tensor(seed), torch.tensor(epoch))


DRAW = keys([[7, 2, 9], [5, 0, 7]], [3, 2**33 + 1])
LENGTHS = [[5, 1, 4], [2, 5, 2]]
LAYOUT = ragged_layout(LENGTHS, versions=2, spare=3)
GROUPS, FEATURES = 3, 11
"""Two counters for each row, the second of which is not used up."""


def dropout(rate: float, place: int = 0) -> Dropout:
    made = Dropout(rate)
    made.place = place
    return made


def kept(
    draw: DrawKeys = DRAW,
    layout: Layout = LAYOUT,
    groups: int = GROUPS,
    rate: float = 0.5,
    place: int = 0,
    first: int = 0,
    features: int = FEATURES,
) -> torch.Tensor:
    shape = torch.Size((len(draw.seed) * groups, layout.rows, features))
    return kept_elements(round(rate * LEVELS), place, draw, layout, shape, first)


def of_sample(x: torch.Tensor, layout: Layout, model: int, number: int) -> torch.Tensor:
    """The rows of a layout's sample in every group of a model: `[G, R, d]` -> `[n, T, d]`."""
    start, end = layout.starts[model, number : number + 2]
    return x.unflatten(0, (len(layout.starts), -1))[model, :, start:end]


def literal_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for i in range(10):
        if i:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second % 2**32, (first >> 32) ^ c[3] ^ k[1], first % 2**32]
    return c


def literal_kept(
    dropped: int, place: int, draw: DrawKeys, layout: Layout, groups: int, features: int, first: int = 0
) -> torch.Tensor:
    """Element by element, from the module's docstring: `[S * n, R, d]`; nothing is kept in rows of nobody."""
    models, samples = draw.sample.shape
    mask = torch.zeros(models * groups, layout.rows, features, dtype=torch.bool)
    for g in range(models * groups):
        model, group = divmod(g, groups)
        seed, ends = int(draw.seed[model]), layout.starts[model, 1:].tolist()
        for row in range(ends[-1]):
            whose = next(i for i, end in enumerate(ends) if row < end)
            version, b = divmod(whose, samples)
            stream = 2**31 + (place * 256 + first + group) * 16 + version
            for f in range(features):
                block = (ends[whose] - 1 - row) * math.ceil(features / 8) + f // 8
                counter = [block, int(draw.sample[model, b]), int(draw.epoch), stream]
                word = literal_philox(counter, [seed % 2**32, seed >> 32])[f % 8 // 2]
                level = word >> 16 if f % 2 else word % 2**16
                mask[g, row, f] = level >= dropped
    return mask


@pytest.mark.parametrize("features", [6, 8, 11])
@pytest.mark.parametrize(("rate", "place", "first"), [(0.1, 0, 0), (0.5, 7, 2)])
def test_every_element_is_that_of_the_literal_draw(rate: float, place: int, first: int, features: int) -> None:
    drawn = kept(rate=rate, place=place, first=first, features=features)
    literal = literal_kept(round(rate * LEVELS), place, DRAW, LAYOUT, GROUPS, features, first)
    somebodys = LAYOUT.is_somebodys.repeat_interleave(GROUPS, dim=0).unsqueeze(-1)
    assert torch.equal(drawn & somebodys, literal)


def test_known_answer() -> None:
    """The generator's published vector for zeros is 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    assert literal_philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_are_dropped_at_their_rate_independently_and_the_mean_stays(rate: float) -> None:
    draw = keys([list(range(40))], [1])
    y = dropout(rate)(torch.ones(2, 40 * 50, 40), layout_of(1, 40, 50), draw).unflatten(1, (40, 50))
    n, dropped = y.numel(), y == 0
    assert abs(dropped.double().mean().item() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
    assert y.double().mean().item() == pytest.approx(1, abs=5 * math.sqrt(rate / (1 - rate) / n))
    scaled = y[~dropped]
    assert (scaled == scaled[0]).all()
    assert scaled[0].item() == pytest.approx(1 / (1 - rate), rel=1e-4)
    for a, b in (  # neighbours in time, in features, groups, samples
        (dropped[:, :, 1:], dropped[:, :, :-1]),
        (dropped[..., 1:], dropped[..., :-1]),
        (dropped[:1], dropped[1:]),
        (dropped[:, 1:], dropped[:, :-1]),
    ):
        both = (a & b).double().mean().item()
        assert abs(both - rate**2) < 6 * math.sqrt(rate**2 / a.numel())


class TestKeys:
    def test_everything_that_keys_a_mask_changes_it(self) -> None:
        layout = layout_of(2, 2 * 3, 9)
        whole = kept(layout=layout)
        models, groups = (whole.unflatten(0, (2, GROUPS)).unbind(axis) for axis in (0, 1))
        pairs = [
            *(
                (whole, kept(DRAW._replace(**change), layout))
                for change in ({"seed": DRAW.seed + 2**32}, {"epoch": DRAW.epoch + 1}, {"sample": DRAW.sample + 10})
            ),
            (whole, kept(layout=layout, place=1)),
            (whole, kept(layout=layout, first=3)),
            models,
            groups[:2],
            groups[1:],
            whole.chunk(2, dim=1),  # versions
        ]
        for a, b in pairs:
            agreement = (a == b).double().mean().item()
            assert 0.4 < agreement < 0.6, "masks at rate 0.5 that do not depend on each other agree on half"

    def test_samples_have_their_masks_wherever_they_stand(self) -> None:
        whole, order = kept(), [2, 0, 1]
        moved_layout = ragged_layout([[of_model[i] for i in order] for of_model in LENGTHS], versions=2)
        moved = kept(DRAW._replace(sample=DRAW.sample[:, order]), moved_layout)
        alone_layout = ragged_layout([of_model[1:2] for of_model in LENGTHS], versions=2, spare=1)
        alone = kept(DRAW._replace(sample=DRAW.sample[:, 1:2]), alone_layout)
        for model in range(2):
            for version in range(2):
                for place, b in enumerate(order):
                    expected = of_sample(whole, LAYOUT, model, 3 * version + b)
                    assert torch.equal(of_sample(moved, moved_layout, model, 3 * version + place), expected)
                expected = of_sample(whole, LAYOUT, model, 3 * version + 1)
                assert torch.equal(of_sample(alone, alone_layout, model, version), expected)

    def test_models_have_the_masks_that_they_have_alone(self) -> None:
        whole = kept()
        for s in range(2):
            layout = ragged_layout(LENGTHS[s : s + 1], versions=2)
            alone = kept(DrawKeys(DRAW.sample[s : s + 1], DRAW.seed[s : s + 1], DRAW.epoch), layout)
            assert torch.equal(alone, whole.unflatten(0, (2, GROUPS))[s, :, : layout.rows])

    def test_groups_have_their_masks_in_any_part_of_a_layer(self) -> None:
        assert torch.equal(kept(groups=1, first=1), kept().unflatten(0, (2, GROUPS))[:, 1])

    def test_padding_before_a_sample_moves_nothing(self) -> None:
        whole, longer = kept(), ragged_layout([[n + 4 for n in of_model] for of_model in LENGTHS], versions=2)
        padded = kept(layout=longer)
        for model in range(2):
            for number in range(2 * 3):
                expected = of_sample(whole, LAYOUT, model, number)
                assert torch.equal(of_sample(padded, longer, model, number)[:, 4:], expected)

    def test_no_missing_draw_has_the_same_counters(self) -> None:
        assert STREAMS > EVALUATION_VERSION + 2**16


class Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def config_of(method: str, rate: float, **model: Any):
    layers = {"mcim_layers": 1} if method == "umdf" else {}
    return parse_config(
        {
            "method": method,
            "data": {"path": "none.h5"},
            "model": {"width": 8, "heads": 2, "encoder_layers": 1, "dropout": rate} | layers | model,
            "train": {"task": "regression", "batch_size": 4, "epochs": 1},
            "deepspeed": {"optimizer": {"type": "Adam"}},
        }
    )


def versions_of(network: Any) -> int:
    return 2 if isinstance(network, UMDF) else 1


def inputs(network: Any, steps: tuple[int, int, int] = STEPS, samples: int = 3):
    rows = versions_of(network) * samples
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(1, rows, t, generator=generator) < 0.7 for t in steps]
    features = [
        torch.randn(1, rows, t, d, dtype=torch.float64, generator=generator) * mask.unsqueeze(-1)
        for t, d, mask in zip(steps, DIMS, masks, strict=True)
    ]
    targets = torch.randn(1, samples, dtype=torch.float64, generator=generator)
    return features, masks, targets, keys([[7, 2, 9]], [3])


class TestNetworks:
    @pytest.fixture(params=METHODS)
    def method(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_a_rate_of_0_costs_no_operation(self, method: str) -> None:
        network = network_of(config_of(method, 0.0), DIMS, seed=1).double()
        *batch, draw = inputs(network)
        network(batch_of(*batch, draw=draw))  # what is made once is made now
        calls = []
        for keyed in (None, draw):
            with Counting() as counting:
                network(batch_of(*batch, draw=keyed))
            calls.append(counting.calls)
        assert calls[0] == calls[1]
        x = torch.ones(1, 1, 1)
        assert dropout(0.0)(x, layout_of(1, 1, 1), draw) is x
        assert dropout(0.5).eval()(x, layout_of(1, 1, 1), None) is x

    def test_evaluation_has_none(self, method: str) -> None:
        networks = [network_of(config_of(method, rate), DIMS, seed=1).double() for rate in (0.0, 0.5)]
        *batch, draw = inputs(networks[0])
        (logits, joint), others = (network.eval().predict(inputs_of(*batch[:2])) for network in networks)
        assert torch.equal(logits, others[0])
        assert torch.equal(joint, others[1])
        plain, dropped = (network(batch_of(*batch, draw=draw))[1]["task"] for network in networks)
        assert not torch.equal(plain, dropped)

    def test_keys_that_do_not_arrive_are_missed(self, method: str) -> None:
        network = network_of(config_of(method, 0.5), DIMS, seed=1).double()
        *batch, _ = inputs(network)
        with pytest.raises(ValueError, match="dropout needs the keys of its batch"):
            network(batch_of(*batch))

    def test_every_dropout_is_in_use_and_has_its_own_place(self, method: str) -> None:
        network = network_of(config_of(method, 0.5), DIMS, seed=1).double()
        found = [module for module in network.modules() if isinstance(module, Dropout)]
        assert [module.place for module in found] == list(range(len(found)))
        used = set()
        for module in found:
            module.register_forward_hook(lambda module, given, y: used.add(module.place) if y is not given[0] else None)
        *batch, draw = inputs(network)
        network(batch_of(*batch, draw=draw))
        assert used == set(range(len(found)))

    @pytest.mark.parametrize("steps", [STEPS, (6, 9, 4)], ids=["aligned", "unaligned"])
    def test_order_and_size_of_a_batch_do_not_matter(self, method: str, steps: tuple[int, int, int]) -> None:
        network = network_of(config_of(method, 0.3), DIMS, seed=1).double()
        features, masks, targets, draw = inputs(network, steps)

        def task_losses(order: list[int]) -> torch.Tensor:
            rows = [version * 3 + i for version in range(versions_of(network)) for i in order]
            some = DrawKeys(draw.sample[:, order], draw.seed, draw.epoch)
            batch = [x[:, rows] for x in features], [mask[:, rows] for mask in masks], targets[:, order]
            return network(batch_of(*batch, draw=some))[1]["task"]

        whole = task_losses([0, 1, 2])
        torch.testing.assert_close(task_losses([2, 0, 1]), whole)
        torch.testing.assert_close(sum(task_losses([i]) for i in range(3)) / 3, whole)


def test_groups_one_by_one_are_the_groups_at_once() -> None:
    """What an unaligned batch runs one by one has the masks that it has as a part of one call."""
    encoders = ModalityEncoders(1, 8, 2, 1, dropout=0.4).double()
    number_dropouts(encoders)
    x = [torch.randn(1, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(m)) for m in range(3)]
    masks, draw = [torch.ones(1, 3, 6, dtype=torch.bool)] * 3, keys([[7, 2, 9]], [3])
    rows = inputs_of(x, masks)
    ((together, _, _),) = encoders(rows.features, rows, draw)
    for m in range(3):
        shorter = [z if i == m else z[:, :, 1:] for i, z in enumerate(x)]
        unaligned = inputs_of(shorter, [mask if i == m else mask[:, :, 1:] for i, mask in enumerate(masks)])
        alone, _, _ = encoders(unaligned.features, unaligned, draw)[m]
        torch.testing.assert_close(alone[0], together[m])


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_an_encoder_layer_and_its_gradients_equal_the_literal_ones(rate: float) -> None:
    torch.manual_seed(0)
    layer = EncoderLayer((1,), 6, 2, dropout=rate).double()
    number_dropouts(layer)
    draw, mask = keys([[7, 2]], [3]), torch.rand(1, 4, 5) < 0.8
    mask[..., -1] = True
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    layout = layout_of(1, 4, 5)
    places = {name: module.place for name, module in layer.named_modules() if isinstance(module, Dropout)}
    assert set(places) == {"dropout", "feed_forward.dropout"}

    def dropped(z: torch.Tensor, name: str) -> torch.Tensor:
        m = literal_kept(round(rate * LEVELS), places[name], draw, layout, 1, 6)[0].unflatten(0, (4, 5))
        return z * m / (1 - rate)

    def literal() -> torch.Tensor:
        ffn = layer.feed_forward
        q, k, v = (x[0] @ layer.query_key_value[0]).chunk(3, -1)
        heads = [z.unflatten(-1, (2, 3)).transpose(1, 2) for z in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(3)
        weights = scores.masked_fill(~mask[0][:, None, None], -math.inf).softmax(-1)
        attended = (weights @ heads[2]).transpose(1, 2).flatten(-2) @ layer.out.weight[0] + layer.out.bias[0]
        y = F.layer_norm(dropped(attended, "dropout") + x[0], (6,), layer.norm.weight[0], layer.norm.bias[0])
        hidden = torch.relu(y @ ffn.expand.weight[0] + ffn.expand.bias[0])
        out = dropped(hidden @ ffn.contract.weight[0] + ffn.contract.bias[0], "feed_forward.dropout")
        return F.layer_norm(out + y, (6,), ffn.norm.weight[0], ffn.norm.bias[0])[None]

    wanted = [x, *layer.parameters()]
    out = layer(x.flatten(1, 2), mask.flatten(1), layout, draw=draw).unflatten(1, (4, 5))
    expected = literal()
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradient() -> None:
    x = torch.randn(4, LAYOUT.rows, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(0.4)(x, LAYOUT, DRAW), (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_the_mask_is_the_same(dtype: torch.dtype) -> None:
    y = dropout(0.25)(torch.ones(4, LAYOUT.rows, 5, dtype=dtype), LAYOUT, DRAW)
    assert y.dtype == dtype
    m = kept(groups=2, rate=0.25, features=5)
    assert torch.equal(y, m.to(dtype) * torch.tensor(1 / 0.75, dtype=dtype))
