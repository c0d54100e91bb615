"""Equation 2, each term against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from custom.corrdiff import CorrDiffLoss, TrainingOutputs, residual_error, segmentation_error

SHAPE = (2, 3, 6, 5, 4)


def sample(**changes) -> tuple[TrainingOutputs, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise, predicted = torch.randn(2, 2, 4, 3, 2, 2, generator=generator)
    fields = {
        "residual": torch.rand(SHAPE, generator=generator) * 2 - 1,
        "reconstruction": torch.rand(SHAPE, generator=generator) * 2 - 1,
        "quantisation": torch.tensor(0.8),
        "perplexity": torch.tensor(17.0),
        "noise": noise,
        "predicted_noise": predicted,
        "signal": torch.tensor([0.9, 0.2]),
        "refined": torch.randn(SHAPE, generator=generator),
    }
    return TrainingOutputs(**(fields | changes)), (torch.rand(SHAPE, generator=generator) > 0.6).float()


def seg(logits: np.ndarray, y: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    values = []
    for b in range(len(y)):
        dice = [(2 * np.sum(p[b, r] * y[b, r]) + eps) / (np.sum(p[b, r]) + np.sum(y[b, r]) + eps) for r in range(3)]
        bce = -np.mean(y[b] * np.log(p[b]) + (1 - y[b]) * np.log(1 - p[b]))
        values.append(bce + 1 - np.mean(dice))
    return np.array(values)


def weighed(loss: CorrDiffLoss, *batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return loss(*batch), loss.logged


def test_each_term_and_their_weighted_sum_are_equation_2():
    outputs, target = sample()
    total, terms = weighed(CorrDiffLoss(residual_emphasis=0.0, fade_with_noise=True), outputs, target)
    diff = np.mean((outputs.noise - outputs.predicted_noise).numpy() ** 2)
    recon = np.mean(np.abs((outputs.residual - outputs.reconstruction).numpy()))
    weighted = np.mean(np.array([0.9, 0.2]) * seg(outputs.refined.numpy(), target.numpy()))
    found = [terms[name].item() for name in ("diff", "recon", "vq", "seg", "perplexity")]
    assert_allclose(found, [diff, recon, 0.8, weighted, 17.0], rtol=1e-5)
    assert_allclose(total.item(), diff + recon + 0.25 * 0.8 + weighted, rtol=1e-5)
    assert_allclose(terms["total"].item(), total.item())


@pytest.mark.parametrize("name", ["diff", "recon", "vq", "seg"])
def test_each_weight_scales_its_own_term_once(name):
    outputs, target = sample()
    weights = {f"lambda_{other}": 0.0 for other in ("diff", "recon", "vq", "seg")}
    total, terms = weighed(CorrDiffLoss(**(weights | {f"lambda_{name}": 3.0})), outputs, target)
    assert_allclose(total.item(), 3 * terms[name].item(), rtol=1e-6)
    assert terms[name] > 0


def test_stage_without_diffusion_has_reconstruction_and_quantisation_only():
    outputs, target = sample(noise=None, predicted_noise=None, signal=None, refined=None)
    total, terms = weighed(CorrDiffLoss(), outputs, target)
    assert terms["diff"] == terms["seg"] == 0
    assert_allclose(total.item(), terms["recon"].item() + 0.25 * 0.8, rtol=1e-6)


def test_segmentation_term_fades_with_the_signal_only_where_asked():
    outputs, target = sample(signal=torch.tensor([0.0, 0.0]))
    assert weighed(CorrDiffLoss(fade_with_noise=True), outputs, target)[1]["seg"] == 0
    full = seg(outputs.refined.numpy(), target.numpy()).mean()
    assert_allclose(weighed(CorrDiffLoss(), outputs, target)[1]["seg"].item(), full, rtol=1e-5)


def test_empty_region_predicted_empty_costs_nothing():
    assert segmentation_error(torch.full(SHAPE, -60.0), torch.zeros(SHAPE)).max() < 1e-6


def test_emphasis_weighs_voxels_with_a_residual():
    residual = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert_allclose(residual_error(torch.zeros(4), residual).item(), 0.25)
    assert_allclose(residual_error(torch.zeros(4), residual, emphasis=4.0).item(), 5 / 8)


def test_logged_terms_carry_no_gradient_and_the_total_does():
    outputs, target = sample(refined=torch.zeros(SHAPE, requires_grad=True))
    total, terms = weighed(CorrDiffLoss(), outputs, target)
    assert total.requires_grad
    assert not any(value.requires_grad for value in terms.values())


def test_logged_terms_are_those_of_the_last_call():
    loss = CorrDiffLoss()
    assert loss.logged == {}
    totals = [loss(*sample(quantisation=torch.tensor(value))).item() for value in (0.5, 2.5)]
    assert loss.logged["vq"] == 2.5
    assert_allclose(loss.logged["total"].item(), totals[1])
    assert_allclose(totals[1] - totals[0], 0.25 * 2.0, rtol=1e-5)
