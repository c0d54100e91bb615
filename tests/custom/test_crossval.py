"""The plan of a cross-validation, and when its jobs count as changed."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from custom import __version__, bundle_run
from custom.bundle_run import bundle_root
from custom.crossval import inputs
from custom.crossval.inputs import Overlays, Subjects
from custom.crossval.plan import Job, choose_models, make_plan
from custom.files import UserError

FOLDS = range(3)


@pytest.fixture
def subjects(tmp_path) -> Subjects:
    folds = {f"BT{number}": number % 3 for number in range(6)}
    return Subjects(tmp_path / "run" / "datalist.json", tmp_path / "data", 3, folds, "digest")


def plan(subjects, run_dir, *args, **kwargs) -> dict[str, Job]:
    return {job.name: job for job in make_plan(run_dir, subjects, *args, **kwargs)}


def options(job: Job) -> dict[str, str]:
    words = shlex.split(job.command())
    first = words.index("--config_file")
    return dict(zip(words[first::2], words[first + 1 :: 2], strict=True))


def config_names(job: Job) -> list[str]:
    value = options(job)["--config_file"]
    return [Path(name).name for name in (eval(value) if value.startswith("[") else [value])]


class TestPlan:
    def test_every_model_and_fold_is_trained_and_scored_once(self, subjects, tmp_path):
        jobs = plan(subjects, tmp_path / "run")
        expected = {
            f"{verb}_{m}_fold{k}"
            for verb in ("train", "score")
            for m in ("segresnet", "mednext", "comnet")
            for k in FOLDS
        }
        expected |= {"predict_coarse", "ensemble", "report"}
        assert set(jobs) == expected and len(make_plan(tmp_path / "run", subjects)) == len(expected)
        assert list(dict.fromkeys(job.stage for job in jobs.values())) == [
            *("train_segresnet", "score_segresnet", "train_mednext", "score_mednext"),
            *("predict_coarse", "train_comnet", "score_comnet", "ensemble", "report"),
        ]

    def test_a_job_comes_after_those_that_it_needs(self, subjects, tmp_path):
        jobs = make_plan(tmp_path / "run", subjects)
        needs = {job.name: {other.name for other in job.needs(jobs)} for job in jobs}
        names = list(needs)
        assert all(names.index(other) < names.index(job) for job, others in needs.items() for other in others)
        written = {path for job in jobs for path in job.writes}
        for job in jobs:
            assert {path for path in job.reads if path.name != "record.json"} <= written, job.name
        assert {path.name for path in written if path.suffix} == {
            "model.pt",
            "scores.csv",
            "tuning.json",
            "report.html",
        }
        trained = {f"train_mednext_fold{k}" for k in FOLDS}
        assert needs["train_mednext_fold1"] == set() and needs["score_mednext_fold1"] == {"train_mednext_fold1"}
        assert needs["predict_coarse"] == trained and needs["train_comnet_fold0"] == {*trained, "predict_coarse"}
        assert needs["score_comnet_fold2"] == {"train_comnet_fold2"}
        assert needs["ensemble"] == {*trained, "predict_coarse", *(f"train_comnet_fold{k}" for k in FOLDS)}
        scored = {f"score_{model}_fold{k}" for model in ("segresnet", "mednext", "comnet") for k in FOLDS}
        assert needs["report"] == {*scored, "ensemble"}

    def test_the_paths_of_a_command_are_those_of_the_agreed_layout(self, subjects, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        jobs = plan(subjects, tmp_path / "run", seed=7)
        train = options(jobs["train_segresnet_fold1"])
        assert train["--models_dir"] == "run/segresnet" and train["--ckpt_dir"] == "run/segresnet/fold1"
        assert (train["--dataset_dir"], train["--datalist_file"]) == ("data", "run/datalist.json")
        assert (train["--fold"], train["--num_folds"], train["--seed"]) == ("1", "3", "7")
        score = options(jobs["score_mednext_fold2"])
        assert score["--checkpoint"] == "run/mednext/fold2/model.pt"
        assert score["--output_dir"] == "run/mednext/scores/fold2"
        assert (score["--fold"], score["--batch#model"], score["--cohort#num_folds"]) == ("2", "MedNeXt", "3")
        corrector = options(jobs["train_comnet_fold0"])
        assert corrector["--backbones_dir"] == "run/mednext" and corrector["--coarse_dir"].startswith("run/coarse/")
        assert corrector["--models_dir"] == "run/comnet" and corrector["--ckpt_dir"] == "run/comnet/fold0"
        ensemble = options(jobs["ensemble"])
        assert ensemble["--correctors_dir"] == "run/comnet" and ensemble["--models_dir"] == "run/ensemble"
        assert ensemble["--coarse_dir"] == options(jobs["predict_coarse"])["--coarse_dir"] == corrector["--coarse_dir"]
        assert jobs["predict_coarse"].command().split()[4] == "predict_coarse"
        assert jobs["report"].command() == "comnet report run"

    def test_every_option_is_known_to_its_bundle(self, subjects, tmp_path):
        for job in make_plan(tmp_path / "run", subjects):
            if job.bundle is None:
                continue
            files = [bundle_root(job.bundle) / "configs" / name for name in job.configs]
            known = {key.split("#")[0] for file in files for key in json.loads(file.read_text())}
            assert {key.split("#")[0] for key in job.overrides} <= known, job.name

    def test_the_baselines_network_wins_over_every_overlay(self, subjects, tmp_path):
        jobs = plan(subjects, tmp_path / "run", ["segresnet", "mednext"], ["small.json"])
        for job, last in (("train_segresnet_fold0", ["segresnet.json"]), ("train_mednext_fold0", [])):
            first, laid, *others = config_names(jobs[job])
            assert first == "train.json" and others == last
            small = json.loads((tmp_path / "run" / "configs" / laid).read_text())
            assert small == json.loads((bundle_root("comnet_mednext") / "configs" / "small.json").read_text())

    def test_the_ensemble_is_built_of_what_the_correctors_were_trained_with(self, subjects, tmp_path):
        plain, small = (
            options(plan(subjects, tmp_path / "run", overlays=overlays)["ensemble"])
            for overlays in ([], ["small.json"])
        )
        assert plain["--backbone"] == "custom.mednext.mednext_base" and plain["--spacing"] == "[1.0, 1.0, 1.0]"
        assert small["--backbone"] == "custom.mednext.mednext_tiny" and small["--spacing"] == "[2.0, 2.0, 2.0]"
        assert small["--corrector"] == "custom.corrdiff.corrdiff_tiny"

    def test_notes_reach_every_checkpoint(self, subjects, tmp_path):
        jobs = plan(subjects, tmp_path / "run", notes="phantoms only").values()
        making = [job for job in jobs if job.stage.startswith("train_") or job.name == "ensemble"]
        assert len(making) == 10 and {options(job)["--notes"] for job in making} == {"phantoms only"}

    def test_models_can_be_chosen(self, subjects, tmp_path):
        assert choose_models(["comnet"]) == ("mednext", "comnet")
        stages = dict.fromkeys(job.stage for job in make_plan(tmp_path, subjects, ["segresnet"]))
        assert list(stages) == ["train_segresnet", "score_segresnet", "report"]
        with pytest.raises(UserError, match="unknown model unet: choose from segresnet, mednext, comnet"):
            choose_models(["unet", "mednext"])

    def test_all_models_keep_the_weights_by_the_same_rule(self, subjects, tmp_path):
        for job in make_plan(tmp_path / "run", subjects, selection="inner"):
            assert ("selection" in job.overrides) == job.stage.startswith("train_"), job.name
            assert job.overrides.get("selection", "inner") == "inner"
        assert not any("selection" in job.overrides for job in make_plan(tmp_path / "run", subjects))
        with pytest.raises(UserError, match="unknown selection best: choose from paper, inner, last"):
            make_plan(tmp_path / "run", subjects, selection="best")

    def test_a_rule_for_one_of_the_models_is_refused(self, subjects, tmp_path, monkeypatch):
        values = Overlays.values

        def other_rule(self, bundle, *configs):
            return values(self, bundle, *configs) | ({"selection": "last"} if bundle == "comnet_corrdiff" else {})

        monkeypatch.setattr(Overlays, "values", other_rule)
        with pytest.raises(UserError, match="another selection for MedNeXt than for CoMNeT"):
            make_plan(tmp_path / "run", subjects)
        assert make_plan(tmp_path / "run", subjects, selection="inner"), "one rule for all is what is advised"


class TestDigest:
    def changed(self, before: dict[str, Job], after: dict[str, Job]) -> set[str]:
        return {job.stage for name, job in after.items() if job.digest() != before[name].digest()}

    def test_a_setting_that_only_the_corrector_knows_leaves_the_backbones_as_they_are(self, subjects, tmp_path):
        mine, plans = tmp_path / "mine.json", []
        for epochs in (1, 2):
            mine.write_text(json.dumps({"vq_epochs": epochs, "spacing": [2.0, 2.0, 2.0]}))
            plans.append(plan(subjects, tmp_path / "run", overlays=[str(mine)]))
        assert self.changed(*plans) == {"predict_coarse", "train_comnet"}

    def test_neither_worker_processes_nor_the_place_of_a_run_count(self, subjects, tmp_path):
        mine, plans = tmp_path / "mine.json", []
        for workers, folder in ((1, "run"), (2, "elsewhere")):
            mine.write_text(json.dumps({"num_workers": workers, "max_epochs": 3}))
            moved = replace(subjects, datalist_file=tmp_path / folder / "datalist.json")
            plans.append(plan(moved, tmp_path / folder, overlays=[str(mine)]))
        assert config_names(plans[0]["train_mednext_fold0"]) != config_names(plans[1]["train_mednext_fold0"])
        assert self.changed(*plans) == set()
        mine.write_text(json.dumps({"num_workers": 3}))
        workers_only = plan(subjects, tmp_path / "run", overlays=[str(mine)])
        assert self.changed(plan(subjects, tmp_path / "run"), workers_only) == set()
        job = plans[0]["train_mednext_fold0"]
        assert replace(job, overrides=job.overrides | {"num_workers": 7}).digest() == job.digest()

    def test_the_version_alone_does_not_count(self, subjects, tmp_path, monkeypatch):
        before = plan(subjects, tmp_path / "run")
        digests = {name: job.digest() for name, job in before.items()}
        newer = tmp_path / "newer"
        shutil.copytree(inputs.PACKAGE, newer / "custom", ignore=shutil.ignore_patterns("__pycache__", "bundles"))
        for bundle in ("comnet_mednext", "comnet_corrdiff", "comnet_ensemble"):
            shutil.copytree(bundle_root(bundle) / "configs", newer / "bundles" / bundle / "configs")
        changed = 0
        for file in (newer / "custom" / "__init__.py", *newer.glob("bundles/*/configs/*.json")):
            text = file.read_text()
            file.write_text(text.replace(f'"{__version__}"', '"99.0.0"'))
            changed += file.read_text() != text
        assert changed > 3
        monkeypatch.setattr(inputs, "PACKAGE", newer / "custom")
        monkeypatch.setattr(bundle_run, "bundle_root", lambda name: newer / "bundles" / name)
        monkeypatch.setattr(inputs, "bundle_root", lambda name: newer / "bundles" / name)
        assert {name: job.digest() for name, job in plan(subjects, tmp_path / "run").items()} == digests
        (newer / "custom" / "corrdiff" / "diffusion.py").open("a").write("\nMORE = 1\n")
        after = plan(subjects, tmp_path / "run")
        stages = {job.stage for name, job in after.items() if job.digest() != digests[name]}
        assert stages == {"predict_coarse", "train_comnet", "score_comnet", "ensemble"}
        assert before["ensemble"].overrides["coarse_dir"] != after["ensemble"].overrides["coarse_dir"]

    def test_the_content_of_configs_and_checkpoints_counts_and_their_place_does_not(self, tmp_path):
        overlay = tmp_path / "mine.json"
        overlay.write_text('{"max_epochs": 1}')
        job = Job("a", tmp_path / "run", "comnet_mednext", ("train.json", overlay), overrides={"data": tmp_path / "x"})
        digest = job.digest()
        overlay.write_text('{\n  "max_epochs": 1\n}')
        assert job.digest() == replace(job, overrides={"data": tmp_path / "y"}).digest() == digest
        overlay.write_text('{"max_epochs": 2}')
        assert job.digest() != digest
        for change in ({"run_id": "other"}, {"cohort": "other"}, {"overrides": {"fold": 1}}):
            assert replace(job, **change).digest() != job.digest()
        reading = replace(job, reads=(tmp_path / "run" / "model.pt",))
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "model.pt").write_text("weights")
        digest = reading.digest()
        (tmp_path / "run" / "model.pt").write_text("other weights")
        assert reading.digest() != digest
