from __future__ import annotations

import pytest
import torch

from custom.weights import CheckpointError, describe_weights, fold_checkpoint, save_atomically, tuned_settings


def write_fold(folder, fold, **facts):
    facts = {"backbone": "custom.mednext.mednext_tiny", "spacing": [2.0, 2.0, 2.0], "num_folds": 3} | facts
    content = {"model": {"weight": torch.full((2,), float(fold))}, "provenance": facts | {"fold": fold}}
    save_atomically(content, fold_checkpoint(folder, fold))


def test_folds_are_described_together(tmp_path):
    for fold in range(3):
        write_fold(tmp_path, fold, trained_on=[f"BT{fold}", "BT9"], notes="phantoms only")
    weights = describe_weights(tmp_path)
    assert len(weights.files) == 3 and weights.note == "phantoms only"
    assert weights.trained_on == {"BT0", "BT1", "BT2", "BT9"}
    assert weights.facts["backbone"] == "custom.mednext.mednext_tiny" and weights.facts["num_folds"] == 3
    assert "fold" not in weights.facts


def test_digest_changes_with_any_file(tmp_path):
    for fold in range(3):
        write_fold(tmp_path, fold)
    before = describe_weights(tmp_path).sha256
    write_fold(tmp_path, 1, seed=1)
    assert describe_weights(tmp_path).sha256 != before
    assert describe_weights(tmp_path).note == f"weights {describe_weights(tmp_path).sha256[:12]}"


def test_as_many_folds_as_were_trained_are_expected(tmp_path):
    write_fold(tmp_path, 0)
    write_fold(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"1 of 3 fold checkpoints are missing \(first: .*fold2"):
        describe_weights(tmp_path)


def test_folds_that_do_not_belong_together_are_refused(tmp_path):
    for fold in range(3):
        write_fold(tmp_path, fold, spacing=[1.0 + fold, 1.0, 1.0])
    with pytest.raises(CheckpointError, match=r"differ in spacing"):
        describe_weights(tmp_path)


def test_one_checkpoint_file_is_a_set_of_weights(tmp_path):
    write_fold(tmp_path, 2, trained_on=["BT5"])
    assert describe_weights(fold_checkpoint(tmp_path, 2)).trained_on == {"BT5"}


def test_no_weights_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights in .*5 of 5.*comnet demo"):
        describe_weights(tmp_path)


def write_comnet(path, num_backbones, **facts):
    names = [f"backbones.{n}.stem.{part}" for n in range(num_backbones) for part in ("weight", "bias")]
    save_atomically({"model": {name: torch.ones(1) for name in [*names, "corrector.alpha"]}, "provenance": facts}, path)


def test_backbones_of_a_whole_ensemble_are_counted(tmp_path):
    write_comnet(tmp_path / "model.pt", 12, num_folds=5, backbone="custom.mednext.mednext_tiny")
    assert describe_weights(tmp_path).facts == {"num_folds": 12, "backbone": "custom.mednext.mednext_tiny"}


def test_a_fold_network_of_the_corrector_has_one_backbone(tmp_path):
    write_comnet(tmp_path / "fold2" / "model.pt", 1, num_folds=5)
    assert describe_weights(tmp_path / "fold2" / "model.pt").facts["num_folds"] == 1


def test_tuned_settings_come_from_the_weights_of_the_whole(tmp_path):
    settings = {"thresholds": [0.4, 0.5, 0.6], "min_volume_mm3": [0.0, 50.0, 250.0]}
    write_comnet(tmp_path / "model.pt", 5, **settings, refine_regions=[True, False, True])
    assert tuned_settings(tmp_path) == settings | {"refine_regions": [True, False, True]}
    assert tuned_settings(tmp_path / "model.pt") == tuned_settings(tmp_path)


def test_untuned_weights_have_the_defaults(tmp_path):
    expected = {"thresholds": [0.5] * 3, "min_volume_mm3": [50.0] * 3, "refine_regions": [True] * 3}
    assert tuned_settings(tmp_path / "absent") == tuned_settings(tmp_path) == expected
    write_fold(tmp_path, 0)
    assert tuned_settings(tmp_path) == expected
    write_comnet(tmp_path / "model.pt", 5)
    settings = tuned_settings(tmp_path)
    settings["thresholds"][0] = 0.1
    assert tuned_settings(tmp_path) == expected


def test_unreadable_weights_of_the_whole_are_named(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="model.pt is not a readable checkpoint"):
        tuned_settings(tmp_path)
