"""What a run has left in its folder, and which of its cases went wrong, worst first."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cohort import REGIONS
from ..files import UserError
from ..metrics import PAPER
from .tables import BRATS, Scores, dice_of, models_of

MODELS = {"segresnet": "SegResNet", "mednext": "MedNeXt", "comnet": "CoMNeT"}
FOUND_SHARE = 0.5
"""A region of which a smaller share was found counts as missed."""
TOO_LARGE = 2.0
"""A region whose predicted volume is more than this many times the true one counts as too large."""
FAR_MM = 20.0
"""HD95 of a region that is found for the most part, above which some of it lies far off."""
ORDER_RULE = (
    "Ordered by the mean Dice over regions, worst first; a region wrongly predicted counts 0, one rightly left empty "
    "(–) does not count"
)
MEDIAN_RULE = "The subject in the middle when ordered by mean Dice; of two in the middle, the worse"


@dataclass(frozen=True)
class Run:
    """A cross-validation, read from its folder.

    Attributes:
        folder: the run's folder.
        scores: flat rows with "model", "fold", "subject", "selection" and the columns of `metrics.score_subject`, by
            model in the order of `MODELS`, then by subject.
        notes: what each model's weights are, by model.
        not_scored: subjects that a model has no scores of, by model.
        datalist: `datalist.json` as it is, empty where there is none.
        tuning: `ensemble/tuning.json`, empty where there is none.
        places: folder of what scoring wrote, by model and subject.
    """

    folder: Path
    scores: list[dict[str, Any]]
    notes: dict[str, str]
    not_scored: dict[str, list[str]]
    datalist: dict[str, Any]
    tuning: dict[str, Any]
    places: dict[tuple[str, str], Path]

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects that some model has scores of."""
        return sorted({str(score["subject"]) for score in self.scores})

    @property
    def last_model(self) -> str:
        """The last of the models that have scores: CoMNeT if it has."""
        return str(self.scores[-1]["model"])

    def of(self, subject: str) -> dict[str, dict[str, Any]]:
        """Scores of a subject by model."""
        return {str(score["model"]): score for score in self.scores if score["subject"] == subject}

    def file(self, model: str, subject: str, ending: str) -> Path:
        """Path of what scoring wrote for a subject, such as that which ends in `qc.png` or `seg.nii.gz`."""
        return self.places[model, subject] / f"{subject}_{ending}"

    def weights(self, model: str, subject: str) -> str:
        """What the weights are that a subject was segmented with."""
        return str(_read(self.file(model, subject, "").with_name("record.json")).get("weights", ""))


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """Reads `<model>/scores/fold<k>/<subject>/record.json` of every model, `datalist.json` and `ensemble/tuning.json`.

    The folder decides what a model is called. Records without scores count as not scored. The rule that selected the
    epochs is the record's "selection", in runs of 0.1 always "paper".

    Raises:
        UserError: no model has scores, or a file is not what it should be; says which.
    """
    folder = Path(run_dir)
    found = {name: _record_files(folder / key / "scores") for key, name in MODELS.items()}
    records = {name: {subject: _read(file) for subject, file in files.items()} for name, files in found.items()}
    scores = [_scores(one) | {"model": name} for name, of in records.items() for one in of.values() if "scores" in one]
    if not scores:
        places = ", ".join(f"{key}/scores/fold*/*/record.json" for key in MODELS)
        raise UserError(
            f"{folder}: no scores in {places}: score the models with `comnet crossval`, or name the folder of a "
            "cross-validation"
        )
    datalist = _read(folder / "datalist.json", optional=True)
    expected = {str(item["subject"]) for item in datalist.get("training", [])} | {str(one["subject"]) for one in scores}
    present = {name: {score["subject"] for score in scores if score["model"] == name} for name in MODELS.values()}
    notes = {name: dict.fromkeys(str(one["weights"]) for one in records[name].values() if one.get("weights"))
             for name in MODELS.values() if present[name]}  # fmt: skip
    return Run(
        folder,
        scores,
        notes={name: "; ".join(told) for name, told in notes.items()},
        not_scored={
            name: missing
            for key, name in MODELS.items()
            if (folder / key).is_dir() and (missing := sorted(expected - present[name]))
        },
        datalist=datalist,
        tuning=_read(folder / "ensemble" / "tuning.json", optional=True),
        places={(name, subject): file.parent for name, files in found.items() for subject, file in files.items()},
    )


def read_scores(scores_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the scores of all subjects that an evaluation has left in a folder, or those of folds in its `fold<k>`.

    Raises:
        UserError: a record is not what it should be; says which.
    """
    records = map(_read, _record_files(Path(scores_dir)).values())
    return [_scores(record) for record in records if "scores" in record]


def mean_dice(score: Mapping[str, Any]) -> float:
    """Mean of `counted_dice` over the regions; 1 where all of them are rightly empty."""
    counted = [value for region in REGIONS if not math.isnan(value := counted_dice(score, region))]
    brats = [value for region in REGIONS if not math.isnan(value := dice_of(score, region, BRATS))]
    return float(np.mean(counted or brats or math.nan))


def counted_dice(score: Mapping[str, Any], region: str) -> float:
    """Dice by which a case is judged: 0 for a region wrongly predicted, NaN for one rightly left empty."""
    brats = dice_of(score, region, BRATS)
    return brats if brats != 1 else dice_of(score, region)


def worst_first(scores: Scores) -> list[str]:
    """Subjects in ascending order of the last model's `mean_dice`; without a value they come first, ties by name."""
    model = models_of(scores)[-1]
    means = {str(score["subject"]): mean_dice(score) for score in scores if str(score["model"]) == model}
    return sorted(means, key=lambda name: (-math.inf if math.isnan(means[name]) else means[name], name))


def median_subject(scores: Scores) -> str:
    """The subject in the middle of `worst_first`; of two in the middle, the worse."""
    ranking = worst_first(scores)
    return ranking[(len(ranking) - 1) // 2]


def what_went_wrong(score: Mapping[str, Any]) -> list[str]:
    """Findings on one subject, at most one per region, from its Dice, volumes and HD95; none where all went well.

    A region without `_volume_ml` and `_reference_ml` in its score (`metrics.score_subject`) gives no finding.
    """
    return [finding for region in REGIONS if (finding := _finding(score, region))]


def _finding(score: Mapping[str, Any], region: str) -> str:
    predicted, true, distance = (
        math.nan if (value := score.get(f"{region}_{name}")) is None else float(value)
        for name in ("volume_ml", "reference_ml", "hd95")
    )
    if math.isnan(predicted + true) or not predicted + true:
        return ""
    if not true:
        return f"{region} predicted though there is none: {_amount(predicted)} ml"
    found = dice_of(score, region) * (predicted + true) / 2
    share = f"{_amount(found)} of {_amount(true)} ml found"
    if found < FOUND_SHARE * true < predicted - found:
        return f"{region} in the wrong place: {share}, {_amount(predicted - found)} ml elsewhere"
    if found < FOUND_SHARE * true:
        return f"{region} missed: {share}"
    if predicted > TOO_LARGE * true:
        return f"{region} too large: {_amount(predicted)} ml for {_amount(true)} ml ({predicted / true:.1f} times)"
    return f"{region} has parts far off: HD95 {distance:.0f} mm" if distance > FAR_MM else ""


def _amount(volume: float) -> str:
    return f"{volume:.1f}" if volume >= 0.1 or volume < 5e-4 else f"{volume:.3f}"


def _scores(record: Mapping[str, Any]) -> dict[str, Any]:
    scores = record["scores"]
    names = {key: scores[key] for key in ("model", "fold", "subject") if key in scores}
    return names | {"selection": PAPER} | scores | ({"selection": record["selection"]} if "selection" in record else {})


def _record_files(scores_dir: Path) -> dict[str, Path]:
    """Records by subject: of several evaluations, each in a folder of its own, else of one."""
    found = [*scores_dir.glob("fold*/*/record.json")] or [*scores_dir.glob("*/record.json")]
    return {path.parent.name: path for path in sorted(found, key=lambda path: path.parent.name)}


def _read(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and run `comnet crossval` again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: delete it and run `comnet crossval` again")
    return content
