"""The compiled missing draw: bit for bit the reference's."""

import pytest
import torch

from fastmmkd.ops import missing_draw, reference, use_provider
from fastmmkd.ops.providers import INTERPRETED
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


def resident(steps=(8, 50, 3), widths=(5, 1, 40), dtypes=(torch.float32,) * 3):
    """A split whose samples have any of the eight sets of modalities."""
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(ROWS, len(steps), generator=generator) < 0.7
    features, masks = [], []
    for m, (t, d, dtype) in enumerate(zip(steps, widths, dtypes, strict=True)):
        mask = (torch.rand(ROWS, t, generator=generator) < 0.8) & present[:, m, None]
        features.append((torch.randn(ROWS, t, d, generator=generator) * mask.unsqueeze(-1)).to(DEVICE, dtype))
        masks.append(mask.to(DEVICE))
    return features, masks, present.to(DEVICE)


def draw(data, sample, seed=(1, 2**40 + 7), epoch=3, versions=2, p_max=0.7, exact=False):
    keys = sample, torch.tensor(seed, device=DEVICE)[: sample.shape[0]], torch.tensor(epoch, device=DEVICE)
    arguments = *data, *keys, versions, p_max, exact
    with use_provider(PROVIDER), poisoned_memory():
        found = missing_draw(*arguments)
    expected = reference.missing_draw(*arguments)
    for x, y in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    return found


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
    features, masks, present = resident()
    draw((features[:2], masks[:2], present), samples(4))
    draw((features[:1], masks[:1], present), samples(4), exact=True)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("p_max", [0.0, 0.3, 1.0])
def test_every_ratio(p_max, exact) -> None:
    draw(resident(), samples(), p_max=p_max, exact=exact)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("steps", [(1, 4, 5), (63, 64, 65), (257, 1, 2), (50, 375, 500)])
def test_lengths(steps, exact) -> None:
    batch, versions = (1, 1) if INTERPRETED else (7, 3)
    draw(resident(steps, (2, 3, 1)), samples(batch), versions=versions, exact=exact)


@pytest.mark.parametrize(("seed", "frames"), [(51095, 512), (203938, 512), (2691, 500)])
def test_exact_numbers_at_a_half_and_between_equal_draws(seed, frames) -> None:
    """Searched for: `p * frames` is 411.5 and 256.5; the last frame dropped draws what the first one kept draws."""
    mask = torch.ones(1, frames, dtype=torch.bool, device=DEVICE)
    row = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    draw(([mask.float().unsqueeze(-1)], [mask], mask[:, :1]), row, (seed,), 0, versions=1, p_max=1.0, exact=True)


@pytest.mark.parametrize(("seed", "epoch"), [((0, -1), 0), ((-(2**63), 2**63 - 1), 2**31), ((5, 6), 2**32 + 1)])
def test_keys_at_their_limits(seed, epoch) -> None:
    draw(resident(), samples(4), seed, epoch)


def test_one_seed_one_version_and_an_empty_batch() -> None:
    draw(resident(), samples()[:1], versions=1)
    draw(resident(), samples(0))


def test_negative_rows_and_views() -> None:
    features, masks, present = resident()
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in features]
    draw((views, [x.t().contiguous().t() for x in masks], present.t().contiguous().t()), samples(10).t()[:2] - ROWS)


@only_cpp
@pytest.mark.parametrize("row", [ROWS, -ROWS - 1])
def test_rows_that_there_are_not(row) -> None:
    with pytest.raises(IndexError, match=f"sample has {row}; the split has {ROWS} rows"), use_provider(PROVIDER):
        missing_draw(*resident(), torch.tensor([[row]]), *keys(1), 1, 0.5)


@only_cpp
def test_the_number_of_threads_does_not_matter() -> None:
    with threads(1):
        one = draw(resident((200, 200, 200)), samples(64))
    with threads(2):
        two = draw(resident((200, 200, 200)), samples(64))
    assert all(torch.equal(a, b) for a, b in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True))


def test_features_that_want_a_gradient_receive_it() -> None:
    features, masks, present = resident()
    features[0].requires_grad_()
    with use_provider(PROVIDER):
        drawn, kept = missing_draw(features, masks, present, samples(), *keys(), 2, 0.5)
    (gradient,) = torch.autograd.grad(drawn[0].sum(), features[0])
    assert gradient.sum() == kept[0].sum() * features[0].shape[-1]


def test_the_operation_is_well_defined() -> None:
    arguments = *resident(), samples(1), *keys(), 2, 0.5, False
    torch.library.opcheck(torch.ops.fastmmkd.missing_draw.default, arguments)


def test_compiles_to_one_graph() -> None:
    arguments = *resident(), samples(4), *keys(), 2, 0.5
    compiled = torch.compile(missing_draw, fullgraph=True, backend="aot_eager")
    found, expected = (f(*arguments) for f in (compiled, missing_draw))
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(a, b)
