"""What MONAI's trainer lacks for CorrDiff: the batch as one call, the stages in turn, and a guard on frozen weights."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from ..files import UserError
from . import STAGES, CorrDiff, TrainingOutputs

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
