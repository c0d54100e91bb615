"""What MONAI's engines lack for training: clipping on real steps, randomness by the epoch, time left."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import set_rnd
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler


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
