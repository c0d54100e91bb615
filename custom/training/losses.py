"""Training losses of the backbone: DSC++ with binary cross-entropy, under deep supervision (paper §3.3).

The plain Dice loss of eqs. 3-4, for baselines, is MONAI's: `{"_target_": "monai.losses.DiceLoss", "sigmoid": true}`.
MONAI's `DiceCELoss` is no substitute for eq. 6: with three channels it takes a softmax cross-entropy over the regions,
which overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import monai.losses
import torch
from torch import nn
from torch.nn import functional

from ..files import UserError


def dsc_plus_plus(probabilities: torch.Tensor, target: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Soft overlap with squared denominator (paper eq. 5).

    For a binary target this is DSC++ of Yeung et al. (2023, doi 10.1007/s10278-022-00735-3) with gamma 2, since
    2·Σpy + Σp²(1-y) + Σ(1-p)²y = Σp² + Σy, and it is what `monai.losses.DiceLoss(squared_pred=True)` subtracts from 1.
    MONAI takes the intersection as a difference of squared norms, though: with sparse regions in a 128×160×112 crop
    its single-precision value was off by 3e-4 and its gradient by 1.4e-3 (relative), against 1e-7 here.

    Args:
        probabilities: `[B, C, *spatial]`, in [0, 1].
        target: the same shape, binary or in [0, 1].
        eps: ε in numerator and denominator. An empty region predicted empty scores 1.

    Returns:
        `[B, C]`, in [0, 1].
    """
    spatial = tuple(range(2, probabilities.ndim))
    intersection = (probabilities * target).sum(spatial)
    squares = probabilities.square().sum(spatial) + target.square().sum(spatial)
    return (2 * intersection + eps) / (squares + eps)


class DscPlusPlusBCELoss(nn.Module):
    """`1 - mean(DSC++) + BCE` on logits, the mean running over subjects and regions (paper eqs. 4-6).

    Computed in single precision whatever the input or the autocast context.

    Args:
        eps: ε of eq. 5, in voxels.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of `logits` `[B, C, *spatial]` against region masks of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if logits.shape != target.shape:
            raise UserError(
                f"logits {tuple(logits.shape)} and target {tuple(target.shape)} differ in shape: "
                "convert the label map to one mask per region first"
            )
        logits, target = _plain_float(logits), _plain_float(target)
        overlap = dsc_plus_plus(logits.sigmoid(), target, self.eps).mean()
        return 1 - overlap + functional.binary_cross_entropy_with_logits(logits, target)


class DeepSupervisionLoss(monai.losses.DeepSupervisionLoss):
    """Weighted mean of a loss over outputs of falling resolution, weights 1/2^i normalised to sum to one.

    Targets are brought to each output's grid by nearest neighbour, as MONAI does, so they stay binary and nested.
    Unlike MONAI's, the weights are normalised and not held above 1/16, and outputs in the wrong order are refused.
    `{"_target_": "custom.training.DeepSupervisionLoss", "loss": {"_target_": "custom.training.DscPlusPlusBCELoss"}}`

    Args:
        loss: called as `loss(logits, target)` on each level; DSC++ with BCE if not given.
    """

    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__(loss=loss or DscPlusPlusBCELoss())

    def get_weights(self, levels: int = 1) -> list[float]:
        """Return `levels` weights, the full resolution first."""
        weights = [0.5**level for level in range(levels)]
        return [weight / sum(weights) for weight in weights]

    def forward(self, input: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss.

        Args:
            input: logits `[B, C, *spatial]`, or several of them from full resolution downwards.
            target: region masks `[B, C, *spatial]` at full resolution.

        Raises:
            ValueError: no output at all, or the first one is not at the target's resolution.
        """
        outputs = [input] if isinstance(input, torch.Tensor) else list(input)
        if not outputs or outputs[0].shape[2:] != target.shape[2:]:
            raise UserError(
                f"outputs of spatial shapes {[tuple(output.shape[2:]) for output in outputs]} do not start at the "
                f"target's {tuple(target.shape[2:])}: give them from full resolution downwards"
            )
        return super().forward(outputs, _plain_float(target))


def _plain_float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor).float()
