"""The subjects of a cross-validation: its own copy of the datalist, which remembers where the dataset is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import FileError, UserError


@dataclass(frozen=True)
class Subjects:
    """Who is cross-validated.

    Attributes:
        datalist_file: the copy in the run's folder.
        dataset_dir: folder of the dataset.
        num_folds: how many folds they were dealt into.
        folds: fold of each subject, by name.
        digest: SHA-256 over subjects, folds, and sizes of their files; where the files lie does not matter.
    """

    datalist_file: Path
    dataset_dir: Path
    num_folds: int
    folds: dict[str, int]
    digest: str


def prepare_subjects(
    datalist_file: str | Path,
    run_dir: str | Path,
    dataset_dir: str | Path | None = None,
    num_folds: int | None = None,
) -> Subjects:
    """Copy the datalist to ``<run_dir>/datalist.json`` and make sure that it can be cross-validated.

    Args:
        datalist_file: as `comnet validate` writes it; it may be the copy itself.
        run_dir: folder of the cross-validation.
        dataset_dir: where the dataset is, by default what the datalist remembers.
        num_folds: how many folds are expected, by default as many as the datalist has.

    Raises:
        ValueError: the datalist is none, has other folds, or is another than the one that the folder was made for.
        OSError: a file is absent or cannot be written.
    """
    from ..cohort import load_datalist
    from ..cohort.datalist import copy_datalist

    source, copy = Path(datalist_file), Path(run_dir) / "datalist.json"
    if not source.is_file():
        raise FileError(f"{source} does not exist: give a datalist as `comnet validate` writes it, or a dataset folder")
    _refuse_others(source, copy)
    dataset = copy_datalist(source, copy, dataset_dir)
    datalist = load_datalist(copy, dataset)
    folds = {item["subject"]: item["fold"] for item in datalist["training"]}
    count = _check_folds(folds, datalist.get("num_folds"), num_folds, source)
    return Subjects(copy, dataset, count, folds, _digest(datalist["training"], dataset))


def _refuse_others(source: Path, copy: Path) -> None:
    if copy.is_file() and _items(copy) != _items(source):
        raise UserError(
            f"{copy.parent} was made for other subjects or folds than those of {source}: name another --output_dir"
        )


def _items(datalist_file: Path) -> Any:
    try:
        return json.loads(datalist_file.read_text(encoding="utf-8"))["training"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{datalist_file} is no datalist: write it with `comnet validate`") from error


def _check_folds(folds: Mapping[str, int], written: int | None, asked: int | None, source: Path) -> int:
    count = written if written is not None else 1 + max(folds.values())
    if asked is not None and asked != count:
        raise UserError(f"{source} has {count} folds, not {asked}: make another one with `comnet validate`")
    empty = sorted(set(range(count)) - set(folds.values()))
    if empty or count < 2:
        problem = f"fold {empty[0]} of {count} holds no subject" if empty else "one fold leaves nothing to train on"
        raise UserError(f"{source}: {problem}: make another one with `comnet validate --num_folds`")
    return count


def _digest(items: Sequence[Mapping[str, Any]], dataset: Path) -> str:
    rows = [
        [item["subject"], item["fold"], item["palette"]]
        + [[os.path.relpath(file, dataset), os.path.getsize(file)] for file in (*item["image"], item["label"])]
        for item in items
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
