"""What a cross-validation has left in its folder: scores of every model, the subjects, and what the ensemble chose."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import UserError

MODELS = {"segresnet": "SegResNet", "mednext": "MedNeXt", "comnet": "CoMNeT"}


@dataclass(frozen=True)
class Run:
    """A cross-validation, read from its folder.

    Attributes:
        folder: the run's folder.
        scores: flat rows with "model", "fold", "subject" and the columns of `metrics.score_subject`, by model in the
            order of `MODELS`, then by subject.
        notes: what each model's weights are, by model.
        not_scored: subjects that a model has no scores of, by model.
        datalist: `datalist.json` as it is, empty where there is none.
        tuning: `ensemble/tuning.json`, empty where there is none.
    """

    folder: Path
    scores: list[dict[str, Any]]
    notes: dict[str, str]
    not_scored: dict[str, list[str]]
    datalist: dict[str, Any]
    tuning: dict[str, Any]

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
        key = next(key for key, name in MODELS.items() if name == model)
        return self.folder / key / "scores" / subject / f"{subject}_{ending}"

    def weights(self, model: str, subject: str) -> str:
        """What the weights are that a subject was segmented with."""
        return str(_read(self.file(model, subject, "").with_name("record.json")).get("weights", ""))


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """Reads `<model>/scores/<subject>/record.json` of every model, `datalist.json` and `ensemble/tuning.json`.

    The folder decides what a model is called. Records without scores count as not scored.

    Raises:
        ValueError: no model has scores, or a file is not what it should be; says which.
    """
    folder = Path(run_dir)
    records = {name: _records(folder / key / "scores") for key, name in MODELS.items()}
    scores = [
        record["scores"] | {"model": name}
        for name, by_subject in records.items()
        for record in by_subject.values()
        if "scores" in record
    ]
    if not scores:
        raise UserError(
            f"{folder}: no scores in {', '.join(f'{key}/scores/*/record.json' for key in MODELS)}: score the models "
            "with `comnet crossval`, or name the folder of a cross-validation"
        )
    datalist = _read_optional(folder / "datalist.json")
    expected = {str(item["subject"]) for item in datalist.get("training", [])} | {str(one["subject"]) for one in scores}
    present = {name: {score["subject"] for score in scores if score["model"] == name} for name in MODELS.values()}
    return Run(
        folder,
        scores,
        notes={name: _note(by_subject) for name, by_subject in records.items() if present[name]},
        not_scored={
            name: missing
            for key, name in MODELS.items()
            if (folder / key).is_dir() and (missing := sorted(expected - present[name]))
        },
        datalist=datalist,
        tuning=_read_optional(folder / "ensemble" / "tuning.json"),
    )


def read_scores(scores_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the scores of all subjects that an evaluation has left in a folder.

    Raises:
        ValueError: a record is not what it should be; says which.
    """
    return [record["scores"] for record in _records(Path(scores_dir)).values() if "scores" in record]


def _records(scores_dir: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: _read(path) for path in sorted(scores_dir.glob("*/record.json"))}


def _note(records: Mapping[str, Mapping[str, Any]]) -> str:
    notes = dict.fromkeys(str(record["weights"]) for record in records.values() if record.get("weights"))
    return "; ".join(notes)


def _read_optional(path: Path) -> dict[str, Any]:
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and run `comnet crossval` again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: delete it and run `comnet crossval` again")
    return content
