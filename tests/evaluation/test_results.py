import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics, report, results, tables
from fastmmkd.evaluation.commands import print_headline
from fastmmkd.evaluation.results import Outcome, SeedEvaluation, combine
from fastmmkd.evaluation.schema import Results, Statistic
from fastmmkd.modalities import CONDITIONS
from fastmmkd.tasks import TASKS, Task

TASK = Task("classification-2")


def outcome(f1: float, samples: int = 10) -> Outcome:
    return Outcome(samples, dict.fromkeys(metrics.keys(TASK), f1))


def evaluation(seed: int, values: list[float], sweep: tuple[float, ...] = (0.0,)) -> SeedEvaluation:
    conditions = {c: outcome(v) for c, v in zip(CONDITIONS, values, strict=True)}
    return SeedEvaluation(seed, conditions, [(p, outcome(50.0).metrics) for p in sweep], 10)


def floors(value: float = 40.0) -> dict[str, dict[str, float]]:
    return {c: outcome(value).metrics for c in CONDITIONS}


def test_mean_and_deviation_over_seeds():
    summary = combine("m", "d", "h", TASK, [evaluation(7, [60.0] * 7), evaluation(8, [64.0] * 7)], floors(), None)
    assert summary.seeds == [7, 8]
    statistic = summary.conditions["la"].metrics["f1_non0"]
    assert (statistic.mean, statistic.std, statistic.per_seed) == (62.0, pytest.approx(math.sqrt(8)), [60.0, 64.0])
    assert summary.conditions["la"].floor["f1_non0"] == 40.0
    assert summary.conditions["la"].ideal is None
    assert summary.average.ideal is None


def test_average_is_taken_per_seed_and_leaves_out_the_complete_condition():
    up, down = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 99.0], [60.0, 50.0, 40.0, 30.0, 20.0, 10.0, 1.0]
    summary = combine("m", "d", "h", TASK, [evaluation(1, up), evaluation(2, down)], floors(), floors(90.0))
    assert summary.average.metrics["f1_non0"] == Statistic(mean=35.0, std=0.0, per_seed=[35.0, 35.0])
    assert summary.average.samples == 60
    assert summary.average.floor["f1_non0"] == 40.0
    assert summary.average.ideal["f1_non0"] == 90.0


def test_one_seed_has_no_deviation():
    summary = combine("m", "d", "h", TASK, [evaluation(1, [60.0] * 7)], floors(), None)
    assert summary.conditions["l"].metrics["f1_non0"].std is None
    assert summary.average.metrics["f1_non0"].std is None


def test_a_condition_without_samples_is_null_and_not_averaged(tmp_path, capsys):
    one = evaluation(1, [60.0] * 7)
    del one.conditions["l"]
    one.conditions["la"] = Outcome(0, dict.fromkeys(metrics.keys(TASK), math.nan))
    known = {c: f for c, f in floors().items() if c not in ("l", "la")}
    summary = combine("m", "d", "h", TASK, [one], known, None)
    for condition in ("l", "la"):
        assert summary.conditions[condition].samples == 0
        assert summary.conditions[condition].metrics["f1_non0"] == Statistic(mean=None, std=None, per_seed=[None])
    assert summary.average.metrics["f1_non0"].mean == 60.0
    assert summary.average.samples == 40
    results.write(tmp_path, summary)
    note = "Avg. is over 4 of 6 conditions: no sample can be tested under {l}, {l,a}."
    assert note in (tmp_path / "results.md").read_text()
    report.report([tmp_path], tmp_path / "report")
    assert note in (tmp_path / "report" / "report.md").read_text()
    assert "Avg. is over 4 of 6 conditions" in (tmp_path / "report" / "report.tex").read_text()
    print_headline(report.comparable(report.load([tmp_path]))[0])
    assert f"  {note}\n" in capsys.readouterr().out
    assert results.read(tmp_path) == summary


def test_evaluations_must_match():
    first = evaluation(1, [60.0] * 7)
    with pytest.raises(ValueError, match="a seed occurs twice"):
        combine("m", "d", "h", TASK, [first, first], floors(), None)
    with pytest.raises(ValueError, match="seeds 1 and 2 differ"):
        combine("m", "d", "h", TASK, [first, evaluation(2, [60.0] * 7, sweep=(0.0, 0.5))], floors(), None)
    with pytest.raises(ValueError, match="no evaluations"):
        combine("m", "d", "h", TASK, [], floors(), None)


def test_phases_at_the_floor_are_named_and_may_be_unknown(tmp_path):
    said = [{"teacher": True, "student": False}, {"teacher": None, "student": True}, {"teacher": True, "student": True}]
    evaluations = [replace(evaluation(i, [60.0] * 7), at_floor=phases) for i, phases in enumerate(said)]
    summary = combine("m", "d", "h", TASK, evaluations, floors(), None)
    assert summary.at_floor == {"teacher": [True, None, True], "student": [False, True, True]}
    results.write(tmp_path, summary)
    assert results.read(tmp_path) == summary
    assert "teacher of seeds 0, 2; student of seeds 1, 2." in (tmp_path / "results.md").read_text()

    saved = summary.model_dump()
    del saved["at_floor"]  # as earlier versions wrote them
    (tmp_path / "results.json").write_text(json.dumps(saved))
    summary = results.read(tmp_path)
    assert summary.at_floor == {}
    results.write(tmp_path, summary)
    assert "At the floor" not in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("name", TASKS)
def test_write_and_read_round_trip(tmp_path, simulate, name):
    run = tmp_path / "nested" / "run"
    summary = simulate(task=name)
    results.write(run, summary)
    assert results.read(run) == summary
    assert results.read(run / "results.json") == summary
    written = ["confusion.png", "curves.png", "results.csv", "results.json", "results.md"]
    assert sorted(p.name for p in run.iterdir()) == written
    assert "NaN" not in (run / "results.json").read_text()


def as_before(results: Results) -> Results:
    """What a version wrote that neither counted the samples of a metric nor confusions."""
    content = results.model_dump()
    for part in (*content["conditions"].values(), content["average"]):
        del part["used"], part["confusion"]
    return Results.model_validate(content)


def test_samples_are_those_that_a_metric_used(tmp_path, simulate):
    """F1 non0 leaves out those labelled 0, MAE does not."""
    summary = simulate(seeds=(1, 2))
    lav = summary.conditions["lav"]
    kept = lav.used["f1_non0"]
    assert 80 < kept < 120
    assert kept == lav.used["acc2_non0"]
    assert {lav.used[key] for key in lav.used if "non0" not in key} == {120}
    assert summary.average.used["f1_non0"] == 6 * kept
    results.write(tmp_path, summary)
    text = (tmp_path / "results.md").read_text()

    def samples(title: str) -> list[str]:
        line = next(x for x in text.split(f"## {title}\n")[1].splitlines() if x.startswith("| samples"))
        return [cell.strip() for cell in line.split("|")[2:-1]]

    assert samples("F1 non0 (%)") == [*[str(kept)] * 6, str(6 * kept), str(kept)]
    assert samples("MAE (lower is better)")[-2:] == ["720", "120"]
    assert f"120 samples, of which F1 non0 (%) and Acc-2 non0 (%) use {kept}." in text
    with (tmp_path / "results.csv").open() as f:
        lines = {(r["part"], r["condition"], r["metric"]): r["samples"] for r in csv.DictReader(f)}
    assert lines["condition", "a", "f1_non0"] == lines["sweep", "lav", "f1_non0"] == str(kept)
    assert lines["condition", "a", "mae"] == lines["sweep", "lav", "mae"] == "120"
    assert lines["average", "average", "f1_non0"] == str(6 * kept)


def test_confusions_are_summed_over_seeds():
    counts = [[[3, 2], [1, 4]], [[5, 0], [0, 5]]]
    seeds = []
    for i, of_seed in enumerate(counts):
        seed = evaluation(i, [60.0] * 7)
        conditions = {c: replace(o, confusion={"acc2_has0": of_seed}) for c, o in seed.conditions.items()}
        seeds.append(replace(seed, conditions=conditions))
    summary = combine("m", "d", "h", TASK, seeds, floors(), None)
    matrix = summary.conditions["l"].confusion["acc2_has0"]
    assert (matrix.classes, matrix.counts) == (["negative", "nonnegative"], [[8, 2], [1, 9]])
    assert summary.average.confusion is None
    # A seed that an earlier version has evaluated has none.
    summary = combine("m", "d", "h", TASK, [seeds[0], evaluation(1, [60.0] * 7)], floors(), None)
    assert summary.conditions["l"].confusion is None


def test_results_of_before_samples_and_confusions_were_counted(tmp_path, simulate):
    old = as_before(simulate(seeds=(1, 2)))
    saved = old.model_dump()
    for part in (*saved["conditions"].values(), saved["average"]):
        del part["used"], part["confusion"]
    (tmp_path / "results.json").write_text(json.dumps(saved))
    assert results.read(tmp_path) == old
    results.write(tmp_path / "again", old)
    assert not (tmp_path / "again" / "confusion.png").exists()
    text = (tmp_path / "again" / "results.md").read_text()
    assert "here counted before *non0* drops any" in text
    assert "All modalities present, 120 samples.\n" in text
    # Beside one that counts, the table shows what was counted.
    table = tables.metric_table("f1_non0", [("old", old), ("new", simulate(seeds=(1, 2)))])
    assert table.samples[-1] == simulate(seeds=(1, 2)).conditions["lav"].used["f1_non0"]


def test_markdown_shows_ours_floor_and_ideal_in_the_papers_columns(tmp_path, simulate):
    summary = simulate(seeds=(1, 2, 3))
    results.write(tmp_path, summary)
    text = (tmp_path / "results.md").read_text()
    table = text.split("## F1 non0 (%)\n\n")[1].split("\n\n")[0].splitlines()
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table}
    assert rows[""] == ["{l}", "{a}", "{v}", "{l,a}", "{l,v}", "{a,v}", "Avg.", "{l,a,v}"]
    lav, average = summary.conditions["lav"], summary.average
    ours = lav.metrics["f1_non0"]
    assert rows["umdf"][-1] == f"{ours.mean:.2f} ± {ours.std:.2f}"
    assert rows["floor"][-1] == f"{lav.floor['f1_non0']:.2f}"
    assert rows["ideal"][-2] == f"{average.ideal['f1_non0']:.2f}"
    assert rows["samples"][-2:] == [str(of.used["f1_non0"]) for of in (average, lav)]
    assert "over 3 seeds (1, 2, 3)" in text
    assert "always-negative" in text
    assert "**" not in text  # one run is not best of anything


def test_markdown_for_real_data_has_no_ideal(tmp_path, simulate):
    results.write(tmp_path, simulate(known_posterior=False, seeds=(4,)))
    text = (tmp_path / "results.md").read_text()
    assert "ideal" not in text
    assert "±" not in text
    assert "1 seed (4)" in text


def test_csv_has_every_number(tmp_path, simulate):
    summary = simulate(seeds=(1, 2), steps=3)
    results.write(tmp_path, summary)
    with (tmp_path / "results.csv").open() as f:
        lines = list(csv.DictReader(f))
    assert len(lines) == (7 + 1 + 3) * len(metrics.keys(Task("regression")))
    by_key = {(r["part"], r["condition"], r["p"], r["metric"]): r for r in lines}
    line = by_key["condition", "av", "0.0", "mae"]
    expected = summary.conditions["av"].metrics["mae"]
    assert [float(line[k]) for k in ("mean", "std", "seed_1", "seed_2")] == [
        expected.mean,
        expected.std,
        *expected.per_seed,
    ]
    assert by_key["sweep", "lav", "0.5", "mae"]["floor"] == ""


def test_a_failed_write_leaves_the_old_results(tmp_path, simulate, monkeypatch):
    old, new = simulate(seeds=(1,)), simulate(seeds=(2,))
    results.write(tmp_path, old)

    def full_disk(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match=r"results\.md: cannot write this file \(No space left on device\)"):
        results.write(tmp_path, new)
    monkeypatch.undo()
    assert results.read(tmp_path) == old
    assert not list(tmp_path.glob(".*"))


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match=r"results\.json: no such file \(evaluate the run first"):
        results.read(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        results.read(tmp_path / "nowhere")
    file = tmp_path / "results.json"
    for text in ("", '{"version": 1', "\x00\xff"):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="not a JSON file"):
            results.read(tmp_path)
    for text in ("[1, 2]", "{}", '{"version": "1"}'):
        file.write_text(text)
        with pytest.raises(UserError, match="the integer key 'version' is missing"):
            results.read(tmp_path)


def test_a_newer_version_says_to_update(tmp_path, simulate):
    newer = {**simulate(seeds=(1,)).model_dump(), "version": 2}
    (tmp_path / "results.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match="version 2 is newer than this fastmmkd reads"):
        results.read(tmp_path)


def edited(results: Results, path: str, value: object = None) -> dict:
    """What the file would hold, with the key at `path` set, or removed if no value is given."""
    content = results.model_dump()
    *parents, last = path.split("/")
    target = content
    for key in parents:
        target = target[int(key) if isinstance(target, list) else key]
    if value is None:
        del target[last]
    elif isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seeds", None, "seeds: Field required"),
        ("conditions/av", None, "conditions are"),
        ("conditions/av/metrics/mae", None, "av lacks the metric 'mae' that average has"),
        ("average/metrics/mae", None, "average lacks the metric 'mae' that l has"),
        ("conditions/av/samples", "ten", "conditions.av.samples: Input should be a valid integer"),
        ("average/metrics/mae/per_seed", [1.0], "average.mae has 1 per-seed values, seeds lists 2"),
        ("task", "translation", "task 'translation' is not one of regression"),
        ("seeds", [1, 1], "seeds are [1, 1], expected at least one, each once and from 0"),
        ("seeds", [-1, 2], "seeds are [-1, 2], expected at least one, each once and from 0"),
        ("conditions/av/samples", -5, "av.samples is -5, expected 0 or more"),
        ("sweep/0/samples", -1, "sweep p=0.samples is -1, expected 0 or more"),
        ("sweep/0/p", -7.0, "sweep has p of [-7.0, "),
        ("sweep/0/p", 1.5, "sweep has p of [1.5, "),
        ("average/metrics/f1_non0/mean", 12345.0, "average.f1_non0 is 12345, expected a number from 0 to 100"),
        ("average/metrics/f1_non0/per_seed/1", -1.0, "average.f1_non0 is -1, expected a number from 0 to 100"),
        ("conditions/l/metrics/corr/per_seed/0", 1.5, "l.corr is 1.5, expected a number from -1 to 1"),
        ("conditions/l/metrics/mae/mean", -0.5, "l.mae is -0.5, expected a number from 0 to inf"),
        ("conditions/l/metrics/mae/std", -0.5, "l.mae.std is -0.5, expected 0 or more"),
        ("conditions/l/used/f1_non0", 121, "l.used.f1_non0 is 121, expected 0 to 120 samples"),
        ("average/used/mae", -1, "average.used.mae is -1, expected 0 to 720 samples"),
        ("conditions/l/confusion/acc7/counts/3/3", -200, "l.confusion.acc7.counts has a negative count"),
        ("conditions/l/confusion/acc7/counts/0/6", 2000, "l.confusion.acc7.counts sum up to "),
        (
            "conditions/l/confusion/acc7/counts/2",
            [1, 2],
            "l.confusion.acc7.counts is not 7 x 7, one row and column per",
        ),
        ("conditions/l/floor/f1_non0", 101.0, "l.floor.f1_non0 is 101, expected a number from 0 to 100"),
        ("conditions/l/metrics/mae/mean", 10**400, "conditions.l.metrics.mae.mean: Input should be"),
    ],
)
def test_damaged_results_name_the_key(tmp_path, simulate, path, value, message):
    (tmp_path / "results.json").write_text(json.dumps(edited(simulate(seeds=(1, 2)), path, value)))
    with pytest.raises(UserError) as e:
        results.read(tmp_path)
    assert message in str(e.value)
    assert str(tmp_path / "results.json") in str(e.value)
    assert "\n" not in str(e.value)


def test_nesting_without_an_end(tmp_path):
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"results\.json: not a JSON file \("):
        results.read(tmp_path)


@pytest.mark.parametrize("key", ["method", "data", "data_hash"])
def test_half_a_surrogate_pair(tmp_path, simulate, key):
    content = {**simulate(seeds=(1,)).model_dump(), key: "\ud800"}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"results\.json: not a JSON file \(.*surrogates not allowed\)"):
        results.read(tmp_path)


def test_a_sweep_without_an_end(tmp_path, simulate):
    content = simulate(seeds=(1,)).model_dump()
    content["sweep"] *= 1000
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"results\.json: sweep has 3000 entries, expected at most 1000"):
        results.read(tmp_path)


def test_a_metric_that_a_later_version_adds_may_have_any_value(tmp_path, simulate):
    content = simulate(seeds=(1,)).model_dump()
    for part in (*content["conditions"].values(), content["average"], *content["sweep"]):
        part["metrics"]["perplexity"] = {"mean": 400.0, "std": None, "per_seed": [400.0]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert results.read(tmp_path).average.metrics["perplexity"].mean == 400


def test_keys_that_a_later_version_adds_are_kept(tmp_path, simulate):
    content = {**simulate(seeds=(1,)).model_dump(), "notes": "added later"}
    (tmp_path / "results.json").write_text(json.dumps(content))
    results.write(tmp_path, results.read(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == content


def test_the_file_holds_the_keys_in_the_order_of_the_documentation(tmp_path, simulate):
    results.write(tmp_path, simulate(seeds=(1,)))
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content) == list(Results.model_fields)
    assert list(content["average"]) == ["samples", "metrics", "floor", "ideal", "used", "confusion"]
    assert tuple(content["average"]["metrics"]) == metrics.keys(Task("regression"))
