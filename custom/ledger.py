"""What was done with each subject of a batch: resuming, the tables, the report and the exit code of a segmentation."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events

from . import __version__
from .checkpoints import CheckpointError, read_checkpoint
from .cohort import PALETTES
from .comnet import NUM_FOLDS, weight_files
from .files import file_sha256, write_text
from .report import region_volumes, write_qc_picture, write_segment_report, write_volumes_csv

logger = logging.getLogger("comnet")

EXIT_OK = 0
EXIT_SOME_FAILED = 3
EXIT_NONE_SEGMENTED = 4
RECORD_NAME = "record.json"


class OutputError(OSError):
    """The output folder cannot be used; the message names it and says what to do."""


class Ledger:
    """Ignite handler and bookkeeper of one output folder.

    For each subject the folder holds ``<subject>/<subject>_seg.nii.gz``, a QC picture and ``record.json``; the record
    is written last, so a subject counts as done only when everything of it is there. A subject is done again when its
    files, the weights or the settings have changed. ``volumes.csv`` and ``report.html`` are made anew from the records
    at the end of every run.

    Args:
        output_dir: folder of all outputs; made if absent.
        settings: what the result depends on beside input and weights.
        weights: folder of an ensemble's weights, or one checkpoint.
        cohort: its ``exclusions`` are reported with the failures.
        pictures: whether to draw the QC pictures and the report.
    """

    def __init__(
        self,
        output_dir: str,
        settings: Mapping[str, Any],
        weights: str,
        cohort: Any = None,
        pictures: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.settings = dict(settings)
        self.weights = Path(weights)
        self.cohort = cohort
        self.pictures = pictures
        self.records: dict[str, dict[str, Any]] = {}
        self.items: dict[str, Mapping[str, Any]] = {}
        self._started = time.perf_counter()

    def pending(self, items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the subjects that still need work, in order.

        Args:
            items: dicts with ``subject`` and ``image`` (paths in modality order).

        Raises:
            OutputError: the output folder cannot be made or written.
            CheckpointError: there are no weights.
        """
        _ensure_writable(self.output_dir)
        self.weights_facts = describe_weights(self.weights)
        self.items = {str(item["subject"]): item for item in items}
        done = {name: record for name in self.items if (record := self._valid_record(name)) is not None}
        self.records = done
        if done:
            logger.info("%d of %d subjects are done already in %s", len(done), len(items), self.output_dir)
        todo = [item for name, item in self.items.items() if name not in done]
        for item in todo:
            self._path(str(item["subject"]), RECORD_NAME).unlink(missing_ok=True)
        return todo

    def attach(self, engine: Engine) -> None:
        """Keep a record of each subject that ``engine``, a ``SubjectEvaluator``, has finished."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish)

    def close(self) -> None:
        """Write the tables and the report, print a summary, and leave with a code that says how it went.

        Raises:
            SystemExit: with 3 when some subjects failed or were excluded, with 4 when none could be segmented.
        """
        failures = self._failures()
        rows = [self._row(record) for record in self._sorted_records()]
        write_volumes_csv(self.output_dir / "volumes.csv", rows)
        if self.pictures:
            self._write_report(rows, failures)
        done = sum(row["status"] == "done" for row in rows)
        logger.info("%d subjects segmented, %d failed or excluded; results in %s", done, len(failures), self.output_dir)
        for failure in failures:
            logger.error("not segmented: %s: %s", failure["subject"], failure["reason"])
        if failures or not done:
            raise SystemExit(EXIT_SOME_FAILED if done else EXIT_NONE_SEGMENTED)

    def _start(self, engine: Engine) -> None:
        self._started = time.perf_counter()

    def _finish(self, engine: Engine) -> None:
        name = str(engine.state.subject)
        record = {"subject": name, "comnet_version": __version__, "weights": self.weights_facts["note"]}
        if engine.state.failure is None:
            try:
                record |= self._success(name, engine.state.output[0]["pred"])
            except Exception as error:
                engine.state.failure = f"{type(error).__name__}: {error}"
                logger.error("subject %s: %s", name, engine.state.failure)
        if engine.state.failure is not None:
            self._path(name, f"{name}_seg.nii.gz").unlink(missing_ok=True)
            record |= {"status": "failed", "reason": engine.state.failure}
        self.records[name] = record | {"seconds": round(time.perf_counter() - self._started, 2)}
        if record["status"] == "done":
            write_text(self._path(name, RECORD_NAME), json.dumps(self.records[name], indent=2))

    def _success(self, name: str, label_map: Any) -> dict[str, Any]:
        voxel_volume = float(abs(np.linalg.det(np.asarray(label_map.affine)[:3, :3])))
        labels = np.asarray(label_map[0].cpu())
        volumes = region_volumes(_to_output_palette(labels, self.settings["output_palette"]), voxel_volume)
        warnings = list(self.items.get(name, {}).get("warnings", []))
        if not volumes["WT"]:
            warnings.append("no tumour found")
        if self.pictures:
            self._draw(name, warnings)
        return {"status": "done", "key": self._key(name), "volumes_ml": volumes, "warnings": warnings}

    def _draw(self, name: str, warnings: list[str]) -> None:
        try:
            write_qc_picture(
                self._path(name, f"{name}_qc.png"),
                self._image_paths(name),
                self._path(name, f"{name}_seg.nii.gz"),
                title=name,
                weights_note=self.weights_facts["note"],
                palette=self.settings["output_palette"],
            )
        except Exception as error:
            logger.warning("subject %s: no picture: %s", name, error)
            warnings.append(f"no picture: {error}")

    def _image_paths(self, name: str) -> list[str]:
        image = self.items[name]["image"]
        return [image] if isinstance(image, str) else list(image)

    def _valid_record(self, name: str) -> dict[str, Any] | None:
        try:
            record = json.loads(self._path(name, RECORD_NAME).read_text())
        except (OSError, ValueError):
            return None
        whole = self._path(name, f"{name}_seg.nii.gz").is_file()
        return record if whole and record.get("key") == self._key(name) else None

    def _key(self, name: str) -> str:
        files = [
            (os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns)
            for path in self._image_paths(name)
        ]
        content = json.dumps([__version__, files, self.settings, self.weights_facts["sha256"]], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def _failures(self) -> list[dict[str, str]]:
        excluded = [
            {"subject": one.subject, "file": str(one.file or ""), "reason": one.reason, "remedy": one.remedy}
            for one in (getattr(self.cohort, "exclusions", None) or [])
        ]
        failed = [
            {"subject": record["subject"], "file": "", "reason": record["reason"], "remedy": "see the log"}
            for record in self._sorted_records()
            if record["status"] == "failed"
        ]
        return excluded + failed

    def _sorted_records(self) -> list[dict[str, Any]]:
        return [self.records[name] for name in sorted(self.records)]

    def _row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        volumes = record.get("volumes_ml", {})
        return {
            "subject": record["subject"],
            **{f"{region.lower()}_ml": volumes.get(region) for region in ("ET", "TC", "WT")},
            "status": record["status"],
            "seconds": record["seconds"],
            "warnings": "; ".join(record.get("warnings", []) or [record.get("reason", "")]),
            "weights": record["weights"],
        }

    def _write_report(self, rows: list[dict[str, Any]], failures: list[dict[str, str]]) -> None:
        pictures = {row["subject"]: self._path(row["subject"], f"{row['subject']}_qc.png") for row in rows}
        existing = {name: path for name, path in pictures.items() if path.is_file()}
        settings = self.settings | {"weights": str(self.weights), "weights_note": self.weights_facts["note"]}
        write_segment_report(self.output_dir / "report.html", rows, failures, existing, settings)

    def _path(self, subject: str, name: str) -> Path:
        return self.output_dir / subject / name


def describe_weights(weights: str | Path) -> dict[str, Any]:
    """Say what a set of weights is.

    Args:
        weights: folder of an ensemble's weights, or one checkpoint.

    Returns:
        ``files``, ``sha256`` over all of them, ``note`` (what the weights say of themselves), ``backbone``, ``spacing``
        and ``trained_on`` (names of all training subjects), the last three from the checkpoints' provenance.

    Raises:
        CheckpointError: no weights, or unreadable ones.
    """
    weights = Path(weights)
    if not weights.exists():
        raise CheckpointError(f"no weights at {weights}: train first, run `comnet demo`, or name another place")
    files = weight_files(weights, _expected_folds(weights)) if weights.is_dir() else [weights]
    facts = [read_checkpoint(path)[1] for path in files]
    digest = hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()
    notes = sorted({fact["notes"] for fact in facts if fact.get("notes")})
    return {
        "files": files,
        "sha256": digest,
        "note": "; ".join(notes) or f"weights {digest[:12]}",
        "backbone": next((fact["backbone"] for fact in facts if "backbone" in fact), None),
        "spacing": next((fact["spacing"] for fact in facts if "spacing" in fact), None),
        "num_folds": next((fact["num_folds"] for fact in facts if "num_folds" in fact), len(files)),
        "trained_on": sorted({name for fact in facts for name in fact.get("trained_on", [])}),
    }


def _expected_folds(weights_dir: Path) -> int:
    first = next(iter(sorted(weights_dir.glob("fold*/model.pt"))), None)
    return read_checkpoint(first)[1].get("num_folds", NUM_FOLDS) if first else NUM_FOLDS


def _to_output_palette(labels: np.ndarray, palette: str) -> np.ndarray:
    values, output = PALETTES[palette], PALETTES["brats2023"]
    return np.select([labels == values[name] for name in output], list(output.values()), 0).astype(np.uint8)


def _ensure_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to output folder {folder} ({error.strerror}): choose another --output_dir or mend its permissions"
        ) from error
