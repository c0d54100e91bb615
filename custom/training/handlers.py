"""What MONAI's engines lack for training: exact resuming, whole checkpoints, clipping on real steps, time left."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import ignite.distributed as idist
import monai.handlers
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import DiskSaver
from monai.data import set_rnd
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

logger = logging.getLogger("comnet")


class GradientClipper:
    """Clip the global gradient norm right before each optimiser step (paper, 3.3: maximum norm 1.0).

    A hook on the optimiser sees the accumulated gradients, and under mixed precision the unscaled ones.

    Args:
        max_norm: largest L2 norm over all parameters.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Hook into the optimiser of a MONAI trainer for the length of its run."""
        engine.add_event_handler(Events.STARTED, self._hook)
        engine.add_event_handler(Events.COMPLETED, self._unhook)

    def _hook(self, engine: Engine) -> None:
        self.handle = engine.optimizer.register_step_pre_hook(self._clip)

    def _unhook(self, engine: Engine) -> None:
        self.handle.remove()

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)


class EpochSeeder:
    """Seed every source of randomness from (seed, epoch) when an epoch starts.

    What an epoch draws then depends on nothing that came before, so that training resumed at any epoch gives the same
    result as training that was never interrupted.

    Args:
        seed: seed of the run.
        dataset: its random transforms are seeded too.
    """

    def __init__(self, seed: int, dataset: Dataset) -> None:
        self.seed = seed
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        """Seed at the start of each epoch of ``engine``, before its data loader makes an iterator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._seed)

    def _seed(self, engine: Engine) -> None:
        self.seed_epoch(engine.state.epoch)
        sampler = getattr(engine.state.dataloader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(engine.state.epoch)

    def seed_epoch(self, epoch: int) -> None:
        """Seed Python, NumPy, PyTorch and the dataset's transforms for one epoch; another stream for each rank."""
        seed = int(np.random.SeedSequence([self.seed, epoch, idist.get_rank()]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        set_rnd(self.dataset, seed=seed)


class _WholeFileSaver(DiskSaver):
    """Disk saver with one fixed file name, replaced in one step, so that there is a whole checkpoint at any moment."""

    def __init__(self, dirname: str, filename: str) -> None:
        super().__init__(dirname, atomic=True, require_empty=False)
        self.filename = filename

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        super().__call__(checkpoint, self.filename, metadata)

    def remove(self, filename: str) -> None:
        """Keep the file: the next checkpoint replaces it."""


class CheckpointSaver(monai.handlers.CheckpointSaver):
    """MONAI's saver for the best model, which never leaves a moment without a whole file, and whose memory is saved.

    MONAI deletes the previous best file before it writes the next one, and writes in place.

    Args:
        save_dir: folder of the checkpoint.
        save_dict: objects to save, by key.
        key_metric_filename: name of the file with the best key metric.
    """

    def __init__(self, save_dir: str, save_dict: dict, key_metric_filename: str = "model.pt") -> None:
        super().__init__(save_dir, save_dict, save_key_metric=True, key_metric_filename=key_metric_filename)
        self._key_metric_checkpoint.save_handler = _WholeFileSaver(save_dir, key_metric_filename)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far."""
        saved = self._key_metric_checkpoint.state_dict()["_saved"]
        return {"_saved": [(float(score), name) for score, name in saved]}


class EarlyStopHandler(monai.handlers.EarlyStopHandler):
    """MONAI's early stopping on the validator's key metric, with its count of validations without gain saved.

    It is attached to the trainer and listens to the validator; in a config the two could not name each other.

    Args:
        patience: validations without gain before training stops (paper, Table 1: 30; 15 for CorrDiff).
        validator: evaluator with a key metric, larger is better.
        after: epochs whose validations do not count, such as those in which only the tokeniser learns.
    """

    def __init__(self, patience: int, validator: Engine, after: int = 0) -> None:
        super().__init__(patience, lambda engine: engine.state.metrics[engine.state.key_metric_name])
        self.validator = validator
        self.after = after

    def attach(self, engine: Engine) -> None:
        """Stop the trainer ``engine`` when patience has run out."""
        self.trainer = engine
        self.set_trainer(engine)
        super().attach(self.validator)

    def __call__(self, engine: Engine) -> None:
        """Count a validation."""
        if self.trainer.state.epoch > self.after:
            super().__call__(engine)

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


class ProgressBar:
    """One bar over a whole run of an engine, all epochs together, with time left and the newest figures.

    Args:
        description: text before the bar.
        loss: reads the loss from ``engine.state.output``; ``None`` shows none.
        validator: its key metric is shown when known.
    """

    def __init__(
        self,
        description: str,
        loss: Callable[[Any], float] | None = None,
        validator: Engine | None = None,
    ) -> None:
        self.description = description
        self.loss = loss
        self.validator = validator
        self.bar: Any = None

    def attach(self, engine: Engine) -> None:
        """Follow ``engine``; only rank 0 draws."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self._open)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
            engine.add_event_handler(Events.COMPLETED, self._close)

    def _open(self, engine: Engine) -> None:
        from tqdm import tqdm

        total = engine.state.max_epochs * engine.state.epoch_length
        self.bar = tqdm(total=total, initial=engine.state.iteration, desc=self.description, dynamic_ncols=True)

    def _advance(self, engine: Engine) -> None:
        figures = {"epoch": f"{engine.state.epoch}/{engine.state.max_epochs}"} if engine.state.max_epochs > 1 else {}
        if self.loss is not None:
            figures["loss"] = f"{self.loss(engine.state.output):.4f}"
        if self.validator is not None and self.validator.state.best_metric_epoch > 0:
            figures["best"] = f"{self.validator.state.best_metric:.4f}"
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(engine.state.iteration - self.bar.n)

    def _close(self, engine: Engine) -> None:
        self.bar.close()
