"""Noise prediction in latent space: a 3D U-Net that sees the conditioning at every scale it needs.

MONAI's `DiffusionModelUNet` always has self-attention at its lowest resolution: that needs einops, takes memory
quadratic in the voxels (7,000 tokens for a whole brain), does not compile to TorchScript, and MONAI's upsampling breaks
on odd sizes. Its residual block with a timestep embedding serves here; attention does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, get_timestep_embedding
from torch import Tensor, nn

NUM_GROUPS = 8
T = TypeVar("T", bound=nn.Module)


class ConditionEncoder(nn.Module):
    """Strided convolutions from image resolution down to the latent grid, run once for all reverse steps.

    Args:
        in_channels: channels of the conditioning.
        out_channels: channels at the latent grid; a multiple of 8 times `factor / 2`.
        factor: a power of two, the image's size over the latent's.
    """

    def __init__(self, in_channels: int = 13, out_channels: int = 32, factor: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while factor > 1:
            factor //= 2
            width = out_channels // factor
            layers += [nn.Conv3d(in_channels, width, 3, 2, 1), nn.GroupNorm(NUM_GROUPS, width), nn.SiLU()]
            in_channels = width
        self.layers = nn.Sequential(*layers, nn.Conv3d(in_channels, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Encode `[B, 13, *spatial]` to `[B, G, *latent]`."""
        return self.layers(x)


class Stage(nn.Module):
    """A change of resolution, the skip connection if there is one, and a residual block."""

    def __init__(self, resample: nn.Module, in_channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.resample = resample
        self.block = residual_block(in_channels, out_channels, embedding)

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """Run on `[B, C, *spatial]`."""
        x = self.resample(x)
        if skip is not None:
            x = torch.cat([x, skip], 1)
        return self.block(x, embedding)


class Denoiser(nn.Module):
    """U-Net that predicts the noise, or the velocity, in a latent.

    Beside it runs a linear path whose scale and shift of each channel depend on the timestep alone. Most of a residual
    is "no error", one code, for which the noise is exactly such a function of the noisy latent; a U-Net normalises its
    features and is slow to find it. On one synthetic subject, 180 steps brought L_diff from 0.27 to 0.25 without that
    path and to 0.02 with it.

    Args:
        latent_channels: channels of the latent.
        guide_channels: channels of the encoded conditioning.
        channels: of each level, from the latent grid downwards; multiples of 8. Every level but the first halves the
            resolution, so that spatial sizes must be multiples of `2 ** (len(channels) - 1)`.
    """

    def __init__(
        self, latent_channels: int = 8, guide_channels: int = 32, channels: Sequence[int] = (32, 64, 96)
    ) -> None:
        super().__init__()
        first, last, embedding = channels[0], channels[-1], 4 * channels[0]
        self.width = first
        self.latent_channels = latent_channels
        self.guide_channels = guide_channels
        self.divisor = 2 ** (len(channels) - 1)
        self.embed = nn.Sequential(nn.Linear(first, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.start = nn.Conv3d(latent_channels + guide_channels, first, 3, padding=1)
        pairs = list(itertools.pairwise(channels))
        self.down = nn.ModuleList([Stage(nn.Identity(), first, first, embedding)])
        self.down.extend(Stage(nn.Conv3d(a, a, 3, 2, 1), a, b, embedding) for a, b in pairs)
        self.middle = residual_block(last, last, embedding)
        self.up = nn.ModuleList(Stage(Upsampling(b), b + a, a, embedding) for a, b in reversed(pairs))
        self.end = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, first), nn.SiLU(), zeroed(nn.Conv3d(first, latent_channels, 3, padding=1))
        )
        self.linear = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(embedding, 2 * latent_channels)))

    def forward(self, noisy: Tensor, timesteps: Tensor, guide: Tensor) -> Tensor:
        """Predict noise or velocity for `noisy` `[B, C, *latent]` at `timesteps` `[B]`, `guide` `[B, G, *latent]`."""
        embedding = self.embed(get_timestep_embedding(timesteps, self.width))
        x = self.start(torch.cat([noisy, guide], 1))
        skips: list[Tensor] = []
        for stage in self.down:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        skips.pop()
        for stage in self.up:
            x = stage(x, embedding, skips.pop())
        scale, shift = self.linear(embedding)[:, :, None, None, None].chunk(2, 1)
        return self.end(x) + scale * noisy + shift


def residual_block(in_channels: int, out_channels: int, embedding: int) -> nn.Module:
    """MONAI's residual block with timestep embedding."""
    return DiffusionUNetResnetBlock(3, in_channels, embedding, out_channels, norm_num_groups=NUM_GROUPS)


class Upsampling(nn.Sequential):
    """Double the resolution: nearest neighbour, then a 3x3x3 convolution; MONAI's own does not compile to TorchScript.

    Computed as one transposed convolution of stride 2: of the 27 inputs of an output voxel, only 8 differ.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv3d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Upsample `[B, C, *spatial]`."""
        weight = self[1].weight.flip([2, 3, 4])
        for before, after in (([1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]), ([0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]),
                              ([0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1])):  # fmt: skip
            weight = F.pad(weight, before) + F.pad(weight, after)
        return F.conv_transpose3d(x, weight.transpose(0, 1), self[1].bias, stride=[2, 2, 2], padding=[1, 1, 1])


def zeroed(module: T) -> T:
    """Set the weights to zero, so that an untrained denoiser puts out zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
