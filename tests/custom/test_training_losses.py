"""Losses against the paper's formulas, written a second time in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import DiceLoss
from numpy.testing import assert_allclose

from custom.training import DeepSupervisionLoss, DscPlusPlusBCELoss, dsc_plus_plus

SHAPE = (2, 3, 8, 10, 6)


def sample(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    target = rng.random(shape) < 0.3
    return torch.from_numpy(rng.normal(size=shape).astype("float32")), torch.from_numpy(target.astype("float32"))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def equation_3(p: np.ndarray, y: np.ndarray, eps: float) -> float:
    return float((2 * np.sum(p * y) + eps) / (np.sum(p) + np.sum(y) + eps))


def equation_5(p: np.ndarray, y: np.ndarray, eps: float) -> float:
    return float((2 * np.sum(p * y) + eps) / (np.sum(p**2) + np.sum(y**2) + eps))


def equation_6(logits: torch.Tensor, target: torch.Tensor, eps: float) -> float:
    p, y = sigmoid(logits.numpy()), target.numpy().astype(np.float64)
    scores = [equation_5(p[b, r], y[b, r], eps) for b in range(len(p)) for r in range(3)]
    bce = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    return float(1 - np.mean(scores) + bce)


@pytest.mark.parametrize("eps", [1e-5, 1.0])
def test_loss_is_equation_6(eps: float) -> None:
    logits, target = sample()
    assert_allclose(DscPlusPlusBCELoss(eps=eps)(logits, target).item(), equation_6(logits, target, eps), rtol=1e-6)


def test_epsilon_stands_in_numerator_and_denominator() -> None:
    probabilities, target = torch.full((1, 1, 2, 2, 2), 0.5), torch.zeros(1, 1, 2, 2, 2)
    assert_allclose(dsc_plus_plus(probabilities, target, eps=1.0).item(), 1 / (8 * 0.25 + 1))


def test_soft_targets_are_squared_too() -> None:
    logits, _ = sample(10)
    soft = sample(11)[0].sigmoid()
    expected = [[equation_5(sigmoid(logits[b, r].numpy()), soft[b, r].numpy(), 1e-5) for r in range(3)] for b in (0, 1)]
    assert_allclose(dsc_plus_plus(logits.sigmoid(), soft).numpy(), expected, rtol=1e-5)


def test_empty_region_predicted_empty_scores_one() -> None:
    empty = torch.zeros(1, 3, 4, 4, 4)
    assert torch.equal(dsc_plus_plus(empty, empty), torch.ones(1, 3))


def test_equals_squared_dice_of_monai_for_binary_targets() -> None:
    logits, target = sample(1)
    monai_loss = DiceLoss(squared_pred=True, sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5)(logits, target)
    assert_allclose(1 - dsc_plus_plus(logits.sigmoid(), target).mean().item(), monai_loss.item(), rtol=1e-5)


def test_equals_published_dsc_plus_plus_at_gamma_two() -> None:
    logits, target = sample(2)
    p, y = sigmoid(logits.numpy()), target.numpy()
    true_positive, false_positive, false_negative = (
        np.sum(v, (2, 3, 4)) for v in (p * y, (p * (1 - y)) ** 2, ((1 - p) * y) ** 2)
    )
    published = 2 * true_positive / (2 * true_positive + false_positive + false_negative)
    assert_allclose(dsc_plus_plus(logits.sigmoid(), target, eps=0).numpy(), published, rtol=1e-5)


def test_documented_baseline_config_is_equations_3_and_4() -> None:
    logits, target = sample(3)
    loss = ConfigParser({"loss": {"_target_": "monai.losses.DiceLoss", "sigmoid": True}}).get_parsed_content("loss")
    p, y = sigmoid(logits.numpy()), target.numpy()
    expected = 1 - np.mean([equation_3(p[b, r], y[b, r], 1e-5) for b in range(2) for r in range(3)])
    assert_allclose(loss(logits, target).item(), expected, rtol=1e-5)


def test_stays_exact_where_the_region_is_a_speck_in_a_large_crop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 128, 128, 96, generator=generator) - 6
    target = torch.zeros_like(logits)
    target[..., 50:58, 50:58, 50:58] = 1
    exact = equation_5(sigmoid(logits.numpy()), target.numpy(), 1e-5)
    assert_allclose(dsc_plus_plus(logits.sigmoid(), target).item(), exact, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 60.0, -60.0, 1e4])
@pytest.mark.parametrize("filled", [0.0, 1.0])
def test_gradient_is_finite_on_empty_and_full_regions(scale: float, filled: float) -> None:
    logits = torch.full((1, 3, 4, 4, 4), scale, requires_grad=True)
    loss = DscPlusPlusBCELoss()(logits, torch.full((1, 3, 4, 4, 4), filled))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_gradient_agrees_with_finite_differences() -> None:
    logits, target = sample(4, (1, 3, 3, 3, 2))
    double = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dsc_plus_plus(z.sigmoid(), target.double()), double)


def test_value_is_bounded_below_by_zero_and_falls_with_confidence() -> None:
    _, target = sample(5)
    losses = [DscPlusPlusBCELoss()((2 * target - 1) * confidence, target).item() for confidence in (-20, 0, 2, 20)]
    assert losses == sorted(losses, reverse=True)
    assert 0 <= losses[-1] < 1e-6
    assert losses[0] == pytest.approx(1 + 20, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_gives_the_single_precision_loss(dtype: torch.dtype) -> None:
    logits, target = sample(6)
    logits = logits.to(dtype)
    loss = DscPlusPlusBCELoss()(logits, target.to(torch.uint8))
    assert loss.dtype == torch.float32
    assert_allclose(loss.item(), equation_6(logits.float(), target, 1e-5), rtol=1e-6)


def test_autocast_gives_the_single_precision_loss() -> None:
    logits, target = sample(6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = DeepSupervisionLoss()([logits], target)
    assert loss.dtype == torch.float32
    assert_allclose(loss.item(), equation_6(logits, target, 1e-5), rtol=1e-6)


def test_meta_tensors_give_a_plain_tensor() -> None:
    logits, target = sample(7)
    loss = DeepSupervisionLoss()([MetaTensor(logits)], MetaTensor(target))
    assert type(loss) is torch.Tensor


def test_shape_mismatch_is_refused() -> None:
    logits, target = sample()
    with pytest.raises(ValueError, match="one mask per region"):
        DscPlusPlusBCELoss()(logits, target[:, :1])


@pytest.mark.parametrize("levels", [1, 3, 5, 8])
def test_weights_halve_and_sum_to_one(levels: int) -> None:
    weights = np.array(DeepSupervisionLoss().get_weights(levels))
    assert_allclose(weights.sum(), 1)
    assert_allclose(weights[1:] / weights[:-1], 0.5)


def test_five_levels_from_json_are_the_weighted_sum() -> None:
    config = {
        "_target_": "custom.training.DeepSupervisionLoss",
        "loss": {"_target_": "custom.training.DscPlusPlusBCELoss"},
    }
    loss = ConfigParser({"loss": config}).get_parsed_content("loss")
    outputs = [sample(level, (1, 3, 32 >> level, 32 >> level, 16 >> level))[0] for level in range(5)]
    target = sample(9, (1, 3, 32, 32, 16))[1]
    expected = 0.0
    for level, output in enumerate(outputs):
        step = 2**level
        middle = target[:, :, step // 2 :: step, step // 2 :: step, step // 2 :: step]
        expected += (16 / 31) * 0.5**level * equation_6(output, middle, 1e-5)
    assert_allclose(loss(outputs, target).item(), expected, rtol=1e-5)
    assert_allclose(loss(tuple(outputs), target.bool()).item(), expected, rtol=1e-5)


def test_single_tensor_is_the_plain_loss() -> None:
    logits, target = sample(8)
    assert DeepSupervisionLoss()(logits, target) == DscPlusPlusBCELoss()(logits, target)


def test_every_level_receives_a_gradient() -> None:
    outputs = [torch.zeros(1, 3, size, size, size, requires_grad=True) for size in (16, 8, 4)]
    DeepSupervisionLoss()(outputs, sample(1, (1, 3, 16, 16, 16))[1]).backward()
    assert all(output.grad.abs().sum() > 0 for output in outputs)


@pytest.mark.parametrize("sizes", [(), (4, 8)])
def test_outputs_must_start_at_full_resolution(sizes: tuple[int, ...]) -> None:
    outputs = [torch.zeros(1, 3, size, size, size) for size in sizes]
    with pytest.raises(ValueError, match="from full resolution downwards"):
        DeepSupervisionLoss()(outputs, torch.zeros(1, 3, 8, 8, 8))
