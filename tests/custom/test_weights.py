from __future__ import annotations

import json
import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from custom import weights as module
from custom.batch import Batch
from custom.comnet import CoMNeT
from custom.files import UserError
from custom.release import release_weights
from custom.weights import (
    CheckpointError,
    Weights,
    WeightsLoader,
    fold_checkpoint,
    read_checkpoint,
    save_atomically,
)

REPOSITORY = Path(__file__).resolve().parents[2]
opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(os.path.realpath(args[0])) if is_open(event, args) else None)


def is_open(event, args) -> bool:
    return event == "open" and isinstance(args[0], (str, os.PathLike))


@contextmanager
def opens(*paths):
    """Count how often each file is opened by Python within the block."""
    opened.clear()
    counts = {}
    yield counts
    counts |= {Path(path): opened.count(os.path.realpath(path)) for path in paths}


def save(path, network, **facts):
    save_atomically({"model": network.state_dict(), "provenance": facts}, path)
    return path


def write_fold(folder, fold, **facts):
    facts = {"backbone": "custom.mednext.mednext_tiny", "spacing": [2.0, 2.0, 2.0], "num_folds": 3} | facts
    torch.manual_seed(fold)
    save(fold_checkpoint(folder, fold), nn.Linear(3, 2), fold=fold, **facts)


def write_comnet(path, num_backbones, **facts):
    names = [f"backbones.{n}.stem.{part}" for n in range(num_backbones) for part in ("weight", "bias")]
    save_atomically({"model": {name: torch.ones(1) for name in [*names, "corrector.alpha"]}, "provenance": facts}, path)


def ensemble(num_folds=3):
    return CoMNeT(lambda: nn.Linear(3, 2), num_folds)


def test_folds_are_described_together(tmp_path):
    for fold in range(3):
        write_fold(tmp_path, fold, trained_on=[f"BT{fold}", "BT9"], notes="phantoms only")
    weights = Weights(tmp_path)
    assert weights.files == tuple(fold_checkpoint(tmp_path, fold) for fold in range(3))
    assert weights.note == "phantoms only" and weights.trained_on == {"BT0", "BT1", "BT2", "BT9"}
    assert weights.settings == {
        "backbone": "custom.mednext.mednext_tiny",
        "spacing": [2.0, 2.0, 2.0],
        "num_folds": 3,
    }
    assert "fold" not in weights.facts


def test_each_file_is_read_once_whatever_is_asked_of_it_and_by_whom(tmp_path):
    for fold in range(3):
        write_fold(tmp_path, fold)
    with opens(*(fold_checkpoint(tmp_path, fold) for fold in range(3))) as counts:
        first, again = Weights(tmp_path), Weights(str(tmp_path))
        assert first.note and first.settings and first.tuned and first.trained_on == frozenset()
        assert again.sha256 == first.sha256 and again.files == first.files
        again.load(ensemble())
    assert set(counts.values()) == {1}


def test_a_file_that_has_changed_is_read_again(tmp_path):
    write_fold(tmp_path, 0, num_folds=1)
    before = Weights(tmp_path)
    assert before.sha256
    write_fold(tmp_path, 0, num_folds=1, seed=1)
    after = Weights(tmp_path)
    assert after.sha256 != before.sha256 and after.note == f"weights {after.sha256[:12]}"


def test_what_has_been_loaded_can_be_loaded_again(tmp_path):
    write_fold(tmp_path, 0, num_folds=1)
    weights, first, second = Weights(tmp_path), nn.Linear(3, 2), nn.Linear(3, 2)
    weights.load(first)
    weights.load(second)
    assert torch.equal(first.weight, second.weight)


def test_as_many_folds_as_were_trained_are_expected(tmp_path):
    write_fold(tmp_path, 0)
    write_fold(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"1 of 3 fold checkpoints are missing in .* \(fold 2\)"):
        _ = Weights(tmp_path).facts


def test_a_copy_of_a_fold_under_another_name_is_no_fold(tmp_path):
    write_fold(tmp_path, 0, num_folds=1)
    (tmp_path / "fold0_backup").mkdir()
    (tmp_path / "fold0_backup" / "model.pt").write_bytes(b"")
    assert len(Weights(tmp_path).checkpoints) == 1


def test_folds_that_do_not_belong_together_are_refused(tmp_path):
    for fold in range(3):
        write_fold(tmp_path, fold, spacing=[1.0 + fold, 1.0, 1.0])
    with pytest.raises(CheckpointError, match=r"differ in spacing"):
        _ = Weights(tmp_path).facts


def test_another_spacing_than_that_of_the_weights_is_refused(tmp_path):
    write_fold(tmp_path, 0, spacing=[1.5, 1.5, 1.5])
    weights = Weights(fold_checkpoint(tmp_path, 0))
    weights.refuse_other_spacing((1.5, 1.5, 1.5))
    weights.refuse_other_spacing((1, 1, 1), backbone="another, which does not fit")
    with pytest.raises(
        CheckpointError, match=r'at a spacing of \[1.5, 1.5, 1.5\] mm, not \[1, 1, 1\]: give --spacing "'
    ):
        Batch(str(tmp_path / "out"), {"spacing": [1, 1, 1]}, weights).inputs()
    assert not (tmp_path / "out").exists()


def test_how_often_the_corrector_was_sampled_in_tuning_is_a_setting(tmp_path):
    write_fold(tmp_path, 0, num_samples=4)
    assert Weights(fold_checkpoint(tmp_path, 0)).settings["num_samples"] == 4
    tuned = json.loads((REPOSITORY / "bundles/comnet_ensemble/configs/train.json").read_text())
    assert tuned["provenance"]["num_samples"] == "@num_samples"


def test_one_backbone_is_a_set_of_weights_of_itself_and_of_an_ensemble_of_one(tmp_path):
    write_fold(tmp_path, 2, trained_on=["BT5"])
    weights, network = Weights(fold_checkpoint(tmp_path, 2)), ensemble(1)
    assert weights.trained_on == {"BT5"} and weights.settings["num_folds"] == 1
    weights.load(network)
    assert torch.equal(network.backbones[0].weight, read_checkpoint(weights.files[0])[0]["weight"])
    with pytest.raises(CheckpointError, match="holds 1 backbones, the network has 5"):
        weights.load(ensemble(5))


def test_no_weights_is_one_sentence_that_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights at .*neither model.pt nor fold<k>.*name yours by --weights"):
        _ = Weights(tmp_path).facts


def test_backbones_of_a_whole_ensemble_are_counted(tmp_path):
    write_comnet(tmp_path / "model.pt", 12, num_folds=5, backbone="custom.mednext.mednext_tiny")
    assert Weights(tmp_path).facts == {"num_folds": 12, "backbone": "custom.mednext.mednext_tiny"}
    write_comnet(tmp_path / "fold2" / "model.pt", 1, num_folds=5)
    assert Weights(tmp_path / "fold2" / "model.pt").settings["num_folds"] == 1


def test_tuned_settings_come_from_the_weights_of_the_whole(tmp_path):
    settings = {"thresholds": [0.4, 0.5, 0.6], "min_volume_mm3": [0.0, 50.0, 250.0]}
    write_comnet(tmp_path / "model.pt", 5, **settings, refine_regions=[True, False, True])
    expected = settings | {"refine_regions": [True, False, True]}
    assert Weights(tmp_path).tuned == Weights(tmp_path / "model.pt").tuned == expected


def test_untuned_and_absent_weights_have_the_defaults(tmp_path):
    expected = {"thresholds": [0.5] * 3, "min_volume_mm3": [50.0] * 3, "refine_regions": [True] * 3}
    assert Weights(tmp_path / "absent").tuned == Weights(tmp_path).tuned == expected
    write_fold(tmp_path, 0, num_folds=1)
    assert Weights(tmp_path).tuned == expected
    write_comnet(tmp_path / "model.pt", 5)
    Weights(tmp_path).tuned["thresholds"][0] = 0.1
    assert Weights(tmp_path).tuned == expected


@pytest.mark.parametrize(
    "facts",
    [
        {"backbone": "os.system"},
        {"backbone": "custom.mednext.network.torch.os.system"},
        {"backbone": "custom.mednext.runtime.os.system"},
        {"backbone": "custom.mednext.mednext_nothing"},
        {"backbone": "custom.mednext.from_mic_dkfz"},
        {"backbone": "monai.networks.nets.torch.os.system"},
        {"backbone": "monai.networks.nets.download_url"},
        {"backbone": ["custom.mednext.mednext_tiny"]},
        {"corrector": "custom.corrdiff.out_of_fold.torch.load"},
        {"corrector": "monai.networks.nets.SegResNet"},
        {"spacing": "$__import__('os')"},
        {"patch_size": ["$1"]},
        {"refine_each_fold": "$1"},
    ],
)
def test_only_names_that_are_known_and_numbers_reach_a_config(tmp_path, facts):
    write_fold(tmp_path, 0, **({"num_folds": 1} | facts))
    with pytest.raises(CheckpointError, match="not used"):
        _ = Weights(tmp_path).settings


@pytest.mark.parametrize(
    "backbone", ["custom.mednext.mednext_base", "custom.mednext.mednext_light", "monai.networks.nets.SegResNet"]
)
def test_names_of_ours_and_of_monai_are_trusted(tmp_path, backbone):
    write_fold(tmp_path, 0, num_folds=1, backbone=backbone, corrector="custom.corrdiff.corrdiff_tiny")
    assert Weights(tmp_path).settings["backbone"] == backbone


def test_plain_state_dict_is_a_checkpoint_without_provenance(tmp_path):
    save_atomically(nn.Linear(3, 2).state_dict(), tmp_path / "model.pt")
    state, provenance = read_checkpoint(tmp_path / "model.pt")
    assert set(state) == {"weight", "bias"} and provenance == {}


def test_files_of_pytorchs_old_format_load(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save({"model": source.state_dict()}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    Weights(tmp_path).load(target)
    assert torch.equal(source.weight, target.weight)


def test_checkpoints_as_0_1_0_wrote_them_load(tmp_path):
    """State dict under "model", facts under "provenance", and nothing that this version has added."""
    source, target = ensemble(2), ensemble(2)
    facts = {"backbone": "custom.mednext.mednext_tiny", "spacing": [2.0] * 3, "trained_on": ["a"], "notes": "old"}
    torch.save({"model": source.state_dict(), "provenance": facts}, tmp_path / "model.pt")
    weights = Weights(tmp_path)
    weights.load(target)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert weights.note == "old" and weights.trained_on == {"a"} and weights.settings["num_folds"] == 2


def test_half_precision_on_disk_is_single_precision_in_the_network(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    save(tmp_path / "model.pt", source.half())
    Weights(tmp_path).load(target)
    assert target.weight.dtype == torch.float32 and torch.equal(target.weight, source.weight.float())


def test_another_size_is_refused_with_both_sizes_and_untouched_weights(tmp_path):
    network = nn.Linear(4, 2)
    before = network.weight.clone()
    path = save(tmp_path / "model.pt", nn.Linear(3, 2), backbone="custom.mednext.mednext_small")
    with pytest.raises(CheckpointError, match=r"model.pt does not fit Linear .*mednext_small.*\(2, 3\).*\(2, 4\)"):
        Weights(path).load(network)
    assert torch.equal(network.weight, before)


def test_other_keys_are_refused(tmp_path):
    path = save(tmp_path / "model.pt", nn.Linear(3, 2, bias=False))
    with pytest.raises(CheckpointError, match=r"1 missing \(first: bias\)"):
        Weights(path).load(nn.Linear(3, 2))


def test_the_loader_loads_when_an_engine_starts(tmp_path):
    from ignite.engine import Engine

    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    engine = Engine(lambda engine, batch: None)
    WeightsLoader(target, str(save(tmp_path / "model.pt", source))).attach(engine)
    assert not torch.equal(source.weight, target.weight)
    engine.run([0])
    assert torch.equal(source.weight, target.weight)


def test_missing_truncated_and_unsafe_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent.pt"):
        read_checkpoint(tmp_path / "absent.pt")
    path = save(tmp_path / "model.pt", nn.Linear(30, 20))
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="model.pt is not a readable checkpoint"):
        _ = Weights(tmp_path).tuned
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(os.system))
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "evil.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 20\n")
    with pytest.raises(
        CheckpointError, match=r"lfs\.pt stands for a file that Git LFS has not fetched: run `git lfs pull`"
    ):
        read_checkpoint(tmp_path / "lfs.pt")


def released(tmp_path, monkeypatch):
    torch.manual_seed(0)
    source = save(tmp_path / "trained.pt", nn.Linear(30, 20), trained_on=["a"], notes="fold 0")
    digest = release_weights(source, tmp_path / "model.pt", notes="34 subjects")
    monkeypatch.setattr(module, "RELEASED", {"comnet_ensemble": digest})
    return tmp_path / "model.pt"


def test_a_release_is_half_as_large_and_says_what_it_is(tmp_path, monkeypatch):
    weights, network = Weights(released(tmp_path, monkeypatch)), nn.Linear(30, 20)
    assert weights.note == "34 subjects" and weights.trained_on == {"a"} and weights.facts["release"]
    weights.load(network)
    original = read_checkpoint(tmp_path / "trained.pt")[0]
    assert torch.equal(network.weight, original["weight"].half().float())
    assert isinstance(torch.load(weights.files[0], weights_only=True)["weight"], torch.Tensor), "a plain state dict"


def test_values_too_large_for_half_precision_stay(tmp_path):
    save_atomically({"model": {"sums": torch.tensor([1e6]), "n": torch.tensor([3])}}, tmp_path / "source.pt")
    release_weights(tmp_path / "source.pt", tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["sums"].item() == 1e6 and state["n"].dtype == torch.int64


def test_what_missing_modalities_cost_comes_with_a_release(tmp_path, monkeypatch):
    table = {"nothing": [0.6, 0.82, 0.87], "t1n": [0.54, 0.77, 0.82], "t1n+t1c+t2w": [0.0, 0.44, 0.76]}
    source = save(tmp_path / "trained.pt", nn.Linear(3, 2))
    digest = release_weights(source, tmp_path / "model.pt", missing_modalities=table)
    monkeypatch.setattr(module, "RELEASED", {"comnet_ensemble": digest})
    assert Weights(tmp_path).missing_dice == table
    for key, row in (("t2w+t1n", [0.5] * 3), ("T1n", [0.5] * 3), ("t1n", [0.5] * 2), ("t1n", [50, 70, 80])):
        with pytest.raises(UserError, match=rf"missing_modalities has '{key[:3]}.*give keys such as"):
            release_weights(source, tmp_path / "model.pt", missing_modalities={key: row})


def test_weights_know_whether_modalities_were_dropped_in_training(tmp_path):
    assert Weights(tmp_path).missing_dice is None
    for fold in range(3):
        write_fold(tmp_path, fold)
    assert Weights(tmp_path).missing_dice is None
    for fold in range(3):
        write_fold(tmp_path, fold, drop_modalities_prob=0.25)
    assert Weights(tmp_path).missing_dice == {}
    write_fold(tmp_path, 2, drop_modalities_prob=0.0)
    assert Weights(tmp_path).missing_dice is None


def test_a_released_file_is_the_one_that_this_version_knows(tmp_path, monkeypatch):
    assert Weights(released(tmp_path, monkeypatch)).sha256
    other = save(tmp_path / "other.pt", nn.Linear(30, 20), release="0.2.0", notes="34 subjects")
    with pytest.raises(CheckpointError, match="other.pt is damaged or of another release"):
        _ = Weights(other).note


def test_whichever_byte_of_a_released_file_is_flipped_it_is_refused(tmp_path, monkeypatch):
    path = released(tmp_path, monkeypatch)
    content = path.read_bytes()
    for position in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.pt (is damaged|is not a readable checkpoint)"):
            Weights(path).load(nn.Linear(30, 20))


def test_interrupted_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = save(tmp_path / "model.pt", nn.Linear(3, 2))
    before = path.read_bytes()

    def stop_half_way(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.pt"]
