"""Folders on disk → subjects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .layouts import check_choices, reject_namesakes, shorten, subjects_from_names
from .names import EXPECTED
from .subject import Exclusion, Subject

PathLike = str | os.PathLike
DatasetDir = PathLike | Sequence[PathLike] | Mapping[str, PathLike]


def find_subjects(
    dataset_dir: DatasetDir, layout: str = "auto", palette: str | None = None, require_label: bool = True
) -> tuple[list[Subject], list[Exclusion]]:
    """Find subjects by the names of their files; nothing is opened.

    Args:
        dataset_dir: a folder of subject folders, one subject's own folder, a list of such folders, or one subject as
            the arguments of `subject_from_files`.
        layout: one of `LAYOUTS`, or "auto" to recognise it subject by subject.
        palette: key of `PALETTES`; by default that of the layout. Never guessed from voxels.
        require_label: leave subjects without a mask out.

    Returns:
        Subjects (absolute paths) in order of their names, and the folders that are none.

    Raises:
        FileNotFoundError: a folder does not exist.
        NotADirectoryError: a file was given.
        ValueError: a folder holds nothing that could be a subject; unknown layout or palette.
        SubjectError: two subjects of the same name.
    """
    if isinstance(dataset_dir, Mapping):
        return [subject_from_files(**dataset_dir)], []
    subjects: list[Subject] = []
    exclusions: list[Exclusion] = []
    for root in dataset_roots(dataset_dir):
        found, left_out = subjects_from_names(_list_names(root), layout, palette, require_label, str(root))
        if not found and not left_out:
            raise ValueError(_nothing_found(root, layout))
        subjects += found
        exclusions += left_out
    reject_namesakes(subjects)
    return sorted(subjects, key=lambda s: s.name), sorted(exclusions, key=lambda e: (e.subject, e.file))


def subject_from_files(
    t1n: PathLike,
    t1c: PathLike,
    t2w: PathLike,
    flair: PathLike,
    name: str | None = None,
    label: PathLike | None = None,
    palette: str = "brats2021",
) -> Subject:
    """One subject from four files whatever their names; `name` is by default that of the folder of `t1n`.

    Raises:
        ValueError: unknown palette.
    """
    check_choices("auto", palette)
    images = tuple(_absolute(file) for file in (t1n, t1c, t2w, flair))
    return Subject(
        name=name or os.path.basename(os.path.dirname(images[0])) or "subject",
        layout="files",
        images=images,
        label=None if label is None else _absolute(label),
        palette=palette,
        label_source=None if label is None else "unknown",
    )


def dataset_roots(dataset_dir: PathLike | Sequence[PathLike]) -> list[Path]:
    """The dataset folders as absolute paths.

    Raises:
        FileNotFoundError: a folder does not exist.
        NotADirectoryError: a file was given.
        ValueError: an empty list was given.
    """
    given = [dataset_dir] if isinstance(dataset_dir, (str, os.PathLike)) else list(dataset_dir)
    if not given:
        raise ValueError("dataset_dir is an empty list: give at least one folder.")
    roots = [Path(_absolute(folder)) for folder in given]
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(
                f"dataset_dir {root} does not exist: give a folder of subject folders, or one subject's folder."
            )
        if not root.is_dir():
            raise NotADirectoryError(
                f"dataset_dir {root} is a file: give the folder that holds it, {root.parent}, "
                "or name the four modalities one by one."
            )
    return roots


def base_folder(dataset_dir: PathLike | Sequence[PathLike]) -> Path:
    """The folder that the paths of a datalist are relative to: the innermost one that holds every dataset folder."""
    return Path(os.path.commonpath(dataset_roots(dataset_dir)))


def _absolute(path: PathLike) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _list_names(root: Path) -> list[str]:
    """Visible files in the folder and in its subfolders; a subfolder without files is listed with a slash."""
    names: list[str] = []
    for entry in _visible(root):
        if not entry.is_dir():
            names.append(entry.name)
            continue
        files = [file.name for file in _visible(entry.path) if not file.is_dir()]
        names += [f"{entry.name}/{file}" for file in files] or [f"{entry.name}/"]
    return names


def _visible(folder: PathLike) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _nothing_found(root: Path, layout: str) -> str:
    layouts = EXPECTED if layout == "auto" else [layout]
    looked_for = "; ".join(f"{name}: {', '.join(EXPECTED[name].values())}" for name in layouts)
    return (
        f"no subject in {root}: looked for subfolders, or files (.nii or .nii.gz) in it, named as {looked_for}. "
        f"The folder holds {shorten(entry.name for entry in _visible(root))}."
    )
