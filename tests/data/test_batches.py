"""From the store to a step: standardised features, and masks that depend on nothing they should not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.blocks import DataBlock, MissingBlock
from fastmmkd.data.batches import Batch, ResidentSplit, View, by_layer, real_mask, scaling, standardise
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.data.missingness import evaluation_drops
from fastmmkd.modalities import CONDITIONS, MODALITIES, condition_modalities
from fastmmkd.ops.reference import dropped_frames
from tests.handmade import config_for_data

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
    return Split(features, lengths, present, labels, [str(i) for i in range(SAMPLES)])


NORMALISATION = {m: (np.full(d, 2.0), np.full(d, 3.0)) for m, d in zip(MODALITIES, DIMS, strict=True)}


def resident(
    masking: str = "missing",
    clip: float | None = 10.0,
    dtype: torch.dtype = torch.float32,
    masked_layers: str = "all",
) -> ResidentSplit:
    config = config_for_data(clip=clip, attention_mask=masking, masked_layers=masked_layers)
    return ResidentSplit(make_split(), NORMALISATION, config, torch.device("cpu"), dtype)


def training(split: ResidentSplit, sample: torch.Tensor, seed: int = 7, epoch: int = 3, **missing: Any) -> Batch:
    split.missing = MissingBlock(**missing)
    return split.training_batch(sample, torch.tensor([seed]), torch.tensor(epoch), (View.MISSING, View.MISSING_2))


class TestStandardisation:
    def test_by_hand(self) -> None:
        x = np.array([[[3.0, 10.0], [1.0, -90.0], [5.0, 5.0]]], dtype=np.float32)
        mask = np.array([[True, True, False]])
        z = standardise(x, mask, np.array([1.0, 10.0]), np.array([2.0, 4.0]), clip=5.0)
        assert z.dtype == np.float32
        np.testing.assert_array_equal(z, [[[1.0, 0.0], [0.0, -5.0], [0.0, 0.0]]])

    def test_without_clip(self) -> None:
        z = standardise(np.full((1, 1, 1), 1e6, np.float32), np.ones((1, 1), bool), np.zeros(1), np.ones(1), clip=None)
        assert z.item() == 1e6

    def test_what_is_absent_is_zero_whatever_the_mean(self) -> None:
        """Zero before standardisation would otherwise become -mean / std."""
        split, raw = resident(), make_split()
        for m, (x, mask) in enumerate(zip(split.features, split.frame_masks, strict=True)):
            np.testing.assert_array_equal(mask.numpy(), raw.frame_mask(MODALITIES[m]))
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


class TestRealMask:
    def test_the_real_frames_come_last(self) -> None:
        raw = make_split()
        for m, t in enumerate(STEPS):
            mask = real_mask(raw, m)
            there = raw.present[:, m]
            np.testing.assert_array_equal(mask.sum(1)[there], raw.lengths[there, m])
            assert (np.diff(mask.astype(int), axis=1) >= 0).all(), "padding first"
            assert mask.shape == (SAMPLES, t)

    def test_an_absent_modality_takes_the_length_of_the_others_as_far_as_it_fits(self) -> None:
        raw = make_split()
        raw.lengths[0] = [0, 8, 3]
        assert real_mask(raw, 0)[0].sum() == 6  # 8 frames of audio, language has room for 6
        raw.lengths[2] = [5, 2, 0]
        assert real_mask(raw, 2)[2].sum() == 4

    def test_a_missing_frame_is_real(self) -> None:
        raw = make_split()
        raw.lengths[5, 0] = 6
        assert real_mask(raw, 0)[5].all()
        assert not raw.frame_mask("language")[5, -2]


class TestTrainingBatch:
    def test_shapes_and_versions(self) -> None:
        sample = torch.tensor([[3, 4, 5]])
        batch = training(resident(), sample)
        assert [tuple(x.shape) for x in batch.inputs.features] == [
            (1, 6, t, d) for t, d in zip(STEPS, DIMS, strict=True)
        ]
        assert [tuple(x.shape) for x in batch.inputs.masks] == [(1, 6, t) for t in STEPS]
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
        batch = training(resident(), torch.arange(SAMPLES)[None], seed, epoch, p_max=p_max)
        for m in range(3):
            mask = batch.inputs.masks[m].view(2, SAMPLES, -1)
            assert not mask[:, m].any()
            assert not (mask & ~resident().frame_masks[m]).any()

    def test_without_missingness_both_versions_are_the_sample(self) -> None:
        split, sample = resident(), torch.tensor([[8, 0, 5]])
        batch = training(split, sample, enabled=False)
        for m in range(3):
            for version in batch.inputs.features[m].view(2, 3, *batch.inputs.features[m].shape[2:]):
                assert torch.equal(version, split.features[m][sample[0]])
            for version in batch.inputs.masks[m].view(2, 3, -1):
                assert torch.equal(version, split.frame_masks[m][sample[0]])

    @settings(deadline=None, max_examples=25)
    @given(order=st.permutations(range(SAMPLES)), size=st.integers(1, SAMPLES))
    def test_draws_depend_on_the_sample_not_on_its_place_in_the_batch(self, order: list[int], size: int) -> None:
        split = resident()
        whole = training(split, torch.arange(SAMPLES)[None])
        sample = torch.tensor(order[:size])
        part = training(split, sample[None])
        for m in range(3):
            expected = whole.inputs.masks[m].view(2, SAMPLES, -1)[:, sample]
            assert torch.equal(part.inputs.masks[m].view(2, size, -1), expected)

    def test_draws_depend_on_seed_epoch_and_version(self) -> None:
        split, sample = resident(), torch.arange(SAMPLES)[None]
        first = training(split, sample, seed=1, epoch=0).inputs.masks[1]
        a, b = first.view(2, SAMPLES, -1)
        assert not torch.equal(a, b)
        assert not torch.equal(first, training(split, sample, seed=2, epoch=0).inputs.masks[1])
        assert not torch.equal(first, training(split, sample, seed=1, epoch=1).inputs.masks[1])


class TestAttentionMasks:
    def test_missing_hides_padding_and_missing_frames(self) -> None:
        features, masks = resident("missing").evaluation_batch(torch.arange(SAMPLES), (True, False, True))
        assert torch.equal(masks[0][0], resident().frame_masks[0])
        assert not masks[1].any()
        assert not features[1].any()

    def test_padding_hides_padding_alone(self) -> None:
        split = resident("padding")
        features, masks = split.evaluation_batch(torch.arange(SAMPLES), (True, False, True), p=1.0)
        for m in range(3):
            assert torch.equal(masks[m][0], torch.from_numpy(real_mask(make_split(), m)))
            assert not features[m].any()
        batch = training(split, torch.tensor([[4, 5]]))
        assert torch.equal(batch.inputs.masks[0], torch.from_numpy(real_mask(make_split(), 0))[[4, 5, 4, 5]][None])

    def test_none_hides_nothing(self) -> None:
        split = resident("none")
        _, masks = split.evaluation_batch(torch.arange(SAMPLES), (True, False, True), p=0.5)
        assert all(mask.all() for mask in masks)
        assert all(mask.all() for mask in training(split, torch.tensor([[4, 5]])).inputs.masks)

    def test_the_later_layers_hide_padding_alone(self) -> None:
        """In training, whole or not, and in evaluation; the first layer hides what all hid before."""
        split, sample = resident(masked_layers="first"), torch.arange(SAMPLES)
        real = [torch.from_numpy(real_mask(make_split(), m)) for m in range(3)]
        for found, alone, versions in (
            (training(split, sample[None]).inputs.masks, training(resident(), sample[None]).inputs.masks, 2),
            (
                training(split, sample[None], enabled=False).inputs.masks,
                training(resident(), sample[None], enabled=False).inputs.masks,
                2,
            ),
            (
                split.evaluation_batch(sample, (True, False, True), 0.5)[1],
                resident().evaluation_batch(sample, (True, False, True), 0.5)[1],
                1,
            ),
        ):
            first, later = by_layer(found)
            assert all(torch.equal(a, b) for a, b in zip(first, alone, strict=True))
            assert all(torch.equal(a[0], b.repeat(versions, 1)) for a, b in zip(later, real, strict=True))

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
        for batch, reference in (
            (
                training(resident(masking), sample[None]).inputs.features,
                training(resident(), sample[None]).inputs.features,
            ),
            (
                resident(masking).evaluation_batch(sample, ALL, 0.5, 1, 2)[0],
                resident().evaluation_batch(sample, ALL, 0.5, 1, 2)[0],
            ),
        ):
            assert all(torch.equal(x, y) for x, y in zip(batch, reference, strict=True))


class TestEvaluationBatch:
    @pytest.mark.parametrize("condition", CONDITIONS)
    def test_a_condition_keeps_its_modalities_whole(self, condition: str) -> None:
        split, kept = resident(), condition_modalities(condition)
        features, masks = split.evaluation_batch(torch.arange(SAMPLES), kept)
        for m in range(3):
            assert torch.equal(masks[m][0], split.frame_masks[m] & kept[m])
            assert torch.equal(features[m][0], split.features[m] * kept[m])

    @settings(deadline=None, max_examples=25)
    @given(order=st.permutations(range(SAMPLES)), size=st.integers(1, SAMPLES), exact=st.booleans())
    def test_masks_depend_on_seed_sample_and_condition_alone(self, order: list[int], size: int, exact: bool) -> None:
        split, sample = resident(), torch.tensor(order[:size])
        _, whole = split.evaluation_batch(torch.arange(SAMPLES), ALL, 0.5, 2024, 4, exact)
        torch.manual_seed(size)  # no generator of torch is involved
        _, part = split.evaluation_batch(sample, ALL, 0.5, 2024, 4, exact)
        for m in range(3):
            assert torch.equal(part[m][0], whole[m][0, sample])

    @pytest.mark.parametrize(("seed", "condition"), [(2025, 4), (2024, 5)])
    def test_another_seed_or_condition_draws_anew(self, seed: int, condition: int) -> None:
        split, sample = resident(), torch.arange(SAMPLES)
        _, first = split.evaluation_batch(sample, ALL, 0.5, 2024, 4)
        _, other = split.evaluation_batch(sample, ALL, 0.5, seed, condition)
        assert not torch.equal(first[1], other[1])

    def test_modalities_are_drawn_apart(self) -> None:
        mask = torch.ones(SAMPLES, 30, dtype=torch.bool)
        drops = [evaluation_drops(mask, 0.5, m, torch.arange(SAMPLES), 1, 0, False) for m in range(3)]
        assert not torch.equal(drops[0], drops[1])
        assert not torch.equal(drops[1], drops[2])

    @pytest.mark.parametrize("exact", [True, False])
    def test_the_ends_of_the_sweep(self, exact: bool) -> None:
        split, sample = resident(), torch.arange(SAMPLES)
        _, whole = split.evaluation_batch(sample, ALL, 0.0, 1, 2, exact)
        assert all(torch.equal(mask[0], frames) for mask, frames in zip(whole, split.frame_masks, strict=True))
        features, nothing = split.evaluation_batch(sample, ALL, 1.0, 1, 2, exact)
        assert not any(mask.any() for mask in nothing)
        assert not any(x.any() for x in features)

    def test_the_ratio_is_that_of_the_frames_that_are_there(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(400, 50, generator=generator) < 0.6
        sample = torch.arange(400)
        dropped = evaluation_drops(mask, 0.3, 1, sample, 2024, 3, exact=False)
        assert not (dropped & ~mask).any()
        # Binomial over about 12,000 frames: four standard deviations are 0.017.
        assert dropped.sum() / mask.sum() == pytest.approx(0.3, abs=0.017)
        exactly = evaluation_drops(mask, 0.3, 1, sample, 2024, 3, exact=True)
        assert torch.equal(exactly.sum(1), torch.round(0.3 * mask.sum(1)).long())

    def test_no_test_mask_is_a_training_mask(self) -> None:
        """Even with equal seeds: evaluation counts its versions from elsewhere."""
        mask = torch.ones(200, 40, dtype=torch.bool)
        sample = torch.arange(200)
        one = torch.ones(1, 1, dtype=torch.int64)
        for condition in range(11):
            tested = evaluation_drops(mask, 0.5, 0, sample, 5, condition, exact=False)
            for version in range(2):
                trained = dropped_frames(
                    mask[None], torch.full((1, 200), 0.5), 0, sample[None], 5 * one, 0 * one, version * one, False
                )[0]
                agreement = (tested == trained).float().mean().item()
                assert agreement == pytest.approx(0.5, abs=0.03)  # 8,000 fair coins: five standard deviations


class TestViews:
    SAMPLE = torch.tensor([[3, 0, 5]])

    def batch(self, *views: View, **missing: Any) -> Batch:
        split = resident()
        split.missing = MissingBlock(**missing)
        return split.training_batch(self.SAMPLE, torch.tensor([7]), torch.tensor(3), views)

    def test_a_phase_sees_what_it_asks_for(self) -> None:
        both = self.batch(View.MISSING, View.MISSING_2)
        for view, rows in ((View.MISSING, slice(0, 3)), (View.MISSING_2, slice(3, 6))):
            for seen, whole in zip(both.view(view), both.inputs, strict=True):
                assert all(torch.equal(x, y[:, rows]) for x, y in zip(seen, whole, strict=True))
        one = self.batch(View.MISSING, View.COMPLETE)
        assert all(
            torch.equal(x, y) for x, y in zip(one.inputs.features, both.view(View.MISSING).features, strict=True)
        )
        assert one.view(View.COMPLETE) is one.complete
        assert self.batch(View.COMPLETE).inputs is not None
        for wrong, view in ((both, View.COMPLETE), (one, View.MISSING_2), (self.batch(View.COMPLETE), View.MISSING)):
            with pytest.raises(ValueError, match=f"the phase does not see {view}"):
                wrong.view(view)

    def test_it_knows_rows_kept_modalities_and_real_frames(self) -> None:
        batch, raw = self.batch(View.MISSING, View.MISSING_2, p_max=0.0), make_split()
        assert batch.rows.tolist() == self.SAMPLE.tolist()
        assert batch.kept.shape == (1, 2, 3, 3)
        for m, mask in enumerate(batch.inputs.masks):  # nothing else is dropped
            assert torch.equal(mask.view(1, 2, 3, -1).any(-1), batch.kept[..., m])
            assert torch.equal(batch.real[m][0], torch.from_numpy(real_mask(raw, m))[self.SAMPLE[0]])
        whole = self.batch(View.MISSING, enabled=False).kept
        assert torch.equal(whole[0, 0], torch.from_numpy(raw.present)[self.SAMPLE[0]])
