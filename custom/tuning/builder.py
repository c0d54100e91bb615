"""Five backbones and a corrector to one file of weights, with the settings that suit it (design, section 4)."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.transforms import Transform

from ..checkpoints import Provenance, save_atomically
from ..cohort import REGIONS
from ..comnet import CoMNeT
from ..files import write_text
from .choice import Choice, choose
from .grid import DEFAULT_THRESHOLD, DEFAULT_VOLUME_MM3, Grid
from .out_of_fold import OutOfFoldDice
from .parts import check_own_backbone, gather_parts

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
        provenance: Provenance,
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
            raise ValueError(f"correctors_dir is {correctors_dir}, but the network has no corrector to load them into")
        if max_epochs != 1:
            raise ValueError(f"max_epochs is {max_epochs}: an ensemble is gathered and tuned in one pass")
        self.network = network
        self.dataset = dataset
        self.postprocessing = postprocessing
        self.backbones_dir = backbones_dir
        self.models_dir = Path(models_dir)
        self.provenance = provenance
        self.correctors_dir = correctors_dir or None
        self.corrector_fold = corrector_fold
        self.grid = Grid.of(try_thresholds, try_volumes_mm3, fill_holes)
        self.tune = tune
        self.amp = amp
        self.train_handlers = list(train_handlers)

    def run(self) -> None:
        """Gather, choose, write.

        Raises:
            CheckpointError: a checkpoint is missing or unreadable, belongs to other parts or other settings, or was
                trained on a subject that it is to be judged on.
            ValueError: a subject cannot be read; names it.
            OSError: ``models_dir`` cannot be written.
        """
        facts = self.provenance.state_dict()
        facts = gather_parts(self.network, facts, self.backbones_dir, self.correctors_dir, self.corrector_fold)
        choices = self._choose() if self.tune else self._defaults()
        for region, choice in choices.items():
            logger.info("%s: %s", region, choice.reason)
        self._write_choices(choices)
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        save_atomically({"model": state, "provenance": facts | _settings(choices)}, self.models_dir / "model.pt")
        logger.info("the ensemble is in %s", self.models_dir / "model.pt")
        self._tell_handlers(choices)

    def _choose(self) -> dict[str, Choice]:
        if self.correctors_dir is not None:
            for fold in range(len(self.network.backbones)):
                check_own_backbone(self.correctors_dir, self.backbones_dir, fold)
        scores = OutOfFoldDice(
            self.dataset,
            self.postprocessing,
            self.grid,
            self.models_dir / "tuning",
            copy.deepcopy(self.network.corrector),
            self.correctors_dir,
            self.amp,
        )
        return choose(scores.measure(), scores.folds, self.grid, self.correctors_dir is not None)

    def _defaults(self) -> dict[str, Choice]:
        choice = Choice(refine=self.correctors_dir is not None, reason="Nothing was measured: tuning was switched off.")
        return dict.fromkeys(REGIONS, choice)

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

    def _write_choices(self, choices: Mapping[str, Choice]) -> None:
        content = {
            "num_subjects": len(self.dataset.data) if self.tune else 0,
            "regions": {region: choice.as_json() for region, choice in choices.items()},
            "convention": "brats",
        }
        write_text(self.models_dir / "tuning.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _settings(choices: Mapping[str, Choice]) -> dict[str, list[Any]]:
    """Settings of ET, TC and WT, as :func:`custom.weights.tuned_settings` reads them."""
    return {
        "thresholds": [choices[region].threshold for region in REGIONS],
        "min_volume_mm3": [choices[region].min_volume_mm3 for region in REGIONS],
        "refine_regions": [choices[region].refine for region in REGIONS],
    }
