"""The plan of a cross-validation and the configs that are laid over it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from custom.bundle_run import bundle_root
from custom.crossval.execute import write_commands
from custom.crossval.job import Job, Stage
from custom.crossval.overlays import Overlays
from custom.crossval.plan import choose_models, make_plan
from custom.crossval.subjects import Subjects
from custom.files import UserError

STAGES = [
    "train_backbones",
    "score_backbones",
    "predict_coarse",
    "train_correctors",
    "score_comnet",
    "ensemble",
    "report",
]
FOLDS = range(3)


@pytest.fixture
def subjects(tmp_path) -> Subjects:
    folds = {f"BT{number}": number % 3 for number in range(6)}
    return Subjects(tmp_path / "run" / "datalist.json", tmp_path / "data", 3, folds, "digest")


def plan(subjects, run_dir, *args, **kwargs) -> dict[str, Stage]:
    return {stage.name: stage for stage in make_plan(run_dir, subjects, *args, **kwargs)}


def options(job: Job) -> dict[str, str]:
    words = shlex.split(job.command())
    first = words.index("--config_file")
    return dict(zip(words[first::2], words[first + 1 :: 2], strict=True))


def config_names(job: Job) -> list[str]:
    value = options(job)["--config_file"]
    return [Path(name).name for name in (eval(value) if value.startswith("[") else [value])]


class TestPlan:
    def test_every_model_and_fold_is_trained_and_scored_once(self, subjects, tmp_path):
        stages = plan(subjects, tmp_path / "run")
        names = [job.name for stage in stages.values() for job in stage.jobs]
        expected = [
            f"{verb}_{m}_fold{k}" for verb in ("train", "score") for m in ("segresnet", "mednext") for k in FOLDS
        ]
        expected += ["predict_coarse", *(f"train_comnet_fold{k}" for k in FOLDS)]
        expected += [*(f"score_comnet_fold{k}" for k in FOLDS), "ensemble", "report"]
        assert list(stages) == STAGES and names == expected

    def test_a_job_reads_only_what_earlier_stages_have_written(self, subjects, tmp_path):
        written: set[Path] = set()
        for stage in plan(subjects, tmp_path / "run").values():
            checkpoints = {path for job in stage.jobs for path in job.reads if path.suffix == ".pt"}
            assert checkpoints <= written
            written |= {path for job in stage.jobs for path in job.writes}
        assert {path.name for path in written} >= {"model.pt", "scores.csv", "tuning.json", "report.html", "coarse"}

    def test_the_paths_of_a_command_are_those_of_the_agreed_layout(self, subjects, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        stages = plan(subjects, tmp_path / "run", seed=7)
        train = options(stages["train_backbones"].jobs[1])
        assert train["--models_dir"] == "run/segresnet" and train["--ckpt_dir"] == "run/segresnet/fold1"
        assert (train["--dataset_dir"], train["--datalist_file"]) == ("data", "run/datalist.json")
        assert (train["--fold"], train["--num_folds"], train["--seed"]) == ("1", "3", "7")
        score = options(stages["score_backbones"].jobs[5])
        assert score["--checkpoint"] == "run/mednext/fold2/model.pt" and score["--output_dir"] == "run/mednext/scores"
        assert (score["--fold"], score["--batch#model"], score["--cohort#num_folds"]) == ("2", "MedNeXt", "3")
        corrector = options(stages["train_correctors"].jobs[0])
        assert corrector["--backbones_dir"] == "run/mednext" and corrector["--coarse_dir"] == "run/coarse"
        assert corrector["--models_dir"] == "run/comnet"
        ensemble = options(stages["ensemble"].jobs[0])
        assert ensemble["--correctors_dir"] == "run/comnet" and ensemble["--models_dir"] == "run/ensemble"
        assert stages["predict_coarse"].jobs[0].command().split()[4] == "predict_coarse"
        assert stages["report"].jobs[0].command() == "comnet report run"

    def test_every_option_is_known_to_its_bundle(self, subjects, tmp_path):
        for stage in plan(subjects, tmp_path / "run").values():
            for job in stage.jobs:
                if job.bundle is None:
                    continue
                files = [bundle_root(job.bundle) / "configs" / name for name in job.configs]
                known = {key.split("#")[0] for file in files for key in json.loads(file.read_text())}
                assert {key.split("#")[0] for key in job.overrides} <= known, job.name

    def test_the_baselines_network_wins_over_every_overlay(self, subjects, tmp_path):
        jobs = plan(subjects, tmp_path / "run", ["segresnet", "mednext"], ["small.json"])["train_backbones"].jobs
        assert config_names(jobs[0]) == ["train.json", "small.json", "segresnet.json"]
        assert config_names(jobs[3]) == ["train.json", "small.json"]

    def test_the_ensemble_is_built_of_what_the_correctors_were_trained_with(self, subjects, tmp_path):
        plain, small = (
            options(plan(subjects, tmp_path / "run", overlays=overlays)["ensemble"].jobs[0])
            for overlays in ([], ["small.json"])
        )
        assert plain["--backbone"] == "custom.mednext.mednext_base" and plain["--spacing"] == "[1.0, 1.0, 1.0]"
        assert small["--backbone"] == "custom.mednext.mednext_tiny" and small["--spacing"] == "[2.0, 2.0, 2.0]"
        assert small["--corrector"] == "custom.corrdiff.corrdiff_tiny"

    def test_notes_reach_every_checkpoint(self, subjects, tmp_path):
        stages = plan(subjects, tmp_path / "run", notes="phantoms only")
        for name in ("train_backbones", "train_correctors", "ensemble"):
            assert {options(job)["--notes"] for job in stages[name].jobs} == {"phantoms only"}

    def test_a_setting_that_only_the_corrector_knows_leaves_the_backbones_as_they_are(self, subjects, tmp_path):
        mine = tmp_path / "mine.json"
        digests = []
        for epochs in (1, 2):
            mine.write_text(json.dumps({"vq_epochs": epochs, "spacing": [2.0, 2.0, 2.0]}))
            stages = plan(subjects, tmp_path / "run", overlays=[str(mine)])
            digests.append({name: [job.digest() for job in stage.jobs] for name, stage in stages.items()})
        changed = [name for name in STAGES if digests[0][name] != digests[1][name]]
        assert changed == ["predict_coarse", "train_correctors"]

    def test_models_can_be_chosen(self, subjects, tmp_path):
        assert choose_models(["comnet"]) == ("mednext", "comnet")
        assert list(plan(subjects, tmp_path, ["segresnet"])) == ["train_backbones", "score_backbones", "report"]
        with pytest.raises(ValueError, match="unknown model unet: choose from segresnet, mednext, comnet"):
            choose_models(["unet", "mednext"])

    def test_commands_are_written_one_line_a_job(self, subjects, tmp_path):
        stages = make_plan(tmp_path / "run", subjects)
        files = write_commands(stages, tmp_path / "run")
        assert [file.name for file in files] == [f"{n}_{name}.txt" for n, name in enumerate(STAGES, start=1)]
        assert files[0].read_text().splitlines() == [job.command() for job in stages[0].jobs]


class TestOverlays:
    def over(self, names, run_dir, bundle="comnet_mednext", configs=("train.json",)):
        return Overlays(names, run_dir).over(bundle, *configs)

    def test_a_bundles_own_file_is_taken_where_it_exists(self, tmp_path):
        assert self.over(["small.json"], tmp_path) == ("train.json", "small.json")
        assert self.over(["small.json"], tmp_path, "comnet_ensemble", ("inference.json",)) == ("inference.json",)

    def test_a_users_file_is_laid_over_every_config(self, tmp_path):
        mine = tmp_path / "mine.json"
        mine.write_text('{"spacing": [3, 3, 3], "max_epochs": 1}')
        for bundle in ("comnet_mednext", "comnet_ensemble"):
            assert self.over([str(mine)], tmp_path, bundle, ("inference.json",))[1:] == (mine,)

    def test_what_does_not_fit_into_a_config_is_left_out_of_a_copy(self, tmp_path):
        own = json.loads((bundle_root("comnet_mednext") / "configs" / "demo.json").read_text())
        assert any(key.startswith("train#") for key in own)
        _, _, copy = self.over(["demo.json"], tmp_path, configs=("inference.json", "evaluate.json"))
        assert json.loads(copy.read_text()) == {key: value for key, value in own.items() if "train#" not in key}
        assert self.over(["demo.json"], tmp_path) == ("train.json", "demo.json")

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
        assert len(make_plan(tmp_path, subjects, ["segresnet"], [str(mine)])) == 3

    def test_a_file_that_is_nowhere_is_refused(self, subjects, tmp_path):
        with pytest.raises(UserError, match=r"tiny\.json: no such file, nor has any bundle"):
            make_plan(tmp_path, subjects, ["mednext"], ["tiny.json"])
