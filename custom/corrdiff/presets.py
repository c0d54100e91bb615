"""Named sizes of CorrDiff, so that a bundle's configuration needs one line."""

from __future__ import annotations

from typing import Any

from ..vqvae import ResidualVQVAE
from .corrector import CorrDiff
from .denoiser import Denoiser
from .diffusion import LatentDiffusion


def corrdiff_base(**options: Any) -> CorrDiff:
    """CorrDiff for 1 mm: its defaults; `options` are passed on to :class:`CorrDiff`, e.g. `num_samples`, `seed`."""
    return CorrDiff(**options)


def corrdiff_tiny(**options: Any) -> CorrDiff:
    """CorrDiff with narrow layers, for demonstrations at 2 mm on a CPU; `options` as in :func:`corrdiff_base`."""
    tokeniser = ResidualVQVAE(channels=(16, 32), num_codes=128)
    diffusion = LatentDiffusion(Denoiser(tokeniser.latent_channels, guide_channels=16, channels=(24, 48)))
    return CorrDiff(tokeniser, diffusion, guide_channels=16, **options)
