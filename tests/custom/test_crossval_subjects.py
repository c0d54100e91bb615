"""Who is cross-validated, and where their data are."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from custom.cohort import build_datalist, load_datalist, write_datalist
from custom.cohort.datalist import dataset_of
from custom.crossval.subjects import prepare_subjects
from custom.files import UserError
from custom.phantom import write_cohort


class TestSubjects:
    @pytest.fixture(scope="class")
    def dataset(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("home") / "data"
        write_cohort(folder, 4, seed=1, shape=(16, 16, 16), spacing=(10.0, 10.0, 10.0))
        return folder

    @pytest.fixture
    def datalist(self, dataset, tmp_path) -> Path:
        file = tmp_path / "lists" / "datalist.json"
        write_datalist(*build_datalist(dataset, num_folds=2), file, dataset)
        return file

    def test_a_datalist_knows_where_its_dataset_is_without_an_absolute_path(self, dataset, datalist):
        text = datalist.read_text()
        assert str(dataset) not in text and not os.path.isabs(json.loads(text)["dataset_dir"])
        assert dataset_of(datalist) == dataset

    def test_moved_together_they_still_find_each_other(self, dataset, tmp_path):
        home = tmp_path / "here"
        home.mkdir()
        (home / "data").symlink_to(dataset)
        write_datalist(*build_datalist(home / "data", num_folds=2), home / "datalist.json")
        content = json.loads((home / "datalist.json").read_text()) | {"dataset_dir": "data"}
        (home / "datalist.json").write_text(json.dumps(content))
        home.rename(tmp_path / "there")
        assert dataset_of(tmp_path / "there" / "datalist.json") == tmp_path / "there" / "data"

    def test_the_copy_in_the_run_loads_without_being_told_where_the_data_are(self, dataset, datalist, tmp_path):
        subjects = prepare_subjects(datalist, tmp_path / "deep" / "run")
        assert subjects.dataset_dir == dataset == dataset_of(subjects.datalist_file)
        assert len(load_datalist(subjects.datalist_file, subjects.dataset_dir)["training"]) == 4
        assert (subjects.num_folds, set(subjects.folds.values())) == (2, {0, 1})

    def test_the_copy_itself_can_be_given_and_stays_as_it_is(self, datalist, tmp_path):
        first = prepare_subjects(datalist, tmp_path / "run")
        before = first.datalist_file.stat().st_mtime_ns
        assert prepare_subjects(first.datalist_file, tmp_path / "run") == first
        assert first.datalist_file.stat().st_mtime_ns == before

    def test_a_moved_dataset_is_the_same_and_a_changed_one_is_not(self, dataset, datalist, tmp_path):
        digest = prepare_subjects(datalist, tmp_path / "run").digest
        moved = tmp_path / "moved"
        subprocess.run(["cp", "-r", dataset, moved], check=True)
        assert prepare_subjects(datalist, tmp_path / "run", moved).digest == digest
        with open(next(moved.glob("*/brain_t1.nii.gz")), "ab") as file:
            file.write(b"more")
        assert prepare_subjects(datalist, tmp_path / "run", moved).digest != digest

    def test_datalists_of_before_are_asked_for_the_folder(self, dataset, tmp_path):
        write_datalist(*build_datalist(dataset, num_folds=2), tmp_path / "old.json")
        with pytest.raises(ValueError, match=r"old\.json does not say where its dataset is.*--dataset_dir"):
            prepare_subjects(tmp_path / "old.json", tmp_path / "run")
        assert prepare_subjects(tmp_path / "old.json", tmp_path / "run", dataset).dataset_dir == dataset

    def test_what_cannot_be_cross_validated_is_refused(self, dataset, datalist, tmp_path):
        with pytest.raises(UserError, match=r"none\.json does not exist: give a datalist"):
            prepare_subjects(tmp_path / "none.json", tmp_path / "run")
        with pytest.raises(ValueError, match="has 2 folds, not 3"):
            prepare_subjects(datalist, tmp_path / "run", num_folds=3)
        prepare_subjects(datalist, tmp_path / "run")
        for folds, reason in ((5, "was made for other subjects or folds"), (1, "was made for other subjects or folds")):
            write_datalist(*build_datalist(dataset, num_folds=folds), tmp_path / "other.json", dataset)
            with pytest.raises(ValueError, match=reason):
                prepare_subjects(tmp_path / "other.json", tmp_path / "run")
        with pytest.raises(ValueError, match="one fold leaves nothing to train on"):
            prepare_subjects(tmp_path / "other.json", tmp_path / "new")
        write_datalist(*build_datalist(dataset, num_folds=5), tmp_path / "empty.json", dataset)
        with pytest.raises(ValueError, match="fold 4 of 5 holds no subject"):
            prepare_subjects(tmp_path / "empty.json", tmp_path / "newer")
