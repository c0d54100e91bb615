"""Gaussian noise as a function of a seed: the same on every device, in TorchScript and in ONNX."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_noise(like: Tensor, channels: int, seed: int, draw: int) -> Tensor:
    """Standard normal noise from a hash of seed, draw and position (Box and Muller 1958).

    A random generator keeps a state that an exported network cannot have, and no two runtimes have the same one.
    Integers are kept to 32 bits in 64, since not every runtime has unsigned ones.

    Args:
        like: `[B, C, *spatial]`, whose grid and device are taken.
        channels: of the noise.
        seed: any integer.
        draw: number of the draw; each has noise of its own.

    Returns:
        `[1, channels, *spatial]`, float32.
    """
    shape = [1, channels, like.shape[2], like.shape[3], like.shape[4]]
    counter = 2 * torch.arange(shape[1] * shape[2] * shape[3] * shape[4], device=like.device)
    key = ((seed & 0xFFFFFFFF) * 0x9E3779B1 + draw * 0x85EBCA6B) & 0xFFFFFFFF
    radius = (-2.0 * torch.log(uniform(counter, key))).sqrt()
    return (radius * torch.cos(2.0 * math.pi * uniform(counter + 1, key))).view(shape)


def uniform(counter: Tensor, key: int) -> Tensor:
    """Hash integers to floats between 0 and 1, both excluded, in steps of 2⁻²³."""
    word = scramble(scramble((counter + key) & 0xFFFFFFFF) ^ key)
    return ((word // 512).float() + 0.5) / 8388608.0


def scramble(word: Tensor) -> Tensor:
    """One-to-one mixing of 32 bits: xor with the upper bits and odd multiplication, twice over, as in MurmurHash3."""
    word = word ^ (word // 65536)
    word = (word * 0x85EBCA6B) & 0xFFFFFFFF
    word = word ^ (word // 8192)
    word = (word * 0xC2B2AE35) & 0xFFFFFFFF
    return word ^ (word // 65536)
