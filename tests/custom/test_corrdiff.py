"""CorrDiff: schedule and sampler against an oracle, gate and brain mask, gradients, scripting, a short overfit."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from numpy.testing import assert_allclose
from scipy import ndimage
from torch import nn

from custom.corrdiff import (
    ConditionEncoder,
    CorrDiff,
    Denoiser,
    LatentDiffusion,
    LatentScale,
    binary_entropy,
    brain_mask,
    condition,
    corrdiff_base,
    corrdiff_tiny,
    reverse_timesteps,
)
from custom.corrdiff_loss import CorrDiffLoss
from custom.phantom import simulate
from custom.transforms import label_map_to_regions
from custom.vqvae import ResidualVQVAE

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


def test_entropy_is_in_bits_and_safe_at_the_extremes():
    logits = torch.tensor([0.0, 2.0, -2.0, 200.0, -200.0])
    p = 1 / (1 + np.exp(-2.0))
    expected = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    assert_allclose(binary_entropy(logits).numpy(), [1, expected, expected, 0, 0], atol=1e-6)


def test_condition_is_image_probability_clamped_logit_and_entropy():
    image, coarse, _ = subject()
    coarse = 20 * coarse
    stacked = condition(image, coarse, limit=10.0)
    assert stacked.shape == (1, 13, *SHAPE)
    assert torch.equal(stacked[:, :4], image)
    torch.testing.assert_close(stacked[:, 4:7], 1 / (1 + torch.exp(-coarse)))
    assert_allclose(stacked[:, 7:10].abs().max(), 1)
    torch.testing.assert_close(stacked[:, 10:], binary_entropy(coarse), atol=1e-3, rtol=0)


def test_brain_is_where_any_modality_is_not_zero():
    image = torch.zeros(1, 4, 2, 2, 2)
    image[0, 2, 1, 1, 0] = -0.5
    assert brain_mask(image).sum() == 1
    assert brain_mask(image)[0, 0, 1, 1, 0]


def test_latent_scale_normalises_and_restores():
    scale, latent = LatentScale(2), torch.randn(1, 2, 8, 8, 8) * torch.tensor([3.0, 0.1]).view(1, 2, 1, 1, 1) + 5
    scale.update(latent)
    normal = scale.normalise(latent)
    assert_allclose(normal.mean((0, 2, 3, 4)).numpy(), 0, atol=1e-2)
    assert_allclose(normal.std((0, 2, 3, 4)).numpy(), 1, atol=2e-2)
    torch.testing.assert_close(scale.restore(normal), latent, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shortcut", [True, False])
def test_untrained_returns_the_coarse_logits_bit_for_bit(shortcut):
    image, coarse, _ = subject()
    coarse[0, 0, 0, 0, 0] = -0.0
    refined = tiny(shortcut=shortcut).eval()(image, coarse)
    assert torch.equal(refined.view(torch.int32), coarse.view(torch.int32))


@pytest.mark.parametrize("shape", [SHAPE, (13, 10, 7), (24, 16, 8)])
def test_changes_only_the_brain_at_any_size(shape):
    image, coarse, _ = subject(shape)
    refined = tiny(alpha=0.7).eval()(image, coarse)
    outside = ~brain_mask(image).expand_as(coarse)
    assert refined.shape == coarse.shape
    assert torch.equal(refined[outside], coarse[outside])
    assert (refined != coarse)[~outside].float().mean() > 0.9


def test_correction_is_gate_times_alpha_times_residual():
    network = tiny(alpha=0.5, scale=8.0)
    nn.init.normal_(network.gate.weight)
    network.gate.bias.data.copy_(torch.tensor([0.3, -1.0, 0.0]))
    network.alpha.data.copy_(torch.tensor([0.5, -0.25, 0.0]))
    image, coarse, _ = subject()
    found = network.refine(image, coarse, 1, 0)
    p = coarse.sigmoid()[0].double()
    seen = torch.cat([p, -(p * p.log2() + (1 - p) * (1 - p).log2())]).flatten(1)
    gate = torch.sigmoid(network.gate.weight[:, :, 0, 0, 0].double() @ seen + network.gate.bias[:, None])
    change = gate.view(3, *SHAPE) * torch.tensor([4.0, -2.0, 0.0]).view(3, 1, 1, 1) * found.residual[0]
    expected = torch.where(image[0].abs().amax(0) > 0, coarse[0] + change, coarse[0].double()).float()
    torch.testing.assert_close(found.logits[0], expected, atol=1e-5, rtol=1e-5)


def test_same_seed_same_output_and_the_global_generator_is_left_alone():
    image, coarse, _ = subject()
    network = tiny(alpha=1.0, seed=4).eval()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second = network(image, coarse), network(image, coarse)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    network.seed = 5
    assert not torch.equal(network(image, coarse), first)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_subject_does_not_depend_on_its_batch(eta):
    network = tiny(alpha=1.0).eval()
    network.diffusion.eta = eta
    image, coarse, _ = subject(batch=2)
    together = network(image, coarse)
    torch.testing.assert_close(network(image[1:], coarse[1:]), together[1:], atol=1e-4, rtol=1e-4)


def test_several_samples_give_their_mean_and_spread():
    network = tiny(alpha=1.0, quantise_samples=False, num_samples=3).eval()
    image, coarse, _ = subject()
    draws = []
    with torch.no_grad():
        guide, gain = network.encode_condition(image, coarse), network.gain(image, coarse)
        for _ in range(3):
            draws.append(network.decode(network.diffusion.sample(guide, 0, len(draws))).numpy())
    found = network.refine(image, coarse, 3, 0)
    probabilities = torch.sigmoid(coarse + gain * torch.from_numpy(np.stack(draws))).numpy()
    assert_allclose(found.residual.numpy(), np.mean(draws, 0), atol=1e-5)
    assert_allclose(found.spread.numpy(), probabilities.std(0, ddof=1), atol=1e-5)
    assert found.spread.max() > 1e-4
    assert torch.equal(network(image, coarse), found.logits)
    assert network.refine(image, coarse, 1, 0).spread.max() == 0


def test_stages_learn_what_they_should():
    network, (image, coarse, target) = tiny(alpha=0.1), subject()
    loss = CorrDiffLoss()
    with pytest.raises(ValueError, match="tokeniser is untrained"):
        network.training_step(image, coarse, target, "diffusion")
    with pytest.raises(ValueError, match="choose one of vq, diffusion, joint"):
        network.training_step(image, coarse, target, "warmup")
    loss(network.training_step(image, coarse, target, "vq"), target).backward()
    assert with_gradient(network) == {"tokeniser"}
    network.freeze_tokeniser()
    network.zero_grad()
    frozen = {name: value.clone() for name, value in network.state_dict().items() if is_frozen(name)}
    loss(network.training_step(image, coarse, target, "diffusion"), target).backward()
    assert with_gradient(network) == {"tokeniser", "diffusion", "guide", "gate", "alpha"}
    assert all(p.grad is None for p in network.tokeniser.encoder.parameters())
    assert all(torch.equal(network.state_dict()[name], value) for name, value in frozen.items())


def is_frozen(name: str) -> bool:
    return name.startswith(("tokeniser.encoder", "tokeniser.codebook", "latent_scale"))


def with_gradient(network: nn.Module) -> set[str]:
    named = network.named_parameters()
    return {name.split(".")[0] for name, p in named if p.grad is not None and p.grad.abs().sum() > 0}


def test_diffusion_and_segmentation_do_not_move_the_encoder():
    network, (image, coarse, target) = tiny(alpha=0.5), subject()
    outputs = network.training_step(image, coarse, target, "joint")
    CorrDiffLoss(lambda_recon=0, lambda_vq=0)(outputs, target).backward()
    assert with_gradient(network.tokeniser.encoder) == set()
    outputs = network.training_step(image, coarse, target, "joint")
    CorrDiffLoss()(outputs, target).backward()
    assert with_gradient(network.tokeniser.encoder) != set()


def test_segmentation_alone_reaches_denoiser_guide_gate_alpha_and_decoder():
    network, (image, coarse, target) = tiny(alpha=0.5), subject()
    network.training_step(image, coarse, target, "vq")
    torch.manual_seed(0)
    outputs = network.training_step(image, coarse, target, "diffusion")
    CorrDiffLoss(lambda_diff=0, lambda_recon=0)(outputs, target).backward()
    assert with_gradient(network) == {"tokeniser", "diffusion", "guide", "gate", "alpha"}


def test_training_outputs_are_the_residual_and_the_noise():
    network, (image, coarse, target) = tiny(), subject(batch=2)
    outputs = network.training_step(image, coarse, target)
    torch.testing.assert_close(outputs.residual, target - 1 / (1 + torch.exp(-coarse)))
    assert outputs.noise.shape == outputs.predicted_noise.shape == (8, 4, 4, 4, 4)
    assert outputs.signal.shape == (2,)
    assert torch.equal(outputs.refined, coarse)


def test_alpha_leaves_zero_by_its_own_gradient():
    network, (image, coarse, target) = tiny(), subject()
    CorrDiffLoss()(network.training_step(image, coarse, target), target).backward()
    assert (network.alpha.grad != 0).all()


def test_overfits_a_damaged_phantom_and_needs_its_denoiser():
    """Coarse logits lack half of the tumour, have a false island, are shifted and blurred."""
    image, coarse, target = damaged_phantom()
    torch.manual_seed(0)
    tokeniser = ResidualVQVAE(channels=(16,), stride=4, num_codes=64, latent_channels=16, codes_per_vector=2)
    network = CorrDiff(tokeniser, LatentDiffusion(Denoiser(16, 16, channels=(16, 32))), guide_channels=16)
    untrained = copy.deepcopy(network.diffusion.denoiser)
    fit(network, (image, coarse, target), "vq", 80)
    residual = target - coarse.sigmoid()
    reconstruction, wrong = network.tokenise(residual, learn=False)[0].reconstruction, residual.abs() > 0.1
    assert (reconstruction - residual)[wrong].abs().mean() < 0.5 * residual[wrong].abs().mean()
    network.freeze_tokeniser()
    history = fit(network, (image, coarse, target), "diffusion", 60)
    before, after = dice(coarse, target), dice(network(image, coarse), target)
    network.diffusion.denoiser = untrained
    assert before < 0.5
    assert after > 0.8
    assert dice(network(image, coarse), target) < before + 0.1
    assert np.mean(history[-15:]) < 0.5 * np.mean(network.diffusion.signal)  # the latter without training


def damaged_phantom() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, coarse logits and regions of one phantom at 4.5 mm."""
    image, labels = simulate((32, 40, 32), (4.5, 4.5, 4.5), seed=3)
    target = label_map_to_regions(torch.from_numpy(labels)).float()
    damaged = target.numpy().copy()
    damaged[:, : int(np.argwhere(damaged[2])[:, 0].mean()) - 2] = 0
    damaged = np.roll(damaged, 2, axis=2)
    damaged[:, 4:8, 18:22, 14:18] = 1
    blurred = np.stack([ndimage.gaussian_filter(region, 1.0) for region in damaged])
    coarse = torch.logit(torch.from_numpy(blurred), eps=0.002)
    return torch.from_numpy(image / image.max() * 4)[None], coarse[None], target[None]


def fit(network: CorrDiff, subject: tuple[torch.Tensor, ...], stage: str, steps: int) -> list[float]:
    """Train, and return L_diff of each step."""
    loss, history = CorrDiffLoss(), []
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(network.training_step(*subject, stage), subject[-1]).backward()
        optimiser.step()
        history.append(loss.logged["diff"].item())
    return history


def dice(logits: torch.Tensor, target: torch.Tensor) -> float:
    found, truth = (logits > 0).flatten(2), (target > 0).flatten(2)
    return (2 * (found & truth).sum(2) / (found.sum(2) + truth.sum(2))).mean().item()


def test_state_dict_goes_round_without_pickle():
    source, target, (image, coarse, truth) = tiny(alpha=0.5), tiny(), subject()
    source.training_step(image, coarse, truth, "vq")
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(target(image, coarse), source(image, coarse))


def test_scripts_saves_and_loads_to_the_same_output(tmp_path):
    network, (image, coarse, _) = tiny(alpha=0.5, num_samples=2).eval(), subject((13, 16, 10))
    torch.jit.save(torch.jit.script(network), tmp_path / "corrdiff.ts")
    torch.testing.assert_close(torch.jit.load(tmp_path / "corrdiff.ts")(image, coarse), network(image, coarse))


def test_half_precision_context_leaves_the_background_alone():
    network, (image, coarse, _) = tiny(alpha=0.5).eval(), subject()
    with torch.autocast("cpu", torch.bfloat16):
        refined = network(image, coarse)
    assert refined.dtype == torch.float32
    assert torch.equal(refined[:, :, :3], coarse[:, :, :3])
    torch.testing.assert_close(refined, network(image, coarse), atol=1.5, rtol=0)


def test_a_bundle_can_build_it_from_json():
    config = {
        "tokeniser": {"_target_": "custom.vqvae.ResidualVQVAE", "channels": [8, 16], "num_codes": 64},
        "denoiser": {"_target_": "custom.corrdiff.Denoiser", "guide_channels": 16, "channels": [8, 16]},
        "diffusion": {"_target_": "custom.corrdiff.LatentDiffusion", "denoiser": "@denoiser", "schedule": "cosine"},
        "corrector": {
            "_target_": "custom.corrdiff.CorrDiff",
            "tokeniser": "@tokeniser",
            "diffusion": "@diffusion",
            "guide_channels": 16,
        },
        "preset": {"_target_": "custom.corrdiff.corrdiff_tiny", "num_samples": 3, "seed": 7},
        "loss": {"_target_": "custom.corrdiff_loss.CorrDiffLoss", "lambda_vq": 0.25},
    }
    parser = ConfigParser(config)
    image, coarse, target = subject()
    network = parser.get_parsed_content("corrector")
    total = parser.get_parsed_content("loss")(network.training_step(image, coarse, target), target)
    assert torch.isfinite(total)
    preset = parser.get_parsed_content("preset")
    assert (preset.num_samples, preset.seed) == (3, 7)


@pytest.mark.parametrize("preset", [corrdiff_tiny, corrdiff_base])
def test_presets_train_script_and_start_as_no_op(preset):
    network, (image, coarse, target) = preset(num_samples=2).eval(), subject()
    assert torch.equal(network(image, coarse), coarse)
    network.training_step(image, coarse, target, "vq")
    assert torch.isfinite(CorrDiffLoss()(network.training_step(image, coarse, target, "diffusion"), target))
    nn.init.constant_(network.alpha, 0.1)
    torch.testing.assert_close(torch.jit.script(network)(image, coarse), network(image, coarse))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="6 latent channels, the tokeniser 8"):
        CorrDiff(diffusion=LatentDiffusion(Denoiser(6)))
    with pytest.raises(ValueError, match="at least one"):
        CorrDiff(num_samples=0)
    with pytest.raises(ValueError, match="train at least one"):
        CorrDiff(timesteps_per_subject=0)


def test_condition_encoder_reaches_the_latent_grid():
    assert ConditionEncoder(13, 32, factor=4)(torch.zeros(1, 13, 16, 8, 12)).shape == (1, 32, 4, 2, 3)
