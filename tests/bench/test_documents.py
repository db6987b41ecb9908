"""The documents say what the records say."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bench import quality, quality_plots, records, report
from bench.quality import ABLATIONS
from fastmmkd.engine.suite import slug
from fastmmkd.errors import UserError
from fastmmkd.evaluation import results
from fastmmkd.evaluation.schema import Results

UMDF = quality.RECORDS / "study" / "umdf"
PARTS = (
    *("study_umdf", "study_corrkd", "study_hrlf", "fresh_umdf", "fresh_corrkd", "fresh_hrlf", "methods", "fresh"),
    "losses",
    *("ict_mmmo", "ict_mmmo_mae", "ict_mmmo_differences", "compare", "compare_mae", "compare_differences"),
    *("cmu_mosi", "cmu_mosi_mae", "cmu_mosi_folds", "cmu_mosi_differences"),
    *("speed", "whole_steps", "train_steps", "kernels", "epochs", "scaling", "data_path", "parity"),
)


def test_tables_are_rendered_from_the_records() -> None:
    assert report.main(["--check"]) == 0


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return report.parts()


@pytest.mark.parametrize("part", PARTS)
def test_render_replaces_only_the_marked_parts(part: str, generated: dict[str, str]) -> None:
    (document,) = (path for path, names in report.DOCUMENTS.items() if part in names)
    text = document.read_text(encoding="utf-8")
    marked = rf"(<!-- begin: {part} [^\n]*-->\n).*?(<!-- end: {part} -->)"
    broken = re.sub(marked, r"\1stale\n\2", text, flags=re.DOTALL)
    assert broken != text
    assert report.render(broken, {part: generated[part]}, document.name) == text


def test_a_part_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"my\.md has 0 parts named methods; expected one"):
        report.render("<!-- begin: method -->\n<!-- end: methods -->", {"methods": ""}, "my.md")


class TestOtherRecords:
    """Runs made from UMDF's: those of CorrKD classify, on the same data."""

    @pytest.fixture
    def records(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(quality, "RECORDS", tmp_path / "records")
        monkeypatch.setattr(records, "FOLDER", tmp_path / "speed")
        monkeypatch.setattr(quality_plots, "FOLDER", tmp_path / "pictures")
        self.document = tmp_path / "README.md"
        monkeypatch.setattr(report, "DOCUMENTS", {self.document: PARTS})
        parts = [f"<!-- begin: {part} (generated) -->\n<!-- end: {part} -->\n" for part in PARTS]
        self.document.write_text("".join(parts))
        return tmp_path / "records"

    @pytest.fixture
    def runs(self, tmp_path: Path) -> Path:
        """What `make study` and `make real` leave behind, HRLF not yet run."""
        umdf = results.read(UMDF / "umdf")
        for name in ABLATIONS["umdf"]:
            self.write(tmp_path / "runs" / "umdf" / slug(name), umdf)
        corrkd = umdf.model_copy(deep=True, update={"task": "classification-2", "method": "corrkd"})
        statistic = corrkd.average.metrics["f1_non0"]
        statistic.per_seed = [value - 1 - 0.1 * i for i, value in enumerate(statistic.per_seed)]
        for name in ABLATIONS["corrkd"]:
            self.write(tmp_path / "runs" / "corrkd" / slug(name), corrkd)
        self.write(tmp_path / "runs" / "ict_mmmo" / "corrkd_ict_mmmo", corrkd)
        return tmp_path / "runs"

    def write(self, folder: Path, summary: Results) -> None:
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(summary.model_dump_json())
        shutil.copyfile(UMDF / "umdf" / "run.json", folder / "run.json")

    def parts(self) -> dict[str, str]:
        text = self.document.read_text()
        return {
            part: text.split(f"<!-- begin: {part} (generated) -->\n")[1].split(f"<!-- end: {part} -->")[0]
            for part in PARTS
        }

    def test_nothing_is_said_of_what_was_not_run(self, records: Path) -> None:
        assert report.main([]) == 0
        assert set(self.parts().values()) == {"Not yet run.\n"}

    def test_records_are_taken_of_the_methods_that_are_there(self, records: Path, runs: Path) -> None:
        assert report.main(["--study", str(runs), "--real", str(runs)]) == 0
        taken = {str(path.parent.relative_to(records)) for path in records.rglob("results.json")}
        assert taken == {
            *(f"study/{method}/{slug(name)}" for method in ("umdf", "corrkd") for name in ABLATIONS[method]),
            "ict_mmmo/corrkd",
        }
        parts = self.parts()
        assert parts["study_hrlf"] == "Not yet run.\n"
        for method in ("umdf", "corrkd"):
            rows = [line.split("|")[1].strip() for line in parts[f"study_{method}"].splitlines() if "|" in line]
            first, *others = ABLATIONS[method]
            assert rows[2:] == [
                *(first, *others, "floor", "ideal", "samples"),
                *("difference on Avg., paired over seeds", rows[-len(others) - 1]),
                *(f"{first} − {other}" for other in others),
            ]

    def test_methods_share_a_table_that_names_their_tasks(self, records: Path, runs: Path) -> None:
        report.main(["--study", str(runs)])
        text = self.parts()["methods"]
        assert text.startswith("F1 non0 (%) on synthetic, like mosi")
        assert "trained for regression (UMDF, UMDF complete training) and classification-2 (CorrKD, Corr" in text
        seeds = results.read(UMDF / "umdf").seeds
        assert f"over seeds {', '.join(map(str, seeds))}; " in text
        (difference,) = (line for line in text.splitlines() if line.startswith("| UMDF − CorrKD "))
        cells = [cell.strip() for cell in difference.split("|")[1:-1]]
        assert cells[:2] == ["UMDF − CorrKD", f"{1 + 0.05 * (len(seeds) - 1):+.2f}"]
        assert float(cells[2].removeprefix("< ")) < 0.01

    def test_a_method_is_compared_with_its_own_baseline(self, records: Path, runs: Path) -> None:
        shutil.move(runs / "umdf", runs / "fresh" / "umdf")
        for row in ("corrkd", "without_distillation"):
            shutil.copytree(runs / "corrkd" / row, runs / "fresh" / "corrkd" / row)
        report.main(["--study", str(runs)])
        assert self.parts()["methods"] == "Not yet run.\n"
        text = self.parts()["fresh"]
        compared = [line.split("|")[1].strip() for line in text.splitlines() if " − " in line]
        assert compared == ["UMDF − UMDF complete training", "CorrKD − CorrKD without distillation", "UMDF − CorrKD"]

    def test_only_regressions_are_in_the_table_of_mae(self, records: Path, runs: Path) -> None:
        report.main(["--real", str(runs)])
        assert self.parts()["ict_mmmo_mae"] == "Not yet run.\n"
        shutil.copytree(runs / "umdf" / "umdf", runs / "ict_mmmo" / "umdf_ict_mmmo")
        shutil.copytree(runs / "umdf" / "umdf", runs / "cmu_mosi" / "umdf_cmu_mosi")
        report.main(["--real", str(runs)])
        assert "| UMDF " in self.parts()["cmu_mosi"]
        mae = self.parts()["ict_mmmo_mae"]
        assert mae.startswith("MAE (lower is better) on ")
        assert "| CorrKD " in self.parts()["ict_mmmo"]
        assert "| CorrKD " not in mae
        assert "| UMDF " in mae

    def test_a_record_of_folds_holds_each_of_them(self, records: Path, runs: Path) -> None:
        content = results.read(UMDF / "umdf")
        run = runs / "cmu_mosi" / "umdf_cmu_mosi"
        for fold in ("fold_0", "fold_1"):
            self.write(run / fold, content.model_copy(deep=True, update={"data_hash": fold, "data": f"MOSI, {fold}"}))
        for _ in range(2):  # again over what is there
            report.main(["--real", str(runs)])
            held = sorted(
                str(path.parent.relative_to(records / "cmu_mosi")) for path in records.glob("cmu_mosi/**/run.json")
            )
            assert held == ["umdf/fold_0", "umdf/fold_1"]
        assert " on MOSI, fold, 2 folds; mean ± standard deviation over seeds " in self.parts()["cmu_mosi"]
        assert f"{', '.join(map(str, content.seeds))} on each of 2 folds; " in self.parts()["cmu_mosi"]
        header, _, row, _ = self.parts()["cmu_mosi_folds"].splitlines()
        assert [cell.strip() for cell in header.split("|")[2:5]] == ["fold_0", "fold_1", "all"]
        average = np.mean(content.average.metrics["f1_non0"].per_seed)
        assert [float(cell.split("±")[0]) for cell in row.split("|")[2:5]] == pytest.approx([average] * 3, abs=0.01)
        shutil.rmtree(run)
        self.write(run, content)
        report.main(["--real", str(runs)])
        assert [path.parent.name for path in records.glob("cmu_mosi/**/run.json")] == ["umdf"]

    def test_what_a_loss_adds_is_counted_on_both_draws(self, records: Path, runs: Path) -> None:
        """Each row of CorrKD's table is the full method less 1 on one draw and less 2 on another, of two seeds."""
        for draw, less in (("", 1), ("fresh", 2)):
            for name in ABLATIONS["corrkd"]:
                of_row = runs / draw / "corrkd" / slug(name)
                content = results.read(runs / "umdf" / "umdf").model_copy(deep=True, update={"method": "corrkd"})
                statistic = content.average.metrics["f1_non0"]
                full = name == next(iter(ABLATIONS["corrkd"]))
                statistic.per_seed = [x - (0 if full else less + 0.1 * i) for i, x in enumerate(statistic.per_seed)]
                shutil.rmtree(of_row, ignore_errors=True)
                self.write(of_row, content)
        report.main(["--study", str(runs)])
        (line,) = (line for line in self.parts()["losses"].splitlines() if line.startswith("| CorrKD − w/o SCD"))
        seeds = len(results.read(UMDF / "umdf").seeds)
        more = 0.1 * (seeds - 1) / 2
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[1] == "+2.23"  # 74.69 and 72.46 in the paper
        assert cells[2:5] == [f"{value:+.2f}" for value in (1 + more, 2 + more, 1.5 + more)]
        assert float(cells[7].removeprefix("< ")) < 0.05
        assert cells[8] == str(2 * seeds)

    def test_runs_on_different_data_share_no_table(self, records: Path, runs: Path) -> None:
        path = runs / "corrkd" / "corrkd" / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_hash": "0" * 64}))
        with pytest.raises(UserError, match="not evaluated on the same data"):
            report.main(["--study", str(runs)])

    def test_rows_that_are_not_finished_are_left_out(self, records: Path, runs: Path) -> None:
        (runs / "corrkd" / "without_scd" / "results.json").unlink()
        report.main(["--study", str(runs)])
        assert "w/o SCD" not in self.parts()["study_corrkd"]
        assert "w/o CPD" in self.parts()["study_corrkd"]

    def test_many_systems_are_drawn_and_compared_with_the_best(self, records: Path, runs: Path, tmp_path: Path) -> None:
        for method in ("umdf", "hrlf", "dmd", "smil"):
            shutil.copytree(runs / "umdf" / "umdf", runs / "ict_mmmo" / f"{method}_ict_mmmo")
        report.main(["--real", str(runs)])
        assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["ict_mmmo.png"]
        compared = [line.split("|")[1] for line in self.parts()["ict_mmmo_differences"].splitlines() if " − " in line]
        assert len(compared) == 4
        assert len({line.split(" − ")[0] for line in compared}) == 1

    def test_a_folder_without_runs_is_refused(self, records: Path, tmp_path: Path) -> None:
        folders = ", ".join(f"{method}_ict_mmmo" for method in ABLATIONS)
        with pytest.raises(UserError, match=f"expected one of the folders {folders}"):
            report.main(["--real", str(tmp_path)])
