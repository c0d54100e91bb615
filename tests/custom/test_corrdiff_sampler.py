"""CorrDiff's schedule, forward process and sampler, against denoisers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from custom.corrdiff import LatentDiffusion, reverse_timesteps


class Oracle(nn.Module):
    """Knows the clean latent, one draw of N(0.5, 0.2²) a voxel, and so the exact noise."""

    latent_channels = 1

    def __init__(self, schedule: str = "linear_beta"):
        super().__init__()
        self.clean = 0.5 + 0.2 * torch.randn(1, 1, 60, 60, 60, generator=torch.Generator().manual_seed(5))
        self.calls: list[int] = []
        self.bias = 0.0

    def forward(self, noisy, timesteps, guide):
        self.calls.append(int(timesteps[0]))
        signal = guide.flatten()[timesteps[0]].double()
        return ((noisy - signal.sqrt() * self.clean) / (1 - signal).sqrt() + self.bias).float()


def oracle_sample(**changes) -> tuple[torch.Tensor, Oracle]:
    oracle = Oracle()
    diffusion = LatentDiffusion(oracle, prediction="epsilon", **changes)
    guide = torch.ones(1, 1, 60, 60, 60)
    guide.view(-1)[:200] = torch.tensor(diffusion.signal)
    return diffusion.sample(guide, 0), oracle


@pytest.mark.parametrize("schedule", ["linear_beta", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_exact_noise_brings_back_the_distribution(schedule, eta):
    sample, oracle = oracle_sample(schedule=schedule, eta=eta)
    assert abs(sample.mean().item() - 0.5) < 0.02 * 0.5
    assert abs(sample.std().item() - 0.2) < 0.02 * 0.2
    torch.testing.assert_close(sample, oracle.clean, atol=0.01, rtol=0)


def test_reverse_steps_are_199_191_to_7_and_the_network_sees_them():
    _, oracle = oracle_sample()
    assert oracle.calls == [199 - 8 * i for i in range(25)]
    assert oracle.calls[-1] == 7
    with pytest.raises(ValueError, match="30 reverse steps do not divide 200"):
        reverse_timesteps(200, 30)


class Gaussian(nn.Module):
    """Best possible denoiser of N(0, 1) latents at the linear schedule: E[noise | noisy] = sqrt(1 - ᾱ) · noisy."""

    latent_channels = 1

    def __init__(self):
        super().__init__()
        self.signal = np.cumprod(1 - np.linspace(5e-4, 0.1, 200))

    def forward(self, noisy, timesteps, guide):
        return float(np.sqrt(1 - self.signal[int(timesteps[0])])) * noisy


class Silent(nn.Module):
    """An untrained denoiser."""

    latent_channels = 1

    def forward(self, noisy, timesteps, guide):
        return 0 * noisy


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("denoiser", "prediction"), [(Gaussian(), "epsilon"), (Silent(), "v_prediction")])
def test_sampler_follows_the_posterior_of_a_gaussian(denoiser, prediction, eta):
    """Each step is linear in a Gaussian here, so its variance is known in closed form, noise and rounding apart.

    An untrained denoiser of velocities is that of N(0, 1).
    """
    diffusion = LatentDiffusion(denoiser, eta=eta, prediction=prediction)
    sample = diffusion.sample(torch.ones(1, 1, 60, 60, 60), 0)
    bar, variance = np.cumprod(1 - np.linspace(5e-4, 0.1, 200)), 1.0
    for t in range(199, 0, -8):
        now, then = bar[t], bar[t - 8] if t > 7 else 1.0
        sigma = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
        slope = np.sqrt(then * now) + np.sqrt(1 - then - sigma**2) * np.sqrt(1 - now)
        variance = slope**2 * variance + sigma**2
    assert abs(sample.mean().item()) < 0.01
    assert_allclose(sample.std().item(), np.sqrt(variance), rtol=0.01)


def test_schedule_ends_in_noise_and_default_does_not_blow_up_errors():
    linear, cosine = (LatentDiffusion(Oracle(), schedule=name).signal for name in ("linear_beta", "cosine"))
    assert linear[-1] < 1e-4
    assert cosine[-1] < 1e-4
    assert_allclose(linear, np.cumprod(1 - np.linspace(5e-4, 0.1, 200)), rtol=1e-4)
    assert (linear[191] / linear[199]) ** 0.5 < 2
    assert (cosine[191] / cosine[199]) ** 0.5 > 100


def test_forward_process_and_its_inverse():
    diffusion, steps = LatentDiffusion(Oracle()), torch.tensor([7, 150])
    clean, noise = torch.randn(2, 2, 1, 4, 4, 4)
    noisy = diffusion.add_noise(clean, noise, steps)
    signal = np.cumprod(1 - np.linspace(5e-4, 0.1, 200))[[7, 150]].reshape(2, 1, 1, 1, 1)
    assert_allclose(noisy.numpy(), np.sqrt(signal) * clean.numpy() + np.sqrt(1 - signal) * noise.numpy(), rtol=1e-3)
    torch.testing.assert_close(diffusion.clean(noisy, noise, steps), clean, atol=1e-4, rtol=1e-3)
    assert_allclose(diffusion.signal_at(steps).numpy(), signal.ravel(), rtol=1e-4)


def test_velocity_gives_the_noise_it_was_made_of():
    diffusion, steps = LatentDiffusion(Silent()), torch.tensor([7, 150, 199])
    clean, noise = torch.randn(2, 3, 1, 4, 4, 4)
    bar = np.cumprod(1 - np.linspace(5e-4, 0.1, 200))[[7, 150, 199]].reshape(3, 1, 1, 1, 1)
    velocity = torch.from_numpy(np.sqrt(bar) * noise.numpy() - np.sqrt(1 - bar) * clean.numpy()).float()
    diffusion.denoiser.forward = lambda noisy, timesteps, guide: velocity
    found = diffusion.predict_noise(diffusion.add_noise(clean, noise, steps), steps, clean)
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="no prediction 'sample': choose one of v_prediction, epsilon"):
        LatentDiffusion(Silent(), prediction="sample")


def test_timesteps_of_a_subject_come_from_all_parts_of_the_schedule():
    torch.manual_seed(0)
    drawn = LatentDiffusion(Silent()).draw_timesteps(500, 4).view(500, 4).numpy()
    assert (np.sort(drawn // 50, axis=1) == np.arange(4)).all()
    assert abs(drawn[:, 0].mean() - 99.5) < 10
    assert (drawn.min(), drawn.max()) == (0, 199)
