"""What MONAI lacks around a trainer: clipping on real steps, seeding, time left, exact resuming."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import set_rnd
from monai.transforms import Transform
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from ..files import file_sha256, whole_file
from ..weights import CheckpointError, save_atomically
from .selection import EarlyStopHandler, unwrapped


@dataclass(eq=False)
class GradientClipper:
    """Clip the global gradient norm right before each optimiser step (paper, 3.3: maximum norm 1.0).

    A hook on the optimiser sees the accumulated gradients, and under mixed precision the unscaled ones.

    Args:
        max_norm: largest L2 norm over all parameters.
    """

    max_norm: float = 1.0

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
        scale = getattr(optimizer, "grad_scale", None)  # of a fused optimiser, which unscales in its step, after this
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm * (1.0 if scale is None else float(scale)))


@dataclass(eq=False)
class EpochSeeder:
    """Seed every source of randomness from (seed, epoch) when an epoch starts.

    What an epoch draws then depends on nothing that came before, so that training resumed at any epoch gives the same
    result as training that was never interrupted.

    Args:
        seed: seed of the run.
        dataset: its random transforms are seeded too.
    """

    seed: int
    dataset: Dataset

    def attach(self, engine: Engine) -> None:
        """Seed at the start of each epoch of ``engine``, before its data loader makes an iterator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._seed)

    def _seed(self, engine: Engine) -> None:
        """Seed Python, NumPy, PyTorch and the dataset's transforms for one epoch; another stream for each rank."""
        sampler, epoch = getattr(engine.state.dataloader, "sampler", None), engine.state.epoch
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        seed = int(np.random.SeedSequence([self.seed, epoch, idist.get_rank()]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        set_rnd(self.dataset, seed=seed)


@dataclass(eq=False)
class ProgressBar:
    """One bar over a whole run of an engine, all epochs together, with time left and the newest figures.

    Args:
        description: text before the bar.
        loss: reads the loss from ``engine.state.output``; ``None`` shows none.
        validator: its key metric is shown when known.
    """

    description: str
    loss: Callable[[Any], float] | None = None
    validator: Engine | None = None
    bar: Any = field(default=None, init=False)

    def attach(self, engine: Engine) -> None:
        """Follow ``engine``; only rank 0 draws."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_STARTED, self._open)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
            engine.add_event_handler(Events.COMPLETED, self._close)

    def _open(self, engine: Engine) -> None:
        """Begin where the engine is, which other handlers may have set when it started."""
        from tqdm import tqdm

        if self.bar is not None:
            return
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
        if self.bar is not None:
            self.bar.close()
            self.bar = None


logger = logging.getLogger("comnet")

TRANSFORMS = "transforms"
ANEW = "name another output folder, or start anew with --resume False"


class Resumer:
    """Save everything that training needs to go on after each epoch, and go on from it.

    The file is written whole or not at all after every other handler of the epoch has run: put this handler last.

    Args:
        path: file of the last epoch's state.
        objects: objects with ``state_dict`` and ``load_state_dict``, by key.
        validator: evaluator whose best metric is carried over.
        stopper: early stopping; training that it had ended does not start again.
        enabled: ``False`` starts anew and replaces the file.
        dataset: what is trained on, with ``data`` as a list of subjects; if these or the contents of their labels are
            others than those of the file, training starts anew: in a server labels are added and mended. Its
            ``transform`` counts among the settings.
        settings: what the weights depend on beside the subjects, by name. Training does not go on with others; how long
            it goes on (epochs, patience) is none of them.
    """

    def __init__(
        self,
        path: str,
        objects: Mapping[str, Any],
        validator: Engine | None = None,
        stopper: EarlyStopHandler | None = None,
        enabled: bool = True,
        dataset: Dataset | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.objects = dict(objects) | ({"stopper": stopper} if stopper is not None else {})
        self.validator = validator
        self.stopper = stopper
        self.enabled = enabled
        self.dataset = dataset
        transforms = {} if dataset is None else {TRANSFORMS: plain(dataset.transform)}
        self.settings = json.loads(json.dumps(dict(settings or {}) | transforms, default=str))

    @cached_property
    def subjects(self) -> str:
        """Digest of what is trained on, taken when training starts."""
        return subjects_digest(self.dataset.data) if self.dataset is not None else ""

    def attach(self, engine: Engine) -> None:
        """Restore when ``engine`` starts, save when each of its epochs is complete."""
        engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def save(self, engine: Engine) -> None:
        """Write the state after an epoch (rank 0 only)."""
        if idist.get_rank() != 0:
            return
        state = {key: unwrapped(item).state_dict() for key, item in self.objects.items()}
        state["progress"] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        state |= {"subjects": self.subjects, "settings": self.settings}
        if getattr(engine, "scaler", None) is not None:
            state["scaler"] = engine.scaler.state_dict()
        if self.validator is not None:
            best = self.validator.state
            state["best"] = {"metric": float(best.best_metric), "epoch": int(best.best_metric_epoch)}
        save_atomically(state, self.path)

    def restore(self, engine: Engine) -> None:
        """Go on from the file if there is one, and say where no epoch is left.

        Raises:
            CheckpointError: the file was written by another network or with other settings.
        """
        if not self.enabled or engine.state.epoch or not self.path.is_file():
            return  # an engine that has trained already, as in a federated round, goes on from its own state
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if self.subjects and state.get("subjects", self.subjects) != self.subjects:
            logger.warning("%s is of other subjects or labels: training starts anew", self.path)
            return
        self._check_settings(state.get("settings", {}))
        try:
            for key, item in self.objects.items():
                length = getattr(item, "t_total", 0)
                unwrapped(item).load_state_dict(state[key])
                if length != getattr(item, "t_total", 0):
                    stretch(item, length)
            if getattr(engine, "scaler", None) is not None and "scaler" in state:
                engine.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.path} was written by another configuration ({reason}): {ANEW}") from error
        engine.state.epoch = state["progress"]["epoch"]
        engine.state.iteration = state["progress"]["iteration"]
        if self.validator is not None:
            self.validator.state.best_metric = state["best"]["metric"]
            self.validator.state.best_metric_epoch = state["best"]["epoch"]
        logger.info("resumed after epoch %d from %s", engine.state.epoch, self.path)
        if self.stopper is not None and self.stopper.exhausted:
            logger.warning("early stopping ended this training after epoch %d: nothing is trained", engine.state.epoch)
            logger.warning("to go on give more --patience; %s", ANEW)
            engine.terminate()
        elif engine.state.epoch >= (engine.state.max_epochs or math.inf):
            logger.warning("%s has %d epochs already: nothing is trained", self.path, engine.state.epoch)
            logger.warning("to go on give more --max_epochs; %s", ANEW)

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        pairs = {name: (found[name], asked) for name, asked in self.settings.items() if name in found}
        changed = {name: f"{name} {old!r} instead of {asked!r}" for name, (old, asked) in pairs.items() if old != asked}
        if changed:
            named = (changed | ({TRANSFORMS: "other transforms"} if TRANSFORMS in changed else {})).values()
            raise CheckpointError(f"{self.path} was trained with {', '.join(named)}: ask for the same again, {ANEW}")


def stretch(schedule: Any, t_total: int) -> None:
    """Have a MONAI schedule go on from its epoch as one of another length would."""
    schedule.t_total = t_total
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def plain(value: Any) -> Any:
    """Describe a transform, or what is in one, by plain values: names of classes and their public settings."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if not isinstance(value, Transform):
        return getattr(value, "__qualname__", type(value).__qualname__)
    public = {name: plain(one) for name, one in vars(value).items() if not name.startswith("_")}
    return {"class": type(value).__qualname__} | public


def subjects_digest(items: Iterable[Mapping[str, Any]]) -> str:
    """Return one SHA-256 over the names of the images and the contents of the labels, in their order."""
    digest = hashlib.sha256()
    for item in items:
        images = item["image"] if isinstance(item["image"], (list, tuple)) else [item["image"]]
        digest.update(f"{[Path(image).name for image in images]} {file_sha256(item['label'])}".encode())
    return digest.hexdigest()


class Publisher:
    """Copy the best checkpoint to where servers and released bundles look for one, when training is complete.

    Args:
        source: the checkpoint.
        target: the copy, replaced as a whole.
    """

    def __init__(self, source: str, target: str) -> None:
        self.source = Path(source)
        self.target = Path(target)

    def attach(self, engine: Engine) -> None:
        """Publish when ``engine`` ends."""
        engine.add_event_handler(Events.COMPLETED, self.publish)

    def publish(self, engine: Engine) -> None:
        """Copy (rank 0 only); without a checkpoint, as after a round without validation, there is nothing to do."""
        if idist.get_rank() == 0 and self.source.is_file():
            with whole_file(self.target) as temporary:
                shutil.copyfile(self.source, temporary)
