"""The corrector: residual tokeniser, latent diffusion and gate as one module (paper §3.2).

Annotations stay evaluated here: TorchScript cannot resolve postponed ones in a `NamedTuple`.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from ..files import UserError
from .diffusion import ConditionEncoder, Denoiser, LatentDiffusion, LatentScale
from .vqvae import ResidualVQVAE, crop_like, pad_to_multiple

STAGES = ("vq", "diffusion", "joint")


class Refinement(NamedTuple):
    """What the sampler makes of one batch, all `[B, 3, *spatial]`.

    Attributes:
        logits: refined logits, coarse plus the gated mean residual; the coarse ones exactly outside the brain.
        residual: mean of the sampled residuals, in [-1, 1].
        spread: standard deviation of the refined probabilities over the samples; 0 with one sample.
    """

    logits: Tensor
    residual: Tensor
    spread: Tensor


class TrainingOutputs(NamedTuple):
    """What the composite loss needs of one batch; the last four are None in stage "vq".

    Attributes:
        residual: the target r, `[B, 3, *spatial]`.
        reconstruction: r as decoded from its own latent.
        quantisation: scalar L_vq, not weighted; 0 in stage "diffusion", where encoder and codebook are frozen.
        perplexity: scalar, codes in effective use.
        noise: noise added to the latent at each of K timesteps a subject, `[B·K, C, *latent]`.
        predicted_noise: the denoiser's prediction of it.
        signal: ᾱ at the timestep that `refined` comes from, `[B]`.
        refined: logits corrected with the residual decoded from the predicted clean latent.
    """

    residual: Tensor
    reconstruction: Tensor
    quantisation: Tensor
    perplexity: Tensor
    noise: Tensor | None = None
    predicted_noise: Tensor | None = None
    signal: Tensor | None = None
    refined: Tensor | None = None


class CorrDiff(nn.Module):
    """Refine coarse logits: ℓ + gate · scale · α_region · r̂, with r̂ a sampled residual and α = 0 before training.

    r̂ lies in [-1, 1], the gate in [0, 1], and nothing changes outside the brain. α is learnt in units of `scale`
    logits, since AdamW at 1e-4 moves a parameter by at most 1e-4 a step: without it, 50 epochs of UTSW-Glioma
    (12,500 steps) could not undo a confident miss, which is 14 logits deep, nor could the 300 steps of a
    demonstration at 3e-3 with a scale of 10.

    Args:
        tokeniser: VQ-VAE of the residual; its defaults if not given.
        diffusion: denoiser, schedule and sampler; its defaults for the tokeniser's latent if not given.
        in_channels: modalities.
        guide_channels: channels of the encoded conditioning; the denoiser must take as many.
        num_samples: residuals that `forward` averages.
        seed: of the sampler's noise; the same seed gives the same output.
        scale: logits for an α of 1.
        logit_limit: coarse logits are clamped to ± this for the conditioning.
        quantise_samples: put a sampled latent on its nearest codes before it is decoded. Overfitted to one synthetic
            subject, cross-entropy then fell from 0.23 to 0.14; without it, it rose to 0.29.
        shortcut: where all α are 0, return the coarse logits without sampling; the result is the same.
        timesteps_per_subject: at which the denoiser is trained in one step, from as many equal parts of the schedule;
            image and residual are encoded once for all, and one of them, drawn at random, serves L_seg.

    Raises:
        ValueError: the parts do not fit each other.
    """

    def __init__(
        self,
        tokeniser: ResidualVQVAE | None = None,
        diffusion: LatentDiffusion | None = None,
        in_channels: int = 4,
        guide_channels: int = 32,
        num_samples: int = 1,
        seed: int = 0,
        scale: float = 40.0,
        logit_limit: float = 10.0,
        quantise_samples: bool = True,
        shortcut: bool = True,
        timesteps_per_subject: int = 4,
    ) -> None:
        super().__init__()
        tokeniser = ResidualVQVAE() if tokeniser is None else tokeniser
        channels, regions = tokeniser.latent_channels, tokeniser.num_regions
        diffusion = LatentDiffusion(Denoiser(channels, guide_channels)) if diffusion is None else diffusion
        if diffusion.latent_channels != channels:
            raise UserError(f"the denoiser takes {diffusion.latent_channels} latent channels, the tokeniser {channels}")
        if diffusion.denoiser.guide_channels != guide_channels:
            taken = diffusion.denoiser.guide_channels
            raise UserError(f"the denoiser takes {taken} channels of conditioning, guide_channels is {guide_channels}")
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}: sample at least one residual")
        if timesteps_per_subject < 1:
            raise UserError(f"timesteps_per_subject is {timesteps_per_subject}: train at least one")
        self.tokeniser = tokeniser
        self.diffusion = diffusion
        self.latent_scale = LatentScale(channels)
        self.guide = ConditionEncoder(in_channels + 3 * regions, guide_channels, tokeniser.factor)
        self.gate = nn.Conv3d(2 * regions, regions, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.alpha = nn.Parameter(torch.zeros(regions))
        self.divisor = tokeniser.factor * int(getattr(diffusion.denoiser, "divisor", 1))
        self.num_samples = num_samples
        self.seed = seed
        self.scale = scale
        self.logit_limit = logit_limit
        self.quantise_samples = quantise_samples
        self.shortcut = shortcut
        self.timesteps_per_subject = timesteps_per_subject

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Refine `coarse` logits `[B, 3, *spatial]` given `image` `[B, 4, *spatial]`, by sampling, without gradient."""
        return self.refine(image, coarse, self.num_samples, self.seed).logits

    @torch.jit.export
    def refine(self, image: Tensor, coarse: Tensor, num_samples: int, seed: int) -> Refinement:
        """Sample `num_samples` residuals, one after the other, and apply their mean."""
        with torch.no_grad():
            residual, mean, squares = torch.zeros_like(coarse), torch.zeros_like(coarse), torch.zeros_like(coarse)
            if self.may_skip():
                return Refinement(coarse, residual, squares)
            guide, gain = self.encode_condition(image, coarse), self.gain(image, coarse)
            for n in range(num_samples):
                latent = self.diffusion.sample(guide, seed, n)
                sample = crop_like(self.decode(latent), coarse)
                difference = torch.sigmoid(coarse + gain * sample) - mean  # Welford's running variance
                mean = mean + difference / (n + 1)
                squares = squares + difference.square() * (n / (n + 1))
                residual = residual + (sample - residual) / (n + 1)
            refined = torch.where(gain == 0, coarse, self.correct(coarse, gain, residual))  # keeps a -0.0
            return Refinement(refined, residual, (squares / max(num_samples - 1, 1)).sqrt())

    def may_skip(self) -> bool:
        """Whether no logit would change; an export must not ask, as it keeps one of the two ways only."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript drops the branch, not half a condition
            if torch.compiler.is_exporting():
                return False
        return self.shortcut and not bool(self.alpha.any())

    def training_step(self, image: Tensor, coarse: Tensor, target: Tensor, stage: str = "joint") -> TrainingOutputs:
        """Run one training batch; timesteps and noise come from torch's global generator.

        Args:
            image: `[B, 4, *spatial]`, normalised modalities.
            coarse: logits `[B, 3, *spatial]` of the frozen backbone.
            target: region masks of the same shape.
            stage: "vq" trains the tokeniser; "diffusion" the denoiser, gate, α and decoder, with encoder and codebook
                as they are; "joint" all at once.

        Raises:
            ValueError: no such stage, or "diffusion" with an untrained tokeniser.
        """
        if stage not in STAGES:
            raise UserError(f"no stage {stage!r}: choose one of {', '.join(STAGES)}")
        if stage == "diffusion" and not bool(self.tokeniser.codebook.initialised):
            raise UserError('the tokeniser is untrained: run stage "vq" before "diffusion", or train in stage "joint"')
        image, coarse, target = (convert_to_tensor(x, track_meta=False).float() for x in (image, coarse, target))
        residual = target - coarse.sigmoid()
        outputs, latent = self.tokenise(residual, learn=stage != "diffusion")
        return outputs if stage == "vq" else self.denoise(outputs, latent, image, coarse)

    def freeze_tokeniser(self) -> None:
        """Take the encoder out of training, for stage "diffusion"; that stage never updates the codebook anyway."""
        self.tokeniser.encoder.requires_grad_(False)

    def tokenise(self, residual: Tensor, learn: bool) -> tuple[TrainingOutputs, Tensor]:
        """Encode and decode `residual`; where `learn` is set, codebook and latent scale learn and the encoder may."""
        padded = pad_to_multiple(residual, self.divisor)
        with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
            latent, loss, perplexity = self.tokeniser.codebook(self.tokeniser.encode(padded), update=learn)
        if learn:
            self.latent_scale.update(latent)
        reconstruction = crop_like(self.tokeniser.decode(latent), residual)
        loss = loss if learn else torch.zeros_like(loss)
        return TrainingOutputs(residual, reconstruction, loss, perplexity), latent.detach()

    def denoise(self, outputs: TrainingOutputs, latent: Tensor, image: Tensor, coarse: Tensor) -> TrainingOutputs:
        """Noise `latent` to several timesteps, predict the noise, and correct `coarse` with what one of them leaves."""
        times = self.timesteps_per_subject
        clean = self.latent_scale.normalise(latent).repeat_interleave(times, 0)
        guide = self.encode_condition(image, coarse).repeat_interleave(times, 0)
        timesteps = self.diffusion.draw_timesteps(len(latent), times).to(clean.device)
        noise = torch.randn_like(clean)
        noisy = self.diffusion.add_noise(clean, noise, timesteps)
        predicted = self.diffusion.predict_noise(noisy, timesteps, guide)
        noisy_once, predicted_once, timesteps_once = noisy[::times], predicted[::times], timesteps[::times]
        sample = crop_like(self.decode(self.diffusion.clean(noisy_once, predicted_once, timesteps_once)), coarse)
        refined = self.correct(coarse, self.gain(image, coarse), sample)
        signal = self.diffusion.signal_at(timesteps_once)
        return outputs._replace(noise=noise, predicted_noise=predicted, signal=signal, refined=refined)

    def encode_condition(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Bring the 13 channels of conditioning to the latent grid of the image, padded with sure background."""
        image = pad_to_multiple(image.float(), self.divisor)
        coarse = pad_to_multiple(coarse.float(), self.divisor, -self.logit_limit)
        return self.guide(condition(image, coarse, self.logit_limit))

    def gain(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Logits for a residual of 1, `[B, 3, *spatial]`: gate times α within the brain, 0 outside."""
        coarse = coarse.float()
        gate = torch.sigmoid(self.gate(torch.cat([torch.sigmoid(coarse), binary_entropy(coarse)], 1)).float())
        return gate * (self.scale * self.alpha).view(1, -1, 1, 1, 1) * brain_mask(image)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode a latent of unit variance to a residual on the padded grid."""
        latent = self.latent_scale.restore(latent)
        if self.quantise_samples:
            latent = self.tokeniser.codebook(latent).latent
        return self.tokeniser.decode(latent)

    def correct(self, coarse: Tensor, gain: Tensor, residual: Tensor) -> Tensor:
        """Add the correction, in `coarse`'s own type."""
        return (coarse.float() + gain * residual).to(coarse.dtype)


def binary_entropy(logits: Tensor) -> Tensor:
    """Uncertainty of each region on its own, of any shape, in bits: 1 at a logit of 0, 0 where the backbone is sure."""
    probability = torch.sigmoid(logits)
    nats = probability * F.softplus(-logits) + (1 - probability) * F.softplus(logits)  # exported logsigmoid overflows
    return nats / math.log(2.0)


def condition(image: Tensor, coarse: Tensor, limit: float) -> Tensor:
    """Stack image, probabilities, logits and entropies.

    Args:
        image: `[B, 4, *spatial]`, normalised modalities.
        coarse: logits `[B, 3, *spatial]`.
        limit: logits are clamped to ±limit and divided by it, so that a certain voxel does not drown the others.

    Returns:
        `[B, 13, *spatial]`.
    """
    clamped = coarse.clamp(-limit, limit)
    return torch.cat([image, torch.sigmoid(coarse), clamped / limit, binary_entropy(clamped)], 1)


def brain_mask(image: Tensor) -> Tensor:
    """Voxels of `image` `[B, 4, *spatial]` where any modality is not zero, `[B, 1, *spatial]`."""
    return (image != 0).any(1, keepdim=True)


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
