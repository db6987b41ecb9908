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
from fastmmkd.ops.philox import DrawKeys
from tests.handmade import batch_of, network_of

DIMS, STEPS = (5, 4, 3), (6, 6, 6)
METHODS = ("umdf", "corrkd", "hrlf")


def keys(sample: list[list[int]], seed: list[int], epoch: int = 4) -> DrawKeys:
    return DrawKeys(torch.tensor(sample), torch.tensor(seed), torch.tensor(epoch))


DRAW = keys([[7, 2, 9], [5, 0, 7]], [3, 2**33 + 1])
SHAPE = torch.Size((2 * 3, 2 * 3, 5, 6))
"""2 models, 3 groups, 2 versions of 3 samples."""


def dropout(rate: float, place: int = 0) -> Dropout:
    made = Dropout(rate)
    made.place = place
    return made


def kept(draw: DrawKeys = DRAW, shape: torch.Size = SHAPE, rate: float = 0.5, place: int = 0, first: int = 0):
    return kept_elements(round(rate * LEVELS), place, draw, shape, first)


def literal_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for i in range(10):
        if i:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second % 2**32, (first >> 32) ^ c[3] ^ k[1], first % 2**32]
    return c


def literal_kept(dropped: int, place: int, draw: DrawKeys, shape: torch.Size, first: int = 0) -> torch.Tensor:
    """Element by element, from the module's docstring."""
    groups, rows, steps, d = shape
    models, samples = draw.sample.shape
    found = torch.empty(shape, dtype=torch.bool)
    for g in range(groups):
        model, group = divmod(g, groups // models)
        seed = int(draw.seed[model])
        for row in range(rows):
            version, b = divmod(row, samples)
            stream = 2**31 + (place * 256 + first + group) * 16 + version
            for t in range(steps):
                for f in range(d):
                    block, element = divmod((steps - 1 - t) * d + f, 8)
                    counter = [block, int(draw.sample[model, b]), int(draw.epoch), stream]
                    word = literal_philox(counter, [seed % 2**32, seed >> 32])[element // 2]
                    level = word >> 16 if element % 2 else word % 2**16
                    found[g, row, t, f] = level >= dropped
    return found


@pytest.mark.parametrize(("rate", "place", "first"), [(0.1, 0, 0), (0.5, 7, 2)])
def test_every_element_is_that_of_the_literal_draw(rate: float, place: int, first: int) -> None:
    dropped = round(rate * LEVELS)
    assert torch.equal(kept(rate=rate, place=place, first=first), literal_kept(dropped, place, DRAW, SHAPE, first))


def test_known_answer() -> None:
    """The generator's published vector for zeros is 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    assert literal_philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_are_dropped_at_their_rate_independently_and_the_mean_stays(rate: float) -> None:
    draw = keys([list(range(40))], [1])
    x = torch.ones(2, 40, 50, 40)
    y = dropout(rate)(x, draw)
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
        whole = kept()
        models, groups, versions = (
            whole.unflatten(0, (2, 3)).unbind(0),
            whole.unflatten(0, (2, 3)).unbind(1),
            whole.unflatten(1, (2, 3)).unbind(1),
        )
        pairs = [
            (whole, kept(DRAW._replace(seed=DRAW.seed + 2**32))),
            (whole, kept(DRAW._replace(epoch=DRAW.epoch + 1))),
            (whole, kept(DRAW._replace(sample=DRAW.sample + 10))),
            (whole, kept(place=1)),
            (whole, kept(first=3)),
            models,
            groups[:2],
            groups[1:],
            versions,
        ]
        for a, b in pairs:
            agreement = (a == b).double().mean().item()
            assert 0.4 < agreement < 0.6, "masks at rate 0.5 that do not depend on each other agree on half"

    def test_samples_have_their_masks_wherever_they_stand(self) -> None:
        whole, order = kept(), [2, 0, 1]
        found = kept(DRAW._replace(sample=DRAW.sample[:, order]))
        assert torch.equal(found.unflatten(1, (2, 3)), whole.unflatten(1, (2, 3))[:, :, order])
        alone = kept(DRAW._replace(sample=DRAW.sample[:, 1:2]), torch.Size((6, 2, 5, 6)))
        assert torch.equal(alone.unflatten(1, (2, 1)), whole.unflatten(1, (2, 3))[:, :, 1:2])

    def test_models_have_the_masks_that_they_have_alone(self) -> None:
        whole = kept()
        for s in range(2):
            alone = kept(
                DrawKeys(DRAW.sample[s : s + 1], DRAW.seed[s : s + 1], DRAW.epoch), torch.Size((3, *SHAPE[1:]))
            )
            assert torch.equal(alone, whole.unflatten(0, (2, 3))[s])

    def test_groups_have_their_masks_in_any_part_of_a_layer(self) -> None:
        part = kept(shape=torch.Size((2, *SHAPE[1:])), first=1)
        assert torch.equal(part, kept().unflatten(0, (2, 3))[:, 1])

    def test_padding_before_a_sample_moves_nothing(self) -> None:
        longer = kept(shape=torch.Size((*SHAPE[:2], 9, SHAPE[3])))
        assert torch.equal(longer[:, :, 4:], kept())

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
        x = torch.ones(1)
        assert dropout(0.0)(x, draw) is x
        assert dropout(0.5).eval()(x, None) is x

    def test_evaluation_has_none(self, method: str) -> None:
        networks = [network_of(config_of(method, rate), DIMS, seed=1).double() for rate in (0.0, 0.5)]
        *batch, draw = inputs(networks[0])
        (logits, joint), others = (network.eval().predict(*batch[:2]) for network in networks)
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
    at_once = encoders(x, masks, draw)
    for m in range(3):
        shorter = [z if i == m else z[:, :, 1:] for i, z in enumerate(x)]
        fitting = [mask if i == m else mask[:, :, 1:] for i, mask in enumerate(masks)]
        (alone, _), ((together, _),) = encoders(shorter, fitting, draw)[m], at_once
        torch.testing.assert_close(alone[:, 0], together[:, m])


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_an_encoder_layer_and_its_gradients_equal_the_literal_ones(rate: float) -> None:
    torch.manual_seed(0)
    layer = EncoderLayer((1,), 6, 2, dropout=rate).double()
    number_dropouts(layer)
    draw, mask = keys([[7, 2]], [3]), torch.rand(1, 4, 5) < 0.8
    mask[..., -1] = True
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    places = {name: module.place for name, module in layer.named_modules() if isinstance(module, Dropout)}
    assert set(places) == {"dropout", "feed_forward.dropout"}

    def dropped(z: torch.Tensor, name: str) -> torch.Tensor:
        m = literal_kept(round(rate * LEVELS), places[name], draw, torch.Size((1, 4, 5, 6)))[0]
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
    found, expected = layer(x, mask, draw=draw), literal()
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradient() -> None:
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    draw = keys([[7, 2]], [3])
    assert torch.autograd.gradcheck(lambda x: dropout(0.4)(x, draw), (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_the_mask_is_the_same(dtype: torch.dtype) -> None:
    draw = keys([[7, 2]], [3])
    y = dropout(0.25)(torch.ones(2, 4, 3, 5, dtype=dtype), draw)
    assert y.dtype == dtype
    m = kept_elements(LEVELS // 4, 0, draw, y.shape, 0)
    assert torch.equal(y, m.to(dtype) * torch.tensor(1 / 0.75, dtype=dtype))
