"""Going on from where training was stopped, and publishing what it ends with."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from ..files import copy_file, file_sha256
from ..weights import CheckpointError, save_atomically
from . import EarlyStopHandler

logger = logging.getLogger("comnet")


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
            others than those of the file, training starts anew: in a server labels are added and mended.
    """

    def __init__(
        self,
        path: str,
        objects: Mapping[str, Any],
        validator: Engine | None = None,
        stopper: EarlyStopHandler | None = None,
        enabled: bool = True,
        dataset: Dataset | None = None,
    ) -> None:
        self.path = Path(path)
        self.objects = dict(objects) | ({"stopper": stopper} if stopper is not None else {})
        self.validator = validator
        self.stopper = stopper
        self.enabled = enabled
        self.dataset = dataset

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
        state = {key: _unwrapped(item).state_dict() for key, item in self.objects.items()}
        state["progress"] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        state["subjects"] = self.subjects
        if self.validator is not None:
            best = self.validator.state
            state["best"] = {"metric": float(best.best_metric), "epoch": int(best.best_metric_epoch)}
        save_atomically(state, self.path)

    def restore(self, engine: Engine) -> None:
        """Go on from the file if there is one.

        Raises:
            CheckpointError: the file was written by another network or configuration.
        """
        if not self.enabled or engine.state.epoch or not self.path.is_file():
            return  # an engine that has trained already, as in a federated round, goes on from its own state
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if self.subjects and state.get("subjects", self.subjects) != self.subjects:
            logger.warning("%s is of other subjects or labels: training starts anew", self.path)
            return
        try:
            for key, item in self.objects.items():
                _unwrapped(item).load_state_dict(state[key])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{self.path} was written by another configuration ({reason}): name another output folder, or start "
                "anew with --resume False"
            ) from error
        engine.state.epoch = state["progress"]["epoch"]
        engine.state.iteration = state["progress"]["iteration"]
        if self.validator is not None:
            self.validator.state.best_metric = state["best"]["metric"]
            self.validator.state.best_metric_epoch = state["best"]["epoch"]
        logger.info("resumed after epoch %d from %s", engine.state.epoch, self.path)
        if self.stopper is not None and self.stopper.exhausted:
            engine.terminate()


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


def _unwrapped(item: Any) -> Any:
    return item.module if isinstance(item, DistributedDataParallel) else item
