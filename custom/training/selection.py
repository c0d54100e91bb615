"""Which epoch's weights a training leaves as its checkpoint, on whom that is chosen, and when training stops early.

A score on subjects that a choice has touched is no unbiased one. The paper chooses on the fold that is scored (3.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import monai.handlers
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..cohort.datalist import assign_folds
from ..files import UserError
from ..metrics import RULES
from ..weights import MODEL_KEY, PROVENANCE_KEY, Weights, save_atomically

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """Subjects to train on and to choose the epoch on.

    Args:
        rule: ``"paper"``: the best epoch on the fold left out, which is the one that is scored; ``"inner"``: the best
            epoch on one ``num_folds``-th of the training subjects, on which nothing is trained; ``"last"``: nothing is
            chosen, and validation draws a curve only.
        num_folds: parts that the training subjects are dealt into for ``"inner"``, as into folds.
        seed: of that deal.

    Raises:
        UserError: no such rule.
    """

    rule: str = "paper"
    num_folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"no selection {self.rule!r}: choose one of {', '.join(RULES)}")

    def training(self, items: Sequence[Item]) -> list[Item]:
        """Return those of a fold's training ``items`` to train on.

        Raises:
            UserError: they are too few to set some aside.
        """
        kept = [item for item in items if item["subject"] not in self._aside(items)]
        if not kept:
            raise UserError(f"selection {self.rule!r} leaves none of {len(items)} subjects to train on: use 'last'")
        return kept

    def validation(self, training: Sequence[Item], held_out: Sequence[Item]) -> list[Item]:
        """Return the subjects to validate on, of a fold's training items and of those left out."""
        aside = self._aside(training)
        return [item for item in training if item["subject"] in aside] if self.rule == "inner" else list(held_out)

    def seen(self, training: Sequence[Item], validation: Sequence[Item], start_from: str = "") -> list[str]:
        """Names of the subjects that weights have seen: trained on, for ``"inner"`` chosen on, and by those before.

        Args:
            training: what is trained on.
            validation: what is validated on.
            start_from: weights from which training starts, if any.
        """
        before = Weights(start_from).trained_on if start_from else frozenset()
        items = [*training, *(validation if self.rule == "inner" else ())]
        return sorted({str(item.get("subject", "")) for item in items} | before)

    def _aside(self, items: Sequence[Item]) -> set[str]:
        if self.rule != "inner":
            return set()
        return {name for name, part in assign_folds(items, max(self.num_folds, 2), self.seed).items() if part == 0}


class CheckpointSaver:
    """Ignite handler that leaves the weights of the selected epoch, whole at any moment.

    MONAI's saver and ignite's ``Checkpoint`` delete the best file before they write the next of the same name.

    Args:
        path: the checkpoint.
        network: what is saved.
        provenance: what is saved beside it: plain values that say what the weights are, from what, and by whom seen.
        validator: evaluator whose key metric decides, larger is better; not asked for ``"last"``.
        selection: see :class:`Selection`.
        interval: epochs from one validation to the next.
        epochs: of the whole training, of which a federated round is a part; by default as many as the trainer's.
        momentum: for ``"last"``, share of the newest weights in a running average after each step: 1 saves those of the
            last epoch themselves, 0.005 averages over some 200 steps.
        after: epochs before the average of ``"last"`` or the validations start, such as those in which only a tokeniser
            learns.

    Raises:
        UserError: when training starts, where no epoch would be validated that could be chosen.
    """

    def __init__(
        self,
        path: str,
        network: nn.Module,
        provenance: Mapping[str, Any],
        validator: Engine,
        selection: str = "paper",
        interval: int = 1,
        epochs: int | None = None,
        momentum: float = 1.0,
        after: int = 0,
    ) -> None:
        self.path = path
        self.network = unwrapped(network)
        self.provenance = provenance
        self.validator = validator
        self.after = after
        self.selection = selection
        self.interval = interval
        self.epochs = epochs
        self.average = EMAHandler(self.network, momentum) if selection == "last" and momentum < 1 else None

    def attach(self, engine: Engine) -> None:
        """Save when an epoch of trainer ``engine``, or a validation, is complete."""
        engine.add_event_handler(Events.STARTED, self._start)
        if self.average is not None:
            self.average.attach(engine, warn_if_exists=False)
        decides = engine if self.selection == "last" else self.validator
        decides.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _start(self, engine: Engine) -> None:
        epochs = self.epochs or engine.state.max_epochs or math.inf
        if self.selection != "last" and (self.after // self.interval + 1) * self.interval > epochs:
            raise UserError(
                f"selection {self.selection!r} chooses among validated epochs, and with val_interval {self.interval} "
                f"none of {epochs} is validated: give a smaller one, or selection 'last'"
            )
        self._start_average()  # other handlers have loaded weights

    def __call__(self, engine: Engine) -> None:
        """Save if the epoch that ``engine``, trainer or validator, has completed is the selected one so far."""
        if self.selection != "last":
            selected = engine.state.best_metric_epoch == engine.state.epoch
        else:
            selected = engine.state.epoch > self.after
        if not selected:
            self._start_average()
        if selected and idist.get_rank() == 0:
            network = self.network if self.average is None else self._averaged(self.average.ema_model)
            content = {MODEL_KEY: network.state_dict(), PROVENANCE_KEY: dict(self.provenance)}
            save_atomically(content, self.path)

    def _averaged(self, mean: nn.Module) -> nn.Module:
        """Put what is frozen into an average as it is: a mean of equal numbers is off by rounding."""
        with torch.no_grad():
            for averaged, parameter in zip(mean.parameters(), self.network.parameters(), strict=True):
                if not parameter.requires_grad:
                    averaged.copy_(parameter)
        return mean

    def _start_average(self) -> None:
        if self.average is not None:
            self.average.ema_model.load_state_dict(self.network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the average, where there is one; the best score is the validator's."""
        return {} if self.average is None else {"average": self.average.ema_model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an average."""
        if self.average is not None:
            self.average.ema_model.load_state_dict(state["average"])


class ValidationHandler(monai.handlers.ValidationHandler):
    """MONAI's validation every so many epochs, but for the first ones, whose scores would be no candidates.

    Args:
        validator: evaluator to run.
        interval: epochs from one validation to the next.
        after: epochs without.
    """

    def __init__(self, validator: Any, interval: int, after: int = 0) -> None:
        super().__init__(interval, validator)
        self.after = after

    def __call__(self, engine: Engine) -> None:
        """Validate, unless it is too early."""
        if engine.state.epoch > self.after:
            super().__call__(engine)


class EarlyStopHandler(monai.handlers.EarlyStopHandler):
    """MONAI's early stopping on the validator's key metric, with its count of validations without gain saved.

    It is attached to the trainer and listens to the validator; in a config the two could not name each other.

    Args:
        patience: validations without gain before training stops (paper, Table 1: 30; 15 for CorrDiff).
        validator: evaluator with a key metric, larger is better.
        selection: see :class:`Selection`; ``"last"`` never stops early, as that would be a choice.
    """

    def __init__(self, patience: int, validator: Engine, selection: str = "paper") -> None:
        super().__init__(patience, lambda engine: engine.state.metrics[engine.state.key_metric_name])
        self.validator = validator
        self.selection = selection

    def attach(self, engine: Engine) -> None:
        """Stop the trainer ``engine`` when patience has run out."""
        self.set_trainer(engine)
        if self.selection != "last":
            super().attach(self.validator)

    def state_dict(self) -> dict[str, Any]:
        """Return counter and best score."""
        return {"counter": self._handler.counter, "best_score": self._handler.best_score}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore counter and best score."""
        self._handler.counter, self._handler.best_score = state["counter"], state["best_score"]

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self._handler.counter >= self._handler.patience


def unwrapped(item: Any) -> Any:
    """Return a network without what distributes it."""
    return item.module if isinstance(item, DistributedDataParallel) else item
