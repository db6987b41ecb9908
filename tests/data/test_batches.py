"""From the store to a step: standardised features, and masks that depend on nothing they should not depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.blocks import DataBlock, MissingBlock
from fastmmkd.data import batches
from fastmmkd.data.batches import Batch, Inputs, ResidentSplit, View, by_layer, frames_of, scaling, standardise
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.data.missingness import evaluation_drops
from fastmmkd.modalities import CONDITIONS, MODALITIES, condition_modalities
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.missing_draw import dropped_frames
from tests.handmade import config_for_data, lacking, layout_of, samples_of

STEPS, DIMS, SAMPLES = (6, 9, 4), (5, 4, 3), 12
ALL = (True, True, True)


def make_split() -> Split:
    """Samples 0 to 2 lack language, audio, visual; language frame -2 of sample 5 is all zero (missing)."""
    rng = np.random.default_rng(0)
    present = np.ones((SAMPLES, 3), dtype=bool)
    present[range(3), range(3)] = False
    lengths = np.stack([rng.integers(2, t + 1, SAMPLES) for t in STEPS], axis=1).astype(np.int32) * present
    features = {}
    for i, (m, t, d) in enumerate(zip(MODALITIES, STEPS, DIMS, strict=True)):
        x = rng.normal(2.0, 3.0, size=(SAMPLES, t, d)).astype(np.float32)
        x[np.arange(t)[None, :] < t - lengths[:, i, None]] = 0
        features[m] = x
    features["language"][5, -2] = 0
    labels = rng.uniform(-3, 3, SAMPLES).astype(np.float32)
    return Split.from_padded(features, lengths, present, labels, [str(i) for i in range(SAMPLES)])


NORMALISATION = {m: (np.full(d, 2.0), np.full(d, 3.0)) for m, d in zip(MODALITIES, DIMS, strict=True)}


def resident(
    masking: str = "missing",
    clip: float | None = 10.0,
    dtype: torch.dtype = torch.float32,
    masked_layers: str = "all",
    raw: Split | None = None,
    padded: bool = False,
) -> ResidentSplit:
    config = config_for_data(clip=clip, attention_mask=masking, masked_layers=masked_layers)
    return ResidentSplit(raw or make_split(), NORMALISATION, config, torch.device("cpu"), dtype, padded)


def training(split: ResidentSplit, sample: torch.Tensor, seed: int = 7, epoch: int = 3, **missing: Any) -> Batch:
    """Of one model, or of several with the seeds that follow."""
    split.missing = MissingBlock(**missing)
    seeds = torch.arange(seed, seed + len(sample))
    return split.training_batch(sample, seeds, torch.tensor(epoch), (View.MISSING, View.MISSING_2))


def stored(split: ResidentSplit, of: list[torch.Tensor], i: int, m: int) -> torch.Tensor:
    """What a split holds of one sample's modality, behind zeros for rows of a batch that it has no frames for."""
    start, end = split.starts[m][i : i + 2].tolist()
    x = of[m][start:end]
    return torch.cat((x.new_zeros(int(split.rows[i, m]) - len(x), *x.shape[1:]), x))


def of_samples(x: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """See `samples_of`; nothing is in rows of nobody."""
    assert not x[~layout.is_somebodys].any()
    return samples_of(x, layout)


def assert_same_samples(batch: Inputs, of: Inputs, numbers: list[int]) -> None:
    """Those of a batch are some of another's."""
    layouts = batch.layouts * 2, of.layouts * 2  # masks may be six
    for own, other in ((batch.features, of.features), (batch.masks, of.masks)):
        for x, layout, y, layout_y in zip(own, layouts[0], other, layouts[1], strict=False):
            expected = of_samples(y, layout_y)
            for found, i in zip(of_samples(x, layout), numbers, strict=True):
                assert torch.equal(found, expected[i])


class TestStandardisation:
    def test_by_hand(self) -> None:
        x = np.array([[3.0, 10.0], [1.0, -90.0], [5.0, 5.0]], dtype=np.float32)
        mask = np.array([True, True, False])
        z = standardise(x, mask, np.array([1.0, 10.0]), np.array([2.0, 4.0]), clip=5.0)
        assert z.dtype == np.float32
        np.testing.assert_array_equal(z, [[1.0, 0.0], [0.0, -5.0], [0.0, 0.0]])

    def test_without_clip(self) -> None:
        z = standardise(np.full((1, 1), 1e6, np.float32), np.ones(1, bool), np.zeros(1), np.ones(1), clip=None)
        assert z.item() == 1e6

    def test_part_by_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, mask = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32), np.arange(7) % 3 > 0
        whole = standardise(x, mask, np.ones(3), np.full(3, 2.0), clip=0.5)
        monkeypatch.setattr(batches, "CHUNK", 3)
        np.testing.assert_array_equal(standardise(x, mask, np.ones(3), np.full(3, 2.0), clip=0.5), whole)

    def test_what_is_absent_is_zero_whatever_the_mean(self) -> None:
        """Zero before standardisation would otherwise become -mean / std."""
        split, raw = resident(), make_split()
        for m, (x, mask) in enumerate(zip(split.features, split.frame_masks, strict=True)):
            assert torch.equal(mask, torch.from_numpy(raw.frame_mask(MODALITIES[m])))
            assert not x[~mask].any()
            expected = (raw.features[MODALITIES[m]] - np.float32(2)) / np.float32(3)
            np.testing.assert_allclose(x[mask].numpy(), expected[mask.numpy()], rtol=1e-6)

    def test_raw_features_are_as_extracted(self) -> None:
        splits = {"train": make_split()}
        dataset = Dataset(splits, "score", "hand-made", "synthetic", normalisation=NORMALISATION)
        assert scaling(DataBlock(path="x.h5"), dataset) is NORMALISATION
        raw = scaling(DataBlock(path="x.h5", standardise=False, clip=None), dataset)
        for modality in MODALITIES:
            x, mask = splits["train"].features[modality], splits["train"].frame_mask(modality)
            np.testing.assert_array_equal(standardise(x, mask, *raw[modality], None), x * mask[..., None])

    def test_clip_holds_everywhere(self) -> None:
        split = resident(clip=0.5)
        assert all(x.abs().max() == 0.5 for x in split.features)

    def test_dtype_is_that_of_training(self) -> None:
        assert all(x.dtype == torch.bfloat16 for x in resident(dtype=torch.bfloat16).features)


class TestRows:
    def test_every_sample_has_a_row_for_each_of_its_frames(self) -> None:
        raw, split = make_split(), resident()
        np.testing.assert_array_equal(split.rows[raw.present], raw.lengths[raw.present])
        assert not split.is_padded
        assert not split.aligned
        for m, layout in enumerate(split.layouts(torch.arange(SAMPLES)[None])):
            assert layout.lengths[0].tolist() == split.rows[:, m].tolist()
            assert layout.is_somebodys.all()

    def test_an_absent_modality_takes_the_length_of_the_longest_of_the_others(self) -> None:
        raw = make_split()
        assert frames_of(raw)[0].tolist() == [max(raw.lengths[0, 1:]), *raw.lengths[0, 1:]]

    def test_a_sample_that_has_nothing_has_a_row_that_is_no_frame(self) -> None:
        raw = make_split()
        for modality in MODALITIES:
            raw = lacking(raw, modality, slice(4, 5))
        split, sample = resident(raw=raw), torch.tensor([[4]])
        batch = split.complete(sample)
        assert [x.shape[:2] for x in batch.features] == [(1, 1)] * 3
        assert not any(mask.any() for mask in batch.masks)
        assert not any(real.any() for real in split.real(sample, batch.layouts))

    def test_a_modality_that_nobody_has(self) -> None:
        raw = lacking(make_split(), "audio", slice(None))
        split, sample = resident(raw=raw), torch.tensor([[3, 1, 4]])
        assert split.features[1].shape == (0, DIMS[1])
        for enabled in (True, False):
            inputs = training(split, sample, enabled=enabled).inputs
            assert inputs.features[1].shape == (1, 2 * split.rows[[3, 1, 4], 1].sum(), DIMS[1])
            assert not inputs.features[1].any()
            assert not inputs.masks[1].any()
        assert not split.evaluation_batch(sample[0], ALL, 0.5).masks[1].any()

    def test_a_missing_frame_is_real(self) -> None:
        split, sample = resident(), torch.tensor([[5]])
        layouts = split.layouts(sample)
        assert split.real(sample, layouts)[0].all()
        assert not split.complete(sample, layouts).masks[0][0, -2]

    def test_modalities_of_the_same_lengths_share_a_layout(self) -> None:
        raw = make_split()
        shared = raw.lengths.max(axis=1, keepdims=True)
        assert not resident(raw=raw).aligned
        features = {
            m: np.ones((int((shared[:, 0] * raw.present[:, i]).sum()), d), np.float32)
            for i, (m, d) in enumerate(zip(MODALITIES, DIMS, strict=True))
        }
        split = resident(raw=replace(raw, features=features, lengths=(shared * raw.present).astype(np.int32)))
        assert split.aligned
        inputs = training(split, torch.tensor([[0, 3]])).inputs
        assert inputs.aligned
        assert inputs.layouts[0] is inputs.layouts[2]

    @pytest.mark.parametrize("masking", ["missing", "padding"])
    def test_padded_to_the_longest_the_frames_come_last(self, masking: str) -> None:
        raw, split, sample = make_split(), resident(masking, padded=True), torch.arange(SAMPLES)[None]
        frames = frames_of(raw)
        batch = training(split, sample)
        for m, layout in enumerate(batch.layouts):
            assert layout.lengths.unique().tolist() == [frames[:, m].max()]
            for i, real in enumerate(of_samples(batch.real[m], layout)):
                padding = len(real) - frames[i, m]
                assert real.tolist() == [False] * padding + [True] * frames[i, m]
                position = samples_of(layout.position, layout)[i]
                assert position.tolist() == [0] * padding + list(range(frames[i, m]))

    def test_where_nothing_is_masked_padding_counts_as_frames(self) -> None:
        split = resident("none")
        assert split.is_padded
        longest_of = frames_of(make_split()).max(axis=0)
        for longest, layout in zip(longest_of, split.layouts(torch.tensor([[2, 7]])), strict=True):
            assert layout.position.tolist() == [[*range(longest)] * 2]


class TestRoom:
    BATCHES = np.array([[[3, 4, 5], [6, 7, 8]], [[0, 1, 2], [9, 10, 11]]])
    """Two models, two steps of three samples."""

    def test_every_batch_has_the_rows_of_the_largest(self) -> None:
        split = resident()
        split.make_room(iter([self.BATCHES[:, :1], self.BATCHES[:, 1:]]))
        largest = split.rows[self.BATCHES].sum(axis=2).max(axis=(0, 1))
        assert split.room == largest.tolist()
        for step in range(2):
            batch = training(split, torch.from_numpy(self.BATCHES[:, step]))
            assert [layout.rows for layout in batch.layouts] == split.room
            assert [x.shape[1] for x in batch.inputs.features] == [2 * rows for rows in split.room]

    def test_samples_are_what_they_are_without_it(self) -> None:
        sample = torch.from_numpy(self.BATCHES[:, 0])
        tight, spacious = resident(), resident()
        spacious.room = [50, 60, 70]
        expected, roomy = (training(split, sample) for split in (tight, spacious))
        assert [x.shape[1] for x in roomy.inputs.features] == [100, 120, 140]
        assert_same_samples(roomy.inputs, expected.inputs, list(range(2 * 2 * 3)))
        for view in (View.MISSING, View.MISSING_2):
            assert_same_samples(roomy.view(view), expected.view(view), list(range(2 * 3)))
        of_both = (map(of_samples, batch.real, batch.layouts) for batch in (roomy, expected))
        for own, other in zip(*of_both, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))

    def test_evaluation_does_not_know_it(self) -> None:
        split = resident()
        split.room = [50, 60, 70]
        inputs = split.evaluation_batch(torch.tensor([3, 4]), ALL)
        assert [x.shape[1] for x in inputs.features] == split.rows[[3, 4]].sum(axis=0).tolist()


class TestTrainingBatch:
    def test_shapes_and_versions(self) -> None:
        split = resident()
        batch = training(split, torch.tensor([[3, 4, 5]]))
        rows = split.rows[[3, 4, 5]].sum(axis=0)
        assert batch.versions == 2
        assert [tuple(x.shape) for x in batch.inputs.features] == [
            (1, 2 * n, d) for n, d in zip(rows, DIMS, strict=True)
        ]
        assert [tuple(x.shape) for x in batch.inputs.masks] == [(1, 2 * n) for n in rows]
        np.testing.assert_array_equal(batch.targets[0].numpy(), make_split().labels[3:6])

    @pytest.mark.parametrize("enabled", [True, False])
    def test_features_are_zero_exactly_where_masked(self, enabled: bool) -> None:
        batch = training(resident(), torch.arange(SAMPLES)[None], enabled=enabled)
        for x, mask in zip(batch.inputs.features, batch.inputs.masks, strict=True):
            assert not x[~mask].any()
            assert x[mask].any(-1).all()

    @settings(deadline=None, max_examples=25)
    @given(epoch=st.integers(0, 1000), seed=st.integers(0, 2**31 - 1), p_max=st.floats(0, 1))
    def test_absent_modalities_stay_absent(self, epoch: int, seed: int, p_max: float) -> None:
        split = resident()
        batch = training(split, torch.arange(SAMPLES)[None], seed, epoch, p_max=p_max)
        for m in range(3):
            for i, mask in enumerate(of_samples(batch.inputs.masks[m], batch.inputs.layouts[m])):
                assert not (mask & ~stored(split, split.frame_masks, i % SAMPLES, m)).any()
                assert i % SAMPLES != m or not mask.any()

    def test_without_missingness_both_versions_are_the_sample(self) -> None:
        split, sample = resident(), [8, 0, 5]
        inputs = training(split, torch.tensor([sample]), enabled=False).inputs
        for m, layout in enumerate(inputs.layouts):
            for found, of in ((inputs.features[m], split.features), (inputs.masks[m], split.frame_masks)):
                for x, i in zip(of_samples(found, layout), 2 * sample, strict=True):
                    assert torch.equal(x, stored(split, of, i, m))

    @settings(deadline=None, max_examples=25)
    @given(order=st.permutations(range(SAMPLES)), size=st.integers(1, SAMPLES), padded=st.booleans())
    def test_draws_depend_on_the_sample_not_on_its_place_in_the_batch(
        self, order: list[int], size: int, padded: bool
    ) -> None:
        split, numbers = resident(padded=padded), order[:size]
        whole = training(split, torch.arange(SAMPLES)[None])
        part = training(split, torch.tensor([numbers]))
        assert_same_samples(part.inputs, whole.inputs, numbers + [SAMPLES + i for i in numbers])

    def test_nor_on_the_models_beside_it(self) -> None:
        sample = torch.tensor([[3, 4, 5], [8, 0, 5]])
        together = training(resident(), sample, seed=7).inputs
        for s in range(2):
            alone = training(resident(), sample[s : s + 1], seed=7 + s).inputs
            assert_same_samples(alone, together, list(range(6 * s, 6 * s + 6)))

    def test_nor_on_padding(self) -> None:
        plain, padded = (training(resident(padded=padded), torch.arange(SAMPLES)[None]) for padded in (False, True))
        for m in range(3):
            for of in ("features", "masks"):
                short, long = (
                    of_samples(getattr(batch.inputs, of)[m], batch.inputs.layouts[m]) for batch in (plain, padded)
                )
                for own, wide in zip(short, long, strict=True):
                    assert torch.equal(wide[len(wide) - len(own) :], own)
                    assert not wide[: len(wide) - len(own)].any()

    def test_draws_depend_on_seed_epoch_and_version(self) -> None:
        split, sample = resident(), torch.arange(SAMPLES)[None]
        first = training(split, sample, seed=1, epoch=0).inputs.masks[1]
        a, b = first.chunk(2, dim=1)
        assert not torch.equal(a, b)
        assert not torch.equal(first, training(split, sample, seed=2, epoch=0).inputs.masks[1])
        assert not torch.equal(first, training(split, sample, seed=1, epoch=1).inputs.masks[1])


MISSING: tuple[dict[str, Any], ...] = ({}, {"enabled": False})


class TestAttentionMasks:
    def test_missing_hides_padding_and_missing_frames(self) -> None:
        split = resident("missing")
        inputs = split.evaluation_batch(torch.arange(SAMPLES), (True, False, True))
        for i, mask in enumerate(of_samples(inputs.masks[0], inputs.layouts[0])):
            assert torch.equal(mask, stored(split, split.frame_masks, i, 0))
        assert not inputs.masks[1].any()
        assert not inputs.features[1].any()

    @pytest.mark.parametrize("padded", [False, True])
    def test_padding_hides_padding_alone(self, padded: bool) -> None:
        split, frames = resident("padding", padded=padded), frames_of(make_split())
        evaluated = split.evaluation_batch(torch.arange(SAMPLES), (True, False, True), p=1.0)
        assert not any(x.any() for x in evaluated.features)
        trained = training(split, torch.tensor([[4, 5]])).inputs
        for inputs, numbers in ((evaluated, list(range(SAMPLES))), (trained, [4, 5, 4, 5])):
            for m, layout in enumerate(inputs.layouts):
                for i, mask in zip(numbers, of_samples(inputs.masks[m], layout), strict=True):
                    assert mask.tolist() == [j >= len(mask) - frames[i, m] for j in range(len(mask))]

    def test_none_hides_nothing(self) -> None:
        split = resident("none")
        split.room = [20, 30, 20]
        for inputs in (
            split.evaluation_batch(torch.arange(SAMPLES), (True, False, True), p=0.5),
            training(split, torch.tensor([[4, 5]])).inputs,
        ):
            for mask, layout in zip(inputs.masks, inputs.layouts, strict=True):
                assert torch.equal(mask, layout.is_somebodys)

    @pytest.mark.parametrize("padded", [False, True])
    def test_the_later_layers_hide_padding_alone(self, padded: bool) -> None:
        """In training, whole or not, and in evaluation; the first layer hides what all hid before."""
        split, alone = (resident(masked_layers=layers, padded=padded) for layers in ("first", "all"))
        sample = torch.arange(SAMPLES)
        for inputs, of_all in (
            *((training(of, sample[None], **missing).inputs for of in (split, alone)) for missing in MISSING),
            (of.evaluation_batch(sample, (True, False, True), 0.5) for of in (split, alone)),
        ):
            first, later = by_layer(inputs.masks)
            assert all(torch.equal(a, b) for a, b in zip(first, of_all.masks, strict=True))
            real = split.real(sample[None], inputs.layouts)
            assert all(torch.equal(a, b) for a, b in zip(later, real, strict=True))
            assert all(mask.all() for mask in later) != padded

    def test_all_layers_share_their_masks(self) -> None:
        first, later = by_layer(training(resident(), torch.arange(SAMPLES)[None]).inputs.masks)
        assert all(a is b for a, b in zip(first, later, strict=True))

    @pytest.mark.parametrize("masking", ["padding", "none"])
    def test_without_masked_frames_no_layer_differs(self, masking: str) -> None:
        split = resident(masking, masked_layers="first")
        assert len(training(split, torch.arange(SAMPLES)[None]).inputs.masks) == 3

    @pytest.mark.parametrize("masking", ["padding", "none"])
    def test_it_changes_no_feature(self, masking: str) -> None:
        sample = torch.arange(SAMPLES)
        masked, reference = (resident(way, padded=True) for way in (masking, "missing"))
        for inputs, expected in (
            (training(of, sample[None]).inputs for of in (masked, reference)),
            (of.evaluation_batch(sample, ALL, 0.5, 1, 2) for of in (masked, reference)),
        ):
            assert all(torch.equal(x, y) for x, y in zip(inputs.features, expected.features, strict=True))


class TestEvaluationBatch:
    @pytest.mark.parametrize("condition", CONDITIONS)
    def test_a_condition_keeps_its_modalities_whole(self, condition: str) -> None:
        split, kept = resident(), condition_modalities(condition)
        inputs = split.evaluation_batch(torch.arange(SAMPLES), kept)
        for m, layout in enumerate(inputs.layouts):
            for found, of in ((inputs.features[m], split.features), (inputs.masks[m], split.frame_masks)):
                for i, x in enumerate(of_samples(found, layout)):
                    assert torch.equal(x, stored(split, of, i, m) * kept[m])

    @pytest.mark.parametrize("masked_layers", ["all", "first"])
    @pytest.mark.parametrize("masking", ["missing", "padding", "none"])
    @pytest.mark.parametrize("condition", CONDITIONS)
    def test_a_subset_of_all_there_is_is_the_condition(self, condition: str, masking: str, masked_layers: str) -> None:
        split, kept = resident(masking, masked_layers=masked_layers), condition_modalities(condition)
        subset = split.evaluation_batch(torch.arange(SAMPLES), ALL).only(kept)
        expected = split.evaluation_batch(torch.arange(SAMPLES), kept)
        assert all(torch.equal(a, b) for a, b in zip(subset.features, expected.features, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(subset.masks, expected.masks, strict=True))

    @settings(deadline=None, max_examples=25)
    @given(order=st.permutations(range(SAMPLES)), size=st.integers(1, SAMPLES), exact=st.booleans())
    def test_masks_depend_on_seed_sample_and_condition_alone(self, order: list[int], size: int, exact: bool) -> None:
        split, numbers = resident(), order[:size]
        whole = split.evaluation_batch(torch.arange(SAMPLES), ALL, 0.5, 2024, 4, exact)
        torch.manual_seed(size)  # no generator of torch is involved
        part = split.evaluation_batch(torch.tensor(numbers), ALL, 0.5, 2024, 4, exact)
        assert_same_samples(part, whole, numbers)

    @pytest.mark.parametrize(("seed", "condition"), [(2025, 4), (2024, 5)])
    def test_another_seed_or_condition_draws_anew(self, seed: int, condition: int) -> None:
        split, sample = resident(), torch.arange(SAMPLES)
        first = split.evaluation_batch(sample, ALL, 0.5, 2024, 4)
        other = split.evaluation_batch(sample, ALL, 0.5, seed, condition)
        assert not torch.equal(first.masks[1], other.masks[1])

    def test_modalities_are_drawn_apart(self) -> None:
        mask = torch.ones(SAMPLES, 30, dtype=torch.bool)
        drops = [drops_of(mask, 0.5, m, 1, 0) for m in range(3)]
        assert not torch.equal(drops[0], drops[1])
        assert not torch.equal(drops[1], drops[2])

    @pytest.mark.parametrize("exact", [True, False])
    def test_the_ends_of_the_sweep(self, exact: bool) -> None:
        split, sample = resident(), torch.arange(SAMPLES)
        whole = split.evaluation_batch(sample, ALL, 0.0, 1, 2, exact)
        assert all(torch.equal(a, b) for a, b in zip(whole.masks, split.complete(sample[None]).masks, strict=True))
        nothing = split.evaluation_batch(sample, ALL, 1.0, 1, 2, exact)
        assert not any(mask.any() for mask in nothing.masks)
        assert not any(x.any() for x in nothing.features)

    def test_the_ratio_is_that_of_the_frames_that_are_there(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(400, 50, generator=generator) < 0.6
        dropped = drops_of(mask, 0.3, 1, 2024, 3)
        assert not (dropped & ~mask).any()
        # Binomial over about 12,000 frames: four standard deviations are 0.017.
        assert dropped.sum() / mask.sum() == pytest.approx(0.3, abs=0.017)
        exactly = drops_of(mask, 0.3, 1, 2024, 3, exact=True)
        assert torch.equal(exactly.sum(1), torch.round(0.3 * mask.sum(1)).long())

    def test_no_test_mask_is_a_training_mask(self) -> None:
        """Even with equal seeds: evaluation counts its versions from elsewhere."""
        mask = torch.ones(200, 40, dtype=torch.bool)
        layout = layout_of(1, 200, 40)
        one = torch.ones(1, 1, dtype=torch.int64)
        for condition in range(11):
            tested = drops_of(mask, 0.5, 0, 5, condition)
            for version in range(2):
                keys = layout.sample, 5 * one, 0 * one, version * one
                half = torch.full_like(layout.sample, 0.5, dtype=torch.float32)
                trained = dropped_frames(mask.view(1, -1), layout.position, half, 0, keys, layout, False)
                agreement = (tested.flatten() == trained[0]).float().mean().item()
                assert agreement == pytest.approx(0.5, abs=0.03)  # 8,000 fair coins: five standard deviations


def drops_of(mask: torch.Tensor, p: float, m: int, seed: int, condition: int, exact: bool = False) -> torch.Tensor:
    """What a condition drops of samples 0, 1, ... of one length: `[B, T]` bool twice."""
    layout, sample = layout_of(1, *mask.shape), torch.arange(len(mask))[None]
    drops = evaluation_drops(mask.view(1, -1), layout.position, p, m, sample, layout, seed, condition, exact)
    return drops.view(mask.shape)


class TestViews:
    SAMPLE = torch.tensor([[3, 0, 5]])

    def batch(self, *views: View, **missing: Any) -> Batch:
        split = resident()
        split.missing = MissingBlock(**missing)
        return split.training_batch(self.SAMPLE, torch.tensor([7]), torch.tensor(3), views)

    def test_a_phase_sees_what_it_asks_for(self) -> None:
        both = self.batch(View.MISSING, View.MISSING_2)
        for view, numbers in ((View.MISSING, [0, 1, 2]), (View.MISSING_2, [3, 4, 5])):
            assert_same_samples(both.view(view), both.inputs, numbers)
        one = self.batch(View.MISSING, View.COMPLETE)
        assert all(
            torch.equal(x, y) for x, y in zip(one.inputs.features, both.view(View.MISSING).features, strict=True)
        )
        assert one.view(View.COMPLETE) is one.complete
        assert self.batch(View.COMPLETE).inputs is not None
        for wrong, view in ((both, View.COMPLETE), (one, View.MISSING_2), (self.batch(View.COMPLETE), View.MISSING)):
            with pytest.raises(ValueError, match=f"the phase does not see {view}"):
                wrong.view(view)

    def test_views_have_the_masks_of_every_layer(self) -> None:
        split = resident(masked_layers="first", padded=True)
        batch = training(split, torch.tensor([[3, 0, 5], [1, 2, 3]]))
        for view, numbers in ((View.MISSING, [0, 1, 2, 6, 7, 8]), (View.MISSING_2, [3, 4, 5, 9, 10, 11])):
            assert len(batch.view(view).masks) == 6
            assert_same_samples(batch.view(view), batch.inputs, numbers)

    def test_it_knows_rows_kept_modalities_and_real_frames(self) -> None:
        batch, raw = self.batch(View.MISSING, View.MISSING_2, p_max=0.0), make_split()
        assert batch.rows.tolist() == self.SAMPLE.tolist()
        assert batch.kept.shape == (1, 2, 3, 3)
        for m, layout in enumerate(batch.inputs.layouts):  # nothing else is dropped
            kept = [mask.any() for mask in of_samples(batch.inputs.masks[m], layout)]
            assert kept == batch.kept[..., m].flatten().tolist()
            assert batch.real[m].sum() == frames_of(raw)[self.SAMPLE[0], m].sum()
        whole = self.batch(View.MISSING, enabled=False).kept
        assert torch.equal(whole[0, 0], torch.from_numpy(raw.present)[self.SAMPLE[0]])
