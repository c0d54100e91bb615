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
    """CorrDiff for demonstrations at 2 mm on a CPU: no layer but the first and last above the latent grid.

    Args:
        options: passed on to :class:`CorrDiff`, as for :func:`corrdiff_base`.
    """
    tokeniser = ResidualVQVAE(channels=(32,), stride=4, latent_channels=32, codes_per_vector=4)
    diffusion = LatentDiffusion(Denoiser(tokeniser.latent_channels, channels=(32, 64)))
    return CorrDiff(tokeniser, diffusion, **options)
