"""comnet_corrdiff from its configs: frozen backbone, stages in turn, stopping and going on, scoring, two processes."""

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
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, TINY, fails_with, run
from monai.bundle import ConfigParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from custom.cohort import Cohort
from custom.mednext import mednext_tiny
from custom.weights import RELEASED, CheckpointError, Weights, fold_checkpoint, read_checkpoint, save_atomically

ROOT = BUNDLES / "comnet_corrdiff"
FOLDS = 3
SMALL = TINY | {"corrector": "custom.corrdiff.corrdiff_tiny", "max_epochs": 3, "vq_epochs": 1}


@pytest.fixture(scope="module")
def backbones(phantoms, tmp_path_factory) -> Path:
    """Three untrained backbones that claim to have been trained on the subjects of the other folds."""
    folder = tmp_path_factory.mktemp("backbones")
    cohort = Cohort(str(phantoms), str(folder / "datalist.json"), num_folds=FOLDS)
    for fold in range(FOLDS):
        torch.manual_seed(fold)
        facts = {"backbone": TINY["backbone"], "spacing": TINY["spacing"], "num_folds": FOLDS, "fold": fold}
        facts["trained_on"] = [item["subject"] for item in cohort.training(fold)]
        save_atomically({"model": mednext_tiny().state_dict(), "provenance": facts}, fold_checkpoint(folder, fold))
    return folder


def settings(phantoms: Path, backbones: Path, models: Path, **overrides) -> dict:
    paths = {"dataset_dir": phantoms, "backbones_dir": backbones, "models_dir": models}
    paths |= {"datalist_file": backbones / "datalist.json", "coarse_dir": backbones / "coarse"}
    return {key: str(path) for key, path in paths.items()} | {"num_folds": FOLDS, "fold": 0} | SMALL | overrides


def command(**options) -> list[str]:
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(ROOT / "configs" / "train.json")]
    return words + [
        word for key, value in {"bundle_root": ROOT, **options}.items() for word in (f"--{key}", str(value))
    ]


@pytest.fixture(scope="module")
def trained(phantoms, backbones, tmp_path_factory) -> Path:
    models = tmp_path_factory.mktemp("trained")
    run("comnet_corrdiff", "train.json", **settings(phantoms, backbones, models))
    return models / "fold0"


def test_one_file_holds_backbone_and_corrector_and_the_backbone_is_unchanged(trained, backbones):
    state, facts = read_checkpoint(trained / "model.pt")
    source, _ = read_checkpoint(fold_checkpoint(backbones, 0))
    kept = {name.removeprefix("backbones.0."): value for name, value in state.items() if name.startswith("backbones.")}
    assert kept.keys() == source.keys() and all(torch.equal(kept[name], source[name]) for name in source)
    assert {name.split(".")[0] for name in state} == {"backbones", "corrector"}
    assert facts["corrector"] == SMALL["corrector"] and facts["backbone"] == SMALL["backbone"]
    assert set(facts["trained_on"]) == set(read_checkpoint(fold_checkpoint(backbones, 0))[1]["trained_on"])


def test_every_part_of_the_corrector_has_learnt(trained):
    last = torch.load(trained / "last.pt", weights_only=True)["model"]
    assert bool(last["tokeniser.codebook.initialised"]) and bool(last["latent_scale.measured"])
    for name in ("alpha", "gate.weight", "diffusion.denoiser.end.2.weight"):
        assert last[name].abs().sum() > 0, f"{name} is still as it was made"


def test_coarse_predictions_are_out_of_fold_and_made_once(trained, phantoms, backbones, tmp_path):
    files = {path: path.stat().st_mtime_ns for path in (backbones / "coarse").glob("*.npy")}
    assert len(files) == len(list(phantoms.iterdir()))
    run("comnet_corrdiff", "train.json", run_id="predict_coarse", **settings(phantoms, backbones, tmp_path))
    assert files == {path: path.stat().st_mtime_ns for path in (backbones / "coarse").glob("*.npy")}


def test_each_term_of_the_loss_is_logged_with_the_perplexity(trained):
    events = EventAccumulator(str(trained / "events"))
    events.Reload()
    assert {"diff", "recon", "vq", "seg", "perplexity", "total"} <= set(events.Tags()["scalars"])
    assert len({event.value for event in events.Scalars("diff")}) > 2


def test_killed_training_goes_on_to_the_same_result(trained, phantoms, backbones, tmp_path):
    options = settings(phantoms, backbones, tmp_path)
    process = subprocess.Popen(command(**options), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    last, deadline = tmp_path / "fold0" / "last.pt", time.time() + 120
    while not last.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(last, weights_only=True)["progress"]["epoch"] < 3, "the process was not killed in the middle"
    run("comnet_corrdiff", "train.json", **options)
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path / "fold0", trained))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert ours["best"] == theirs["best"]


def score(trained: Path, phantoms: Path, output: Path, backbones: Path, **overrides) -> dict[str, dict[str, str]]:
    options = {key: SMALL[key] for key in ("backbone", "corrector", "spacing", "num_workers")} | overrides
    options |= {"checkpoint": str(trained / "model.pt"), "dataset_dir": str(phantoms), "output_dir": str(output)}
    options |= {"datalist_file": str(backbones / "datalist.json"), "cohort#num_folds": FOLDS, "write_pictures": False}
    run("comnet_corrdiff", "inference.json", "evaluate.json", **options)
    with open(output / "scores.csv", newline="") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def test_the_held_out_fold_is_scored_and_called_comnet(trained, phantoms, backbones, tmp_path):
    rows = score(trained, phantoms, tmp_path, backbones)
    held_out = Cohort(str(phantoms), str(backbones / "datalist.json"), num_folds=FOLDS).validation(0)
    assert set(rows) == {item["subject"] for item in held_out}
    assert {row["model"] for row in rows.values()} == {"CoMNeT"} and {row["fold"] for row in rows.values()} == {"0"}
    assert all(0 <= float(row["WT_ece"]) <= 1 for row in rows.values())


def test_the_same_seed_gives_the_same_mask_and_uncertainty_is_written(trained, phantoms, backbones, tmp_path):
    state, facts = read_checkpoint(trained / "model.pt")
    state["corrector.alpha"] = torch.full((3,), 0.5)
    save_atomically({"model": state, "provenance": facts}, tmp_path / "model.pt")
    maps = {}
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        options = {"seed": seed, "num_samples": 2, "write_uncertainty": True, "write_probabilities": True}
        subject = next(iter(score(tmp_path, phantoms, tmp_path / name, backbones, **options)))
        stored = [nib.load(tmp_path / name / subject / f"{subject}_{kind}.nii.gz") for kind in ("prob", "uncertainty")]
        maps[name] = [np.asarray(image.dataobj) for image in stored]
    assert all(np.array_equal(a, b) for a, b in zip(maps["one"], maps["two"], strict=True))
    assert not np.array_equal(maps["one"][0], maps["three"][0])
    probability, uncertainty = maps["one"]
    assert uncertainty.shape == probability.shape and 0 < uncertainty.max() <= 0.75
    brain = np.asarray(nib.load(phantoms / subject / "brain_t1.nii.gz").dataobj) != 0
    assert not uncertainty[~brain].any()


def test_a_backbone_that_has_seen_the_subject_is_refused(phantoms, backbones, tmp_path):
    content = json.loads((backbones / "datalist.json").read_text())
    for item in content["training"]:
        item["fold"] = (item["fold"] + 1) % FOLDS
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    options = settings(phantoms, backbones, tmp_path, datalist_file=str(tmp_path / "datalist.json"))
    with fails_with(CheckpointError, match="trained on subject .* which this datalist puts into that very fold"):
        run("comnet_corrdiff", "train.json", **options | {"coarse_dir": str(tmp_path / "coarse")})


def test_a_missing_backbone_is_named(phantoms, backbones, tmp_path):
    with fails_with(CheckpointError, match=r"no backbone at .*fold\d.*model.pt"):
        run("comnet_corrdiff", "train.json", **settings(phantoms, tmp_path, tmp_path))


def test_release_recipe_takes_the_last_epoch(phantoms, backbones, tmp_path):
    run("comnet_corrdiff", "train.json", "release.json", **settings(phantoms, backbones, tmp_path, max_epochs=2))
    state, _ = read_checkpoint(tmp_path / "fold0" / "model.pt")
    last = torch.load(tmp_path / "fold0" / "last.pt", weights_only=True)
    assert last["best"]["epoch"] == last["progress"]["epoch"] == 2
    assert all(torch.equal(state[f"corrector.{key}"], value) for key, value in last["model"].items())


def test_two_processes_train_one_corrector(phantoms, backbones, tmp_path):
    words = command(**settings(phantoms, backbones, tmp_path, max_epochs=2))[1:]
    configs = [str(ROOT / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    words[words.index("--config_file") + 1] = str(configs)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(launcher + words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    state, _ = read_checkpoint(tmp_path / "fold0" / "model.pt")
    assert not any("module." in key for key in state)
    assert torch.load(tmp_path / "fold0" / "last.pt", weights_only=True)["progress"]["iteration"] == 4


def test_the_released_pair_leaves_the_regions_that_its_switch_refuses():
    weights = Weights(ROOT / "models" / "model.pt")
    assert weights.checkpoints[0].sha256 == RELEASED["comnet_corrdiff"]
    config = ConfigParser()
    config.read_config(ROOT / "configs" / "inference.json")
    config.update({"bundle_root": str(ROOT), "device": "cpu"} | weights.settings)
    network = config.get_parsed_content("network_def").eval()
    weights.load(network)
    assert network.refine_regions == weights.tuned["refine_regions"] and bool(network.corrector.alpha.any())
    image = torch.randn(1, 4, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        coarse, found = network.backbones[0](image), network(image)
        network.refine_regions = [True] * 3
        refined = network(image)
    changed = [not torch.equal(found[:, region], coarse[:, region]) for region in range(3)]
    assert changed == weights.tuned["refine_regions"] and not torch.equal(refined, coarse)


def test_the_released_pair_has_the_backbone_of_the_released_fold():
    pair, facts = read_checkpoint(ROOT / "models" / "model.pt")
    backbone, of_backbone = read_checkpoint(BUNDLES / "comnet_mednext" / "models" / "model.pt")
    assert all(torch.equal(pair[f"backbones.0.{name}"], value) for name, value in backbone.items())
    alike = ("fold", "spacing", "patch_size", "trained_on", "missing_modalities")
    assert {name: facts[name] for name in alike} == {name: of_backbone[name] for name in alike}
