"""CorrDiff's condition, gate and brain mask, its output, presets, scripting and configuration."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from corrdiff_networks import SHAPE, subject, tiny
from monai.bundle import ConfigParser
from numpy.testing import assert_allclose
from torch import nn

from custom.corrdiff import (
    ConditionEncoder,
    CorrDiff,
    CorrDiffLoss,
    Denoiser,
    LatentDiffusion,
    LatentScale,
    binary_entropy,
    brain_mask,
    condition,
    corrdiff_base,
    corrdiff_tiny,
)
from custom.corrdiff.diffusion import Upsampling


def test_entropy_is_in_bits_and_safe_at_the_extremes():
    logits = torch.tensor([0.0, 2.0, -2.0, 200.0, -200.0])
    p = 1 / (1 + np.exp(-2.0))
    expected = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    assert_allclose(binary_entropy(logits).numpy(), [1, expected, expected, 0, 0], atol=1e-6)


def test_exported_entropy_is_safe_at_the_extremes_too(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Entropy(nn.Module):
        def forward(self, logits):
            return binary_entropy(logits)

    logits = torch.linspace(-40, 40, 161)
    torch.onnx.export(Entropy(), (logits,), dynamo=True, verbose=False).save(str(tmp_path / "entropy.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "entropy.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: logits.numpy()})
    assert_allclose(found, binary_entropy(logits).numpy(), atol=1e-5)


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
    network = tiny(alpha=1.0, quantise_samples=False).eval()  # the nearest of two codes may be a matter of rounding
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
        "tokeniser": {"_target_": "custom.corrdiff.vqvae.ResidualVQVAE", "channels": [8, 16], "num_codes": 64},
        "denoiser": {"_target_": "custom.corrdiff.Denoiser", "guide_channels": 16, "channels": [8, 16]},
        "diffusion": {"_target_": "custom.corrdiff.LatentDiffusion", "denoiser": "@denoiser", "schedule": "cosine"},
        "corrector": {
            "_target_": "custom.corrdiff.CorrDiff",
            "tokeniser": "@tokeniser",
            "diffusion": "@diffusion",
            "guide_channels": 16,
        },
        "preset": {"_target_": "custom.corrdiff.corrdiff_tiny", "num_samples": 3, "seed": 7},
        "loss": {"_target_": "custom.corrdiff.CorrDiffLoss", "lambda_vq": 0.25},
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
    with pytest.raises(ValueError, match="16 channels of conditioning, guide_channels is 32"):
        CorrDiff(diffusion=LatentDiffusion(Denoiser(8, 16)))
    with pytest.raises(ValueError, match="at least one"):
        CorrDiff(num_samples=0)
    with pytest.raises(ValueError, match="train at least one"):
        CorrDiff(timesteps_per_subject=0)


def test_condition_encoder_reaches_the_latent_grid():
    assert ConditionEncoder(13, 32, factor=4)(torch.zeros(1, 13, 16, 8, 12)).shape == (1, 32, 4, 2, 3)


def test_what_is_padded_is_sure_background():
    network = tiny().eval()
    image, coarse, _ = subject()
    size = [-(-length // network.divisor) * network.divisor for length in image.shape[2:]]
    whole, sure = image.new_zeros(1, 4, *size), coarse.new_full((1, 3, *size), -30.0)
    corner = (..., *(slice(length) for length in image.shape[2:]))
    cut = image[..., :-3], coarse[..., :-3]
    whole[corner], sure[corner] = image, coarse
    whole[..., image.shape[4] - 3 :], sure[..., image.shape[4] - 3 :] = 0, -30.0
    with torch.no_grad():
        torch.testing.assert_close(
            network.encode_condition(*cut), network.encode_condition(whole, sure), atol=1e-4, rtol=1e-4
        )


def test_upsampling_is_nearest_neighbour_and_a_convolution():
    upsampling, x = Upsampling(8), torch.randn(2, 8, 5, 3, 4)
    nearest, convolution = upsampling
    assert_allclose(upsampling(x).detach(), convolution(nearest(x)).detach(), atol=1e-5)
