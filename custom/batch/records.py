"""What a batch keeps on disk: a folder a subject, with its record written last; nothing of anyone else's is touched."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import UserError, lock_folder, write_text
from ..inference.writer import is_ours

RECORD_NAME = "record.json"
IMAGES = ("seg.nii.gz", "prob.nii.gz", "uncertainty.nii.gz")
MARK = "weights.txt"
TABLES = ("volumes.csv", "scores.csv", "summary.csv", "report.html", "scores.html")
Item = Mapping[str, Any]
Record = dict[str, Any]


class Records:
    """The output folder of a batch.

    For each subject it holds ``<subject>/<subject>_seg.nii.gz``, a QC picture and ``record.json``, which is written
    last: a subject counts as done only when everything of it is there. ``weights.txt`` marks the folder as a batch's.

    Args:
        output_dir: folder of all outputs; made if absent.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)

    def claim(self, note: str) -> None:
        """Make the folder and mark it as a batch's, with what the weights say; keep other processes out of it.

        Raises:
            UserError: tables of someone else are there, or another process is writing here.
            FileError: the folder cannot be made or written.
        """
        if not self._is_marked():
            foreign = next((name for name in (MARK, *TABLES) if (self.output_dir / name).exists()), None)
            if foreign:
                raise UserError(f"{self.output_dir / foreign} is not CoMNeT's: choose another output_dir")
        write_text(self.output_dir / MARK, note)
        lock_folder(self.output_dir)

    def protect(self, items: Iterable[Item]) -> None:
        """Make sure that no result falls onto what is not this batch's: before any subject is computed.

        Raises:
            UserError: a result would lie among the images, replace a file that is not ours, or a result of other files.
        """
        for item in items:
            name = str(item["subject"])
            if name in ("", ".", "..") or name != os.path.basename(name):
                raise UserError(f"{name!r} cannot be the name of a subject: it names no folder of its own")
            folders = {os.path.dirname(os.path.abspath(path)) for path in input_files(item) if path}
            if any(os.path.exists(folder) and _same(folder, self.output_dir / name) for folder in folders):
                raise UserError(f"{name}: results would lie among its images: choose another output_dir")
            for kind in IMAGES:
                path = self.path(name, f"{name}_{kind}")
                if os.path.lexists(path) and not is_ours(path):
                    raise UserError(f"{path} is not CoMNeT's and would be replaced: choose another output_dir")
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

    def write(self, record: Record) -> None:
        """Write a subject's record, whole or not at all."""
        write_text(self.path(record["subject"], RECORD_NAME), json.dumps(record, indent=2))

    def others(self, subjects: Iterable[str]) -> list[Record]:
        """Records that earlier runs have left of subjects other than these."""
        names = {path.parent.name for path in self.output_dir.glob(f"*/{RECORD_NAME}")} - set(subjects)
        return [record for name in sorted(names) if (record := self.read(name)) is not None and "subject" in record]

    def forget(self, subject: str) -> None:
        """Delete what there is of a subject: nothing of an earlier run may be taken for a result of this one."""
        names = [name for name in (f"{subject}_{kind}" for kind in IMAGES) if is_ours(self.path(subject, name))]
        if self._is_marked() or self.read(subject):
            names += [RECORD_NAME, f"{subject}_qc.png"]
        for name in names:
            self.path(subject, name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something else
            self.path(subject).rmdir()

    def _is_marked(self) -> bool:
        try:
            return "\nsha256 " in (self.output_dir / MARK).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False


def input_files(item: Item) -> list[str]:
    """Paths of a subject's images, empty for an absent modality, and, where it is to be scored, of its label."""
    images = [item["image"]] if isinstance(item["image"], str) else list(item["image"])
    return [*images, *([item["label"]] if item.get("label") else [])]


def stamps(item: Item) -> list[list[Any]]:
    """Path, size and time of each of a subject's files; a file that is not there has neither."""
    found: list[list[Any]] = []
    for path in input_files(item):
        stat = os.stat(path) if os.path.exists(path) else None
        found.append([path and os.path.abspath(path), stat and stat.st_size, stat and stat.st_mtime_ns])
    return found


def _other_subject(earlier: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> bool:
    """Whether files differ in path and in content, as far as size and time tell; moved files are the same subject.

    A modality that is absent before or now says nothing.
    """
    pairs = [(one, other) for one, other in zip(earlier, now, strict=False) if one[0] and other[0]]
    return all(one[0] != other[0] and list(one[1:]) != list(other[1:]) for one, other in pairs)


def _same(folder: str, other: Path) -> bool:
    return other.exists() and os.path.samefile(folder, other)
