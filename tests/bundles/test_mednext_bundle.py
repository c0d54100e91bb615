"""comnet_mednext from its configs: training, stopping and going on, scoring, the baseline, several processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import pytest
import torch
from bundle_runs import BUNDLES, TINY, fails_with, run

from custom.weights import CheckpointError, read_checkpoint

ROOT = BUNDLES / "comnet_mednext"


def train(models: Path, phantoms: Path, *overlays: str, **overrides) -> Path:
    settings = {"dataset_dir": str(phantoms), "models_dir": str(models), "num_folds": 3, "fold": 0} | TINY | overrides
    run("comnet_mednext", "train.json", *overlays, **settings)
    return models / "fold0"


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), phantoms)


def command(models: Path, phantoms: Path, **overrides) -> list[str]:
    settings = {"dataset_dir": phantoms, "models_dir": models, "num_folds": 3, "bundle_root": ROOT} | TINY | overrides
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(ROOT / "configs" / "train.json")]
    return words + [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def test_training_leaves_best_last_datalist_and_events(trained, phantoms):
    state, provenance = read_checkpoint(trained / "model.pt")
    assert provenance["backbone"] == TINY["backbone"] and provenance["fold"] == 0
    items = json.loads((trained / "datalist.json").read_text())["training"]
    training = {Path(item["image"][0]).parent.name for item in items if item["fold"] != 0}
    assert set(provenance["trained_on"]) == training and 0 < len(training) < 6
    last = torch.load(trained / "last.pt", weights_only=True)
    assert last["progress"]["epoch"] == 2
    assert set(last["model"]) == set(state)
    assert list((trained / "events").glob("events.*"))


def test_killed_training_goes_on_to_the_same_result(trained, phantoms, tmp_path):
    process = subprocess.Popen(command(tmp_path, phantoms), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    last, deadline = tmp_path / "fold0" / "last.pt", time.time() + 120
    while not last.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_after = torch.load(last, weights_only=True)["progress"]["epoch"]
    resumed = train(tmp_path, phantoms)
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (resumed, trained))
    assert stopped_after == 1, "the process was not killed in the middle"
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert ours["best"] == theirs["best"]


def test_evaluation_scores_the_held_out_fold_on_the_native_grid(trained, phantoms, tmp_path):
    checkpoint = {"checkpoint": str(trained / "model.pt"), "dataset_dir": str(phantoms), "output_dir": str(tmp_path)}
    settings = {key: TINY[key] for key in ("backbone", "spacing", "num_workers")} | checkpoint
    run("comnet_mednext", "inference.json", "evaluate.json", **settings, **{"cohort#num_folds": 3})
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    held_out = {item["subject"] for item in rows}
    assert held_out and not held_out & set(read_checkpoint(trained / "model.pt")[1]["trained_on"])
    for row in rows:
        mask = nib.load(tmp_path / row["subject"] / f"{row['subject']}_seg.nii.gz")
        reference = nib.load(phantoms / row["subject"] / "tumorseg_FeTS.nii.gz")
        ours, theirs = mask.get_fdata() > 0, reference.get_fdata() > 0
        expected = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
        assert float(row["WT_dice"]) == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "scores.html").is_file() and (tmp_path / "summary.csv").is_file()


def test_a_checkpoint_of_another_size_is_refused(trained, phantoms, tmp_path):
    settings = {"checkpoint": str(trained / "model.pt"), "dataset_dir": str(phantoms), "output_dir": str(tmp_path)}
    overrides = {"backbone": "custom.mednext.mednext_small", "num_workers": 0}
    with fails_with(CheckpointError, match=r"does not fit MedNeXt .*mednext_tiny.*another shape"):
        run("comnet_mednext", "inference.json", **settings, **overrides)


def test_other_settings_do_not_go_on_from_this_training(trained, phantoms):
    with fails_with(CheckpointError, match=r"last.pt was trained with backbone '.*tiny' instead of '.*small'"):
        train(trained.parent, phantoms, backbone="custom.mednext.mednext_small", max_epochs=3)


def test_segresnet_baseline_trains_under_the_same_settings(phantoms, tmp_path):
    settings = {key: value for key, value in TINY.items() if key != "backbone"} | {"max_epochs": 1}
    overrides = {"dataset_dir": str(phantoms), "models_dir": str(tmp_path), "num_folds": 3}
    run("comnet_mednext", "train.json", "segresnet.json", **settings, **overrides)
    assert read_checkpoint(tmp_path / "segresnet_fold0" / "model.pt")[1]["backbone"] == "monai.networks.nets.SegResNet"


def test_release_recipe_trains_resumes_and_saves_the_average_of_the_last_epoch(phantoms, tmp_path):
    small = {"spacing": [5.0] * 3, "patch_size": [32, 32, 32], "crop_margin": 8, "pad_margin": 2, "num_phantoms": 0}
    settings = {"dataset_dir": str(phantoms), "models_dir": str(tmp_path), "num_folds": 3, "warmup_epochs": 1} | small
    run("comnet_mednext", "train.json", "release.json", **settings, max_epochs=1)
    last = torch.load(tmp_path / "fold0" / "last.pt", weights_only=True)
    state, provenance = read_checkpoint(tmp_path / "fold0" / "model.pt")
    assert provenance["backbone"] == "custom.mednext.mednext_light" and provenance["trained_on"]
    assert provenance["selection"] == "last"
    assert all(torch.equal(state[key], value) for key, value in last["saver"]["average"].items())
    assert any(not torch.equal(state[key], last["model"][key]) for key in last["model"])
    assert last["best"]["epoch"] == -1, "no validation: nothing is chosen by the fold left out"
    run("comnet_mednext", "train.json", "release.json", **settings, max_epochs=2)
    assert torch.load(tmp_path / "fold0" / "last.pt", weights_only=True)["progress"]["epoch"] == 2


def test_the_finer_stage_starts_from_the_weights_of_the_coarser_one(phantoms, tmp_path):
    small = {"spacing": [5.0] * 3, "patch_size": [32, 32, 32], "crop_margin": 8, "pad_margin": 2, "warmup_epochs": 0}
    settings = {"dataset_dir": str(phantoms), "num_folds": 3, "max_epochs": 1, "num_phantoms": 0} | small
    run("comnet_mednext", "train.json", "release.json", models_dir=str(tmp_path / "coarse"), **settings)
    start = tmp_path / "coarse" / "fold0" / "model.pt"
    settings |= {"models_dir": str(tmp_path / "fine"), "start_from": str(start), "learning_rate": 0.0}
    run("comnet_mednext", "train.json", "release.json", "release_finer.json", **settings)
    before, after = (read_checkpoint(path)[0] for path in (start, tmp_path / "fine" / "fold0" / "model.pt"))
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before)


def test_the_recipe_for_a_gpu_passes_each_subject_often_in_an_epoch(phantoms, tmp_path):
    small = {"spacing": [5.0] * 3, "patch_size": [32, 32, 32], "crop_size": [32, 32, 32], "crop_margin": 8}
    settings = {"dataset_dir": str(phantoms), "models_dir": str(tmp_path), "num_folds": 3, "pad_margin": 2} | small
    settings |= {"max_epochs": 1, "warmup_epochs": 0, "num_phantoms": 0, "num_workers": 0, "repeats": 2}
    run("comnet_mednext", "train.json", "release.json", "release_finer.json", "release_gpu.json", **settings)
    facts = read_checkpoint(tmp_path / "fold0" / "model.pt")[1]
    assert facts["backbone"] == "custom.mednext.mednext_slim" and facts["mirror_axes"] == [0]
    progress = torch.load(tmp_path / "fold0" / "last.pt", weights_only=True)["progress"]
    assert progress["iteration"] == 2 * len(facts["trained_on"])


def test_inner_selection_neither_trains_nor_chooses_on_the_fold_that_is_scored(phantoms, tmp_path):
    train(tmp_path, phantoms, selection="inner", max_epochs=1)
    facts = read_checkpoint(tmp_path / "fold0" / "model.pt")[1]
    items = json.loads((tmp_path / "fold0" / "datalist.json").read_text())["training"]
    assert facts["selection"] == "inner"
    assert set(facts["trained_on"]) == {item["subject"] for item in items if item["fold"] != 0}
    iterations = torch.load(tmp_path / "fold0" / "last.pt", weights_only=True)["progress"]["iteration"]
    assert iterations < len(facts["trained_on"]), "those that are chosen on are not trained on"


def test_two_processes_train_one_model(phantoms, tmp_path):
    words = command(tmp_path, phantoms, max_epochs=1)[1:]
    configs = [str(ROOT / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    words[words.index("--config_file") + 1] = str(configs)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(launcher + words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    state, _ = read_checkpoint(tmp_path / "fold0" / "model.pt")
    assert not any(key.startswith("module.") for key in state)
    assert torch.load(tmp_path / "fold0" / "last.pt", weights_only=True)["progress"]["iteration"] == 2
