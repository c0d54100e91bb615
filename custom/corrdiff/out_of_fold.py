"""Coarse predictions of the frozen backbones, computed once a subject and kept on disk (paper, 3.2)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform, Transform
from torch import nn

from ..files import UserError, file_sha256, whole_file
from ..weights import Checkpoint, CheckpointError, fold_checkpoint

logger = logging.getLogger("comnet")

SOURCES = ("out_of_fold", "in_fold")
LOGIT_LIMIT = 14.0
Item = Mapping[str, Any]


class CoarsePredictions:
    """Coarse logits of all subjects, on the grid that the preprocessing makes, as ``<subject>-<key>.npy``, float16.

    Out of fold: a subject's logits come from the backbone that did not train on it, whichever fold CorrDiff itself is
    trained for; a backbone's errors on its own training subjects are not those it makes on new ones. In fold: from the
    backbone of that one fold, as the paper may have done.

    The key in a file's name is a digest of backbone checkpoint, settings and the subject's files, so predictions of
    another backbone are never taken. Old files are left where they are; the folder can be deleted at any time.

    Args:
        items: all subjects of a datalist, with ``subject``, ``image`` and ``fold``.
        network: a backbone to load the checkpoints into, one after the other.
        backbones_dir: folder with ``fold<k>/model.pt``.
        transform: deterministic preprocessing of ``image``.
        inferer: how the backbone runs over a whole volume.
        cache_dir: folder for the predictions.
        settings: what else the prediction depends on, such as the spacing.
        source: ``"out_of_fold"`` or ``"in_fold"``.
        fold: the fold CorrDiff is trained for; it decides the backbone of ``"in_fold"``.
        device: where the backbone runs.
        amp: whether it runs in mixed precision.

    Raises:
        ValueError: no such source.
    """

    def __init__(
        self,
        items: Sequence[Item],
        network: nn.Module,
        backbones_dir: str,
        transform: Transform,
        inferer: Inferer,
        cache_dir: str,
        settings: Mapping[str, Any] | None = None,
        source: str = "out_of_fold",
        fold: int = 0,
        device: torch.device | str = "cpu",
        amp: bool = False,
    ) -> None:
        if source not in SOURCES:
            raise UserError(f"no source {source!r} of coarse predictions: choose one of {', '.join(SOURCES)}")
        self.items = list(items)
        self.network = network
        self.backbones_dir = backbones_dir
        self.transform = transform
        self.inferer = inferer
        self.cache_dir = Path(cache_dir)
        self.settings = dict(settings or {})
        self.source = source
        self.fold = fold
        self.device = torch.device(device)
        self.amp = amp

    def fill(self, items: Sequence[Item] | None = None) -> None:
        """Predict what is not there yet, of ``items`` or of all subjects; the work is shared by all processes.

        Raises:
            CheckpointError: a backbone is missing or does not fit, or was trained on a subject it is to predict.
            ValueError: a subject cannot be read; names it.
        """
        missing = [item for item in (self.items if items is None else items) if not self.path(item).is_file()]
        idist.barrier()  # nobody writes before all have seen the same list
        mine = sorted(missing, key=self.backbone_of)[idist.get_rank() :: idist.get_world_size()]
        if mine:
            self._predict_all(mine)
        idist.barrier()

    def add(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return ``items`` with the path of the coarse logits as ``coarse``, after :meth:`fill`."""
        self.fill(items)
        return [{**item, "coarse": str(self.path(item))} for item in items]

    def backbone_of(self, item: Item) -> int:
        """Fold of the backbone that predicts a subject."""
        return int(item["fold"]) if self.source == "out_of_fold" else self.fold

    def path(self, item: Item) -> Path:
        """Where the coarse logits of a subject are or will be."""
        checkpoint = fold_checkpoint(self.backbones_dir, self.backbone_of(item))
        if not checkpoint.is_file():
            raise CheckpointError(
                f"no backbone at {checkpoint}: train fold {self.backbone_of(item)} of comnet_mednext, or set "
                "backbones_dir to the folder that holds fold<k>/model.pt"
            )
        files = [(os.path.basename(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in item["image"]]
        content = json.dumps([_digest(str(checkpoint), os.stat(checkpoint).st_mtime_ns), self.settings, files])
        return self.cache_dir / f"{item['subject']}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npy"

    def _predict_all(self, items: Sequence[Item]) -> None:
        from tqdm import tqdm

        loaded = None
        for item in tqdm(items, desc="coarse predictions", dynamic_ncols=True):
            if loaded != self.backbone_of(item):
                loaded = self.backbone_of(item)
                checkpoint = Checkpoint.at(fold_checkpoint(self.backbones_dir, loaded))
                checkpoint.load(self.network)
            self._check(item, checkpoint.facts)
            with whole_file(self.path(item)) as temporary:
                np.save(temporary, self._predict(item))

    def _check(self, item: Item, facts: Mapping[str, Any]) -> None:
        fold = self.backbone_of(item)
        if self.source == "out_of_fold" and item["subject"] in facts.get("trained_on", ()):
            raise CheckpointError(
                f"the backbone of fold {fold} was trained on subject {item['subject']}, which this datalist puts into "
                "that very fold: use the datalist that the backbones were trained with"
            )
        for name in self.settings.keys() & facts.keys():
            if self.settings[name] != facts[name]:
                raise CheckpointError(
                    f"the backbone of fold {fold} was trained with {name} {facts[name]}, not {self.settings[name]}: "
                    f"set {name} to that"
                )

    def _predict(self, item: Item) -> np.ndarray:
        try:
            image = self.transform({"subject": item["subject"], "image": list(item["image"])})["image"]
        except Exception as error:
            raise UserError(f"subject {item['subject']} cannot be read for its coarse prediction: {error}") from error
        self.network.to(self.device).eval()
        autocast = torch.autocast(self.device.type, enabled=self.amp)
        with torch.no_grad(), autocast:
            logits = self.inferer(image.as_tensor()[None].to(self.device), self.network)[0]
        return logits.float().clamp(-LOGIT_LIMIT, LOGIT_LIMIT).cpu().numpy().astype(np.float16)


class LoadCoarsed(MapTransform):
    """Load coarse logits that :class:`CoarsePredictions` has left, float32 ``[3, *spatial]``.

    Args:
        keys: paths of the logits.
        image_key: preprocessed image ``[4, *spatial]``, on whose grid they must be.

    Raises:
        ValueError: on call, they are on another grid.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with logits in place of their path."""
        subject = dict(data)
        image = subject[self.image_key]
        for key in self.key_iterator(subject):
            logits = torch.from_numpy(np.load(subject[key], allow_pickle=False)).float()
            if logits.shape[1:] != image.shape[1:]:
                raise UserError(
                    f"{subject[key]} has shape {tuple(logits.shape)}, the image {tuple(image.shape)}: delete that file "
                    "to have the prediction made again"
                )
            subject[key] = MetaTensor(logits, affine=image.affine) if isinstance(image, MetaTensor) else logits
        return subject


@cache
def _digest(path: str, modified: int) -> str:
    return file_sha256(path)
