"""comnet_ensemble/train.json on phantoms: parts gathered, settings chosen out of fold, and taken up by inference."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, TINY, fails_with, run
from monai.bundle import ConfigParser, ConfigWorkflow

from custom.cohort import Cohort
from custom.comnet import CoMNeT
from custom.corrdiff import corrdiff_tiny
from custom.mednext import mednext_tiny
from custom.weights import (
    NUM_FOLDS,
    CheckpointError,
    Weights,
    fold_checkpoint,
    read_checkpoint,
    save_atomically,
)

CONFIG = BUNDLES / "comnet_ensemble" / "configs" / "train.json"
SMALL = {"backbone": TINY["backbone"], "corrector": "custom.corrdiff.corrdiff_tiny", "spacing": TINY["spacing"]}


@pytest.fixture(scope="module")
def parts(phantoms, tmp_path_factory) -> Path:
    """Untrained backbones and correctors of five folds that claim to have been trained on the other folds."""
    folder = tmp_path_factory.mktemp("parts")
    cohort = Cohort(str(phantoms), str(folder / "datalist.json"), num_folds=NUM_FOLDS)
    for fold in range(NUM_FOLDS):
        torch.manual_seed(fold)
        write_parts(folder, fold, corrdiff_tiny(), [item["subject"] for item in cohort.training(fold)])
    return folder


def write_parts(folder: Path, fold: int, corrector: torch.nn.Module, trained_on: list[str]) -> None:
    whole = CoMNeT(mednext_tiny, 1, corrector)
    facts = {"backbone": SMALL["backbone"], "spacing": SMALL["spacing"], "fold": fold, "num_folds": NUM_FOLDS}
    facts |= {"trained_on": trained_on, "notes": "untrained"}
    backbone = {"model": whole.backbones[0].state_dict(), "provenance": facts}
    save_atomically(backbone, fold_checkpoint(folder / "mednext", fold))
    content = {"model": whole.state_dict(), "provenance": facts | {"corrector": SMALL["corrector"]}}
    save_atomically(content, fold_checkpoint(folder / "comnet", fold))


def build(parts: Path, phantoms: Path, models: Path, **overrides) -> dict:
    folders = {"dataset_dir": phantoms, "datalist_file": parts / "datalist.json", "coarse_dir": parts / "coarse"}
    folders |= {"backbones_dir": parts / "mednext", "correctors_dir": parts / "comnet", "models_dir": models}
    settings = {key: str(path) for key, path in folders.items()} | SMALL
    run("comnet_ensemble", "train.json", **(settings | overrides))
    return json.loads((models / "tuning.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(parts, phantoms, tmp_path_factory) -> Path:
    models = tmp_path_factory.mktemp("built")
    build(parts, phantoms, models)
    return models


def test_an_untrained_corrector_changes_nothing_and_is_left_out(built):
    tuning = json.loads((built / "tuning.json").read_text(encoding="utf-8"))
    assert tuning["num_subjects"] == 6 and tuning["selection"] == "paper"
    for region in tuning["regions"].values():
        assert region["refine"] is False and region["difference"] == 0
        assert region["interval"] == [None, None], "the epochs may have been chosen on these subjects"
        assert region["dice_coarse"] == region["dice_refined"] == region["dice_default"]
        assert region["adopted"] is (region["dice_tuned"] > region["dice_default"])
        if not region["adopted"]:
            assert (region["threshold"], region["min_volume_mm3"]) == (0.5, 50.0)


def test_the_whole_is_its_parts_and_says_so(built, parts, phantoms):
    state, facts = read_checkpoint(built / "model.pt")
    for fold in range(NUM_FOLDS):
        backbone, _ = read_checkpoint(fold_checkpoint(parts / "mednext", fold))
        assert all(torch.equal(state[f"backbones.{fold}.{name}"], backbone[name]) for name in backbone)
    corrector, _ = read_checkpoint(fold_checkpoint(parts / "comnet", 0))
    names = [name for name in corrector if name.startswith("corrector.")]
    assert names and all(torch.equal(state[name], corrector[name]) for name in names)
    assert facts["notes"] == "untrained" and facts["trained_on"] == sorted(path.name for path in phantoms.iterdir())
    assert {key: facts[key] for key in SMALL} == SMALL and facts["refine_each_fold"] is False
    assert Weights(built).facts["num_folds"] == NUM_FOLDS


def test_dice_is_that_of_the_held_out_folds_prediction_on_the_native_grid(built, parts, phantoms):
    cohort = Cohort(str(phantoms), str(parts / "datalist.json"), num_folds=NUM_FOLDS)
    for item in cohort.subjects():
        cached = json.loads(next((built / "tuning").glob(f"{item['subject']}-*.json")).read_text())
        cell = cached["thresholds"].index(0.5), cached["volumes_mm3"].index(50.0)
        expected = dice_of_et(item, next((parts / "coarse").glob(f"{item['subject']}-*.npy")))
        assert cached["dice"][0][0][cell[0]][cell[1]] == pytest.approx(expected, abs=1e-4)
        assert cached["fold"] == item["fold"]


def dice_of_et(item: dict, coarse: Path) -> float:
    """ET without holes filled and, in voxels of 125 mm³, without components removed; phantoms need no resampling."""
    images = [nib.as_closest_canonical(nib.load(path)).get_fdata() for path in item["image"]]
    brain = np.any([image != 0 for image in images], axis=0)
    box = tuple(slice(axis.min(), axis.max() + 1) for axis in np.nonzero(brain))
    predicted = np.zeros(brain.shape, dtype=bool)
    predicted[box] = np.load(coarse)[0] >= 0
    predicted &= brain
    truth = nib.as_closest_canonical(nib.load(item["label"])).get_fdata() == 4
    total = predicted.sum() + truth.sum()
    return 2 * (predicted & truth).sum() / total if total else 1.0


def test_inference_takes_up_what_was_chosen(built, phantoms, tmp_path):
    state, facts = read_checkpoint(built / "model.pt")
    chosen = {"thresholds": [0.3, 0.4, 0.6], "min_volume_mm3": [0.0, 250.0, 500.0], "refine_regions": [False] * 3}
    save_atomically({"model": state, "provenance": facts | chosen}, tmp_path / "weights" / "model.pt")
    assert Weights(tmp_path / "weights").tuned == chosen
    config = ConfigParser()
    config.read_config(str(CONFIG.with_name("inference.json")))
    config.update({"bundle_root": str(CONFIG.parents[1]), "weights_dir": str(tmp_path / "weights")})
    assert {key: config.get_parsed_content(key) for key in chosen} == chosen
    places = {"dataset_dir": str(phantoms / "BT0001"), "output_dir": str(tmp_path / "out")}
    options = {"weights_dir": str(built), "write_pictures": False, "num_workers": 0}
    run("comnet_ensemble", "inference.json", **places, **options, **SMALL)
    assert (tmp_path / "out" / "BT0001" / "BT0001_seg.nii.gz").is_file()


def test_a_corrector_that_acts_is_judged_fold_by_fold(parts, phantoms, tmp_path):
    """Each fold's corrector is measured on that fold's subjects, and only fold 2's changes anything."""
    for fold in range(NUM_FOLDS):
        state, facts = read_checkpoint(fold_checkpoint(parts / "comnet", fold))
        generator = torch.Generator().manual_seed(fold)
        for name in [name for name in state if name.startswith("corrector.tokeniser.decoder.")]:
            state[name] = torch.randn(state[name].shape, generator=generator)
        state["corrector.alpha"] = torch.full((3,), 5.0 if fold == 2 else 0.0)
        save_atomically({"model": state, "provenance": facts}, fold_checkpoint(tmp_path / "comnet", fold))
    build(parts, phantoms, tmp_path / "models", correctors_dir=str(tmp_path / "comnet"))
    cached = [json.loads(path.read_text()) for path in (tmp_path / "models" / "tuning").glob("*.json")]
    changed = {one["fold"] for one in cached if any(coarse != refined for coarse, refined in one["dice"])}
    assert len(cached) == 6 and changed == {2}


def test_without_correctors_or_tuning(parts, phantoms, tmp_path):
    tuning = build(parts, phantoms, tmp_path, correctors_dir="", tune=False)
    assert tuning["num_subjects"] == 0 and not (tmp_path / "tuning").exists()
    _, facts = read_checkpoint(tmp_path / "model.pt")
    assert facts["refine_regions"] == [False] * 3 and facts["corrector_sha256"] is None


def test_missing_parts_are_named(parts, phantoms, tmp_path):
    with fails_with(CheckpointError, match=r"no backbone at .*nowhere"):
        build(parts, phantoms, tmp_path, backbones_dir=str(tmp_path / "nowhere"))
    with fails_with(CheckpointError, match=r"no checkpoint at .*nowhere"):
        build(parts, phantoms, tmp_path, correctors_dir=str(tmp_path / "nowhere"))
    assert not (tmp_path / "model.pt").exists()


def test_train_has_all_properties(tmp_path):
    flow = ConfigWorkflow(str(CONFIG), workflow_type="train", bundle_root=str(CONFIG.parents[1]), tune=False)
    flow.initialize()
    assert flow.check_properties() == []


def test_probabilities_are_made_as_in_inference():
    train, inference = ({} for _ in range(2))
    for name, target in (("train.json", train), ("inference.json", inference)):
        target |= json.loads(CONFIG.with_name(name).read_text(encoding="utf-8"))
    ours = [step["_target_"] for step in train["train"]["postprocessing"]["transforms"]]
    theirs = [step["_target_"] for step in inference["probability_transforms"] if "_disabled_" not in step]
    assert ours == theirs and train["fill_holes"] == inference["fill_holes"]
