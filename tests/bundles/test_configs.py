"""What the shipped configurations say, read from the files themselves."""

from __future__ import annotations

import copy
import json
import pydoc
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ComponentLocator

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
CONFIGS = sorted(BUNDLES.glob("*/configs/*.json"))
TRAIN = BUNDLES / "comnet_mednext" / "configs" / "train.json"
CORRDIFF = BUNDLES / "comnet_corrdiff" / "configs" / "train.json"
ENSEMBLE = BUNDLES / "comnet_ensemble" / "configs" / "inference.json"
COMPLETE = [path for path in CONFIGS if path.name in ("train.json", "inference.json")]


def name_of(path: Path) -> str:
    return f"{path.parts[-3]}/{path.name}"


def parser(*paths: Path, **overrides) -> ConfigParser:
    config = ConfigParser()
    config.read_config([str(path) for path in paths])
    config.update({"bundle_root": str(paths[0].parents[1]), **overrides})
    return config


def targets(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets(value)]
    return [target for value in node for target in targets(value)] if isinstance(node, list) else []


TABLE_1 = {
    "backbone": "custom.mednext.mednext_base",
    "network_def#in_channels": 4,
    "network_def#out_channels": 3,
    "patch_size": [128, 160, 112],
    "learning_rate": 1e-4,
    "weight_decay": 1e-5,
    "batch_size": 1,
    "accumulation_steps": 2,
    "max_epochs": 150,
    "patience": 30,
    "num_folds": 5,
    "warmup_epochs": 5,
    "max_gradient_norm": 1.0,
    "selection": "paper",
}


@pytest.mark.parametrize(("key", "value"), TABLE_1.items())
def test_defaults_are_table_1_and_section_3_3(key, value):
    assert parser(TRAIN)[key] == value


def test_weights_say_whether_modalities_were_dropped_in_training():
    recipe = parser(TRAIN, TRAIN.with_name("release.json"), drop_modalities_prob=0.3)
    assert recipe.get_parsed_content("provenance#drop_modalities_prob") == 0.3
    assert "drop_modalities_prob" not in parser(TRAIN)["provenance"]


TABLE_1_CORRDIFF = {
    "backbone": "custom.mednext.mednext_base",
    "max_epochs": 50,
    "patience": 15,
    "loss_weights": {"lambda_diff": 1.0, "lambda_recon": 1.0, "lambda_vq": 0.25, "lambda_seg": 1.0},
    "patch_size": [128, 160, 112],
    "learning_rate": 1e-4,
    "weight_decay": 1e-5,
    "batch_size": 1,
    "accumulation_steps": 2,
    "max_gradient_norm": 1.0,
    "coarse_source": "out_of_fold",
    "selection": "paper",
}


@pytest.mark.parametrize(("key", "value"), TABLE_1_CORRDIFF.items())
def test_corrdiff_defaults_are_table_1(key, value):
    assert parser(CORRDIFF)[key] == value


def test_corrdiffs_named_values_reach_schedule_sampler_loss_and_early_stopping():
    config = parser(CORRDIFF)
    network = config.get_parsed_content("network_def")
    diffusion = network.corrector.diffusion
    assert len(network.backbones) == 1 and sum(p.numel() for p in network.backbones.parameters()) == 10_562_799
    assert diffusion.num_train_timesteps == 200 and len(diffusion.timesteps) == 25
    loss = config.get_parsed_content("loss")
    assert loss.weights == {"diff": 1.0, "recon": 1.0, "vq": 0.25, "seg": 1.0}
    stopper = config["early_stop"]
    assert stopper["_target_"].endswith("EarlyStopHandler")
    assert {"_target_": "@early_stop", "_mode_": "callable"} in config["train#handlers"]
    assert stopper["patience"] == "@patience"
    validation = next(one for one in config["train#handlers"] if one["_target_"].endswith("ValidationHandler"))
    assert validation["after"] == config["saver"]["after"] == "@vq_epochs"
    assert 0 < config["vq_epochs"] < config["max_epochs"]


def test_the_ensemble_is_five_backbones_and_a_corrector_of_200_and_25_steps():
    network = parser(ENSEMBLE, weights_dir="/nonexistent").get_parsed_content("network_def")
    assert len(network.backbones) == 5 and not network.refine_each_fold and all(network.refine_regions)
    assert (network.corrector.diffusion.num_train_timesteps, len(network.corrector.diffusion.timesteps)) == (200, 25)


@pytest.fixture(scope="module")
def built():
    """Train.json with its own defaults, but a folder of its own and data that are not read."""
    items = [{"subject": "a", "image": "a.nii.gz", "label": "b.nii.gz"}] * 3
    data = {"train#dataset#data": items, "validate#dataset#data": items, "cohort": None}
    config = parser(TRAIN, **data, ckpt_dir="/nonexistent")
    config["validate#handlers"] = config["train#handlers"] = []
    return config


def test_the_named_values_reach_optimiser_schedule_loss_and_trainer(built):
    optimizer = built.get_parsed_content("optimizer")
    assert type(optimizer).__name__ == "AdamW"
    assert optimizer.defaults["lr"] == 1e-4 and optimizer.defaults["weight_decay"] == 1e-5
    scheduler = built.get_parsed_content("lr_scheduler")
    factors = [scheduler.lr_lambda(epoch) for epoch in range(150)]
    assert factors[:6] == sorted(factors[:6]) and factors[5] == 1.0 and factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[0] < 1 and factors[-1] < 0.01
    trainer = built.get_parsed_content("train#trainer")
    assert trainer.accumulation_steps == 2 and trainer.state.max_epochs == 150
    assert type(trainer.loss_function).__name__ == "DeepSupervisionLoss"
    assert len(trainer.network.out_blocks) == 4
    assert sum(parameter.numel() for parameter in trainer.network.parameters()) == 10_562_799


def test_augmentation_is_the_papers_list_and_no_more():
    names = [step["name"] for step in parser(TRAIN)["train#random_transforms"] if "RandTorchIOd" in step["_target_"]]
    assert names == ["RandomFlip", "RandomAffine", "RandomGamma", "RandomNoise", "RandomBlur"]


@pytest.mark.parametrize("path", COMPLETE, ids=name_of)
@pytest.mark.parametrize("there", [False, True])
def test_mixed_precision_follows_the_device_and_not_the_machine(path, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    for device, mixed in (("$torch.device('cpu')", False), ("cpu", False), ("cuda:1", True)):
        assert parser(path, device=device).get_parsed_content("amp") is mixed


@pytest.mark.parametrize("bundle", ["comnet_mednext", "comnet_corrdiff", "comnet_ensemble"])
def test_what_monai_label_takes_of_a_bundle_runs_in_openvino(bundle):
    """It parses network_def and inferer, and calls the one with a loaded copy of the other (MONAI Label 0.8.5)."""
    pytest.importorskip("openvino")
    tiny = {"backbone": "custom.mednext.mednext_tiny", "corrector": "custom.corrdiff.corrdiff_tiny"}
    config = parser(BUNDLES / bundle / "configs" / "inference.json", **tiny, compile_cache=False, device="cpu")
    network = copy.deepcopy(config.get_parsed_content("network_def")).eval()
    inferer = config.get_parsed_content("inferer")
    with torch.no_grad():
        inferer(torch.zeros(1, 4, 32, 32, 32), network)
    served, executed = inferer.execution.served
    names = {type(module).__name__ for module in executed.modules()}
    assert served is network and "OpenVINOMedNeXt" in names


def test_image_preprocessing_is_the_same_everywhere():
    """Inference alone may take subjects that lack modalities."""
    lists = [parser(path)["image_preprocessing"] for path in COMPLETE]
    for path, (load, *_) in zip(COMPLETE, lists, strict=True):
        missing = [load.pop(name, None) for name in ("allow_missing", "missing_dice")]
        assert missing == (["@allow_missing", "@missing_dice"] if path.name == "inference.json" else [None, None])
    assert len(lists) >= 5 and all(steps == lists[0] for steps in lists)


def test_output_settings_are_the_same_in_all_inference_configs():
    mednext, corrdiff, ensemble = (
        json.loads((BUNDLES / name / "configs" / "inference.json").read_text())
        for name in ("comnet_mednext", "comnet_corrdiff", "comnet_ensemble")
    )
    weights = {"fold", "checkpoint", "weights_dir", "weights", "num_folds", "network_def", "batch", "handlers"}
    tuned = {"refine_regions", "refine_each_fold", "thresholds", "min_volume_mm3"}
    assert all(config["batch"]["settings"]["amp"] == "@amp" for config in (mednext, corrdiff, ensemble))
    inferers = {"few_windows", "whole_volume", "sliding_window"}
    for inferer in inferers:  # an ensemble mirrors in itself
        assert corrdiff[inferer] == ensemble[inferer] | {"mirror_axes": "@mirror_axes"}
        assert mednext[inferer] == corrdiff[inferer]
    assert ensemble["network_def"]["mirror_axes"] == "@mirror_axes"
    for key in (set(corrdiff) | set(ensemble)) - weights - tuned - inferers:
        assert corrdiff[key] == ensemble[key], key
    corrector = {"segresnet_filters", "corrector", "num_samples", "seed", "refine_regions"}
    maps = {"write_uncertainty", "map_keys", "probability_transforms", "mask_transforms"}
    for key in (set(mednext) | set(corrdiff)) - weights - corrector - maps:
        assert mednext[key] == corrdiff[key], key


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_targets_exist(path):
    content = json.loads(path.read_text())
    locator = ComponentLocator()
    for target in targets(content):
        if target.startswith("@"):
            named = content[target[1:]]
            target = named["_target_"] if isinstance(named, dict) else named
        name = locator.get_component_module_name(target)
        assert pydoc.locate(f"{name}.{target}" if name else target) is not None, target
        assert target.startswith(("monai.", "torch.", "custom.")) or name, target


def workflow(path: Path, kind: str, **overrides) -> ConfigWorkflow:
    flow = ConfigWorkflow(str(path), workflow_type=kind, bundle_root=str(path.parents[1]), **overrides)
    flow.initialize()
    return flow


@pytest.mark.parametrize("path", [TRAIN, CORRDIFF], ids=name_of)
def test_train_has_all_properties(path, tmp_path):
    items = [{"image": "x.nii.gz", "label": "x.nii.gz"}]
    data = {"train#dataset#data": items, "validate#dataset#data": items}
    assert workflow(path, "train", **data, models_dir=str(tmp_path)).check_properties() == []


@pytest.mark.parametrize("path", [path for path in COMPLETE if path.name == "inference.json"], ids=name_of)
def test_inference_has_all_properties(path):
    overrides = {"dataset#data": [{"image": "x.nii.gz"}], "backbone": "custom.mednext.mednext_tiny"}
    assert workflow(path, "infer", **overrides).check_properties() == []
