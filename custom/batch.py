"""What was done with each subject of a batch: resuming, tables, reports and exit code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events

from . import __version__
from .cohort import REGIONS
from .files import write_table, write_text
from .metrics import calibration_columns, score_subject, summarise
from .report import region_volumes, write_qc_picture, write_scores_report, write_segment_report, write_volumes_csv
from .transforms import label_map_to_regions
from .weights import CheckpointError, Weights

logger = logging.getLogger("comnet")

EXIT_SOME_FAILED = 3
EXIT_NONE_SEGMENTED = 4
RECORD_NAME = "record.json"
Item = Mapping[str, Any]


class Ledger:
    """Ignite handler and bookkeeper of one output folder, also for several processes that share its subjects.

    For each subject the folder holds ``<subject>/<subject>_seg.nii.gz``, a QC picture and ``record.json``; the record
    is written last, so a subject counts as done only when everything of it is there. A subject is done again when its
    files, the weights or the settings have changed. ``volumes.csv`` and ``report.html``, and for labelled subjects
    ``scores.csv``, ``summary.csv`` and ``scores.html``, are made anew from the records at the end of every run; results
    that earlier runs have left in the folder stay in them.

    Args:
        output_dir: folder of all outputs; made if absent.
        settings: what the result depends on beside input and weights; ``output_palette`` must be among it.
        weights: what segments; or its path: see :class:`custom.weights.Weights`.
        cohort: its ``exclusions`` are reported with the failures.
        pictures: whether to draw the QC pictures and the reports.
        model: name of the model in tables of scores.
        fold: fold in tables of scores.
    """

    def __init__(
        self,
        output_dir: str,
        settings: Mapping[str, Any],
        weights: Weights | str,
        cohort: Any = None,
        pictures: bool = True,
        model: str = "CoMNeT",
        fold: int | str = "ensemble",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.settings = dict(settings)
        self.weights = Weights.of(weights)
        self.cohort = cohort
        self.pictures = pictures
        self.model = model
        self.fold = fold
        self.records: dict[str, dict[str, Any]] = {}
        self.items: dict[str, Item] = {}
        self._started = time.perf_counter()
        self._pool = ThreadPoolExecutor(1, "pictures")
        self._drawing: Future[None] | None = None

    def open(self) -> Ledger:
        """Make sure of weights and output folder, before any subject is read; return the ledger.

        Raises:
            OSError: the output folder cannot be made or written.
            CheckpointError: there are no weights, or they do not belong together.
        """
        write_text(self.output_dir / "weights.txt", f"{self.weights.note}\nsha256 {self.weights.sha256}\n")
        return self

    def pending(self, items: Sequence[Item]) -> list[Item]:
        """Return the subjects that still need work, in order; of several processes, each gets its share.

        MONAI's DistributedSampler refuses fewer subjects than processes, as when a stopped run goes on.

        Args:
            items: dicts with ``subject``, ``image`` (paths in modality order) and, to be scored, ``label``.
        """
        self.items = {str(item["subject"]): item for item in items}
        self.records = {name: record for name in self.items if (record := self._valid_record(name)) is not None}
        if self.records:
            logger.info("%d of %d subjects are done already in %s", len(self.records), len(items), self.output_dir)
        todo = [item for name, item in self.items.items() if name not in self.records]
        for item in todo:
            self._path(str(item["subject"]), RECORD_NAME).unlink(missing_ok=True)
        idist.barrier()  # several processes must agree on who is left before the first of them begins
        own = todo[idist.get_rank() :: idist.get_world_size()]
        return [dict(item) for item in own]

    def unseen(self, items: Sequence[Item]) -> list[Item]:
        """Return the subjects that none of the weights was trained on: the others would be scored too well.

        Raises:
            CheckpointError: the weights have seen every subject.
        """
        unseen = [item for item in items if item["subject"] not in self.weights.trained_on]
        if len(unseen) < len(items):
            logger.warning("%d subjects were trained on and are not scored", len(items) - len(unseen))
        if items and not unseen:
            raise CheckpointError(
                f"the weights in {self.weights.path} were trained on every one of these {len(items)} subjects: score "
                "each by its own held-out fold, or give subjects that no fold has seen"
            )
        return unseen

    def attach(self, engine: Engine) -> None:
        """Keep a record of each subject that ``engine``, a ``SubjectEvaluator``, has finished."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish)
        engine.add_event_handler(Events.COMPLETED, lambda _: self._wait())

    def close(self) -> None:
        """Write the tables and the reports, log a summary, and leave with a code that says how it went.

        Of several processes the first writes, once all are done.

        Raises:
            SystemExit: with 3 when some subjects failed or were excluded, with 4 when none could be segmented.
        """
        self._wait()
        self._pool.shutdown()
        parts = idist.all_gather(json.dumps(self.records)) if idist.get_world_size() > 1 else []
        if idist.get_rank() != 0:
            return
        self.records = self._earlier_records() | self.records
        for part in parts:
            self.records |= json.loads(part)
        records = [self.records[name] for name in sorted(self.records)]
        failures = self._failures(records)
        rows = [_volume_row(record) for record in records]
        write_volumes_csv(self.output_dir / "volumes.csv", rows)
        scores = [record["scores"] for record in records if "scores" in record]
        if scores:
            self._write_scores(scores)
        if self.pictures:
            settings = self.settings | {"weights": str(self.weights.path), "weights_note": self.weights.note}
            write_segment_report(self.output_dir / "report.html", rows, failures, self._pictures(), settings)
        done = sum(record["status"] == "done" for record in records if record["subject"] in self.items)
        logger.info("%d subjects segmented, %d failed or excluded; results in %s", done, len(failures), self.output_dir)
        for failure in failures:
            logger.error("not segmented: %s: %s %s", failure["subject"], failure["file"], failure["reason"])
        if failures or not done:
            raise SystemExit(EXIT_SOME_FAILED if done else EXIT_NONE_SEGMENTED)

    def _start(self, engine: Engine) -> None:
        self._started = time.perf_counter()

    def _finish(self, engine: Engine) -> None:
        name = str(engine.state.subject)
        record: dict[str, Any] = {"subject": name, "comnet_version": __version__, "weights": self.weights.note}
        failure = engine.state.failure
        if failure is None:
            try:
                record |= self._success(name, engine.state.output[0])
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                logger.error("subject %s: %s", name, failure)
        if failure is not None:
            self._path(name, f"{name}_seg.nii.gz").unlink(missing_ok=True)
            record |= {"status": "failed", "reason": failure}
        self.records[name] = record | {"seconds": round(time.perf_counter() - self._started, 2)}
        if failure is None:  # the next subject is computed meanwhile
            self._wait()
            self._drawing = self._pool.submit(self._draw_and_record, name)

    def _wait(self) -> None:
        """Wait for the last subject's picture and record, and raise what went wrong there."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing.result()

    def _draw_and_record(self, name: str) -> None:
        record = self.records[name]
        if self.pictures:
            self._draw(name, record["warnings"])
        write_text(self._path(name, RECORD_NAME), json.dumps(record, indent=2))

    def _success(self, name: str, output: Mapping[str, Any]) -> dict[str, Any]:
        if name not in self.items:  # a dataset that was given from outside, as servers do
            self.items[name] = {"subject": name, "image": output["image"].meta["filename_or_obj"]}
        label_map, palette = output["pred"], self.settings["output_palette"]
        spacing = np.asarray(label_map.pixdim, dtype=float)
        volumes = region_volumes(np.asarray(label_map[0].cpu()), float(np.prod(spacing)), palette)
        warnings = [*(output.get("warnings") or []), *([] if volumes["WT"] else ["no tumour found"])]
        record = {"status": "done", "key": self._key(name), "volumes_ml": volumes, "warnings": warnings}
        if output.get("label") is not None:
            scores = score_subject(label_map_to_regions(label_map.cpu(), palette), output["label"].cpu(), spacing)
            scores |= calibration_columns(output)
            record["scores"] = {"model": self.model, "fold": self.fold, "subject": name, **scores}
        return record

    def _draw(self, name: str, warnings: list[str]) -> None:
        item = self.items[name]
        try:
            write_qc_picture(
                self._path(name, f"{name}_qc.png"),
                _image_paths(item),
                self._path(name, f"{name}_seg.nii.gz"),
                title=name,
                weights_note=self.weights.note,
                palette=self.settings["output_palette"],
                reference_path=item.get("label"),
                reference_palette=item.get("palette", "brats2021"),
            )
        except Exception as error:
            logger.warning("subject %s: no picture: %s", name, error)
            warnings.append(f"no picture: {error}")

    def _pictures(self) -> dict[str, Path]:
        paths = {name: self._path(name, f"{name}_qc.png") for name in sorted(self.records)}
        return {name: path for name, path in paths.items() if path.is_file() and self.records[name]["status"] == "done"}

    def _write_scores(self, scores: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for row in scores for column in row))
        write_table(self.output_dir / "scores.csv", columns, scores)
        summary = [{"score": name, **figures} for name, figures in summarise(scores).items() if name != "fold"]
        write_table(self.output_dir / "summary.csv", list(summary[0]), summary)
        if self.pictures:
            page = self.output_dir / "scores.html"
            write_scores_report(page, scores, self._pictures(), weights_note=self.weights.note, settings=self.settings)

    def _valid_record(self, name: str) -> dict[str, Any] | None:
        record = self._read_record(name)
        return record if record is not None and record.get("key") == self._key(name) else None

    def _earlier_records(self) -> dict[str, dict[str, Any]]:
        """Records of other subjects that earlier runs have left whole in this folder."""
        names = [path.parent.name for path in self.output_dir.glob(f"*/{RECORD_NAME}")]
        found = {name: self._read_record(name) for name in names}
        return {name: record for name, record in found.items() if record is not None}

    def _read_record(self, name: str) -> dict[str, Any] | None:
        try:
            record = json.loads(self._path(name, RECORD_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if self._path(name, f"{name}_seg.nii.gz").is_file() else None

    def _key(self, name: str) -> str:
        """Digest of all that the result of a subject depends on."""
        item = self.items[name]
        paths = [*_image_paths(item), *([item["label"]] if item.get("label") else [])]
        files = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
        names = [self.model, self.fold, self.pictures]
        content = json.dumps([__version__, files, names, self.settings, self.weights.sha256], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def _failures(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        excluded = [
            {"subject": one.subject, "file": str(one.file or ""), "reason": one.reason, "remedy": one.remedy}
            for one in getattr(self.cohort, "exclusions", ())
        ]
        failed = [
            {"subject": record["subject"], "file": "", "reason": record["reason"], "remedy": ""}
            for record in records
            if record["status"] == "failed"
        ]
        return excluded + failed

    def _path(self, subject: str, name: str) -> Path:
        return self.output_dir / subject / name


def _image_paths(item: Item) -> list[str]:
    return [item["image"]] if isinstance(item["image"], str) else list(item["image"])


def _volume_row(record: Mapping[str, Any]) -> dict[str, Any]:
    volumes = record.get("volumes_ml", {})
    return {
        "subject": record["subject"],
        **{f"{region.lower()}_ml": volumes.get(region) for region in REGIONS},
        "status": record["status"],
        "seconds": record["seconds"],
        "warnings": record.get("warnings") or [record[key] for key in ("reason",) if key in record],
        "weights": record["weights"],
    }
