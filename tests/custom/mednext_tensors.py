"""Random weights and images for MedNeXt, and how outputs are compared."""

from __future__ import annotations

import torch
from torch import nn


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)


def images(n: int = 1, channels: int = 4, size: tuple[int, ...] = (32, 16, 16), offset: float = 0.0) -> torch.Tensor:
    return torch.randn((n, channels, *size), generator=torch.Generator().manual_seed(7)) + offset


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Compare; the default is for float64, where the rounding of another processor cannot decide."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0)
