"""The map of representations: placed, kept, read and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fastmmkd.errors import UserError
from fastmmkd.evaluation import embedding
from fastmmkd.evaluation.embedding import Embedding

RED, GREEN, BLUE = (214, 39, 40), (44, 160, 44), (31, 119, 180)


def near(picture: np.ndarray, colour: tuple[int, int, int], tolerance: float = 0.16) -> int:
    """Pixels within a tolerance of a colour drawn at 75% opacity on white."""
    shown = 0.75 * np.array(colour) / 255 + 0.25
    return int((np.abs(picture[..., :3] - shown).max(axis=-1) < tolerance).sum())


def clusters(n: int, width: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.choice([-1.5, 0.0, 2.0], size=n)
    return generator.normal(size=(n, width)) + 0.5 * labels[:, None], labels


def placed(points: np.ndarray, labels: np.ndarray) -> Embedding:
    return embedding.place(points, labels, np.arange(len(labels)), 1, "language only")


def test_the_papers_colours_and_always_the_same(tmp_path: Path) -> None:
    points, labels = clusters(60)
    for name in ("a", "b"):
        embedding.draw(tmp_path / f"{name}.png", [("title", placed(points, labels))])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = imread(tmp_path / "a.png")
    assert all(near(picture, colour) > 800 for colour in (RED, GREEN, BLUE))
    embedding.draw(tmp_path / "c.png", [("negative only", placed(points[labels < 0], labels[labels < 0]))])
    picture = imread(tmp_path / "c.png")
    # Only the marker in the legend is left of the other classes.
    assert near(picture, RED, 0.05) > 5 * near(picture, BLUE, 0.05)


def test_several_maps_share_a_picture(tmp_path: Path) -> None:
    one, few = placed(*clusters(30)), placed(*clusters(3))
    embedding.draw(tmp_path / "one.png", [("a", one)])
    embedding.draw(tmp_path / "five.png", [("a", few), *((name, one) for name in "bcde")])
    single, many = imread(tmp_path / "one.png"), imread(tmp_path / "five.png")
    assert many.shape[1] > 2 * single.shape[1]
    assert near(many, RED) > 3 * near(single, RED)


def test_what_is_kept_is_what_was_placed(tmp_path: Path) -> None:
    points, labels = clusters(40)
    rows = np.arange(100, 140)
    made = embedding.place(points, labels, rows, 3, "language only, p = 0.5")
    assert made.samples == rows.tolist()
    signs = {"negative": -1, "neutral": 0, "positive": 1}
    assert [signs[made.classes[c]] for c in made.class_of] == np.sign(labels).astype(int).tolist()
    embedding.write(tmp_path / "embedding.json", made)
    assert embedding.read(tmp_path / "embedding.json") == made
    np.testing.assert_allclose(np.array([made.x, made.y]).T, embedding._tsne(points), atol=1e-4)


def test_at_most_a_hundred_samples_of_each_class_are_drawn() -> None:
    classes = np.repeat([0, 1, 2], [500, 30, 101])
    chosen = embedding._choose(classes, 3)
    assert np.bincount(classes[chosen]).tolist() == [100, 30, 100]
    assert len(set(chosen.tolist())) == len(chosen)


def test_scores_and_emotions_fall_into_their_classes() -> None:
    classes, styles = embedding._classes(np.array([-0.2, 0.0, 3.0]))
    assert [styles[c][0] for c in classes] == ["negative", "neutral", "positive"]
    classes, styles = embedding._classes(np.array([[0, 0, 1, 0], [0, 1, 0, 1]]))
    assert [styles[c][0] for c in classes] == ["angry", "sad"]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 9])
def test_few_samples(tmp_path: Path, n: int) -> None:
    made = placed(*clusters(n))
    assert made.chosen == n
    assert len(made.x) == (n if n >= 4 else 0)
    embedding.write(tmp_path / "e.json", made)
    embedding.draw(tmp_path / "e.png", [("few", embedding.read(tmp_path / "e.json"))])
    assert imread(tmp_path / "e.png").ndim == 3


TINY = 1e-30 * np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "points", [np.ones((12, 3)), np.arange(12.0)[:, None], TINY], ids=["equal points", "one feature", "next to nothing"]
)
def test_degenerate_points(points: np.ndarray) -> None:
    found = embedding._tsne(points)
    assert found.shape == (12, 2)
    assert np.isfinite(found).all()


def test_input_is_checked() -> None:
    with pytest.raises(ValueError, match=r"representations \(3, 2\), labels \(4,\) and rows \(4,\)"):
        placed(np.ones((3, 2)), np.ones(4))
    with pytest.raises(ValueError, match="NaN"):
        placed(np.full((3, 2), np.nan), np.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"classes": ["good", "bad"]}, "classes are good, bad, expected negative, neutral, positive or happy, sad, "),
        ({"x": [0.0]}, "has 9 samples, 9 class_of, 1 x, 9 y, expected 9 of each"),
        ({"chosen": 3}, "has 9 samples, 9 class_of, 9 x, 9 y, expected 0 of each"),
        ({"class_of": [3] * 9}, "class_of has a 3, there are 3 classes"),
        ({"y": ["far"] * 9}, "y.0: Input should be a valid number"),
    ],
)
def test_damaged_maps_name_the_file(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "embedding.json"
    file.write_text(json.dumps(placed(*clusters(9)).model_dump() | change))
    with pytest.raises(UserError) as error:
        embedding.read(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    file.write_text("{")
    with pytest.raises(UserError, match=r"embedding\.json: not a run's map of representations"):
        embedding.read(file)
