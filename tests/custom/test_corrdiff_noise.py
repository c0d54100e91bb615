from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from custom.corrdiff.diffusion import gaussian_noise, scramble

GRID = torch.zeros(1, 2, 40, 44, 36)


def noise(seed: int = 0, draw: int = 0) -> torch.Tensor:
    return gaussian_noise(GRID, 3, seed, draw)


def test_hash_is_murmurs_finaliser():
    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    h = words ^ (words >> np.uint32(16))
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    assert np.array_equal(scramble(torch.from_numpy(words.astype(np.int64))).numpy(), h.astype(np.int64))


def test_it_is_standard_normal_and_white():
    z = noise().numpy()
    assert z.shape == (1, 3, 40, 44, 36) and z.dtype == np.float32
    assert stats.kstest(z.ravel(), "norm").pvalue > 0.01
    power = np.abs(np.fft.fftn(z[0, 0].astype(float))).ravel()[1:] ** 2
    assert abs(power.std() / power.mean() - 1) < 0.05, "power of white noise is exponentially distributed"


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (-1, 0), (2**40, 3), (12345, 26)])
def test_seeds_and_draws_have_noise_of_their_own(other):
    assert abs(np.corrcoef(noise().numpy().ravel(), noise(*other).numpy().ravel())[0, 1]) < 0.02
    assert torch.equal(noise(*other), noise(*other))


def test_torchscript_gives_the_same():
    assert torch.equal(torch.jit.script(gaussian_noise)(GRID, 3, 7, 2), noise(7, 2))
