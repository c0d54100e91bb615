from __future__ import annotations

import pytest
import torch

from custom.checkpoints import CheckpointError, save_atomically
from custom.weights import describe_weights, fold_checkpoint


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
