"""What CorrDiff is trained with: the composite objective (paper eq. 2, Table 1), and the stages in turn."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from ..files import UserError
from . import STAGES, CorrDiff, TrainingOutputs


class CorrDiffLoss(nn.Module):
    """`λ_diff·L_diff + λ_recon·L_recon + λ_vq·L_vq + λ_seg·L_seg` of what `CorrDiff.training_step` returns.

    Terms that a stage does not have are 0: in stage "vq" L_diff and L_seg, in stage "diffusion" L_vq.

    Attributes:
        logged: of the last call, "total", "perplexity" and each term before its weight ("diff", "recon", "vq", "seg"),
            scalars without gradient; empty before the first call.

    Args:
        lambda_diff: weight of the squared error of the predicted noise.
        lambda_recon: weight of the absolute error of the decoded residual.
        lambda_vq: weight of codebook and commitment loss, applied here and nowhere else.
        lambda_seg: weight of cross-entropy and Dice on the refined logits.
        residual_emphasis: 0 for the plain L1 of eq. 2; otherwise a voxel counts `1 + emphasis · |r|` times in the
            mean, since most voxels have no residual to speak of.
        fade_with_noise: weigh L_seg by ᾱ at its timestep. For a denoiser of "epsilon", whose clean latent means little
            late in the schedule; with velocities it keeps L_seg from where sampling starts (mean Dice of a damaged
            prediction on two real subjects, 0.723 before, was 0.746 with it and 0.835 without after 100 steps).
        eps: ε of eq. 3, in voxels.
    """

    def __init__(
        self,
        lambda_diff: float = 1.0,
        lambda_recon: float = 1.0,
        lambda_vq: float = 0.25,
        lambda_seg: float = 1.0,
        residual_emphasis: float = 10.0,
        fade_with_noise: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.weights = {"diff": lambda_diff, "recon": lambda_recon, "vq": lambda_vq, "seg": lambda_seg}
        self.residual_emphasis = residual_emphasis
        self.fade_with_noise = fade_with_noise
        self.eps = eps
        self.logged: dict[str, Tensor] = {}

    def forward(self, outputs: TrainingOutputs, target: Tensor) -> Tensor:
        """Weigh up one batch, and keep its terms in `logged`.

        Args:
            outputs: of :meth:`custom.corrdiff.CorrDiff.training_step`.
            target: region masks `[B, 3, *spatial]`.

        Returns:
            The scalar total.
        """
        terms = self.terms(outputs, convert_to_tensor(target, track_meta=False).float())
        total = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum()
        logged = terms | {"perplexity": outputs.perplexity, "total": total}
        self.logged = {name: value.detach() for name, value in logged.items()}
        return total

    def terms(self, outputs: TrainingOutputs, target: Tensor) -> dict[str, Tensor]:
        """Return each scalar term of eq. 2, unweighted."""
        nothing = outputs.quantisation.new_zeros(())
        recon = residual_error(outputs.reconstruction, outputs.residual, self.residual_emphasis)
        terms = {"diff": nothing, "recon": recon, "vq": outputs.quantisation, "seg": nothing}
        if outputs.noise is not None and outputs.predicted_noise is not None:
            terms["diff"] = F.mse_loss(outputs.predicted_noise.float(), outputs.noise)
        if outputs.refined is not None and outputs.signal is not None:
            error = segmentation_error(outputs.refined, target, self.eps)
            terms["seg"] = (outputs.signal * error if self.fade_with_noise else error).mean()
        return terms


def residual_error(reconstruction: Tensor, residual: Tensor, emphasis: float = 0.0) -> Tensor:
    """Mean absolute error, voxels weighted by `1 + emphasis · |residual|`."""
    weight = 1 + emphasis * residual.abs()
    return (weight * (reconstruction - residual).abs()).sum() / weight.sum()


def segmentation_error(logits: Tensor, target: Tensor, eps: float = 1e-5) -> Tensor:
    """Cross-entropy plus Dice loss (eqs. 3 and 4) of `logits` `[B, C, *spatial]`, one value a subject, `[B]`."""
    logits = logits.float()
    probabilities, spatial = logits.sigmoid(), tuple(range(2, logits.ndim))
    dice = (2 * (probabilities * target).sum(spatial) + eps) / (probabilities.sum(spatial) + target.sum(spatial) + eps)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return entropy.mean(tuple(range(1, logits.ndim))) + 1 - dice.mean(1)


logger = logging.getLogger("comnet")


class TrainingStep(nn.Module):
    """CorrDiff as MONAI's ``SupervisedTrainer`` calls a network: ``(image, coarse, target)`` to what the loss needs.

    A module of its own, so that ``DistributedDataParallel`` can wrap it.

    Args:
        corrector: what is trained.
        stage: see :meth:`custom.corrdiff.CorrDiff.training_step`; :class:`StageSchedule` changes it.
    """

    def __init__(self, corrector: CorrDiff, stage: str = STAGES[-1]) -> None:
        super().__init__()
        self.corrector = corrector
        self.stage = stage

    def forward(self, image: Tensor, coarse: Tensor, target: Tensor) -> TrainingOutputs:
        """Run one training batch."""
        return self.corrector.training_step(image, coarse, target, self.stage)


class StageSchedule:
    """Ignite handler: the tokeniser alone first, then, with encoder and codebook frozen, the diffusion.

    The stage depends on the epoch only, so that resumed training is in the same stage.

    Args:
        step: the training step, not wrapped.
        vq_epochs: epochs for the tokeniser; 0 trains everything at once ("joint").
    """

    def __init__(self, step: TrainingStep, vq_epochs: int) -> None:
        self.step = step
        self.vq_epochs = vq_epochs

    def attach(self, engine: Engine) -> None:
        """Set the stage at the start of each epoch of ``engine``.

        Raises:
            ValueError: there is no epoch left for the diffusion.
        """
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.EPOCH_STARTED, self._set)

    def _check(self, engine: Engine) -> None:
        if self.vq_epochs >= engine.state.max_epochs:
            raise UserError(
                f"vq_epochs is {self.vq_epochs} of max_epochs {engine.state.max_epochs}: leave epochs for the diffusion"
            )

    def _set(self, engine: Engine) -> None:
        stage = "joint" if not self.vq_epochs else "vq" if engine.state.epoch <= self.vq_epochs else "diffusion"
        if stage == "diffusion":
            self.step.corrector.freeze_tokeniser()
        if stage != self.step.stage:
            logger.info("epoch %d: stage %s", engine.state.epoch, stage)
            self.step.zero_grad(set_to_none=True)  # a gradient of zero would let momentum and decay move what is frozen
        self.step.stage = stage


class ListedOutput:
    """Leave of a training step's output the loss, in a list of one dict.

    That is what MONAI's experiment trackers expect of a trainer that takes batches apart; CorrDiff's outputs belong to
    no single subject of the batch.
    """

    def attach(self, engine: Engine) -> None:
        """Replace the output after each iteration of ``engine``."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._replace)

    def _replace(self, engine: Engine) -> None:
        engine.state.output = [{"loss": engine.state.output["loss"]}]


class FrozenGuard:
    """Ignite handler that stops training as soon as a weight changes that must not.

    Args:
        network: what is frozen here, in evaluation mode and without gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def attach(self, engine: Engine) -> None:
        """Take a digest when ``engine`` starts, compare it after each epoch.

        Raises:
            RuntimeError: the weights have changed.
        """
        engine.add_event_handler(Events.STARTED, self._remember)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._compare)

    def _remember(self, engine: Engine) -> None:
        self.digest = state_digest(self.network)

    def _compare(self, engine: Engine) -> None:
        if state_digest(self.network) != self.digest:
            raise RuntimeError(
                f"the frozen {type(self.network).__name__} has changed in epoch {engine.state.epoch}: something trains "
                "its parameters or statistics; see what else holds them (optimizer, train mode)"
            )


def state_digest(network: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers of ``network``."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
