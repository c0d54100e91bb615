"""Dice of every subject at all settings, predicted only by networks that did not train on it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Transform
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from .. import __version__
from ..checkpoints import CheckpointError, load_part
from ..files import file_sha256, write_text
from ..inferers import describe
from ..weights import fold_checkpoint
from .grid import Grid

Item = Mapping[str, Any]


class OutOfFoldDice:
    """Table of Dice over subjects, regions, maps (coarse and refined), thresholds and smallest components.

    One subject at a time is in memory. What was measured stays in ``cache_dir`` as ``<subject>-<key>.json``, so that
    a stopped run goes on from there; the key is a digest of all that the figures depend on.

    Args:
        dataset: subjects as :meth:`custom.coarse.CoarsePredictions.add` returns them; each is read as ``image`` and
            ``coarse`` logits on the preprocessed grid, and ``label``, ``[3, *spatial]`` regions on its native grid.
        postprocessing: makes of ``pred``, logits on the preprocessed grid, probabilities on the native one, as
            inference does.
        grid: settings to try.
        cache_dir: folder of what was measured.
        corrector: into which the correctors are loaded, one after the other.
        correctors_dir: folder with ``fold<k>/model.pt`` of ``comnet_corrdiff``; ``None`` leaves the coarse logits.
        amp: whether the corrector runs in mixed precision.
    """

    def __init__(
        self,
        dataset: Dataset,
        postprocessing: Transform,
        grid: Grid,
        cache_dir: str | Path,
        corrector: nn.Module | None = None,
        correctors_dir: str | Path | None = None,
        amp: bool = False,
    ) -> None:
        self.dataset = dataset
        self.postprocessing = postprocessing
        self.grid = grid
        self.cache_dir = Path(cache_dir)
        self.corrector = corrector
        self.correctors_dir = correctors_dir
        self.amp = amp
        self._loaded: int | None = None
        self._seen: frozenset[str] = frozenset()

    @property
    def folds(self) -> list[int]:
        """Fold of each subject."""
        return [int(item["fold"]) for item in self.dataset.data]

    def measure(self) -> np.ndarray:
        """Return ``[subjects, 3, 2, T, V]``, in the order of the dataset.

        Raises:
            ValueError: there is no subject, or one cannot be read; names it.
            CheckpointError: a corrector is missing or does not fit, or was trained on a subject of its own fold.
        """
        from tqdm import tqdm

        if not self.folds:
            raise ValueError("there is no subject to tune on: give the datalist that the folds were trained with")
        order = np.argsort(self.folds, kind="stable")
        scores = {
            number: self._cached(int(number))
            for number in tqdm(order, desc="tuning", unit="subject", dynamic_ncols=True)
        }
        return np.stack([scores[number] for number in sorted(scores)])

    def path(self, item: Item) -> Path:
        """Where the figures of a subject are or will be."""
        label = os.stat(item["label"])
        facts = [os.path.basename(item["coarse"]), label.st_size, label.st_mtime_ns, item.get("palette")]
        if self.correctors_dir is not None:
            sampling = [getattr(self.corrector, name, None) for name in ("num_samples", "seed")]
            facts += [self._digests[int(item["fold"])], sampling, self.amp]
        content = json.dumps([__version__, asdict(self.grid), facts])
        return self.cache_dir / f"{item['subject']}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"

    @cached_property
    def _digests(self) -> dict[int, str]:
        return {fold: file_sha256(self._checkpoint(fold)) for fold in sorted(set(self.folds))}

    def _checkpoint(self, fold: int) -> Path:
        path = fold_checkpoint(str(self.correctors_dir), fold)
        if not path.is_file():
            raise CheckpointError(
                f"no corrector at {path}: train fold {fold} of comnet_corrdiff, or set correctors_dir to the folder "
                "that holds fold<k>/model.pt"
            )
        return path

    def _cached(self, number: int) -> np.ndarray:
        item = self.dataset.data[number]
        path = self.path(item)
        if not path.is_file():
            facts = {"subject": item["subject"], "fold": int(item["fold"]), **asdict(self.grid)}
            write_text(path, json.dumps(facts | {"dice": self._measure(number).tolist()}))
        return np.asarray(json.loads(path.read_text(encoding="utf-8"))["dice"])

    def _measure(self, number: int) -> np.ndarray:
        item = self.dataset.data[number]
        try:
            subject = self.dataset[number]
        except Exception as error:
            raise ValueError(f"subject {item['subject']} cannot be read for tuning: {describe(error)}") from error
        coarse = convert_to_tensor(subject["coarse"], track_meta=False)
        refined = coarse if self.correctors_dir is None else self._refine(item, subject["image"], coarse)
        scores = [self._score(subject, coarse)]
        scores.append(scores[0] if torch.equal(refined, coarse) else self._score(subject, refined))
        return np.stack(scores, axis=1)

    def _refine(self, item: Item, image: Tensor, coarse: Tensor) -> Tensor:
        self._load_corrector(int(item["fold"]))
        if item["subject"] in self._seen:
            raise CheckpointError(
                f"the corrector of fold {item['fold']} was trained on subject {item['subject']}, which this datalist "
                "puts into that very fold: use the datalist that the correctors were trained with"
            )
        device = next(self.corrector.parameters()).device
        pair = (convert_to_tensor(part, track_meta=False, device=device)[None] for part in (image, coarse))
        with torch.no_grad(), torch.autocast(device.type, enabled=self.amp):
            return self.corrector.eval()(*pair)[0].float().cpu()

    def _load_corrector(self, fold: int) -> None:
        if self._loaded != fold:
            facts = load_part(self.corrector, self._checkpoint(fold), "corrector.")
            self._loaded, self._seen = fold, frozenset(facts.get("trained_on", ()))

    def _score(self, subject: Item, logits: Tensor) -> np.ndarray:
        if not torch.isfinite(logits).all():
            raise ValueError(f"subject {subject['subject']}: a network returned NaN or infinite logits: train it again")
        probabilities = self.postprocessing({**subject, "pred": logits.clone()})["pred"]
        voxel_mm3 = abs(float(np.linalg.det(np.asarray(probabilities.affine)[:3, :3])))
        truth = np.asarray(convert_to_tensor(subject["label"], track_meta=False).cpu()) > 0
        return self.grid.score(convert_to_tensor(probabilities, track_meta=False).cpu().numpy(), truth, voxel_mm3)
