"""What CorrDiff looks at: MRI, coarse probabilities, coarse logits and their uncertainty (paper §3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def binary_entropy(logits: Tensor) -> Tensor:
    """Uncertainty of each region on its own, of any shape, in bits: 1 at a logit of 0, 0 where the backbone is sure."""
    probability = torch.sigmoid(logits)
    nats = probability * F.softplus(-logits) + (1 - probability) * F.softplus(logits)  # exported logsigmoid overflows
    return nats / math.log(2.0)


def condition(image: Tensor, coarse: Tensor, limit: float) -> Tensor:
    """Stack image, probabilities, logits and entropies.

    Args:
        image: `[B, 4, *spatial]`, normalised modalities.
        coarse: logits `[B, 3, *spatial]`.
        limit: logits are clamped to ±limit and divided by it, so that a certain voxel does not drown the others.

    Returns:
        `[B, 13, *spatial]`.
    """
    clamped = coarse.clamp(-limit, limit)
    return torch.cat([image, torch.sigmoid(coarse), clamped / limit, binary_entropy(clamped)], 1)


def brain_mask(image: Tensor) -> Tensor:
    """Voxels of `image` `[B, 4, *spatial]` where any modality is not zero, `[B, 1, *spatial]`."""
    return (image != 0).any(1, keepdim=True)
