"""One run's results as Markdown and CSV."""

from __future__ import annotations

import csv
import io

from fastmmkd.evaluation import metrics, tables
from fastmmkd.evaluation.schema import Entry, Results, Statistic, SweepPoint
from fastmmkd.modalities import CONDITIONS, condition_label
from fastmmkd.tasks import Task

SCORE_LEGEND = (
    "*non0*: samples labelled 0 are dropped, positive against negative. *has0*: all samples, >= 0 against < 0. "
    "F1 is weighted F1. "
)
SIMS_LEGEND = (
    "Metrics of CH-SIMS, as MMSA computes them: everything is clipped to ±1; Acc-2 and F1 tell <= 0 from > 0, Acc-3 "
    "ends its classes at ±0.1, Acc-5 at ±0.1 and ±0.7. F1 is weighted F1. "
)
EMOTION_LEGEND = "F1 is weighted F1 of each binary problem. "
FLOOR_LEGEND = (
    "*floor*: the best value of predictors that see no features (always the majority class, always negative, always "
    "the mean or median of the training labels). "
)
IDEAL_LEGEND = (
    "*ideal*: the classifier that knows the process that generated the data and decides for what is most probable (no "
    "classifier is expected to be more accurate; on F1 of a rare class one may be). "
)
SAMPLES_LEGEND = (
    "*samples*: a condition is evaluated on the samples that have the modalities it asks for{dropped}; Avg. is the "
    "mean of the six incomplete conditions"
)


def results_markdown(results: Results) -> str:
    """`results.md`: one table per metric in the papers' layout, then the sweep over p."""
    task = Task(results.task)
    shown = tables.shown_metrics(task)
    parts = [f"# {results.method} on {results.data}\n", facts(results), legend(results)]
    for key in shown:
        table = tables.metric_table(key, [(results.method, results)])
        parts += [f"## {table.title}\n", tables.markdown_metric(table)]
    if results.sweep:
        parts += [
            "## Frames missing at ratio p\n",
            f"All modalities present, {_sweep_samples(results)}.\n",
            tables.markdown_table(
                ["p", *map(metrics.title, shown)],
                [[f"{point.p:g}", *(_cell(key, point.metrics.get(key)) for key in shown)] for point in results.sweep],
            ),
        ]
    if results.trivial:
        parts += [
            "## Predictors that see no features\n",
            f"On {condition_label('lav')}; the floor is the best of these per metric.\n",
            tables.markdown_table(
                ["", *map(metrics.title, shown)],
                [
                    [name, *(tables.format_number(key, values.get(key)) for key in shown)]
                    for name, values in results.trivial.items()
                ],
            ),
        ]
    return "\n".join(parts)


def _sweep_samples(results: Results) -> str:
    """`"343 samples"`, and of which metrics some are left out."""
    count = results.sweep[0].samples
    used = results.conditions["lav"].used or {}
    fewer = [key for key, kept in used.items() if kept < count]
    if not fewer:
        return f"{count} samples"
    return f"{count} samples, of which {' and '.join(map(metrics.title, fewer))} use {used[fewer[0]]}"


def facts(results: Results) -> str:
    """One line: task, seeds, data hash."""
    seeds = results.seeds
    count = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    line = f"Task {results.task}; {count} ({', '.join(map(str, seeds))}); data {results.data_hash[:12]}.\n"
    note = floor_note(results)
    return f"{line}\n{note}\n" if note else line


def floor_note(results: Results) -> str:
    """One line that names the phases of training that learnt nothing; empty where all did."""
    failed = {
        phase: [
            f"{seed} ({fold})" if fold else str(seed)
            for (fold, seed), at_floor in zip(results.models, per_seed, strict=True)
            if at_floor
        ]
        for phase, per_seed in results.at_floor.items()
    }
    named = [f"{phase} of seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" for phase, seeds in failed.items() if seeds]
    if not named:
        return ""
    return f"**At the floor**, no better than a constant prediction on the validation split: {'; '.join(named)}."


def legend(results: Results) -> str:
    """What the rows and metric names mean, and which conditions "Avg." had to leave out."""
    of_kind = {"score": SCORE_LEGEND, "sims": SIMS_LEGEND, "emotions": EMOTION_LEGEND}
    text = of_kind[Task(results.task).label_kind] + FLOOR_LEGEND
    if results.average.ideal is not None:
        text += IDEAL_LEGEND
    dropped = ""
    if results.average.used is None and Task(results.task).label_kind == "score":
        dropped = ", here counted before *non0* drops any"
    text += SAMPLES_LEGEND.format(dropped=dropped)
    if note := tables.average_note(results):
        text += f". {note}"
    return text + ".\n"


def results_csv(results: Results) -> str:
    """`results.csv`: one line per (condition, average or sweep point) and metric, empty where there is no value.

    Columns: part, condition, p, metric, samples, mean, std, floor, ideal, then one `seed_<n>` per seed.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["part", "condition", "p", "metric", "samples", "mean", "std", "floor", "ideal"]
    writer.writerow([*head, *(f"seed_{s}" for s in results.seeds)])
    entries: list[tuple[str, str, float, Entry | SweepPoint]] = [
        *(("condition", c, 0.0, results.conditions[c]) for c in CONDITIONS),
        ("average", "average", 0.0, results.average),
        *(("sweep", "lav", point.p, point) for point in results.sweep),
    ]
    for part, condition, p, entry in entries:
        floor, ideal = (entry.floor, entry.ideal or {}) if isinstance(entry, Entry) else ({}, {})
        for key, s in entry.metrics.items():
            references = floor.get(key), ideal.get(key)
            judged = entry if isinstance(entry, Entry) else results.conditions["lav"]  # which the sweep is on
            samples = (judged.used or {}).get(key, entry.samples)
            writer.writerow([part, condition, p, key, samples, s.mean, s.std, *references, *s.per_seed])
    return out.getvalue()


def _cell(key: str, statistic: Statistic | None) -> str:
    return tables.format_cell(key, statistic.mean, statistic.std) if statistic else tables.NONE
