"""Five backbones and a corrector to one file of weights, with the settings that suit it (design, section 4)."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.transforms import Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from .. import __version__
from ..cohort import REGIONS
from ..comnet import CoMNeT
from ..files import UserError, file_sha256, write_text
from ..inference.inferers import describe
from ..metrics import PAPER, may_infer
from ..weights import OF_THE_PARTS, Checkpoint, CheckpointError, fold_checkpoint, save_atomically
from .choice import DEFAULT_THRESHOLD, DEFAULT_VOLUME_MM3, Choice, Grid, choose

logger = logging.getLogger("comnet")


class EnsembleBuilder:
    """Gather fold checkpoints, choose settings on out-of-fold predictions, and write one ``model.pt``.

    Nothing is trained by gradient: the corrector of one fold serves the whole ensemble. Each was trained on four
    fifths of the out-of-fold predictions, so none is chosen by its score.

    ``models_dir`` receives ``tuning.json``, what was chosen for each region and why (:class:`custom.tuning.Choice`),
    and then ``model.pt``, whose provenance carries the settings that inference takes as its defaults. Figures of
    single subjects stay in ``models_dir/tuning``, from which a stopped run goes on; it can be deleted at any time.

    Args:
        network: the ensemble as inference configures it.
        dataset: see :class:`custom.tuning.OutOfFoldDice`; not used without ``tune``.
        postprocessing: see there.
        backbones_dir: folder with ``fold<k>/model.pt`` of ``comnet_mednext``.
        models_dir: where the ensemble goes.
        provenance: what else the weights say of themselves, such as ``backbone``, ``corrector`` and ``spacing``.
        correctors_dir: folder with ``fold<k>/model.pt`` of ``comnet_corrdiff``; ``None`` or "" (MONAI's command line
            cannot say null) leaves the ensemble without: a corrector in ``network`` then stays untrained, which
            changes no logit.
        corrector_fold: whose corrector the ensemble gets.
        try_thresholds: probabilities to try.
        try_volumes_mm3: smallest components to try.
        fill_holes: for ET, TC and WT, whether inference fills holes.
        tune: measure and choose; otherwise the defaults are written, with refinement wherever there is a corrector.
        amp: whether the corrector runs in mixed precision.
        max_epochs: passes over the subjects, which MONAI asks of whatever trains; there is one.
        train_handlers: handlers of an engine that has one iteration, with 1 - mean Dice as its loss and the figures of
            every region as its metrics: what an experiment tracker records.

    Raises:
        ValueError: correctors for a network without one, settings that cannot be tried, or more than one pass.
    """

    def __init__(
        self,
        network: CoMNeT,
        dataset: Dataset,
        postprocessing: Transform,
        backbones_dir: str,
        models_dir: str,
        provenance: Mapping[str, Any],
        correctors_dir: str | None = None,
        corrector_fold: int = 0,
        try_thresholds: Sequence[float] = (DEFAULT_THRESHOLD,),
        try_volumes_mm3: Sequence[float] = (DEFAULT_VOLUME_MM3,),
        fill_holes: Sequence[bool] = (False, True, True),
        tune: bool = True,
        amp: bool = False,
        max_epochs: int = 1,
        train_handlers: Sequence[Any] = (),
    ) -> None:
        if correctors_dir and network.corrector is None:
            raise UserError(f"correctors_dir is {correctors_dir}, but the network has no corrector to load them into")
        if max_epochs != 1:
            raise UserError(f"max_epochs is {max_epochs}: an ensemble is gathered and tuned in one pass")
        self.network = network
        self.backbones_dir = backbones_dir
        self.models_dir = Path(models_dir)
        self.provenance = provenance
        self.correctors_dir = correctors_dir or None
        self.corrector_fold = corrector_fold
        grid, corrector = Grid.of(try_thresholds, try_volumes_mm3, fill_holes), copy.deepcopy(network.corrector)
        cache_dir = self.models_dir / "tuning"
        self.scores = OutOfFoldDice(dataset, postprocessing, grid, cache_dir, corrector, self.correctors_dir, amp)
        self.tune = tune
        self.train_handlers = list(train_handlers)

    def run(self) -> None:
        """Gather, choose, write.

        Raises:
            CheckpointError: a checkpoint is missing or unreadable, belongs to other parts or other settings, or was
                trained on a subject that it is to be judged on.
            ValueError: a subject cannot be read; names it.
            OSError: ``models_dir`` cannot be written.
        """
        parts = (self.backbones_dir, self.correctors_dir, self.corrector_fold)
        facts = gather_parts(self.network, self.provenance, *parts)
        if self.tune:
            choices = self._choose(facts["selection"])
        else:
            reason = "Nothing was measured: tuning was switched off."
            choices = dict.fromkeys(REGIONS, Choice(refine=self.correctors_dir is not None, reason=reason))
        for region, choice in choices.items():
            logger.info("%s: %s", region, choice.reason)
        content = {
            "num_subjects": len(self.scores.folds) if self.tune else 0,
            "regions": {region: choice.as_json() for region, choice in choices.items()},
            "convention": "brats",
            "selection": facts["selection"],
        }
        write_text(self.models_dir / "tuning.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        settings = {  # of ET, TC and WT, as `custom.weights.Weights.tuned` reads them
            "thresholds": [choices[region].threshold for region in REGIONS],
            "min_volume_mm3": [choices[region].min_volume_mm3 for region in REGIONS],
            "refine_regions": [choices[region].refine for region in REGIONS],
        }
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        save_atomically({"model": state, "provenance": facts | settings}, self.models_dir / "model.pt")
        logger.info("the ensemble is in %s", self.models_dir / "model.pt")
        self._tell_handlers(choices)

    def _choose(self, selection: str) -> dict[str, Choice]:
        if self.correctors_dir is not None:
            for fold in range(len(self.network.backbones)):
                check_own_backbone(self.correctors_dir, self.backbones_dir, fold)
        dice, confidence = self.scores.measure(), 0.95 if may_infer([selection]) else None
        return choose(dice, self.scores.folds, self.scores.grid, self.correctors_dir is not None, confidence)

    def _tell_handlers(self, choices: Mapping[str, Choice]) -> None:
        metrics = {
            f"{region}_{name}": value
            for region, choice in choices.items()
            for name, value in choice.as_json().items()
            if isinstance(value, (int, float))
        }
        tuned = [choice.dice_tuned for choice in choices.values() if choice.dice_tuned is not None]
        loss = 1 - float(np.mean(tuned)) if tuned else math.nan
        engine = Engine(lambda engine, batch: [{"loss": loss}])
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.state.metrics.update(metrics))
        for handler in self.train_handlers:
            handler.attach(engine)
        engine.run([None], max_epochs=1)


def gather_parts(
    network: CoMNeT,
    facts: Mapping[str, Any],
    backbones_dir: str | Path,
    correctors_dir: str | Path | None = None,
    corrector_fold: int = 0,
) -> dict[str, Any]:
    """Load the backbone of every fold and the corrector of one.

    Args:
        network: the ensemble to fill.
        facts: what its provenance says already; parts that say otherwise of ``OF_THE_PARTS`` are refused.
        backbones_dir: folder with ``fold<k>/model.pt`` of ``comnet_mednext``.
        correctors_dir: folder with ``fold<k>/model.pt`` of ``comnet_corrdiff``; ``None`` loads no corrector.
        corrector_fold: whose corrector it is.

    Returns:
        ``facts`` with ``num_folds``, ``trained_on`` (subjects that any part has seen), the parts' own ``notes`` where
        there are none, ``selection``, by which all parts' epochs were chosen ("paper" where they differ),
        ``corrector_fold``, the backbones' least ``drop_modalities_prob``, and the SHA-256 of each part as
        ``backbones_sha256``, ``corrector_sha256``.

    Raises:
        CheckpointError: a part is missing, unreadable, or was trained with other settings or another backbone.
    """
    backbones = [Checkpoint.at(fold_checkpoint(backbones_dir, fold)) for fold in range(len(network.backbones))]
    for backbone, checkpoint in zip(network.backbones, backbones, strict=True):
        checkpoint.load(backbone)
    corrector = None if correctors_dir is None else Checkpoint.at(fold_checkpoint(correctors_dir, corrector_fold))
    if corrector is not None:
        corrector.load(network.corrector, "corrector.")
    parts = [*backbones, *([corrector] if corrector else [])]
    for part, name in itertools.product(parts, OF_THE_PARTS):
        if name in part.facts and name in facts and part.facts[name] != facts[name]:
            raise CheckpointError(
                f"{part.path} was trained with {name} {part.facts[name]}, not {facts[name]}: set {name} to that"
            )
    rules = {str(part.facts.get("selection", PAPER)) for part in parts}
    return {
        **facts,
        "num_folds": len(backbones),
        "selection": rules.pop() if len(rules) == 1 else PAPER,
        "trained_on": sorted({str(name) for part in parts for name in part.facts.get("trained_on", ())}),
        "notes": facts.get("notes")
        or "; ".join(sorted({part.facts["notes"] for part in parts if part.facts.get("notes")})),
        "drop_modalities_prob": min(one.facts.get("drop_modalities_prob", 0.0) for one in backbones),
        "backbones_sha256": [backbone.sha256 for backbone in backbones],
        "corrector_sha256": None if corrector is None else corrector.sha256,
        "corrector_fold": None if corrector is None else corrector_fold,
    }


def check_own_backbone(correctors_dir: str | Path, backbones_dir: str | Path, fold: int) -> None:
    """Make sure that a fold's corrector was trained on the coarse logits of a backbone that is still the same.

    Raises:
        CheckpointError: it was not, or one of the two is missing.
    """
    corrector, backbone = fold_checkpoint(correctors_dir, fold), fold_checkpoint(backbones_dir, fold)
    within, expected = Checkpoint.at(corrector).tensors(), Checkpoint.at(backbone).tensors()
    own = {name: value for name, value in within.items() if name.startswith("backbones.")}
    if len(own) != len(expected) or not all(
        (name := f"backbones.0.{part}") in own and torch.equal(own[name], value) for part, value in expected.items()
    ):
        raise CheckpointError(
            f"{corrector} was trained with another backbone than {backbone}: train the corrector again, or name the "
            "folder of its own backbones"
        )


Item = Mapping[str, Any]


@dataclass(eq=False)
class OutOfFoldDice:
    """Table of Dice over subjects, regions, maps (coarse and refined), thresholds and smallest components.

    One subject at a time is in memory. What was measured stays in ``cache_dir`` as ``<subject>-<key>.json``, so that
    a stopped run goes on from there; the key is a digest of all that the figures depend on.

    Args:
        dataset: subjects as :meth:`custom.corrdiff.CoarsePredictions.add` returns them; each is read as ``image`` and
            ``coarse`` logits on the preprocessed grid, and ``label``, ``[3, *spatial]`` regions on its native grid.
        postprocessing: makes of ``pred``, logits on the preprocessed grid, probabilities on the native one, as
            inference does.
        grid: settings to try.
        cache_dir: folder of what was measured.
        corrector: into which the correctors are loaded, one after the other.
        correctors_dir: folder with ``fold<k>/model.pt`` of ``comnet_corrdiff``; ``None`` leaves the coarse logits.
        amp: whether the corrector runs in mixed precision.
    """

    dataset: Dataset
    postprocessing: Transform
    grid: Grid
    cache_dir: Path
    corrector: Any = None
    correctors_dir: str | Path | None = None
    amp: bool = False
    _loaded: int | None = field(default=None, init=False)
    _seen: frozenset[str] = field(default=frozenset(), init=False)

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
            raise UserError("there is no subject to tune on: give the datalist that the folds were trained with")
        order = np.argsort(self.folds, kind="stable").tolist()  # fold by fold: a corrector is loaded once
        scores = {n: self._cached(n) for n in tqdm(order, desc="tuning", unit="subject", dynamic_ncols=True)}
        return np.stack([scores[n] for n in sorted(scores)])

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
            raise UserError(f"subject {item['subject']} cannot be read for tuning: {describe(error)}") from error
        coarse = convert_to_tensor(subject["coarse"], track_meta=False)
        refined = coarse if self.correctors_dir is None else self._refine(item, subject["image"], coarse)
        scores = [self._score(subject, coarse)]
        scores.append(scores[0] if torch.equal(refined, coarse) else self._score(subject, refined))
        return np.stack(scores, axis=1)

    def _refine(self, item: Item, image: Tensor, coarse: Tensor) -> Tensor:
        if self._loaded != item["fold"]:
            checkpoint = Checkpoint.at(self._checkpoint(int(item["fold"])))
            checkpoint.load(self.corrector, "corrector.")
            self._loaded, self._seen = item["fold"], frozenset(checkpoint.facts.get("trained_on", ()))
        if item["subject"] in self._seen:
            raise CheckpointError(
                f"the corrector of fold {item['fold']} was trained on subject {item['subject']}, which this datalist "
                "puts into that very fold: use the datalist that the correctors were trained with"
            )
        device = next(self.corrector.parameters()).device
        pair = (convert_to_tensor(part, track_meta=False, device=device)[None] for part in (image, coarse))
        with torch.no_grad(), torch.autocast(device.type, enabled=self.amp):
            return self.corrector.eval()(*pair)[0].float().cpu()

    def _score(self, subject: Item, logits: Tensor) -> np.ndarray:
        if not torch.isfinite(logits).all():
            raise UserError(f"subject {subject['subject']}: a network returned NaN or infinite logits: train it again")
        probabilities = self.postprocessing({**subject, "pred": logits.clone()})["pred"]
        voxel_mm3 = abs(float(np.linalg.det(np.asarray(probabilities.affine)[:3, :3])))
        truth = np.asarray(convert_to_tensor(subject["label"], track_meta=False).cpu()) > 0
        return self.grid.score(convert_to_tensor(probabilities, track_meta=False).cpu().numpy(), truth, voxel_mm3)
