"""The compiled missing draw: bit for bit the reference's."""

from dataclasses import replace

import pytest
import torch

from fastmmkd.ops import missing_draw, reference, use_provider
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.providers import INTERPRETED
from fastmmkd.testing.draws import Split, split
from fastmmkd.testing.parity import (
    DEVICE,
    DTYPES,
    INSTRUCTION_SETS,
    PROVIDER,
    instruction_set,
    needs,
    only_cpp,
    poisoned_memory,
    threads,
)

pytestmark = needs("missing_draw")

ROWS = 50
BATCH = 4 if INTERPRETED else 33


def resident(longest=(8, 50, 3), widths=(5, 1, 40), dtypes=(torch.float32,) * 3) -> Split:
    """A split whose samples have any of the eight sets of modalities."""
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(ROWS, len(longest), generator=generator) < 0.7
    return split(present, longest, widths, dtypes, generator=generator)


def draw(data, sample, seed=(1, 2**40 + 7), epoch=3, versions=2, p_max=0.7, exact=False, layouts=None):
    keys = sample, torch.tensor(seed, device=DEVICE)[: sample.shape[0]], torch.tensor(epoch, device=DEVICE)
    arguments = *data, *keys, layouts or data.layouts(sample, versions, spare=2), versions, p_max, exact
    with use_provider(PROVIDER), poisoned_memory():
        drawn = missing_draw(*arguments)
    expected = reference.missing_draw(*arguments)
    for x, y in zip([*drawn[0], *drawn[1]], [*expected[0], *expected[1]], strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    return drawn


def samples(batch=BATCH):
    return torch.randint(ROWS, (2, batch), generator=torch.Generator().manual_seed(4)).to(DEVICE)


def keys(seeds=2):
    return torch.arange(1, seeds + 1, device=DEVICE), torch.tensor(0, device=DEVICE)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_equals_the_reference(exact, dtype, isa) -> None:
    with instruction_set(isa):
        _, masks = draw(resident(dtypes=(dtype,) * 3), samples(), exact=exact)
    assert any(mask.any() for mask in masks)


def test_every_modality_in_its_own_dtype() -> None:
    draw(resident(dtypes=(torch.float32, DTYPES[-1], torch.float32)), samples(4))


def test_fewer_modalities_than_the_samples_have() -> None:
    *parts, present = resident()
    draw(Split(*(x[:2] for x in parts), present), samples(4))
    draw(Split(*(x[:1] for x in parts), present), samples(4), exact=True)


def test_a_modality_that_nobody_has() -> None:
    present = torch.ones(ROWS, 3, dtype=torch.bool)
    present[:, 1] = False
    data = split(present, (3, 4, 5), (2, 3, 4))
    assert len(data.features[1]) == 0
    _, masks = draw(data, samples(4))
    assert not masks[1].any()


@pytest.mark.parametrize("exact", [False, True])
def test_more_room_than_frames_and_less(exact) -> None:
    data, sample = resident(), samples(5)
    draw(data, sample, exact=exact, layouts=data.layouts(sample, 2, room=(5, 60, 2)))
    lengths = [(of.lengths - 3).clamp_min(1) for of in data.layouts(sample, 2)]
    draw(data, sample, exact=exact, layouts=[Layout.of(n, int(n.sum(1).max()), int(n.max())) for n in lengths])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("p_max", [0.0, 0.3, 1.0])
def test_every_ratio(p_max, exact) -> None:
    draw(resident(), samples(), p_max=p_max, exact=exact)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("longest", [(1, 4, 5), (63, 64, 65), (257, 1, 2), (50, 375, 500)])
def test_lengths(longest, exact) -> None:
    batch, versions = (1, 1) if INTERPRETED else (7, 3)
    draw(resident(longest, (2, 3, 1)), samples(batch), versions=versions, exact=exact)


@pytest.mark.parametrize(("seed", "frames"), [(51095, 512), (203938, 512), (2691, 500)])
def test_exact_numbers_at_a_half_and_between_equal_draws(seed, frames) -> None:
    """Searched for: `p * frames` is 411.5 and 256.5; the last frame dropped draws what the first one kept draws."""
    mask = torch.ones(frames, dtype=torch.bool, device=DEVICE)
    row = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    data = Split([mask.float().unsqueeze(-1)], [mask], [torch.tensor([0, frames], device=DEVICE)], mask[:1, None])
    draw(data, row, (seed,), 0, versions=1, p_max=1.0, exact=True)


@pytest.mark.parametrize(("seed", "epoch"), [((0, -1), 0), ((-(2**63), 2**63 - 1), 2**31), ((5, 6), 2**32 + 1)])
def test_keys_at_their_limits(seed, epoch) -> None:
    draw(resident(), samples(4), seed, epoch)


def test_one_seed_one_version_and_an_empty_batch() -> None:
    draw(resident(), samples()[:1], versions=1)
    draw(resident(), samples(0), layouts=resident().layouts(samples(0), 2))


def test_views() -> None:
    features, masks, starts, present = resident()
    views = [x.t().contiguous().t() for x in features]
    views_1d = [[torch.stack((x, x), 1)[:, 0] for x in xs] for xs in (masks, starts)]
    draw(Split(views, *views_1d, present.t().contiguous().t()), samples(10).t()[:2])


@only_cpp
@pytest.mark.parametrize("row", [ROWS, -1])
def test_samples_that_there_are_not(row) -> None:
    data = resident()
    layouts = data.layouts(torch.zeros(1, 1, dtype=torch.int64), 1)
    with pytest.raises(IndexError, match=f"sample has {row}; the split has {ROWS} samples"), use_provider(PROVIDER):
        missing_draw(*data, torch.tensor([[row]]), *keys(1), layouts, 1, 0.5)


@only_cpp
def test_starts_that_do_not_fit() -> None:
    data, sample = resident(), torch.tensor([[7]])
    layouts = data.layouts(sample, 1)
    beyond = [data.starts[0] + 1000, *data.starts[1:]]
    with pytest.raises(RuntimeError, match="modality 0: sample 7 has the rows from 1"), use_provider(PROVIDER):
        missing_draw(*data._replace(starts=beyond), sample, *keys(1), layouts, 1, 0.5)
    short = replace(layouts[1], longest=0)
    with pytest.raises(RuntimeError, match="batch: sample 0 of model 0 has the rows from 0"), use_provider(PROVIDER):
        missing_draw(*data, sample, *keys(1), [layouts[0], short, layouts[2]], 1, 0.5)


@only_cpp
def test_the_number_of_threads_does_not_matter() -> None:
    with threads(1):
        one = draw(resident((200, 200, 200)), samples(64))
    with threads(2):
        two = draw(resident((200, 200, 200)), samples(64))
    assert all(torch.equal(a, b) for a, b in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True))


def test_features_that_want_a_gradient_receive_it() -> None:
    data = resident()
    data.features[0].requires_grad_()
    layouts = data.layouts(samples(), 2)
    with use_provider(PROVIDER):
        drawn, kept = missing_draw(*data, samples(), *keys(), layouts, 2, 0.5)
    (gradient,) = torch.autograd.grad(drawn[0].sum(), data.features[0])
    assert gradient.sum() == kept[0].sum() * data.features[0].shape[-1]


def test_the_operation_is_well_defined() -> None:
    data = resident()
    layouts = data.layouts(samples(1), 2)
    batch_starts, rows, longest = zip(*((of.starts, of.rows, of.longest) for of in layouts), strict=True)
    arguments = *data, samples(1), *keys(), batch_starts, rows, longest, 2, 0.5, False
    torch.library.opcheck(torch.ops.fastmmkd.missing_draw.default, arguments)


def test_compiles_to_one_graph() -> None:
    data = resident()
    arguments = *data, samples(4), *keys(), data.layouts(samples(4), 2), 2, 0.5
    compiled = torch.compile(missing_draw, fullgraph=True, backend="aot_eager")
    actual, expected = (f(*arguments) for f in (compiled, missing_draw))
    for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(a, b)
