"""Going on from where training was stopped, and publishing what it ends with."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.transforms import Transform
from torch.utils.data import Dataset

from ..files import copy_file, file_sha256
from ..weights import CheckpointError, save_atomically
from .selection import EarlyStopHandler, unwrapped

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
                unwrapped(item).load_state_dict(state[key])
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
        changed = [name for name in self.settings if name in found and found[name] != self.settings[name]]
        if changed:
            named = [
                f"{name} {found[name]!r} instead of {self.settings[name]!r}" for name in changed if name != TRANSFORMS
            ]
            named += ["other transforms"] * (TRANSFORMS in changed)
            raise CheckpointError(f"{self.path} was trained with {', '.join(named)}: ask for the same again, {ANEW}")


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
        """Copy (rank 0 only); without a checkpoint, because no validation was due, there is nothing to do."""
        if idist.get_rank() == 0 and self.source.is_file():
            copy_file(self.source, self.target)
