"""The report of a whole cross-validation, on phantoms."""

from __future__ import annotations

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from custom.cohort import build_datalist, write_datalist
from custom.metrics import score_subject
from custom.phantom import cohort_seeds, write_absent
from custom.report import region_masks, write_crossval_report
from custom.report.reports import small_run_line

MODELS = {"segresnet": ("SegResNet", 3), "mednext": ("MedNeXt", 2), "comnet": ("CoMNeT", 1)}
NOTE = "made-up predictions"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three phantoms in three folds; each model's masks are the truth, shifted by so many voxels."""
    root = tmp_path_factory.mktemp("crossval")
    write_absent(root / "data", cohort_seeds(3), shape=(48, 48, 40), spacing=(4, 4, 4))
    datalist, exclusions = build_datalist(root / "data", num_folds=3)
    write_datalist(datalist, exclusions, root / "RUN" / "datalist.json", root / "data")
    for key, (model, shift) in MODELS.items():
        for item in datalist["training"]:
            _predict(root / "RUN" / key / "scores" / item["subject"], root / "data" / item["label"], model, shift, item)
    tuning = {"num_subjects": 3, "regions": {"ET": {"refine": True, "threshold": 0.4, "reason": "it helps"}}}
    (root / "RUN" / "ensemble").mkdir()
    (root / "RUN" / "ensemble" / "tuning.json").write_text(json.dumps(tuning))
    return root / "RUN"


def _predict(folder, truth_path, model, shift, item):
    truth = nib.load(truth_path)
    label = np.asarray(truth.dataobj)
    predicted = np.roll(np.where(label == 4, 3, label), shift + item["fold"], axis=0).astype(np.uint8)
    folder.mkdir(parents=True)
    nib.Nifti1Image(predicted, truth.affine).to_filename(folder / f"{folder.name}_seg.nii.gz")
    masks = [np.stack(list(region_masks(*one).values())) for one in ((predicted, "brats2023"), (label, "brats2021"))]
    scores = {"model": model, "fold": item["fold"], "subject": folder.name} | score_subject(*masks, (4, 4, 4))
    record = {"subject": folder.name, "status": "done", "weights": NOTE, "scores": scores}
    (folder / "record.json").write_text(json.dumps(record))


@pytest.fixture
def run_dir(tmp_path, finished):
    """A copy that a test may change."""
    shutil.copytree(finished, tmp_path / "RUN", ignore=shutil.ignore_patterns("report"))
    datalist = json.loads((tmp_path / "RUN" / "datalist.json").read_text())
    datalist["dataset_dir"] = str(finished.parent / "data")
    (tmp_path / "RUN" / "datalist.json").write_text(json.dumps(datalist))
    return tmp_path / "RUN"


@pytest.fixture(scope="module")
def report(finished):
    """Folder of the report of the whole run."""
    return write_crossval_report(finished).parent


def _table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _ranked(report):
    """CoMNeT's rows in order of the mean of Dice; the truth of every phantom has all regions."""
    return sorted(_table(report / "scores.csv")[-3:], key=lambda row: float(row["mean_dice"]))


def _sections(page):
    return [page.texts[i] for i in range(len(page.texts)) if page.texts[i] in SECTIONS]


SECTIONS = (
    "Not scored",
    "Table 2: Dice",
    "Paired differences",
    "Figures",
    "Other scores",
    "What the ensemble chose",
    "Worst cases first",
    "Settings",
)


class TestWholeRun:
    def test_page_stands_alone(self, report, read_page):
        page = read_page(report / "report.html")
        assert not page.open and "://" not in page.source and "link" not in page.tags
        assert all(source.startswith("data:image/") for source in page.values("img", "src"))
        assert len(page.values("img", "alt")) == 4 and all(page.values("img", "alt")), "Figures 2 to 4, forest plot"
        assert _sections(page) == list(SECTIONS[1:])

    def test_files_beside_it(self, report, finished):
        names = {"report.html", "table2.csv", "scores.csv", "differences.csv", "differences.png"}
        assert report == finished / "report"
        assert {path.name for path in report.iterdir()} == names | {f"figure{number}.png" for number in (2, 3, 4)}

    def test_banner(self, report, read_page):
        texts = read_page(report / "report.html").texts
        assert "3 subjects: a software check, not a benchmark." in texts
        assert f"SegResNet, MedNeXt, CoMNeT. Weights: {NOTE}" in texts
        assert any("Not a medical device" in text for text in texts)

    def test_tables_hold_what_was_scored(self, report, finished):
        rows = _table(report / "scores.csv")
        assert [row["model"] for row in rows] == [name for name, _ in MODELS.values() for _ in range(3)]
        name = rows[-1]["subject"]
        record = json.loads((finished / "comnet" / "scores" / name / "record.json").read_text())
        assert float(rows[-1]["WT_dice"]) == record["scores"]["WT_dice"] and set(rows[-1]) == {
            *record["scores"],
            "selection",
        }
        wt = [float(row["WT_dice"]) for row in rows if row["model"] == "MedNeXt"]
        summary = next(row for row in _table(report / "table2.csv") if row["model"] == "MedNeXt")
        assert float(summary["WT_mean"]) == pytest.approx(np.mean(wt)) and summary["dataset"] == "utsw layout"
        assert float(summary["WT_sd"]) == pytest.approx(np.std(wt, ddof=1))

    def test_differences(self, report):
        rows = [row for row in _table(report / "differences.csv") if row["region"] == "WT"]
        assert [(row["model"], row["baseline"]) for row in rows[::2]] == [
            ("CoMNeT", "MedNeXt"),
            ("MedNeXt", "SegResNet"),
            ("CoMNeT", "SegResNet"),
        ]
        assert all(float(row["difference"]) > 0 for row in rows), "the masks were shifted less and less"

    def test_figure_2_is_the_median_subject(self, report, read_page):
        ranked = _ranked(report)
        alts = read_page(report / "report.html").values("img", "alt")
        assert any(alt.startswith(f"{ranked[1]['subject']}: true regions above") for alt in alts)

    def test_worst_subject_comes_first(self, report, read_page):
        ranked = _ranked(report)
        page = read_page(report / "report.html")
        assert page.values("a", "href") == [f"#subject-{row['subject']}" for row in ranked]
        assert page.values("h3", "id") == [f"subject-{row['subject']}" for row in ranked]
        assert sum(text.startswith("No picture: ") for text in page.texts) == 3, "no QC pictures were drawn"

    def test_what_the_ensemble_chose(self, report, read_page):
        assert "ET: it helps" in read_page(report / "report.html").texts


class TestPartOfARun:
    def test_one_model(self, run_dir, read_page):
        shutil.rmtree(run_dir / "segresnet")
        shutil.rmtree(run_dir / "comnet")
        shutil.rmtree(run_dir / "ensemble")
        page = read_page(write_crossval_report(run_dir))
        assert _sections(page) == ["Table 2: Dice", "Figures", "Other scores", "Worst cases first", "Settings"]
        assert not list((run_dir / "report").glob("differences.*"))

    def test_a_subject_without_scores_is_named(self, run_dir, read_page):
        names = sorted(path.name for path in (run_dir / "comnet" / "scores").iterdir())
        shutil.rmtree(run_dir / "comnet" / "scores" / names[0])
        texts = read_page(write_crossval_report(run_dir)).texts
        assert texts[texts.index("Not scored") :].index(names[0]) < texts.index("Table 2: Dice")

    def test_what_cannot_be_made_any_more_does_not_stay(self, run_dir):
        write_crossval_report(run_dir)
        shutil.rmtree(run_dir / "comnet")
        shutil.rmtree(run_dir / "mednext")
        for path in sorted((run_dir / "segresnet" / "scores").iterdir())[1:]:
            shutil.rmtree(path)
        write_crossval_report(run_dir, dataset_dir=run_dir)
        left = {path.name for path in (run_dir / "report").iterdir()}
        assert left == {"report.html", "table2.csv", "scores.csv", "figure4.png"}

    def test_without_the_dataset_figure_2_is_missing_and_said(self, run_dir, tmp_path, read_page):
        texts = read_page(write_crossval_report(run_dir, dataset_dir=tmp_path)).texts
        assert any(text.startswith("Figure 2 was not drawn (BT") and "do not exist" in text for text in texts)

    def test_no_datalist_and_another_folder(self, run_dir, tmp_path, read_page):
        (run_dir / "datalist.json").unlink()
        page = read_page(write_crossval_report(run_dir, tmp_path / "out", dataset="Phantoms <3>"))
        assert any(text.startswith("Figure 2 was not drawn") for text in page.texts) and "Phantoms <3>" in page.texts
        assert (tmp_path / "out" / "report.html").is_file() and not (run_dir / "report").exists()

    def test_everything_is_escaped(self, run_dir, read_page):
        evil = '<img src=x onerror="alert(1)">'
        for path in run_dir.glob("*/scores/*/record.json"):
            path.write_text(path.read_text().replace(NOTE, json.dumps(evil)[1:-1]))
        page = read_page(write_crossval_report(run_dir, dataset=evil))
        assert page.values("img", "onerror") == [] and page.tags.count("script") == 1


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="no scores"):
        write_crossval_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "line"), [(1, "1 subject: a"), (49, "49 subjects: a software check"), (50, "")])
def test_small_runs_are_no_benchmark(count, line):
    assert small_run_line(count).startswith(line) and bool(small_run_line(count)) == bool(line)
