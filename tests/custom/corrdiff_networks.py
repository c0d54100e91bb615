"""A small CorrDiff whose zero layers are filled, and a subject for it."""

from __future__ import annotations

import torch
from torch import nn

from custom.corrdiff import CorrDiff, Denoiser, LatentDiffusion
from custom.corrdiff.vqvae import ResidualVQVAE

SHAPE = (16, 16, 16)


def tiny(alpha: float = 0.0, **changes) -> CorrDiff:
    """A small network; the last layers of denoiser and decoder, zero at the start, are filled."""
    torch.manual_seed(0)
    tokeniser = ResidualVQVAE(channels=(8, 16), num_codes=16, latent_channels=4)
    diffusion = LatentDiffusion(Denoiser(4, 16, channels=(8, 16)))
    network = CorrDiff(tokeniser, diffusion, guide_channels=16, **changes)
    nn.init.normal_(network.diffusion.denoiser.end[-1].weight, std=0.05)
    nn.init.normal_(tokeniser.decoder[-1].weight, std=0.2)
    nn.init.constant_(network.alpha, alpha)
    return network


def subject(shape: tuple[int, ...] = SHAPE, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image with background zero in the first slices, coarse logits that miss part of a ball, and the ball."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 4, *shape, generator=generator)
    image[:, :, :3] = 0
    centre = torch.stack(torch.meshgrid(*(torch.arange(n) - n / 2 for n in shape), indexing="ij"))
    ball = (centre.norm(dim=0) < 5).float().expand(batch, 3, *shape).clone()
    seen = ball * (centre[2] < 1)
    return image, 4 * seen - 2 + 0.1 * torch.randn(batch, 3, *shape, generator=generator), ball
