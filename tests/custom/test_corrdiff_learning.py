"""What each stage of CorrDiff trains, by its gradients, and a short overfit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from corrdiff_networks import subject, tiny
from scipy import ndimage
from torch import nn

from custom.corrdiff import CorrDiff, CorrDiffLoss, Denoiser, LatentDiffusion
from custom.corrdiff.vqvae import ResidualVQVAE
from custom.phantom import simulate
from custom.transforms import label_map_to_regions


def test_stages_learn_what_they_should():
    network, (image, coarse, target) = tiny(alpha=0.1), subject()
    loss = CorrDiffLoss()
    with pytest.raises(ValueError, match="tokeniser is untrained"):
        network.training_step(image, coarse, target, "diffusion")
    with pytest.raises(ValueError, match="choose one of vq, diffusion, joint"):
        network.training_step(image, coarse, target, "warmup")
    loss(network.training_step(image, coarse, target, "vq"), target).backward()
    assert with_gradient(network) == {"tokeniser"}
    network.freeze_tokeniser()
    network.zero_grad()
    frozen = {name: value.clone() for name, value in network.state_dict().items() if is_frozen(name)}
    loss(network.training_step(image, coarse, target, "diffusion"), target).backward()
    assert with_gradient(network) == {"tokeniser", "diffusion", "guide", "gate", "alpha"}
    assert all(p.grad is None for p in network.tokeniser.encoder.parameters())
    assert all(torch.equal(network.state_dict()[name], value) for name, value in frozen.items())


def is_frozen(name: str) -> bool:
    return name.startswith(("tokeniser.encoder", "tokeniser.codebook", "latent_scale"))


def with_gradient(network: nn.Module) -> set[str]:
    named = network.named_parameters()
    return {name.split(".")[0] for name, p in named if p.grad is not None and p.grad.abs().sum() > 0}


def test_diffusion_and_segmentation_do_not_move_the_encoder():
    network, (image, coarse, target) = tiny(alpha=0.5), subject()
    outputs = network.training_step(image, coarse, target, "joint")
    CorrDiffLoss(lambda_recon=0, lambda_vq=0)(outputs, target).backward()
    assert with_gradient(network.tokeniser.encoder) == set()
    outputs = network.training_step(image, coarse, target, "joint")
    CorrDiffLoss()(outputs, target).backward()
    assert with_gradient(network.tokeniser.encoder) != set()


def test_segmentation_alone_reaches_denoiser_guide_gate_alpha_and_decoder():
    network, (image, coarse, target) = tiny(alpha=0.5), subject()
    network.training_step(image, coarse, target, "vq")
    torch.manual_seed(0)
    outputs = network.training_step(image, coarse, target, "diffusion")
    CorrDiffLoss(lambda_diff=0, lambda_recon=0)(outputs, target).backward()
    assert with_gradient(network) == {"tokeniser", "diffusion", "guide", "gate", "alpha"}


def test_training_outputs_are_the_residual_and_the_noise():
    network, (image, coarse, target) = tiny(), subject(batch=2)
    outputs = network.training_step(image, coarse, target)
    torch.testing.assert_close(outputs.residual, target - 1 / (1 + torch.exp(-coarse)))
    assert outputs.noise.shape == outputs.predicted_noise.shape == (8, 4, 4, 4, 4)
    assert outputs.signal.shape == (2,)
    assert torch.equal(outputs.refined, coarse)


def test_alpha_leaves_zero_by_its_own_gradient():
    network, (image, coarse, target) = tiny(), subject()
    CorrDiffLoss()(network.training_step(image, coarse, target), target).backward()
    assert (network.alpha.grad != 0).all()


def test_overfits_a_damaged_phantom_and_needs_its_denoiser():
    """Coarse logits lack half of the tumour, have a false island, are shifted and blurred."""
    image, coarse, target = damaged_phantom()
    torch.manual_seed(0)
    tokeniser = ResidualVQVAE(channels=(16,), stride=4, num_codes=64, latent_channels=16, codes_per_vector=2)
    network = CorrDiff(tokeniser, LatentDiffusion(Denoiser(16, 16, channels=(16, 32))), guide_channels=16)
    untrained = copy.deepcopy(network.diffusion.denoiser)
    fit(network, (image, coarse, target), "vq", 80)
    residual = target - coarse.sigmoid()
    reconstruction, wrong = network.tokenise(residual, learn=False)[0].reconstruction, residual.abs() > 0.1
    assert (reconstruction - residual)[wrong].abs().mean() < 0.5 * residual[wrong].abs().mean()
    network.freeze_tokeniser()
    history = fit(network, (image, coarse, target), "diffusion", 150)
    before, after = dice(coarse, target), dice(network(image, coarse), target)
    network.diffusion.denoiser = untrained
    assert before < 0.5
    assert after > 0.8
    assert dice(network(image, coarse), target) < before + 0.1
    assert np.mean(history[-50:]) < 0.5 * np.mean(network.diffusion.signal)  # the latter without training


def damaged_phantom() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, coarse logits and regions of one phantom at 4.5 mm."""
    image, labels = simulate((32, 40, 32), (4.5, 4.5, 4.5), seed=3)
    target = label_map_to_regions(torch.from_numpy(labels)).float()
    damaged = target.numpy().copy()
    damaged[:, : int(np.argwhere(damaged[2])[:, 0].mean()) - 2] = 0
    damaged = np.roll(damaged, 2, axis=2)
    damaged[:, 4:8, 18:22, 14:18] = 1
    blurred = np.stack([ndimage.gaussian_filter(region, 1.0) for region in damaged])
    coarse = torch.logit(torch.from_numpy(blurred), eps=0.002)
    return torch.from_numpy(image / image.max() * 4)[None], coarse[None], target[None]


def fit(network: CorrDiff, subject: tuple[torch.Tensor, ...], stage: str, steps: int) -> list[float]:
    """Train, and return L_diff of each step."""
    loss, history = CorrDiffLoss(), []
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(network.training_step(*subject, stage), subject[-1]).backward()
        optimiser.step()
        history.append(loss.logged["diff"].item())
    return history


def dice(logits: torch.Tensor, target: torch.Tensor) -> float:
    found, truth = (logits > 0).flatten(2), (target > 0).flatten(2)
    return (2 * (found & truth).sum(2) / (found.sum(2) + truth.sum(2))).mean().item()
