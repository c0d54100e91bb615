"""What a cross-validation depends on: subjects and where their data are, overlays, code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from custom import __version__
from custom.bundle_run import bundle_root
from custom.cohort import build_datalist, load_datalist, write_datalist
from custom.cohort.datalist import dataset_of
from custom.crossval import inputs
from custom.crossval.inputs import RUNS, Overlays, Subjects, code_digest, config_contents, prepare_subjects
from custom.crossval.plan import make_plan
from custom.files import UserError
from custom.phantom import cohort_seeds, write_absent


class TestSubjects:
    @pytest.fixture(scope="class")
    def dataset(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("home") / "data"
        write_absent(folder, cohort_seeds(4, 1), shape=(16, 16, 16), spacing=(10.0, 10.0, 10.0))
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


@pytest.fixture
def subjects(tmp_path) -> Subjects:
    folds = {f"BT{number}": number % 3 for number in range(6)}
    return Subjects(tmp_path / "run" / "datalist.json", tmp_path / "data", 3, folds, "digest")


class TestOverlays:
    def over(self, names, run_dir, bundle="comnet_mednext", configs=("train.json",)):
        return Overlays(names, run_dir).over(bundle, *configs)

    def test_a_bundles_own_file_is_taken_where_it_exists(self, tmp_path):
        config, laid = self.over(["small.json"], tmp_path)
        own = json.loads((bundle_root("comnet_mednext") / "configs" / "small.json").read_text())
        assert config == "train.json" and json.loads(laid.read_text()) == own
        assert self.over(["small.json"], tmp_path, "comnet_ensemble", ("inference.json",)) == ("inference.json",)

    def test_a_users_file_is_laid_over_every_config_that_knows_its_names(self, tmp_path):
        mine = tmp_path / "mine.json"
        mine.write_text('{"spacing": [3, 3, 3], "max_epochs": 1}')
        for bundle in ("comnet_mednext", "comnet_ensemble"):
            _, laid = self.over([str(mine)], tmp_path, bundle, ("inference.json",))
            assert json.loads(laid.read_text()) == {"spacing": [3, 3, 3]}
        assert json.loads(self.over([str(mine)], tmp_path)[1].read_text()) == json.loads(mine.read_text())

    def test_names_that_a_recipe_brings_along_are_laid_over_with_what_refers_to_them(self, tmp_path):
        mine = tmp_path / "mine.json"
        mine.write_text('{"crop_margin": 4}')
        _, laid = self.over(["release.json", str(mine)], tmp_path)
        recipe = json.loads((bundle_root("comnet_mednext") / "configs" / "release.json").read_text())
        assert json.loads(laid.read_text()) == recipe | {"crop_margin": 4}
        _, _, laid = self.over(["release.json", str(mine)], tmp_path, configs=("inference.json", "evaluate.json"))
        assert not {"crop_margin", "phantoms", "train#random_transforms"} & json.loads(laid.read_text()).keys()
        with pytest.raises(UserError, match="no config knows 'crop_margin'"):
            Overlays([str(mine)], tmp_path)

    def test_later_files_win(self, tmp_path):
        (tmp_path / "mine.json").write_text('{"max_epochs": 1}')
        _, laid = self.over(["small.json", str(tmp_path / "mine.json")], tmp_path)
        content = json.loads(laid.read_text())
        assert (
            content["max_epochs"] == 1 and content["spacing"] == [2.0, 2.0, 2.0] and list(content)[-1] == "max_epochs"
        )
        _, laid = self.over([str(tmp_path / "mine.json"), "small.json"], tmp_path)
        assert json.loads(laid.read_text())["max_epochs"] == 60

    def test_a_component_can_be_changed_inside(self, tmp_path):
        mine = tmp_path / "mine.json"
        mine.write_text('{"optimizer#betas": [0.8, 0.9], "train#handlers#1#max_norm": 2.0}')
        assert len(self.over([str(mine)], tmp_path)) == 2
        mine.write_text('{"train#handlers#99#max_norm": 2.0}')
        with pytest.raises(UserError, match="no config knows 'train#handlers#99#max_norm'"):
            self.over([str(mine)], tmp_path)

    def test_what_does_not_fit_into_a_config_is_left_out(self, tmp_path):
        own = json.loads((bundle_root("comnet_mednext") / "configs" / "demo.json").read_text())
        assert any(key.startswith("train#") for key in own)
        _, _, laid = self.over(["demo.json"], tmp_path, configs=("inference.json", "evaluate.json"))
        base = json.loads((bundle_root("comnet_mednext") / "configs" / "inference.json").read_text())
        left = json.loads(laid.read_text())
        assert left == {key: value for key, value in own.items() if key in base} and "spacing" in left
        assert json.loads(self.over(["demo.json"], tmp_path)[1].read_text()) == own
        kept = laid.read_text()
        (tmp_path / "mine.json").write_text('{"spacing": [3, 3, 3]}')
        self.over(["demo.json", str(tmp_path / "mine.json")], tmp_path, configs=("inference.json", "evaluate.json"))
        assert laid.read_text() == kept, "a job that runs already keeps its config"

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('{"max_epoch": 1}', r"no config knows 'max_epoch': did you mean max_epochs"),
            ('{"trian#dataset#data": 1}', r"no config knows 'trian#dataset#data'"),
            ('{"fold": 1}', r"sets fold itself: take it out"),
            ('{"seed": 1}', r"sets seed itself \(use --seed\)"),
            ("[1]", "holds a list"),
            ("{", "no JSON"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, content, reason, subjects, tmp_path):
        mine = tmp_path / "mine.json"
        mine.write_text(content)
        with pytest.raises(ValueError, match=rf"mine\.json.*{reason}"):
            make_plan(tmp_path, subjects, ["mednext"], [str(mine)])

    def test_what_only_another_models_configs_know_is_not_refused(self, subjects, tmp_path):
        mine = tmp_path / "mine.json"
        mine.write_text('{"vq_epochs": 1, "corrector": "custom.corrdiff.corrdiff_tiny"}')
        assert len(make_plan(tmp_path, subjects, ["segresnet"], [str(mine)])) == 7

    def test_a_file_that_is_nowhere_is_refused(self, subjects, tmp_path):
        with pytest.raises(UserError, match=r"tiny\.json: no such file, nor has any bundle"):
            make_plan(tmp_path, subjects, ["mednext"], ["tiny.json"])


class TestCode:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch) -> Path:
        """A copy of the package that can be changed."""
        copy = tmp_path / "custom"
        shutil.copytree(inputs.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "bundles"))
        monkeypatch.setattr(inputs, "PACKAGE", copy)
        return copy

    def digests(self) -> list[str]:
        """Digest of the code of training MedNeXt, scoring it, training CorrDiff, scoring it, and the ensemble."""
        return [code_digest(json.dumps(config_contents(bundle, configs))) for bundle, *configs in RUNS]

    def changed_by(self, file: Path, old: str, new: str) -> list[int]:
        before, text = self.digests(), file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        after = self.digests()
        return [number for number, digest in enumerate(after) if digest != before[number]]

    def test_a_job_depends_on_the_code_that_it_runs_and_on_no_other(self, package):
        code = "from __future__ import annotations\n"
        changed = {
            name: self.changed_by(package / name, code, code + "CHANGED = 1\n")
            for name in (
                "mednext/network.py",
                "corrdiff/diffusion.py",
                "metrics/scores.py",
                "cli.py",
                "crossval/plan.py",
            )
        }
        assert changed == {
            "mednext/network.py": [0, 1, 2, 3, 4],
            "corrdiff/diffusion.py": [2, 3, 4],
            "metrics/scores.py": [0, 1, 2, 3, 4],
            "cli.py": [],
            "crossval/plan.py": [],
        }
        assert self.changed_by(next(iter(package.glob("tuning/choice*"))), code, code + "CHANGED = 1\n") == [4]

    def test_comments_docstrings_layout_and_the_version_do_not_count(self, package):
        file = package / "mednext" / "network.py"
        code = "from __future__ import annotations\n"
        assert self.changed_by(file, code, f"# a comment\n\n\n{code}") == []
        assert self.changed_by(file, '"""', '"""Another docstring. ') == []
        assert self.changed_by(package / "__init__.py", __version__, "99.0.0") == []

    def test_what_is_sliced_off_counts(self, package):
        file = package / "mednext" / "network.py"
        file.write_text(file.read_text() + "\nREST = [1, 2][1:]\n")
        assert self.changed_by(file, "[1:]", "[:1]") == [0, 1, 2, 3, 4]

    def test_every_module_that_a_job_imports_counts(self, package):
        """What Python has loaded after the import of all that train.json names, and nothing of it is missed."""
        text = json.dumps(config_contents("comnet_corrdiff", ["train.json"]))
        modules = sorted(set(re.findall(r"\bcustom\.\w+", text)))
        script = f"import sys, {', '.join(modules)}; print(*(m for m in sys.modules if m.startswith('custom.')))"
        command = [sys.executable, "-c", script]
        loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=inputs.PACKAGE.parent).stdout
        found: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            module = inputs._module
            patch.setattr(inputs, "_module", lambda file, modified: found.append(file) or module(file, modified))
            code_digest(text)
        names = {".".join(("custom", *file.relative_to(package).with_suffix("").parts)) for file in found}
        assert len(loaded.split()) > 20 and set(loaded.split()) <= {name.removesuffix(".__init__") for name in names}
