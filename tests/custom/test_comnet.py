from __future__ import annotations

import pytest
import torch
from torch import nn

from custom.comnet import CoMNeT
from custom.corrdiff import CorrDiff, Refinement
from custom.weights import CheckpointError, Weights, fold_checkpoint, save_atomically


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


class Shift(nn.Module):
    """A corrector that adds the first three modalities, and says that its samples differ by 0.1."""

    num_samples, seed = 1, 0

    def refine(self, image, coarse, num_samples, seed):
        return Refinement(coarse + image[:, :3], image[:, :3], torch.full_like(coarse, 0.1))


def test_corrector_receives_image_and_coarse_logits():
    network, image = CoMNeT(backbone, 2, Shift()), torch.randn(1, 4, 4, 4, 4)
    corrector, network.corrector = network.corrector, None
    coarse = network(image)
    network.corrector = corrector
    torch.testing.assert_close(network(image), coarse + image[:, :3])


def test_each_fold_can_be_refined_before_the_average():
    network, image = CoMNeT(backbone, 2, Shift(), refine_each_fold=True), torch.randn(1, 4, 4, 4, 4)
    expected = sum(torch.sigmoid(fold(image) + image[:, :3]) for fold in network.backbones) / 2
    torch.testing.assert_close(torch.sigmoid(network(image)), expected)


def test_regions_that_are_not_to_be_refined_keep_their_coarse_logits():
    network, image = CoMNeT(backbone, 2, Shift(), refine_regions=(True, False, True)), torch.randn(1, 4, 4, 4, 4)
    refined = network(image)
    network.corrector = None
    coarse = network(image)
    assert torch.equal(refined[:, 1], coarse[:, 1])
    assert not torch.isclose(refined[:, [0, 2]], coarse[:, [0, 2]]).any()


def test_three_regions_need_three_answers():
    with pytest.raises(ValueError, match="one answer each for ET, TC, WT"):
        CoMNeT(backbone, refine_regions=(True,))


def test_one_fold_with_an_untrained_corrector_gives_the_backbones_logits_bit_for_bit():
    network, image = CoMNeT(backbone, 1, CorrDiff()), 30 * torch.randn(1, 4, 4, 4, 4)
    assert torch.equal(network(image), network.backbones[0](image))


@pytest.mark.parametrize("each", [False, True])
def test_uncertainty_joins_the_spread_of_folds_and_samples(each):
    network = CoMNeT(backbone, 3, Shift(), refine_each_fold=each, uncertainty=True)
    image = torch.randn(1, 4, 4, 4, 4)
    logits = [fold(image) + (image[:, :3] if each else 0) for fold in network.backbones]
    folds = torch.stack(logits).sigmoid().std(0, correction=1)  # as over samples, and over folds in tables
    torch.testing.assert_close(network(image)[:, 3:], (folds.square() + 0.01).sqrt())
    network.uncertainty = False
    assert network(image).shape[1] == 3


class Lopsided(nn.Module):
    """Another answer for a mirrored image, and for each fold."""

    def __init__(self, fold):
        super().__init__()
        self.fold = fold

    def forward(self, image):
        return (self.fold + 1) * image[:, :3] * torch.arange(image.shape[2]).view(-1, 1, 1) / 10


def test_folds_take_turns_in_seeing_the_image_mirrored():
    folds = iter(range(9))
    network, image = CoMNeT(lambda: Lopsided(next(folds)), 4, mirror_axes=[0, 2]), torch.randn(1, 4, 4, 3, 2)
    axes = [[], [2], [4], []]
    views = [fold(image.flip(axis)).flip(axis) for fold, axis in zip(network.backbones, axes, strict=True)]
    torch.testing.assert_close(network(image).sigmoid(), torch.stack(views).sigmoid().mean(0))


def test_of_fewer_folds_than_turns_each_takes_all():
    network, image = CoMNeT(lambda: Lopsided(0), 1, mirror_axes=[0]), torch.randn(1, 4, 4, 3, 2)
    (fold,) = network.backbones
    torch.testing.assert_close(network(image), (fold(image) + fold(image.flip(2)).flip(2)) / 2)
    with pytest.raises(ValueError, match="give axes 0, 1 or 2"):
        CoMNeT(backbone, mirror_axes=[3])


@pytest.mark.parametrize("options", [{}, {"refine_each_fold": True, "uncertainty": True, "mirror_axes": [0]}])
def test_scripts_with_a_corrector(options):
    network, image = CoMNeT(backbone, 2, CorrDiff(), **options).eval(), torch.randn(1, 4, 8, 8, 8)
    nn.init.constant_(network.corrector.alpha, 0.3)
    nn.init.normal_(network.corrector.tokeniser.decoder[-1].weight)
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_fold_checkpoints_leave_the_corrector_untrained(tmp_path):
    write_folds(tmp_path)
    network, image = CoMNeT(backbone, 5, CorrDiff()), torch.randn(1, 4, 8, 8, 8)
    Weights(tmp_path).load(network)
    refined, network.corrector = network(image), None
    assert torch.equal(refined, network(image))


def test_scripts_to_the_same_output():
    network, image = CoMNeT(backbone, 2).eval(), torch.randn(1, 4, 4, 4, 4)
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_five_fold_checkpoints_load_in_order(tmp_path):
    folds, network = write_folds(tmp_path), CoMNeT(backbone)
    Weights(tmp_path).load(network)
    assert all(torch.equal(network.backbones[fold].weight, folds[fold].weight) for fold in range(5))


def test_whole_ensemble_in_one_file_wins(tmp_path):
    write_folds(tmp_path)
    source, target = CoMNeT(backbone), CoMNeT(backbone)
    save_atomically({"model": source.state_dict()}, tmp_path / "model.pt")
    Weights(tmp_path).load(target)
    assert Weights(tmp_path).files == (tmp_path / "model.pt",)
    assert torch.equal(target.backbones[4].weight, source.backbones[4].weight)


def test_a_published_backbone_does_not_hide_the_folds(tmp_path):
    write_folds(tmp_path)
    save_atomically({"model": backbone().state_dict()}, tmp_path / "model.pt")
    assert Weights(tmp_path).files == tuple(fold_checkpoint(tmp_path, fold) for fold in range(5))


def test_folds_that_are_missing_are_named_though_a_copy_of_one_is_published(tmp_path):
    write_folds(tmp_path, folds=(0, 1, 3))
    save_atomically({"model": backbone().state_dict()}, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"2 of 5 .* missing in .* \(fold 2, 4, and model.pt there is one fold's\)"
    ):
        Weights(tmp_path).load(CoMNeT(backbone))


def test_missing_fold_is_named(tmp_path):
    write_folds(tmp_path, folds=(0, 1, 3, 4))
    with pytest.raises(CheckpointError, match=r"1 of 5 .* missing in .* \(fold 2\)"):
        Weights(tmp_path).load(CoMNeT(backbone))


def test_folds_of_another_size_are_refused(tmp_path):
    write_folds(tmp_path)
    with pytest.raises(CheckpointError, match=r"fold0.*another shape"):
        Weights(tmp_path).load(CoMNeT(lambda: nn.Conv3d(4, 3, 3)))
