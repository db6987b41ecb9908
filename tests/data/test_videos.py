"""Videos that ids name, and splits that keep them whole."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import padded, random_clips, write_mfn

from fastmmkd.cli import main
from fastmmkd.data import store
from fastmmkd.data.dataset import SPLITS, Dataset
from fastmmkd.data.importers import import_dataset
from fastmmkd.data.importers.resplit import _allocate_groups, resplit
from fastmmkd.data.importers.videos import shared_videos, videos_of
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

Make = Callable[..., Dataset]


@pytest.mark.parametrize(
    ("ids", "videos"),
    [
        (["a_1$_$0", "a_1$_$x_3", "b$_$1"], ["a_1", "a_1", "b"]),
        (["a_1[0]", "b[12]"], ["a_1", "b"]),
        (["a_1_0.5_3", "a_1_3_7.25", "b_-1_1e1"], ["a_1", "a_1", "b"]),
        (["Ses01F_impro01_F000", "Ses01F_impro01_M012"], ["Ses01F_impro01"] * 2),
        (["a_1_1", "a_1_2", "b_7"], ["a_1", "a_1", "b"]),  # "b_7" says that the others end in one number, too
        (["a_1", "a_1#2"], ["a", "a"]),
        (["train-00000", "train-00001"], None),
        (["a_1", "b"], None),
        (["_1"], None),
    ],
)
def test_videos_of_ids(ids: list[str], videos: list[str] | None) -> None:
    assert videos_of(ids) == videos


NAMES = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=11)
SPELLINGS: dict[str, Callable[[str, int], str]] = {
    "mmsa": lambda video, k: f"{video}$_${k}",
    "sdk": lambda video, k: f"{video}[{k}]",
    "interval": lambda video, k: f"{video}_{k}.5_{k + 1}.25",
}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(NAMES, st.integers(0, 99)), min_size=1, max_size=9), st.sampled_from(sorted(SPELLINGS)))
def test_any_name_of_a_video_is_found(pairs: list[tuple[str, int]], spelling: str) -> None:
    assert videos_of([SPELLINGS[spelling](video, k) for video, k in pairs]) == [video for video, _ in pairs]


def test_videos_in_several_splits_are_counted_however_they_are_spelt() -> None:
    for spell in (*SPELLINGS.values(), lambda video, k: f"{video}_{k}"):
        ids = {"train": [spell("x", 0), spell("y", 0)], "valid": [spell("x", 1)], "test": [spell("z", 1)]}
        assert shared_videos(ids) == 1
    assert shared_videos({"train": ["x[0]", "other"], "valid": ["x[1]"], "test": ["other_2"]}) == 1


def with_videos(dataset: Dataset, videos: int = 9) -> Dataset:
    at = 0
    for split in dataset.splits.values():
        split.ids = [f"v{i % videos}_{i}.0_{i + 1}.5" for i in range(at, at + len(split))]
        at += len(split)
    return dataset


def test_by_video_every_video_is_in_one_split(make_dataset: Make) -> None:
    before = with_videos(make_dataset())
    after = resplit(before, 3, by="video")
    groups = [{sample.split("_")[0] for sample in split.ids} for split in after.splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 9
    assert sorted(i for split in after.splits.values() for i in split.ids) == sorted(
        i for split in before.splits.values() for i in split.ids
    )
    sizes = [len(split) for split in after.splits.values()]
    assert after.report["resplit"] == {"seed": 3, "by": "video", "sizes": sizes, "videos_in_several_splits": 0}
    assert after.source == "random numbers, re-split with seed 3 by video"
    by_sample = resplit(before, 3)
    assert by_sample.report["resplit"]["videos_in_several_splits"] > 0
    assert resplit(before, 3, by="video").splits["train"].ids == after.splits["train"].ids
    assert resplit(before, 4, by="video").splits["train"].ids != after.splits["train"].ids


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=30),
    shares=st.tuples(st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 9),
)
def test_groups_stay_whole_and_no_split_is_empty(sizes: list[int], shares: tuple[int, int, int], seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    strata = np.random.default_rng(seed).integers(0, 3, len(groups))
    target = _allocate_groups(groups, strata, np.array(shares), np.random.default_rng(seed))
    assert set(target.tolist()) == {0, 1, 2}
    assert all(len(set(target[groups == group])) == 1 for group in range(len(sizes)))


def test_sizes_and_strata_are_met_as_nearly_as_videos_allow() -> None:
    """90 videos of 5 samples, of three moods: within one video of the shares."""
    groups, strata = np.repeat(np.arange(90), 5), np.repeat(np.arange(90) % 3, 5)
    target = _allocate_groups(groups, strata, np.array([300, 60, 90]), np.random.default_rng(0))
    for mood in range(3):
        got = np.bincount(target[strata == mood], minlength=3)
        assert (np.abs(got - [100, 20, 30]) <= 5).all(), got


def test_ids_that_say_nothing_are_refused(make_dataset: Make) -> None:
    dataset = make_dataset()
    dataset.splits["train"].ids[0] = "ünï"
    with pytest.raises(UserError) as caught:
        resplit(dataset, 0, by="video")
    assert str(caught.value) == (
        f"--by video: ids such as {'ünï'!a} do not say which video a sample is of; expected video$_$clip, video[k], "
        "video_start_end or video_clip"
    )
    with pytest.raises(UserError, match="--by video: all samples are of 2 videos, expected one for each of train, "):
        resplit(with_videos(make_dataset(), videos=2), 0, by="video")


@pytest.fixture
def mfn(tmp_path: Path) -> Path:
    folder = tmp_path / "mfn"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in zip(SPLITS, (20, 6, 8), strict=True):
        clips = random_clips(rng, n)
        write_mfn(folder, name, {m: padded(clips, m, 5, "left") for m in MODALITIES}, rng.integers(-3, 4, n))
    ids = {
        name: [f"{'abcdefgh'[i % 8]}_{name}_{i}" for i in range(n)] for name, n in zip(SPLITS, (20, 6, 8), strict=True)
    }
    (folder / "ids.json").write_text(json.dumps(ids))
    return folder


class TestCommand:
    def test_by_video(self, mfn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "a.h5"
        words = ["data", "import", "--format", "mfn", str(mfn), "--out", str(out), "--resplit", "3", "--by", "video"]
        assert main(words) == 0
        assert "re-split with seed 3 by video\n" in capsys.readouterr().out
        dataset = store.read(out)
        assert dataset.report["resplit"]["videos_in_several_splits"] == 0
        assert dataset.splits["test"].ids[0].split("_")[1] in SPLITS

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--by", "video"], "error: --by video: expected --resplit SEED with it, splits are the source's\n"),
            (["--resplit=-1"], "error: --resplit -1: expected a seed from 0\n"),
        ],
    )
    def test_refusals(
        self, mfn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
    ) -> None:
        assert main(["data", "import", "--format", "mfn", str(mfn), "--out", str(tmp_path / "a.h5"), *more]) == 2
        assert capsys.readouterr().err == message

    def test_ids_without_videos(self, mfn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (mfn / "ids.json").unlink()
        words = ["data", "import", "--format", "mfn", str(mfn), "--out", str(tmp_path / "a.h5")]
        assert main([*words, "--resplit", "1", "--by", "video"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {mfn}: --by video: ids such as 'train-00000' do not say")


class TestIdsOfMfn:
    def test_they_are_taken_and_shared_videos_are_noted(self, mfn: Path) -> None:
        dataset = import_dataset("mfn", mfn)
        assert dataset.splits["valid"].ids[:2] == ["a_valid_0", "b_valid_1"]
        assert dataset.report["notes"] == []
        ids = json.loads((mfn / "ids.json").read_text())
        ids["test"] = [f"{'abcdefgh'[i]}_train_{50 + i}" for i in range(8)]
        (mfn / "ids.json").write_text(json.dumps(ids))
        notes = import_dataset("mfn", mfn).report["notes"]
        assert notes == ["8 videos have segments in several of the source's splits"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"ids\.json: not \{\"train\": \[\"video_clip\", \.\.\.\]"),
            ("[]", r"ids\.json: has no list of strings for train, expected \{\"train\""),
            ('{"train": [1]}', r"ids\.json: has no list of strings for train"),
            ('{"train": ["a"]}', r"ids\.json: has 1 ids for train, expected 20, one for each label"),
        ],
    )
    def test_refusals(self, mfn: Path, text: str, message: str) -> None:
        (mfn / "ids.json").write_text(text)
        with pytest.raises(UserError, match=message):
            import_dataset("mfn", mfn)
