import numpy as np
import pytest
from matplotlib.image import imread

from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics, plots


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
        "± standard deviation over seeds",
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
    bands = figures[0].axes[0].collections
    for band, (_, run) in zip(bands, runs, strict=True):
        ends = band.get_paths()[0].get_extents()
        spread = [(s.mean - s.std, s.mean + s.std) for s in (point.metrics["f1_non0"] for point in run.sweep)]
        assert (ends.ymin, ends.ymax) == pytest.approx((min(low for low, _ in spread), max(high for _, high in spread)))


def test_the_star_covers_no_point(tmp_path, simulate, monkeypatch):
    """In pixels of the finished picture, whatever the values."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    for task in ("regression", "emotions-binary"):
        plots.curves(tmp_path / "c.png", simulate(task=task))
        figures[-1].canvas.draw()
        for axis in figures[-1].axes:
            curve, *_, star = axis.get_lines()
            assert star.get_label() == "ideal, complete data"
            (point, _), (centre, _) = (axis.transData.transform((line.get_xdata()[0], 0.0)) for line in (curve, star))
            radii = [line.get_markersize() / 2 * figures[-1].dpi / 72 for line in (curve, star)]
            assert point - centre > sum(radii)
            assert axis.transAxes.transform((0, 0))[0] < centre - 0.8 * radii[1]


def test_six_runs_look_different(tmp_path, simulate, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.curves(tmp_path / "c.png", [(f"run {i}", simulate(seeds=(1,))) for i in range(6)])
    lines = figures[0].axes[0].get_lines()[:6]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 6
    assert "± standard deviation over seeds" not in [t.get_text() for t in figures[0].legends[0].get_texts()]


def test_more_runs_have_panels_of_their_own(tmp_path, simulate, monkeypatch):
    """One that classifies has no MAE; one was not evaluated over ratios."""
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    runs = [(f"run {i}", simulate(noise=0.1 * i)) for i in range(5)]
    runs += [("classes", simulate(task="classification-2")), ("none", simulate().model_copy(update={"sweep": []}))]
    plots.curves(tmp_path / "c.png", runs)
    scores = [name for name, _ in runs if name != "classes"]
    assert [axis.get_title() for axis in figures[0].axes] == [*(name for name, _ in runs), *scores]
    for axis, (_, run) in zip(figures[0].axes, runs, strict=False):
        (own,) = [line for line in axis.get_lines() if line.get_marker() == plots.MARKERS[0]]
        np.testing.assert_allclose(own.get_ydata(), [s.metrics["f1_non0"].mean for s in run.sweep])
        assert len(axis.get_lines()) == len(runs) + 1  # and the floor
    assert imread(tmp_path / "c.png").ndim == 3


@pytest.mark.parametrize(("task", "panels", "classes"), [("regression", 7, 7), ("emotions-binary", 28, 2)])
def test_a_confusion_matrix_per_condition(tmp_path, simulate, task, panels, classes, monkeypatch):
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    run = simulate(task=task)
    plots.confusion(tmp_path / "c.png", run)
    drawn = [axis for axis in figures[0].axes if axis.images]
    assert len(drawn) == panels
    assert [axis.get_title() for axis in drawn[:7]] == ["{l}", "{a}", "{v}", "{l,a}", "{l,v}", "{a,v}", "{l,a,v}"]
    key = metrics.CONFUSED[task][0]
    counts = np.array(run.conditions["a"].confusion[key].counts)
    shown = np.asarray(drawn[1].images[0].get_array())
    assert shown.shape == (classes, classes)
    np.testing.assert_allclose(shown, counts / counts.sum(axis=1, keepdims=True))
    assert imread(tmp_path / "c.png").ndim == 3


def test_a_condition_without_samples_has_no_matrix(tmp_path, simulate, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    run = simulate(task="classification-2").model_copy(deep=True)
    run.conditions["l"].confusion = None
    plots.confusion(tmp_path / "c.png", run)
    first = figures[0].axes[0]
    assert not first.images
    assert first.texts[0].get_text() == "no samples"


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
