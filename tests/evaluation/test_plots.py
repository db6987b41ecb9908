import numpy as np
import pytest
from matplotlib.image import imread

from fastmmkd.errors import UserError
from fastmmkd.evaluation import plots

RED, GREEN, BLUE = (214, 39, 40), (44, 160, 44), (31, 119, 180)


def near(picture: np.ndarray, colour: tuple[int, int, int], tolerance: float = 0.16) -> int:
    """Pixels within a tolerance of a colour drawn at 75% opacity on white."""
    shown = 0.75 * np.array(colour) / 255 + 0.25
    return int((np.abs(picture[..., :3] - shown).max(axis=-1) < tolerance).sum())


def clusters(n: int, width: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.choice([-1.5, 0.0, 2.0], size=n)
    return generator.normal(size=(n, width)) + 0.5 * labels[:, None], labels


def test_embedding_uses_the_papers_colours_and_repeats_itself(tmp_path):
    points, labels = clusters(60)
    plots.embedding(tmp_path / "a.png", points, labels, "title")
    plots.embedding(tmp_path / "b.png", points, labels, "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = imread(tmp_path / "a.png")
    assert all(near(picture, colour) > 800 for colour in (RED, GREEN, BLUE))
    plots.embedding(tmp_path / "c.png", points[labels < 0], labels[labels < 0], "negative only")
    picture = imread(tmp_path / "c.png")
    # Only the marker in the legend is left of the other classes.
    assert near(picture, RED, 0.05) > 5 * near(picture, BLUE, 0.05)


def test_at_most_a_hundred_samples_of_each_class_are_drawn():
    classes = np.repeat([0, 1, 2], [500, 30, 101])
    chosen = plots._choose(classes, 3)
    assert np.bincount(classes[chosen]).tolist() == [100, 30, 100]
    assert len(set(chosen.tolist())) == len(chosen)


def test_scores_and_emotions_fall_into_their_classes():
    classes, styles = plots._classes(np.array([-0.2, 0.0, 3.0]))
    assert [styles[c][0] for c in classes] == ["negative", "neutral", "positive"]
    classes, styles = plots._classes(np.array([[0, 0, 1, 0], [0, 1, 0, 1]]))
    assert [styles[c][0] for c in classes] == ["angry", "sad"]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 9])
def test_embedding_of_few_samples(tmp_path, n):
    points, labels = clusters(n)
    plots.embedding(tmp_path / "e.png", points, labels, "few")
    assert imread(tmp_path / "e.png").ndim == 3


@pytest.mark.parametrize("points", [np.ones((12, 3)), np.arange(12.0)[:, None]], ids=["equal points", "one feature"])
def test_embedding_of_degenerate_points(points):
    placed = plots._tsne(points)
    assert placed.shape == (12, 2)
    assert np.isfinite(placed).all()


def test_embedding_checks_its_input(tmp_path):
    with pytest.raises(ValueError, match=r"representations \(3, 2\) and labels \(4,\)"):
        plots.embedding(tmp_path / "e.png", np.ones((3, 2)), np.ones(4), "")
    with pytest.raises(ValueError, match="NaN"):
        plots.embedding(tmp_path / "e.png", np.full((3, 2), np.nan), np.ones(3), "")


@pytest.mark.parametrize(
    ("task", "panels"), [("regression", 2), ("classification-3", 1), ("emotions-binary", 4), ("emotions-4way", 1)]
)
def test_curves_have_a_panel_per_metric(tmp_path, simulate, task, panels, monkeypatch):
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    plots.curves(tmp_path / "c.png", simulate(task=task))
    axes = figures[0].axes
    assert len(axes) == panels
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == [
        "umdf",
        "floor (no features)",
        "ideal, complete data",
    ]
    assert imread(tmp_path / "c.png").shape[1] > 600


def test_curves_show_the_mean_over_seeds_the_floor_and_every_run(tmp_path, simulate, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    runs = [("cost in $ of a_b", simulate(known_posterior=False)), ("b", simulate(noise=0.6))]
    plots.curves(tmp_path / "c.png", runs)
    first, second, floor, ideal = figures[0].axes[0].get_lines()
    for line, (name, run) in zip((first, second), runs, strict=True):
        assert line.get_label() == name
        np.testing.assert_allclose(line.get_xdata(), [0.0, 0.5, 1.0])
        np.testing.assert_allclose(line.get_ydata(), [s.metrics["f1_non0"].mean for s in run.sweep])
    assert set(floor.get_ydata()) == {runs[0][1].conditions["lav"].floor["f1_non0"]}
    assert list(ideal.get_ydata()) == [runs[1][1].conditions["lav"].ideal["f1_non0"]]  # the second run knows it


def test_a_panel_shows_the_runs_that_have_its_metric(tmp_path, simulate, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    runs = [("classes", simulate(task="classification-2", noise=0.6)), ("scores", simulate())]
    plots.curves(tmp_path / "c.png", runs)
    shown = {
        axis.get_title(): {line.get_label(): line.get_color() for line in axis.get_lines()} for axis in figures[0].axes
    }
    references = {"floor (no features)", "ideal, complete data"}
    assert [*shown] == ["F1 non0 (%)", "MAE, lower is better"]
    assert set(shown["F1 non0 (%)"]) == {"classes", "scores"} | references
    assert set(shown["MAE, lower is better"]) == {"scores"} | references
    assert shown["F1 non0 (%)"]["scores"] == shown["MAE, lower is better"]["scores"]


def test_curves_without_a_sweep_or_with_one_seed(tmp_path, simulate):
    plots.curves(tmp_path / "one.png", simulate(seeds=(1,)))
    plots.curves(tmp_path / "none.png", simulate(seeds=(1,)).model_copy(update={"sweep": []}))
    assert imread(tmp_path / "none.png").ndim == 3


def test_a_folder_that_is_not_there(tmp_path, simulate):
    with pytest.raises(UserError, match="cannot write this file"):
        plots.curves(tmp_path / "nowhere" / "c.png", simulate(seeds=(1,)))
