"""Training that ends with the running average of its weights, taken from no validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn

from ..weights import MODEL_KEY, PROVENANCE_KEY, Provenance, save_atomically


class WeightAverage(EMAHandler):
    """Exponential moving average of the weights, saved as the checkpoint after each epoch whatever its score.

    Nothing is chosen by a score, so that the fold left out can be scored without bias.

    Args:
        network: network in training.
        momentum: share of the newest weights in the average after each step; 0.005 averages over some 200 steps.
        path: checkpoint, replaced as a whole after each epoch.
        provenance: what is saved beside the weights.
    """

    def __init__(self, network: nn.Module, momentum: float, path: str, provenance: Provenance) -> None:
        super().__init__(network, momentum)
        self.path = Path(path)
        self.provenance = provenance

    def attach(self, engine: Engine) -> None:
        """Follow the weights of trainer ``engine``, and save their average after each of its epochs."""
        super().attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def save(self, engine: Engine) -> None:
        """Write the average (rank 0 only)."""
        if idist.get_rank() == 0:
            content = {MODEL_KEY: self.state_dict(), PROVENANCE_KEY: self.provenance.state_dict()}
            save_atomically(content, self.path)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the average, named as those of the network."""
        return self.ema_model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an average."""
        self.ema_model.load_state_dict(state)
