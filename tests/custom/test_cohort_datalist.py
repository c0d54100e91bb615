"""Facts → folds → datalist → cohort, on small made-up subjects and on the real cases."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from cohort_subjects import STEMS, make_mask, make_subject
from monai.bundle import ConfigParser
from monai.data import load_decathlon_datalist

import custom
from custom import cohort
from custom.cohort import MODALITIES, Cohort, assign_folds


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Eight plain subjects, three of them without enhancing tumour."""
    for number in range(8):
        make_subject(tmp_path / "data" / f"S{number}", mask=make_mask(None if number < 3 else 4))
    return tmp_path / "data"


def make_items(count: int = 53) -> list[dict]:
    return [
        {"subject": f"BT{n:04d}", "label_source": "manual" if n % 5 < 3 else "automatic", "has_et": n % 4 != 0}
        for n in range(count)
    ]


class TestFolds:
    @pytest.mark.parametrize(("count", "num_folds"), [(53, 5), (11, 5), (7, 3), (3, 5), (40, 4)])
    def test_balanced_within_and_over_strata(self, count: int, num_folds: int) -> None:
        items = make_items(count)
        folds = assign_folds(items, num_folds)
        assert set(folds) == {item["subject"] for item in items}
        strata = {(item["label_source"], item["has_et"]) for item in items}
        members = [
            [i["subject"] for i in items if (i["label_source"], i["has_et"]) == stratum] for stratum in strata
        ] + [list(folds)]
        for subjects in members:
            sizes = Counter(folds[subject] for subject in subjects)
            counts = [sizes[fold] for fold in range(num_folds)]
            assert sum(counts) == len(subjects) and max(counts) - min(counts) <= 1

    def test_folds_hold_some_of_each_dataset(self) -> None:
        items = [item | {"source": "a" if n < 20 else "b"} for n, item in enumerate(make_items(30))]
        folds = assign_folds(items, 5)
        strata = {(item["source"], item["label_source"], item["has_et"]) for item in items}
        for stratum in strata:
            members = [i["subject"] for i in items if (i["source"], i["label_source"], i["has_et"]) == stratum]
            sizes = Counter(folds[subject] for subject in members)
            assert max(sizes.values()) - min(sizes[fold] for fold in range(5)) <= 1

    def test_order_of_listing_does_not_matter_but_the_seed_does(self) -> None:
        items = make_items()
        shuffled = random.Random(1).sample(items, len(items))
        assert assign_folds(shuffled) == assign_folds(items)
        assert list(assign_folds(shuffled)) == sorted(assign_folds(items))
        assert assign_folds(items, seed=1) != assign_folds(items, seed=0)

    def test_one_stratum_is_dealt_in_order_of_its_hashes(self) -> None:
        items = [item | {"label_source": "manual", "has_et": True} for item in make_items(12)]
        names = sorted((item["subject"] for item in items), key=lambda name: sha256(f"7:{name}".encode()).hexdigest())
        assert assign_folds(items, 5, seed=7) == {name: position % 5 for position, name in enumerate(names)}

    def test_golden(self) -> None:
        folds = assign_folds(make_items(12), num_folds=5, seed=0)
        assert "".join(map(str, folds.values())) == "413300201241"

    def test_scans_of_one_patient_stay_together(self) -> None:
        items = [item | {"patient": item["subject"][:5]} for item in make_items(60)]
        folds = assign_folds(items, 3)
        assert all(len({folds[i["subject"]] for i in items if i["patient"] == p}) == 1 for p in {"BT000", "BT003"})
        assert Counter(folds.values()) == {0: 20, 1: 20, 2: 20}

    def test_a_patient_with_many_scans_does_not_unbalance_other_strata(self) -> None:
        scans = [{"subject": f"A{n}", "patient": "A", "label_source": "expert", "has_et": n > 0} for n in range(3)]
        others = [{"subject": f"B{n}", "label_source": "expert", "has_et": True} for n in range(2)]
        folds = assign_folds([*scans, *others], 2)
        assert folds["B0"] != folds["B1"]
        assert assign_folds([*others, *scans[::-1]], 2) == folds

    def test_time_points_share_a_fold_in_the_datalist(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for patient in range(3):
            for time in (1, 2):
                make_subject(tmp_path / f"sub-{patient:02d}_ses-{time}")
        with caplog.at_level(logging.INFO, logger="comnet"):
            items = cohort.build_datalist(tmp_path, num_folds=3)[0]["training"]
        assert sorted(item["fold"] for item in items) == [0, 0, 1, 1, 2, 2]
        assert len({(item["patient"], item["fold"]) for item in items}) == 3
        assert "6 subjects are scans of 3 patients" in caplog.text

    def test_no_folds(self) -> None:
        with pytest.raises(ValueError, match="num_folds is 0"):
            assign_folds(make_items(), 0)


class TestDatalist:
    def test_monai_reads_it(self, dataset: Path, tmp_path: Path) -> None:
        datalist, exclusions = cohort.build_datalist(dataset, num_folds=4)
        cohort.write_datalist(datalist, exclusions, tmp_path / "lists" / "datalist.json")
        items = load_decathlon_datalist(tmp_path / "lists" / "datalist.json", True, "training", base_dir=dataset)
        assert [Path(item["subject"]).name for item in items] == [f"S{n}" for n in range(8)]
        for item in items:
            assert [Path(file).name for file in item["image"]] == [f"{stem}.nii.gz" for stem in STEMS["plain"][:4]]
            assert all(os.path.isfile(file) for file in (*item["image"], item["label"]))
            assert (item["palette"], item["label_source"]) == ("brats2021", "unknown")

    def test_contents(self, dataset: Path) -> None:
        datalist, exclusions = cohort.build_datalist(dataset, num_folds=4, seed=3)
        assert not exclusions and json.loads(json.dumps(datalist)) == datalist
        assert datalist["comnet_version"] == custom.__version__
        assert (datalist["layout"], datalist["num_folds"], datalist["seed"]) == ("plain", 4, 3)
        assert datalist["modalities"] == ["t1n", "t1c", "t2w", "flair"] and datalist["regions"] == ["ET", "TC", "WT"]
        counts = datalist["counts"]
        assert (counts["subjects"], counts["with_et"], counts["excluded"]) == (8, 5, 0)
        assert counts["by_fold"] == [2, 2, 2, 2]
        assert [item["has_et"] for item in datalist["training"]] == [False] * 3 + [True] * 5
        assert datalist["training"][0]["image"][1] == "S0/T1Gd.nii.gz"
        assert datalist["facts"]["S7"]["voxels"]["WT"] == 125

    def test_the_same_whatever_the_workers_and_wherever_it_lies(self, dataset: Path, tmp_path: Path) -> None:
        shutil.copytree(dataset, tmp_path / "moved")
        lists = [
            cohort.build_datalist(folder, num_workers=workers)
            for folder in (dataset, tmp_path / "moved")
            for workers in (1, 3)
        ]
        assert all(other == lists[0] for other in lists)

    def test_paths_of_several_folders_are_relative_to_what_they_share(self, tmp_path: Path) -> None:
        folders = [make_subject(tmp_path / "a" / "S1"), make_subject(tmp_path / "b" / "c" / "S2").parent]
        datalist, _ = cohort.build_datalist(folders, num_folds=2)
        assert [item["label"] for item in datalist["training"]] == ["a/S1/mask.nii.gz", "b/c/S2/mask.nii.gz"]
        assert all(os.path.isfile(item["label"]) for item in Cohort(folders, num_folds=2).subjects())

    def test_an_interrupted_write_leaves_the_old_file(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "lists" / "datalist.json"
        datalist, _ = cohort.build_datalist(dataset)
        cohort.write_datalist(datalist, [], path)
        before = [file.read_text() for file in (path, cohort.exclusions_file(path))]
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            cohort.write_datalist(datalist, [cohort.Exclusion("S9", "S9", "late", "none")], path)
        assert [file.read_text() for file in (path, cohort.exclusions_file(path))] == before
        assert sorted(file.name for file in path.parent.iterdir()) == ["datalist.json", "datalist_exclusions.csv"]

    def test_exclusion_report_is_written_even_without_exclusions(self, dataset: Path, tmp_path: Path) -> None:
        Cohort(dataset, tmp_path / "d.json").subjects()
        assert (tmp_path / "d_exclusions.csv").read_text() == "subject,file,reason,remedy\n"

    def test_real_cases(self, real_data: Path) -> None:
        datalist, exclusions = cohort.build_datalist(real_data / "brats2021")
        assert not exclusions and len(datalist["training"]) == 11
        assert {item["palette"] for item in datalist["training"]} == {"brats2021"}
        without = [item["subject"][-5:] for item in datalist["training"] if not item["has_et"]]
        assert without == ["01477", "01480", "01483", "01484"]
        facts = datalist["facts"]["BraTS2021_01481"]
        assert facts["voxels"] == {"ET": 2575, "TC": 4076, "WT": 56512}
        assert (facts["shape"], facts["spacing"]) == ([240, 240, 155], [1.0, 1.0, 1.0])
        assert {facts["orientation"] for facts in datalist["facts"].values()} == {"LPS"}
        assert sorted(datalist["counts"]["by_fold"]) == [2, 2, 2, 2, 3]


class TestCohort:
    def test_training_and_validation_share_no_subject(self, dataset: Path) -> None:
        data = Cohort(dataset, num_folds=4)
        everyone = {item["subject"] for item in data.subjects()}
        assert len(everyone) == 8
        validated = [item["subject"] for fold in range(4) for item in data.validation(fold)]
        assert sorted(validated) == sorted(everyone)
        for fold in range(4):
            held_out = {item["subject"] for item in data.validation(fold)}
            assert {item["subject"] for item in data.training(fold)} == everyone - held_out
            assert {item["fold"] for item in data.validation(fold)} == {fold}
        assert data.training() == data.training("all") == data.subjects()

    def test_items_have_absolute_paths_and_are_the_callers_own(self, dataset: Path) -> None:
        data = Cohort(dataset)
        item = data.subjects()[0]
        assert item["image"] == [str(dataset / "S0" / f"{stem}.nii.gz") for stem in STEMS["plain"][:4]]
        assert item["label"] == str(dataset / "S0" / "mask.nii.gz")
        item["image"].clear()
        assert len(data.subjects()[0]["image"]) == 4

    def test_nothing_is_read_before_it_is_needed(self, tmp_path: Path) -> None:
        data = Cohort(tmp_path / "later")
        make_subject(tmp_path / "later" / "S1")
        assert len(data.subjects()) == 1

    def test_a_written_datalist_is_loaded_and_not_built_again(
        self, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "datalist.json"
        with caplog.at_level(logging.INFO, logger="comnet"):
            first = Cohort(dataset, path).subjects()
        assert "8 subjects kept, none excluded" in caplog.text and f"wrote {path}" in caplog.text
        for file in dataset.glob("*/*"):
            file.write_bytes(b"no longer readable")
        assert Cohort(dataset, str(path)).subjects() == first

    def test_a_datalist_moves_with_its_dataset(self, dataset: Path, tmp_path: Path) -> None:
        path = tmp_path / "datalist.json"
        Cohort(dataset, path).subjects()
        moved = Path(shutil.move(dataset, tmp_path / "elsewhere"))
        assert Cohort(moved, path).subjects()[0]["label"] == str(moved / "S0" / "mask.nii.gz")

    def test_a_setting_that_the_datalist_overrules_is_logged(
        self, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        Cohort(dataset, tmp_path / "d.json").subjects()
        assert not caplog.records
        Cohort(dataset, tmp_path / "d.json", seed=5).subjects()
        assert "seed=0" in caplog.text and "5 was asked for" in caplog.text

    def test_inputs_need_no_mask(self, dataset: Path) -> None:
        for mask in dataset.glob("*/mask.nii.gz"):
            mask.write_bytes(b"rubbish")
        (dataset / "S3" / "mask.nii.gz").unlink()
        data = Cohort(str(dataset))
        assert [item["subject"] for item in data.inputs()] == [f"S{n}" for n in range(8)]
        assert data.inputs()[0] == {
            "subject": "S0",
            "image": [str(dataset / "S0" / f"{stem}.nii.gz") for stem in STEMS["plain"][:4]],
        }
        assert data.exclusions == []

    def test_one_subject_by_four_files(self, dataset: Path) -> None:
        files = dict(zip(MODALITIES, (str(dataset / "S0" / f"{stem}.nii.gz") for stem in STEMS["plain"]), strict=False))
        assert [item["image"] for item in Cohort(files).inputs()] == [list(files.values())]

    def test_one_subjects_own_folder(self, dataset: Path) -> None:
        assert [item["subject"] for item in Cohort(dataset / "S5").inputs()] == ["S5"]
        assert [item["subject"] for item in Cohort([dataset / "S5", dataset / "S1"]).inputs()] == ["S1", "S5"]

    def test_a_bundle_configuration_builds_it(self, dataset: Path) -> None:
        config = {
            "fold": 1,
            "cohort": {"_target_": "custom.cohort.Cohort", "dataset_dir": str(dataset), "num_folds": 4},
            "training": "$@cohort.training(@fold)",
        }
        parser = ConfigParser(config)
        assert len(parser.get_parsed_content("training")) == 6
