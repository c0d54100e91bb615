"""A batch of subjects, from the list of who is to be done to the exit code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events

from .. import __version__
from ..files import write_table
from ..inference import SUBJECT_KEY, told_warnings, volumes_ml
from ..transforms import label_map_to_regions
from ..weights import CheckpointError, Weights
from .records import Item, Record, Records, input_files, stamps

logger = logging.getLogger("comnet")

EXIT_SOME_FAILED = 3
EXIT_NONE_SEGMENTED = 4
VOLUME_COLUMNS = ("subject", "et_ml", "tc_ml", "wt_ml", "missing", "status", "seconds", "warnings", "weights")


class Batch:
    """Ignite handler of a run over many subjects, also for several processes that share them.

    A config names it once and asks it for its items: `inputs`, `held_out` or `unseen`. Attached to a
    `SubjectEvaluator` it keeps a record of each subject, draws its picture while the next one is computed, and `close`
    makes the tables: ``volumes.csv`` and ``report.html``, of labelled subjects also ``scores.csv``, ``summary.csv``
    and ``scores.html``. A subject is done again when its files, the weights or the settings have changed. The
    tables are of this run; what earlier runs have left of other subjects is in ``volumes.csv``, as "earlier run", and
    in a table of its own in ``report.html``.

    Args:
        output_dir: folder of all outputs; made if absent. See `Records`.
        settings: what the result depends on beside input and weights; ``output_palette`` must be among it.
        weights: what segments; or its path: see :class:`custom.weights.Weights`.
        cohort: the dataset; its ``exclusions`` are reported with the failures.
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
        self.folder = Records(output_dir)
        self.settings = dict(settings)
        self.weights = Weights.of(weights)
        self.cohort = cohort
        self.pictures = pictures
        self.model = model
        self.fold = fold
        self.items: dict[str, Item] = {}
        self.records: dict[str, Record] = {}
        self._own: list[str] = []
        self._started = time.perf_counter()
        self._pool = ThreadPoolExecutor(1, "pictures")
        self._drawing: Future[None] | None = None
        self._fonts: tempfile.TemporaryDirectory[str] | None = None

    def inputs(self) -> list[Item]:
        """Return the subjects of the dataset that are to be segmented: see `begin`."""
        self._claim()
        return self.begin(self.cohort.inputs())

    def held_out(self, fold: int) -> list[Item]:
        """Return the subjects of a fold that are to be segmented and scored: see `begin` and `untrained`."""
        self._claim()
        return self.begin(self.untrained(self.cohort.validation(fold)))

    def unseen(self) -> list[Item]:
        """Return all subjects with a label that no part of the weights was trained on: see `begin` and `untrained`."""
        self._claim()
        return self.begin(self.untrained(self.cohort.subjects()))

    def _claim(self) -> None:
        """Make sure of weights and output folder before the dataset is looked at."""
        note = f"{self.weights.note}\nsha256 {self.weights.sha256}\n"
        if idist.get_rank() == 0:
            self.folder.claim(note)

    def untrained(self, items: Sequence[Item]) -> list[Item]:
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

    def begin(self, items: Sequence[Item]) -> list[Item]:
        """Return the subjects that still need work, in order; of several processes, each gets its share.

        MONAI's DistributedSampler refuses fewer subjects than processes, as when a stopped run goes on.

        Args:
            items: dicts with ``subject``, ``image`` (paths in modality order) and, to be scored, ``label``.

        Raises:
            UserError: a result would fall onto something that is not this batch's: see `Records.protect`.
        """
        self.folder.protect(items)
        self.items = {str(item["subject"]): item for item in items}
        for name in self.items:
            record = self.folder.read(name)
            if record is not None and record.get("key") == self._key(name):
                self.records[name] = record
        if self.records:
            logger.info("%d of %d subjects are done already in %s", len(self.records), len(items), self.output_dir)
        for exclusion in getattr(self.cohort, "exclusions", ()):
            if exclusion.subject not in self.items:
                self.folder.forget(exclusion.subject)
        todo = [item for name, item in self.items.items() if name not in self.records]
        idist.barrier()  # several processes must agree on who is left before the first of them begins
        own = todo[idist.get_rank() :: idist.get_world_size()]
        self._own = [str(item["subject"]) for item in own]
        return [dict(item) for item in own]

    def attach(self, engine: Engine) -> None:
        """Keep a record of each subject that ``engine``, a ``SubjectEvaluator``, has finished."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish)
        engine.add_event_handler(Events.COMPLETED, lambda _: self._wait())

    def _start(self, engine: Engine) -> None:
        self._started = time.perf_counter()
        name = engine.state.batch.get(SUBJECT_KEY)
        self.folder.forget(str(name if name is None or isinstance(name, str) else name[0]))

    def _finish(self, engine: Engine) -> None:
        name, failure = str(engine.state.subject), engine.state.failure
        if failure is None:
            try:
                record = self._success(name, engine.state.output[0], engine.state.warnings)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                logger.exception("subject %s: %s", name, failure)
        if failure is not None:
            self._fail(name, failure)
            return
        self.records[name] = record
        self._wait()
        self._drawing = self._pool.submit(self._draw_and_record, name)  # the next subject is computed meanwhile

    def _success(self, name: str, output: Mapping[str, Any], warnings: list[str]) -> Record:
        if name not in self.items:  # a dataset that was given from outside, as servers do
            self.items[name] = {"subject": name, "image": output["image"].meta["filename_or_obj"]}
        label_map, palette = output["pred"], self.settings["output_palette"]
        spacing = np.asarray(label_map.pixdim, dtype=float)
        volumes = volumes_ml(label_map, palette)
        record = self._record(name, "done", [*warnings, *told_warnings(output.get("erased", ()), volumes)])
        record |= {"key": self._key(name), "files": stamps(self.items[name]), "volumes_ml": volumes}
        record["missing"] = output["image"].meta["missing"] if "image" in output else ""
        if output.get("label") is not None:
            from ..metrics import PAPER, calibration_columns, score_subject

            scores = score_subject(label_map_to_regions(label_map.cpu(), palette), output["label"].cpu(), spacing)
            scores |= calibration_columns(output)
            names = {"model": self.model, "fold": self.fold, "subject": name}
            record["scores"] = names | {"selection": self.weights.facts.get("selection", PAPER)} | scores
        return record

    def _fail(self, name: str, reason: str) -> None:
        """Record a failure; no result of the subject is left, neither of this run nor of an earlier one."""
        self.folder.forget(name)
        self.records[name] = self._record(name, "failed", []) | {"reason": reason.removeprefix(f"{name}: ")}

    def _record(self, name: str, status: str, warnings: list[str]) -> Record:
        seconds = round(time.perf_counter() - self._started, 2)
        about = {"comnet_version": __version__, "weights": self.weights.note, "seconds": seconds}
        return {"subject": name, "status": status, "warnings": warnings, **about}

    def _wait(self) -> None:
        """Wait for the last subject's picture and record."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing.result()

    def _draw_and_record(self, name: str) -> None:
        record = self.records[name]
        if self.pictures:
            try:
                self._draw(name, record["warnings"], record["missing"])
            except Exception as error:
                logger.warning("subject %s: no picture: %s", name, error)
                record["warnings"].append(f"no picture: {error}")
        try:
            self.folder.write(record)
        except Exception as error:  # a disk that is full must not stop the others
            logger.error("subject %s: %s", name, error)
            self._fail(name, str(error))

    def _draw(self, name: str, warnings: Sequence[str], missing: str) -> None:
        try:
            tempfile.gettempdir()
        except FileNotFoundError:  # all is read-only but the output: Matplotlib wants a folder for its list of fonts
            self._fonts = self._fonts or tempfile.TemporaryDirectory(dir=self.output_dir, prefix=".matplotlib-")
            os.environ.setdefault("MPLCONFIGDIR", self._fonts.name)
        from ..report import write_qc_picture

        item = self.items[name]
        write_qc_picture(
            self.folder.path(name, f"{name}_qc.png"),
            input_files({**item, "label": None}),
            self.folder.path(name, f"{name}_seg.nii.gz"),
            title=name,
            subtitle=missing and f"without {missing}",
            weights_note=self.weights.note,
            palette=self.settings["output_palette"],
            reference_path=item.get("label"),
            reference_palette=item.get("palette", "brats2021"),
            warning="; ".join(warnings),
        )

    def close(self) -> None:
        """Write the tables and the reports, then leave with a code that says how it went: see `write` and `leave`."""
        self.write()
        self.leave()

    def write(self) -> None:
        """Write the tables and the reports, and log a summary; of several processes the first does, at the end."""
        self._wait()
        self._pool.shutdown()
        for name in self._own:
            if name not in self.records:
                self._fail(name, "the run ended before its turn: run the same command again")
        if idist.get_world_size() > 1:
            for part in idist.all_gather(json.dumps(self.records)):
                self.records |= json.loads(part)
        if idist.get_rank() == 0:
            self._write_tables([self.records[name] for name in sorted(self.records)])
        idist.barrier()  # whoever leaves with a code has torchrun end the others

    def leave(self) -> None:
        """End the process unless all went well.

        Raises:
            SystemExit: with 3 when some subjects failed or were excluded, with 4 when none could be segmented.
        """
        done = any(record["status"] == "done" for record in self.records.values())
        if self._failures() or not done:
            raise SystemExit(EXIT_SOME_FAILED if done else EXIT_NONE_SEGMENTED)

    def _write_tables(self, records: Sequence[Record]) -> None:
        failures = self._failures()
        rows = [_volume_row(record) for record in records]
        others = [_volume_row(record | {"status": "earlier run"}) for record in self.folder.others(self.records)]
        write_table(self.output_dir / "volumes.csv", VOLUME_COLUMNS, rows + others)
        pictures = {name: self.folder.path(name, f"{name}_qc.png") for name in sorted(self.records)}
        pictures = {name: path for name, path in pictures.items() if path.is_file()}
        if self.pictures:
            from ..report import write_segment_report

            settings = self.settings | {"weights": str(self.weights.path), "weights_note": self.weights.note}
            write_segment_report(self.output_dir / "report.html", rows + others, failures, pictures, settings)
        if scores := [record["scores"] for record in records if "scores" in record]:
            from ..metrics import summarise

            columns = list(dict.fromkeys(key for row in scores for key in row))
            write_table(self.output_dir / "scores.csv", columns, scores)
            summary = [{"score": name, **figures} for name, figures in summarise(scores).items() if name != "fold"]
            write_table(self.output_dir / "summary.csv", list(summary[0]), summary)
            if self.pictures:
                from ..report import write_scores_report

                page = self.output_dir / "scores.html"
                write_scores_report(page, scores, pictures, weights_note=self.weights.note, settings=self.settings)
        done = sum(record["status"] == "done" for record in records)
        logger.info("%d subjects segmented, %d failed or excluded; results in %s", done, len(failures), self.output_dir)
        for failure in failures:
            logger.error("not segmented: %s: %s %s", failure["subject"], failure["file"], failure["reason"])

    def _failures(self) -> list[dict[str, str]]:
        excluded = [
            {"subject": one.subject, "file": str(one.file or ""), "reason": one.reason, "remedy": one.remedy}
            for one in getattr(self.cohort, "exclusions", ())
        ]
        failed = [record for record in self.records.values() if record["status"] == "failed"]
        return excluded + [
            {"subject": record["subject"], "file": "", "reason": record["reason"], "remedy": ""} for record in failed
        ]

    def _key(self, name: str) -> str:
        """Digest of all that the result of a subject depends on."""
        names = [self.model, self.fold, self.pictures]
        content = [__version__, stamps(self.items[name]), names, self.settings, self.weights.sha256]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _volume_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A subject's line of volumes.csv; what is not known stays empty."""
    numbers = {f"{region.lower()}_ml": volume for region, volume in record.get("volumes_ml", {}).items()}
    numbers |= {"seconds": record["seconds"]} if "seconds" in record else {}
    told = [*record.get("warnings", ()), *([record["reason"]] if "reason" in record else [])]
    texts = {key: record.get(key, "") for key in ("subject", "missing", "status", "weights")}
    texts["warnings"] = "; ".join(told)
    return {key: f"{value:.3f}" for key, value in numbers.items()} | texts
