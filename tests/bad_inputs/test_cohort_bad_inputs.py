"""Every way a dataset folder, a datalist or the number of a fold is known to be wrong, and the message for it."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cohort_to_spoil import BAD, GOOD

from custom.cohort import Cohort, build_datalist, find_subjects, load_datalist
from custom.files import UserError


class TestDatasetFolder:
    @pytest.mark.parametrize("use", [find_subjects, build_datalist, lambda folder: Cohort(folder).inputs()])
    def test_it_does_not_exist(self, tmp_path: Path, use: Callable) -> None:
        with pytest.raises(UserError, match=r"nowhere does not exist: give a folder"):
            use(tmp_path / "nowhere")

    @pytest.mark.parametrize("use", [find_subjects, build_datalist, lambda folder: Cohort(folder).inputs()])
    def test_it_is_a_file(self, dataset: Path, use: Callable) -> None:
        with pytest.raises(UserError, match=r"T1.nii.gz is a file: give the folder that holds it, .*B2"):
            use(dataset / BAD / "T1.nii.gz")

    @pytest.mark.parametrize("use", [find_subjects, build_datalist, lambda folder: Cohort(folder).inputs()])
    def test_it_is_empty(self, tmp_path: Path, use: Callable) -> None:
        with pytest.raises(
            ValueError, match=r"no subject in .*brain_t1ce.*<case>_t1ce.*-t1c.*The folder holds nothing"
        ):
            use(tmp_path)

    def test_it_holds_something_else(self, tmp_path: Path) -> None:
        for number in range(20):
            (tmp_path / f"IM{number:04d}.dcm").write_text("")
        with pytest.raises(ValueError, match=r"IM0000.dcm, .*and 8 more"):
            find_subjects(tmp_path)

    def test_it_is_an_empty_list(self) -> None:
        with pytest.raises(ValueError, match="empty list"):
            find_subjects([])

    def test_all_subjects_are_excluded(self, dataset: Path) -> None:
        for name in (*GOOD, BAD):
            (dataset / name / "T2.nii.gz").write_bytes(b"")
        with pytest.raises(ValueError, match=r"no usable subject .* all 3 are excluded. A1: .*T2.nii.gz: not a whole"):
            build_datalist(dataset)
        assert len(Cohort(dataset).inputs()) == 3  # found by name; each is refused when its turn comes

    def test_a_folder_that_may_not_be_read_costs_no_other(self, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        genuine = os.scandir

        def scandir(folder: object) -> object:
            if str(folder).endswith(BAD):
                raise PermissionError(13, "Permission denied")
            return genuine(folder)

        monkeypatch.setattr(os, "scandir", scandir)
        data = Cohort(dataset)
        assert tuple(item["subject"] for item in data.inputs()) == GOOD
        assert [(one.subject, "may not be read" in one.reason) for one in data.exclusions] == [(BAD, True)]

    def test_subjects_lie_a_level_too_deep(self, dataset: Path) -> None:
        with pytest.raises(ValueError, match=r"data: .*holds no .nii.*give it as dataset_dir"):
            build_datalist(dataset.parent)


class TestCohortFiles:
    def test_exclusions_are_reported_beside_the_datalist(
        self, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (dataset / BAD / "T2.nii.gz").write_bytes(b"")
        (dataset / "empty").mkdir()
        (dataset / "moved").symlink_to(tmp_path / "nowhere")
        with caplog.at_level(logging.WARNING, logger="comnet"):
            assert len(Cohort(dataset, tmp_path / "lists" / "d.json", progress=False).subjects()) == 2
        assert "2 subjects kept, 3 excluded" in caplog.text and "T2.nii.gz: not a whole NIfTI file" in caplog.text
        with open(tmp_path / "lists" / "d_exclusions.csv", newline="") as table:
            rows = list(csv.DictReader(table))
        excluded = [(row["subject"], row["file"]) for row in rows]
        assert excluded == [(BAD, f"{BAD}/T2.nii.gz"), ("empty", "empty"), ("moved", "moved")]
        assert all(row["reason"] and row["remedy"] for row in rows)

    @pytest.mark.parametrize(
        ("wrong", "options"), [("nowhere", {}), ("data/A1/T1.nii.gz", {}), ("data", {"num_folds": 0}), ("hollow", {})]
    )
    def test_a_datalist_is_replaced_only_by_a_new_one(
        self, dataset: Path, tmp_path: Path, wrong: str, options: dict
    ) -> None:
        (tmp_path / "hollow" / "S1").mkdir(parents=True)
        path = tmp_path / "d.json"
        Cohort(dataset, path).subjects()
        before = path.read_bytes()
        with pytest.raises(ValueError):
            Cohort(tmp_path / wrong, path, rebuild=True, **options).subjects()
        assert path.read_bytes() == before
        assert len(Cohort(dataset, path, num_folds=2, rebuild=True).subjects()) == 3 and path.read_bytes() != before

    def test_the_exclusion_report_is_written_where_all_are_excluded(self, dataset: Path, tmp_path: Path) -> None:
        for number in range(11):
            shutil.copytree(dataset / BAD, dataset / f"X{number:02d}")
        for file in dataset.glob("*/seg.nii.gz"):
            file.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"all 14 are excluded.*and 4 more in {tmp_path}/d_exclusions.csv"):
            Cohort(dataset, tmp_path / "d.json").subjects()
        assert (
            len((tmp_path / "d_exclusions.csv").read_text().splitlines()) == 15 and not (tmp_path / "d.json").exists()
        )
        with pytest.raises(ValueError, match=r"and 4 more\.$"):
            Cohort(dataset).subjects()

    @pytest.mark.parametrize("number", [202301, 1e3, ["a", 12]])
    def test_a_folder_that_arrives_as_a_number(self, number: object) -> None:
        with pytest.raises(ValueError, match=r"dataset_dir is .*, which is no text: put the folder's name in quotes"):
            Cohort(number).inputs()

    def test_files_gone_since_the_datalist_was_written(self, dataset: Path, tmp_path: Path) -> None:
        Cohort(dataset, tmp_path / "d.json").subjects()
        (dataset / BAD / "T2.nii.gz").unlink()
        with pytest.raises(UserError, match=r"1 of 15 files do not exist, first .*B2.T2.nii.gz"):
            Cohort(dataset, tmp_path / "d.json").subjects()

    def test_another_number_of_folds(self, dataset: Path, tmp_path: Path) -> None:
        Cohort(dataset, tmp_path / "d.json", num_folds=3).subjects()
        with pytest.raises(ValueError, match="has 3 folds, but num_folds is 5: set num_folds to 3"):
            Cohort(dataset, tmp_path / "d.json").training(0)

    def test_another_palette(self, dataset: Path, tmp_path: Path) -> None:
        Cohort(dataset, tmp_path / "d.json").subjects()
        with pytest.raises(ValueError, match="built with palette brats2021, not brats2023"):
            Cohort(dataset, tmp_path / "d.json", palette="brats2023").subjects()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda d: d.update(training=[]), 'no items under "training"'),
            (lambda d: d.update(modalities=["t1c", "t1n", "t2w", "flair"]), "order"),
            (lambda d: d["training"][1].pop("palette"), "item 1 lacks palette"),
            (lambda d: d["training"][1]["image"].pop(), "B2 needs a list of 4 images"),
            (lambda d: d["training"][1].update(image="B2/T1.nii.gz"), "B2 needs a list of 4 images"),
            (lambda d: d["training"][1].update(palette="rainbow"), "B2 has palette 'rainbow'"),
            (lambda d: d["training"][1].update(fold=5), "B2 is in fold 5"),
            (lambda d: d["training"][1].update(fold="1"), "B2 is in fold '1'"),
            (lambda d: d["training"][1].update(subject="A1"), "A1 is listed twice"),
            (lambda d: d["training"][1].update(subject=42), "the name 42 of item 1 is no text"),
        ],
    )
    def test_a_datalist_edited_by_hand(self, dataset: Path, tmp_path: Path, spoil: Callable, message: str) -> None:
        path = tmp_path / "d.json"
        Cohort(dataset, path).subjects()
        datalist = json.loads(path.read_text())
        spoil(datalist)
        path.write_text(json.dumps(datalist))
        with pytest.raises(ValueError, match=message) as caught:
            load_datalist(path, dataset)
        assert str(path) in str(caught.value)

    def test_a_datalist_that_is_no_json(self, dataset: Path, tmp_path: Path) -> None:
        (tmp_path / "d.json").write_text('{"training": [')
        with pytest.raises(ValueError, match=r"d.json: no JSON .*Delete it"):
            Cohort(dataset, tmp_path / "d.json").subjects()


class TestFoldNumbers:
    @pytest.mark.parametrize("fold", [-1, 3, "0", 1.0, True])
    def test_no_such_fold(self, dataset: Path, fold: object) -> None:
        data = Cohort(dataset, num_folds=3)
        for part in (data.training, data.validation):
            with pytest.raises(ValueError, match="give a number from 0 to 2"):
                part(fold)

    @pytest.mark.parametrize("fold", [None, "all"])
    def test_validation_needs_a_fold(self, dataset: Path, fold: object) -> None:
        with pytest.raises(ValueError, match=r"no fold .* to take validation items of"):
            Cohort(dataset).validation(fold)

    def test_an_empty_part(self, dataset: Path) -> None:
        with pytest.raises(ValueError, match="fold 4 of 5 leaves no subject for validation"):
            Cohort(dataset, num_folds=5).validation(4)
        with pytest.raises(ValueError, match="fold 0 of 1 leaves no subject for training"):
            Cohort(dataset, num_folds=1).training(0)
