from __future__ import annotations

import pytest
import torch
from torch import nn

from custom.checkpoints import CheckpointError, save_atomically
from custom.comnet import CoMNeT, load_ensemble
from custom.weights import fold_checkpoint, weight_files


def backbone():
    return nn.Conv3d(4, 3, 1)


def write_folds(folder, folds=range(5)):
    networks = {fold: backbone() for fold in folds}
    for fold, network in networks.items():
        save_atomically({"model": network.state_dict(), "provenance": {"fold": fold}}, fold_checkpoint(folder, fold))
    return networks


def test_probability_is_the_mean_of_the_folds_probabilities():
    network, image = CoMNeT(backbone, num_folds=5), torch.randn(2, 4, 5, 6, 7)
    expected = sum(torch.sigmoid(fold(image)) for fold in network.backbones) / 5
    torch.testing.assert_close(torch.sigmoid(network(image)), expected)


def test_confident_folds_give_finite_logits():
    network = CoMNeT(backbone, num_folds=2)
    assert torch.isfinite(network(torch.full((1, 4, 2, 2, 2), 1e4))).all()


def test_corrector_receives_image_and_coarse_logits():
    class Shift(nn.Module):
        def forward(self, image, coarse):
            return coarse + image[:, :3]

    network, image = CoMNeT(backbone, 2, Shift()), torch.randn(1, 4, 4, 4, 4)
    corrector, network.corrector = network.corrector, None
    coarse = network(image)
    network.corrector = corrector
    torch.testing.assert_close(network(image), coarse + image[:, :3])


def test_scripts_to_the_same_output():
    network, image = CoMNeT(backbone, 2).eval(), torch.randn(1, 4, 4, 4, 4)
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_five_fold_checkpoints_load_in_order(tmp_path):
    folds, network = write_folds(tmp_path), CoMNeT(backbone)
    facts = load_ensemble(network, tmp_path)
    assert [fact["fold"] for fact in facts] == [0, 1, 2, 3, 4]
    assert all(torch.equal(network.backbones[fold].weight, folds[fold].weight) for fold in range(5))


def test_whole_ensemble_in_one_file_wins(tmp_path):
    write_folds(tmp_path)
    source, target = CoMNeT(backbone), CoMNeT(backbone)
    save_atomically({"model": source.state_dict()}, tmp_path / "model.pt")
    load_ensemble(target, tmp_path)
    assert weight_files(tmp_path) == [tmp_path / "model.pt"]
    assert torch.equal(target.backbones[4].weight, source.backbones[4].weight)


def test_missing_fold_is_named(tmp_path):
    write_folds(tmp_path, folds=(0, 1, 3, 4))
    with pytest.raises(CheckpointError, match=r"1 of 5 .* missing \(first: .*fold2.model.pt\)"):
        load_ensemble(CoMNeT(backbone), tmp_path)


def test_folds_of_another_size_are_refused(tmp_path):
    write_folds(tmp_path)
    with pytest.raises(CheckpointError, match=r"fold0.*another shape"):
        load_ensemble(CoMNeT(lambda: nn.Conv3d(4, 3, 3)), tmp_path)
