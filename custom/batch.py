"""A batch of subjects: who is to be done, what came of each, and what is kept on disk: tables, pictures, exit code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events

from . import __version__
from .cohort import MODALITIES, SubjectError
from .cohort.checks import read_mask
from .files import BATCH_MARK, PARTIAL, UserError, is_batch, lock_folder, make_folder, write_table, write_text
from .inference import SUBJECT_KEY, told_warnings, volumes_ml
from .inference.writer import is_ours
from .transforms import check_spacing, label_map_to_regions
from .weights import CheckpointError, Weights

logger = logging.getLogger("comnet")

EXIT_SOME_FAILED = 3
EXIT_NONE_SEGMENTED = 4
VOLUME_COLUMNS = ("subject", "et_ml", "tc_ml", "wt_ml", "missing", "status", "seconds", "warnings", "weights")
RECORD_NAME = "record.json"
IMAGES = ("seg.nii.gz", "prob.nii.gz", "uncertainty.nii.gz")
PICTURE = "qc.png"
OF_RAW = (*(f"seg_{modality}.nii.gz" for modality in MODALITIES), "seg.dcm", "scanned.png")
"""What `comnet segment --raw` makes of a result: see `custom.clinical.masks.deliver`."""
TABLES = ("volumes.csv", "scores.csv", "summary.csv", "report.html", "scores.html")
Item = Mapping[str, Any]
Record = dict[str, Any]


class Records:
    """The output folder of a batch, made if absent.

    For each subject it holds ``<subject>/<subject>_seg.nii.gz``, a QC picture and ``record.json``, which is written
    last: a subject counts as done only when everything of it is there. ``weights.txt`` marks the folder as a batch's.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)

    def claim(self) -> None:
        """Make the folder and keep other processes out of it; what a killed one has left half written goes.

        Raises:
            UserError: tables of someone else are there, or another process is writing here.
            FileError: the folder cannot be made.
        """
        if not is_batch(self.output_dir):
            foreign = next((name for name in (BATCH_MARK, *TABLES) if (self.output_dir / name).exists()), None)
            if foreign:
                raise UserError(f"{self.output_dir / foreign} is not CoMNeT's: choose another output_dir")
        make_folder(self.output_dir)
        lock_folder(self.output_dir)
        left = [*self.output_dir.glob(f"{PARTIAL}*"), *self.output_dir.glob(f"*/{PARTIAL}*")]
        for path in filter(Path.is_file, left):
            path.unlink()

    def mark(self, note: str) -> None:
        """Mark the folder as a batch's, with what the weights say."""
        write_text(self.output_dir / BATCH_MARK, note)

    def protect(self, items: Iterable[Item]) -> None:
        """Make sure that no result falls onto what is not this batch's: before any subject is computed.

        Raises:
            UserError: a result would lie among the images, replace a file that is not ours, or a result of other files.
        """
        for item in items:
            name = str(item["subject"])
            if name in ("", ".", "..") or name != os.path.basename(name):
                raise UserError(f"{name!r} cannot be the name of a subject: it names no folder of its own")
            own, folders = self.path(name), {Path(os.path.abspath(path)).parent for path in input_files(item) if path}
            places = [place for place in (own, self.output_dir) if place.exists()]
            if any(folder.exists() and folder.samefile(place) for folder in folders for place in places):
                raise UserError(f"{name}: results would lie among its images: choose another output_dir")
            foreign = next((path for path, ours in self._found(name) if not ours), None)
            if foreign:
                raise UserError(f"{foreign} is not CoMNeT's and would be replaced: choose another output_dir")
            earlier = (self.read(name) or {}).get("files")
            if earlier and _other_subject(earlier, stamps(item)):
                raise UserError(
                    f"{self.path(name)} holds the results of another {name}, from {earlier[0][0]}: give this subject "
                    "another name (--name), or choose another output_dir"
                )

    def path(self, subject: str, name: str = "") -> Path:
        """Path of a subject's file, or of its folder."""
        return self.output_dir / subject / name

    def read(self, subject: str) -> Record | None:
        """Return a subject's record, ``None`` unless it is there whole, and its mask with it."""
        try:
            record = json.loads(self.path(subject, RECORD_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and self.path(subject, f"{subject}_seg.nii.gz").is_file() else None

    def is_whole(self, record: Record) -> bool:
        """Whether all outputs that a record names are there, as they were written or edited since."""
        outputs = record.get("outputs", {})
        return all(_is_whole(self.path(record["subject"], name), size) for name, size in outputs.items())

    def write(self, record: Record) -> None:
        """Write a subject's record, whole or not at all, with the sizes of the outputs that there are."""
        name = record["subject"]
        paths = [self.path(name, f"{name}_{kind}") for kind in (*IMAGES, PICTURE)]
        outputs = {path.name: path.stat().st_size for path in paths if path.is_file()}
        write_text(self.path(name, RECORD_NAME), json.dumps(record | {"outputs": outputs}, indent=2))

    def others(self, subjects: Iterable[str]) -> list[Record]:
        """Records that earlier runs have left of subjects other than these."""
        names = {path.parent.name for path in self.output_dir.glob(f"*/{RECORD_NAME}")} - set(subjects)
        return [record for name in sorted(names) if (record := self.read(name)) is not None and "subject" in record]

    def is_of(self, exclusion: Any) -> bool:
        """Whether what there is of a subject came from where an exclusion lies, or from where nobody knows any more."""
        folders, place = _folders((self.read(exclusion.subject) or {}).get("files", ())), exclusion.file
        return not folders or not os.path.isabs(place) or bool(folders & {place, os.path.dirname(place)})

    def forget(self, subject: str) -> None:
        """Delete what there is of a subject: nothing of an earlier run may be taken for a result of this one."""
        for path, ours in self._found(subject):
            if ours:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something else
            self.path(subject).rmdir()

    def _found(self, subject: str) -> list[tuple[Path, bool]]:
        """What there is by the names of a subject's results, the record first, and whether it is ours.

        Images say so. The rest is ours where an image or a record says that a result of ours is there.
        """
        images = [self.path(subject, f"{subject}_{kind}") for kind in IMAGES]
        rest = [self.path(subject, name) for name in (RECORD_NAME, *(f"{subject}_{k}" for k in (PICTURE, *OF_RAW)))]
        ours = {path: is_ours(path) for path in images if os.path.lexists(path)}
        known = any(ours.values())
        with contextlib.suppress(OSError, ValueError, TypeError):
            known = known or "comnet_version" in json.loads(rest[0].read_text(encoding="utf-8"))
        return [(path, known) for path in rest if os.path.lexists(path)] + list(ours.items())


def _is_whole(path: Path, size: int) -> bool:
    """Whether an output is there as it was written; one of another size that can be read was edited, and stays."""
    if not path.is_file():
        return False
    if path.stat().st_size == size:
        return True
    try:
        return np.asanyarray(nib.load(path).dataobj).size > 0
    except Exception:  # nibabel raises whatever a damaged file provokes
        return False


def input_files(item: Item) -> list[str]:
    """Paths of a subject's images, empty for an absent modality, and of the mask by which it is scored or shown."""
    images = [item["image"]] if isinstance(item["image"], str) else list(item["image"])
    return [*images, *(item[key] for key in ("label", "truth") if item.get(key))]


def stamps(item: Item) -> list[list[Any]]:
    """Path, size and time of each of a subject's files; a file that is not there has neither."""
    found: list[list[Any]] = []
    for path in input_files(item):
        stat = os.stat(path) if os.path.exists(path) else None
        found.append([path and os.path.abspath(path), stat and stat.st_size, stat and stat.st_mtime_ns])
    return found


def _folders(found: Sequence[Sequence[Any]]) -> set[str]:
    """Where the files lie whose `stamps` these are."""
    return {os.path.dirname(file) for file, *_ in found if file}


def _other_subject(earlier: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> bool:
    """Whether files differ in path and in content, as far as size and time tell; moved files are the same subject.

    A modality that is absent before or now says nothing; where no modality was there both times, the folders tell.
    """
    pairs = [(one, other) for one, other in zip(earlier, now, strict=False) if one[0] and other[0]]
    if not pairs:
        return _folders(earlier).isdisjoint(_folders(now))
    return all(one[0] != other[0] and list(one[1:]) != list(other[1:]) for one, other in pairs)


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
        self._note = ""
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
        if "spacing" in self.settings:
            self.weights.refuse_other_spacing(check_spacing(self.settings["spacing"]), self.settings.get("backbone"))
        self._note = f"{self.weights.note}\nsha256 {self.weights.sha256}\n"
        if idist.get_rank() == 0:
            self.folder.claim()

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
            items: dicts with ``subject``, ``image`` (paths in modality order) and, to be scored, ``label``, or, to be
                drawn beside the result only, ``truth``.

        Raises:
            UserError: a result would fall onto something that is not this batch's: see `Records.protect`.
        """
        self.folder.protect(items)
        if self._note and idist.get_rank() == 0:
            self.folder.mark(self._note)
        self.items = {str(item["subject"]): item for item in items}
        for name in self.items:
            record = self.folder.read(name)
            if record is not None and record.get("key") == self._key(name) and self.folder.is_whole(record):
                self.records[name] = record
        if self.records:
            logger.info("%d of %d subjects are done already in %s", len(self.records), len(items), self.output_dir)
        for exclusion in getattr(self.cohort, "exclusions", ()):
            if exclusion.subject not in self.items and self.folder.is_of(exclusion):
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
            from .metrics import PAPER, calibration_columns, score_subject

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
                self._draw(name, record)
            except Exception as error:
                logger.warning("subject %s: no picture: %s", name, error)
                record["warnings"].append(f"no picture: {error}")
        try:
            self.folder.write(record)
        except Exception as error:  # a disk that is full must not stop the others
            logger.error("subject %s: %s", name, error)
            self._fail(name, str(error))

    def _draw(self, name: str, record: Record) -> None:
        try:
            tempfile.gettempdir()
        except FileNotFoundError:  # all is read-only but the output: Matplotlib wants a folder for its list of fonts
            self._fonts = self._fonts or tempfile.TemporaryDirectory(dir=self.output_dir, prefix=".matplotlib-")
            os.environ.setdefault("MPLCONFIGDIR", self._fonts.name)
        from .report import write_qc_picture

        item, palette = self.items[name], self.items[name].get("palette", "brats2021")
        reference = item.get("label") or item.get("truth")
        if item.get("truth"):
            try:
                read_mask(name, item["truth"], palette)
            except SubjectError as error:
                reference = None
                record["warnings"].append(f"the mask beside the images is not drawn: {error.reason}")
        write_qc_picture(
            self.folder.path(name, f"{name}_{PICTURE}"),
            input_files({"image": item["image"]}),
            self.folder.path(name, f"{name}_seg.nii.gz"),
            title=name,
            subtitle=record["missing"] and f"without {record['missing']}",
            weights_note=self.weights.note,
            palette=self.settings["output_palette"],
            reference_path=reference,
            reference_palette=palette,
            warning="; ".join(record["warnings"]),
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
        pictures = {name: self.folder.path(name, f"{name}_{PICTURE}") for name in sorted(self.records)}
        pictures = {name: path for name, path in pictures.items() if path.is_file()}
        if self.pictures:
            from .report import write_segment_report

            settings = self.settings | {"weights": str(self.weights.path), "weights_note": self.weights.note}
            write_segment_report(self.output_dir / "report.html", rows + others, failures, pictures, settings)
        if scores := [record["scores"] for record in records if "scores" in record]:
            from .metrics import summarise

            columns = list(dict.fromkeys(key for row in scores for key in row))
            write_table(self.output_dir / "scores.csv", columns, scores)
            summary = [{"score": name, **figures} for name, figures in summarise(scores).items() if name != "fold"]
            write_table(self.output_dir / "summary.csv", list(summary[0]), summary)
            if self.pictures:
                from .report import write_scores_report

                page = self.output_dir / "scores.html"
                write_scores_report(page, scores, pictures, weights_note=self.weights.note, settings=self.settings)
        done = sum(record["status"] == "done" for record in records)
        logger.info("%d subjects segmented, %d failed or excluded; results in %s", done, len(failures), self.output_dir)
        for failure in failures:
            logger.error("not segmented: %s: %s %s", failure["subject"], failure["file"], failure["reason"])

    def _failures(self) -> list[dict[str, str]]:
        excluded = [asdict(one) for one in getattr(self.cohort, "exclusions", ())]
        failed = [record for record in self.records.values() if record["status"] == "failed"]
        told = [{key: one[key] for key in ("subject", "reason")} for one in failed]
        return excluded + [one | {"file": "", "remedy": ""} for one in told]

    def _key(self, name: str) -> str:
        """Digest of all that the result of a subject depends on."""
        item = self.items[name]
        names = [self.model, self.fold, self.pictures, *([item.get("palette")] if item.get("truth") else [])]
        content = [__version__, stamps(item), names, self.settings, self.weights.sha256]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _volume_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A subject's line of volumes.csv; what is not known stays empty."""
    numbers = {f"{region.lower()}_ml": volume for region, volume in record.get("volumes_ml", {}).items()}
    numbers |= {"seconds": record["seconds"]} if "seconds" in record else {}
    told = [*record.get("warnings", ()), *([record["reason"]] if "reason" in record else [])]
    texts = {key: record.get(key, "") for key in ("subject", "missing", "status", "weights")}
    texts["warnings"] = "; ".join(told)
    return {key: f"{value:.3f}" for key, value in numbers.items()} | texts
