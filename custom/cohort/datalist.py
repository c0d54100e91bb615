"""The datalist: checked subjects with their folds as JSON for MONAI, and the exclusion report beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import FileError, UserError, write_table, write_text
from .checks import check_subjects, log_outcome
from .layouts import DatasetDir, PathLike, base_folder, dataset_roots, find_subjects
from .subject import MODALITIES, PALETTES, REGIONS, Exclusion, Subject

ITEM_KEYS = ("subject", "image", "label", "palette", "label_source", "has_et", "fold")


def build_datalist(
    dataset_dir: DatasetDir,
    layout: str = "auto",
    palette: str | None = None,
    num_folds: int = 5,
    seed: int = 0,
    unknown_labels: str = "exclude",
    allow_empty_mask: bool = False,
    num_workers: int | None = None,
    progress: bool = False,
    datalist_file: PathLike | None = None,
) -> tuple[dict[str, Any], list[Exclusion]]:
    """Find and check all subjects, and deal the good ones into folds.

    Args as of `Cohort`; where no subject can be used, the exclusion report is written beside `datalist_file` all the
    same, and the file itself stays as it was.

    Returns:
        A MONAI datalist, whose "training" items have paths relative to the dataset folder (to the innermost folder that
        holds them all, if there are several), and what was excluded, with paths relative to the same.

    Raises:
        ValueError: no usable subject, or an argument out of range.
        OSError: the dataset folder is absent or is none.
    """
    assign_folds([], num_folds, seed)
    base = base_folder(dataset_dir)
    subjects, nameless = find_subjects(dataset_dir, layout, palette)
    options = {"unknown_labels": unknown_labels, "allow_empty_mask": allow_empty_mask}
    kept, faulty = check_subjects(subjects, num_workers, progress, require_label=True, **options)
    exclusions = sorted([*nameless, *faulty], key=lambda exclusion: (exclusion.subject, exclusion.file))
    relative = [replace(exclusion, file=_relative(exclusion.file, base)) for exclusion in exclusions]
    if datalist_file and not kept:
        _write_exclusions(relative, exclusions_file(datalist_file))
    log_outcome(kept, exclusions, str(base), exclusions_file(datalist_file) if datalist_file else None)
    roots = dataset_roots(dataset_dir)
    items = _items(kept, base, roots if len(roots) > 1 else [])
    folds = assign_folds(items, num_folds, seed)
    items = [item | {"fold": folds[item["subject"]]} for item in items]
    datalist = {
        "name": "comnet",
        "comnet_version": __version__,
        "layout": next(iter(layouts)) if len(layouts := {subject.layout for subject, _ in kept}) == 1 else "mixed",
        "modalities": list(MODALITIES),
        "regions": list(REGIONS),
        "num_folds": num_folds,
        "seed": seed,
        **options,
        "counts": {
            "subjects": len(items),
            "with_et": sum(item["has_et"] for item in items),
            "excluded": len(exclusions),
            "by_label_source": dict(sorted(Counter(item["label_source"] for item in items).items())),
            "by_palette": dict(sorted(Counter(item["palette"] for item in items).items())),
            "by_fold": [list(folds.values()).count(fold) for fold in range(num_folds)],
        },
        "training": items,
        "facts": {subject.name: facts for subject, facts in kept},
    }
    return datalist, relative


def write_datalist(
    datalist: dict[str, Any],
    exclusions: Iterable[Exclusion],
    datalist_file: PathLike,
    dataset_dir: DatasetDir | None = None,
) -> Path:
    """Write `datalist_file` and next to it the exclusions, each whole or not at all; return the path of these.

    Args:
        datalist: as `build_datalist` returns it.
        exclusions: what was left out; for none there is a table with a header only.
        datalist_file: JSON to write.
        dataset_dir: the dataset it was built from; remembered relative to the datalist, see `dataset_of`.
    """
    path = Path(datalist_file)
    if dataset_dir is not None:
        datalist = _with_dataset(datalist, path, base_folder(dataset_dir))
    _write_exclusions(exclusions, exclusions_file(path))
    write_text(path, json.dumps(datalist, indent=1) + "\n")
    return exclusions_file(path)


def _write_exclusions(exclusions: Iterable[Exclusion], report: Path) -> None:
    write_table(report, [field.name for field in fields(Exclusion)], map(asdict, exclusions))


def copy_datalist(source: PathLike, target: PathLike, dataset_dir: PathLike | None = None) -> Path:
    """Copy a datalist, so that it still knows where its dataset is, by default where `source` says; return that folder.

    `target` is left alone where it would not change.

    Raises:
        ValueError: no JSON, no items, or the folder is neither remembered nor given.
        OSError: a file is absent or cannot be written; the folder given is absent or is none.
    """
    dataset = dataset_of(source) if dataset_dir is None else base_folder(dataset_dir)
    text = json.dumps(_with_dataset(_read_json(source), Path(target), dataset), indent=1) + "\n"
    if not os.path.exists(target) or Path(target).read_text(encoding="utf-8") != text:
        write_text(target, text)
    return dataset


def dataset_of(datalist_file: PathLike) -> Path:
    """Return the dataset's folder as the datalist remembers it: ``"dataset_dir"``, relative to the datalist's folder.

    Raises:
        ValueError: no JSON, no items, or the folder is not remembered.
    """
    datalist = _read_json(datalist_file)
    if not isinstance(datalist.get("dataset_dir"), str):
        raise UserError(f"{datalist_file} does not say where its dataset is: give the folder with --dataset_dir")
    return Path(os.path.normpath(Path(datalist_file).resolve().parent / datalist["dataset_dir"]))


def exclusions_file(datalist_file: PathLike) -> Path:
    """Where the exclusion report of a datalist lies: `<stem>_exclusions.csv` in the same folder."""
    path = Path(datalist_file)
    return path.with_name(f"{path.stem}_exclusions.csv")


def load_datalist(datalist_file: PathLike, dataset_dir: DatasetDir) -> dict[str, Any]:
    """Read a datalist, and make the paths of its "training" items absolute.

    MONAI's `load_decathlon_datalist` reads the same file, but turns every text that happens to name a file or folder in
    `base_dir` into a path: "subject" comes back as the path of the subject's folder.

    Raises:
        ValueError: no JSON, no items, keys missing, another order of modalities, a fold out of range, a name twice.
        FileNotFoundError: a file is absent; names the first ones.
    """
    datalist = _read_json(datalist_file)
    _check_items(datalist, str(datalist_file))
    absolute = with_absolute_paths(datalist, dataset_dir)
    files = [file for item in absolute["training"] for file in (*item["image"], item["label"])]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise FileError(
            f"{datalist_file}: {len(missing)} of {len(files)} files do not exist, first {', '.join(missing[:3])}. "
            "Give the dataset_dir it was built from, or delete the datalist to have it built again."
        )
    return absolute


def with_absolute_paths(datalist: dict[str, Any], dataset_dir: DatasetDir) -> dict[str, Any]:
    """Copy of a datalist whose "training" items have absolute paths."""
    base = base_folder(dataset_dir)

    def absolute(file: str) -> str:
        return os.path.normpath(os.path.join(base, file))

    items = [
        item | {"image": [absolute(file) for file in item["image"]], "label": absolute(item["label"])}
        for item in datalist["training"]
    ]
    return datalist | {"training": items}


def _with_dataset(datalist: dict[str, Any], path: Path, dataset: Path) -> dict[str, Any]:
    """Copy of a datalist that remembers its dataset; real paths, because ``..`` behind a link leads elsewhere."""
    return datalist | {"dataset_dir": _relative(str(dataset.resolve()), path.resolve().parent)}


def _items(kept: list[tuple[Subject, dict[str, Any]]], base: Path, roots: list[Path]) -> list[dict[str, Any]]:
    """Items of the datalist; of several dataset folders each is a source of its own, and folds hold some of each."""
    items: list[dict[str, Any]] = []
    for subject, facts in kept:
        sources = [{"source": root.name} for root in roots if Path(subject.images[0]).is_relative_to(root)]
        item = {
            "subject": subject.name,
            "patient": subject.patient,
            "image": [_relative(file, base) for file in subject.images],
            "label": _relative(str(subject.label), base),
            "palette": subject.palette,
            "label_source": subject.label_source,
            "has_et": facts["has_et"],
        }
        items.append(item | (sources[0] if sources else {}))
    return items


def _relative(file: str, base: Path) -> str:
    return Path(os.path.relpath(file, base)).as_posix()


def _read_json(file: PathLike) -> dict[str, Any]:
    try:
        datalist = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({error}). Delete it to have the datalist built again.") from error
    if not isinstance(datalist, dict) or not isinstance(datalist.get("training"), list) or not datalist["training"]:
        raise UserError(f'{file}: no items under "training". Delete it to have the datalist built again.')
    return datalist


def _check_items(datalist: dict[str, Any], file: str) -> None:
    order = datalist.get("modalities", list(MODALITIES))
    if order != list(MODALITIES):
        raise UserError(f"{file}: modalities are in the order {order}, not {list(MODALITIES)}: build it again.")
    names: set[str] = set()
    for number, item in enumerate(datalist["training"]):
        absent = [key for key in ITEM_KEYS if key not in item]
        if absent:
            raise UserError(f"{file}: training item {number} lacks {', '.join(absent)}: add them or build it again.")
        if not isinstance(item["image"], list) or len(item["image"]) != len(MODALITIES):
            raise UserError(f"{file}: {item['subject']} needs a list of {len(MODALITIES)} images: build it again.")
        if item["palette"] not in PALETTES:
            raise UserError(f"{file}: {item['subject']} has palette {item['palette']!r}, none of {list(PALETTES)}.")
        if not isinstance(item["subject"], str):
            raise UserError(f"{file}: the name {item['subject']!r} of item {number} is no text: put it in quotes.")
        if not isinstance(item["fold"], int) or not 0 <= item["fold"] < datalist.get("num_folds", float("inf")):
            raise UserError(f"{file}: {item['subject']} is in fold {item['fold']!r}, which is none of its folds.")
        if item["subject"] in names:
            raise UserError(f"{file}: {item['subject']} is listed twice: take one out.")
        names.add(item["subject"])


def assign_folds(items: Iterable[Mapping[str, Any]], num_folds: int = 5, seed: int = 0) -> dict[str, int]:
    """Deal subjects into folds, stratified by dataset, label source and whether there is enhancing tumour.

    Patients are shuffled within their stratum by a hash of seed and name, so neither the order of `items` nor the
    machine nor the version of any library matters. Each goes to the fold that has fewest of the stratum, then fewest
    in all. Where each patient has one scan, folds differ by at most one subject in every stratum and over all; scans
    of one patient ("patient", by default the subject itself) stay together whatever the balance, as a patient on both
    sides of a split would leak. More folds than patients leave folds empty.

    Args:
        items: each with "subject", "label_source", "has_et" and perhaps "patient" and "source" (its dataset).
        num_folds: at least 1, else a UserError.
        seed: another seed deals another hand.

    Returns:
        Fold (0 to `num_folds` - 1) of each subject.
    """
    if num_folds < 1:
        raise UserError(f"num_folds is {num_folds}: give at least 1.")
    total = [0] * num_folds
    folds: dict[str, int] = {}
    for _, patients in sorted(_strata(items, seed).items()):
        own = [0] * num_folds
        for subjects in patients:
            fold = min(range(num_folds), key=lambda k: (own[k], total[k], k))
            own[fold] += len(subjects)
            total[fold] += len(subjects)
            folds |= dict.fromkeys(subjects, fold)
    return dict(sorted(folds.items()))


def _strata(items: Iterable[Mapping[str, Any]], seed: int) -> dict[tuple[str, str, bool], list[list[str]]]:
    """Patients of each stratum, as lists of subjects, those with most scans first."""
    patients: dict[str, list[Mapping[str, Any]]] = {}
    for item in sorted(items, key=lambda item: item["subject"]):
        patients.setdefault(item.get("patient", item["subject"]), []).append(item)
    strata: dict[tuple[str, str, bool], list[list[str]]] = {}

    def order(name: str) -> tuple[int, bytes]:
        return -len(patients[name]), hashlib.sha256(f"{seed}:{name}".encode()).digest()

    for scans in (patients[patient] for patient in sorted(patients, key=order)):
        first = scans[0]
        stratum = (str(first.get("source", "")), str(first["label_source"]), bool(first["has_et"]))
        strata.setdefault(stratum, []).append([item["subject"] for item in scans])
    return strata
