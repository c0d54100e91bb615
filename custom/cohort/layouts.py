"""Folders and file names → subjects, by what the names say; no file is opened."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from glob import escape as glob_escape
from glob import glob
from pathlib import Path
from typing import Any

from ..files import FileError, UserError, is_batch
from .names import (
    LABEL_SOURCES,
    LAYOUTS,
    by_role,
    case_of,
    doubtful_names,
    is_nifti,
    numbers_of,
    recognise,
    role_of,
    stem,
)
from .subject import (
    MODALITIES,
    REQUIRED,
    Exclusion,
    Subject,
    SubjectError,
    check_required,
    missing_modalities,
    palette_values,
)

DEFAULT_PALETTES = {"utsw": "brats2021", "brats2021": "brats2021", "brats2023": "brats2023", "plain": "brats2021"}

_EXPECTED = {
    "utsw": ("brain_t1", "brain_t1ce", "brain_t2", "brain_flair", "rtumorseg_manual_correction or tumorseg_FeTS"),
    "brats2021": ("<case>_t1", "<case>_t1ce", "<case>_t2", "<case>_flair", "<case>_seg"),
    "brats2023": ("<case>-t1n", "<case>-t1c", "<case>-t2w", "<case>-t2f", "<case>-seg"),
    "plain": (
        "T1, T1n or T1w",
        "T1c, T1ce, T1Gd or T1post",
        "T2 or T2w",
        "FLAIR, T2-FLAIR or T2f",
        "seg, label or mask",
    ),
}
EXPECTED = {layout: dict(zip((*MODALITIES, "label"), names, strict=True)) for layout, names in _EXPECTED.items()}

_SHOWN = 12


def subjects_from_names(
    names: Iterable[str],
    layout: str = "auto",
    palette: str | None = None,
    require_label: bool = True,
    root: str = "",
    subsets: bool = False,
) -> tuple[list[Subject], list[Exclusion]]:
    """Pair files with modalities by name, one subject per folder; see `find_subjects`.

    Args:
        names: paths relative to the dataset folder, with forward slashes; a folder without files ends in a slash.
        layout: as of `find_subjects`, and so are palette, require_label and subsets, returns and errors.
        palette: see there.
        require_label: see there.
        root: dataset folder, put in front of every path. Its own files are one subject if any names a modality.
        subsets: see there.
    """
    check_choices(layout, palette)
    subjects, exclusions = [], []
    for folder, files in _candidate_folders(names, layout).items():
        path = os.path.join(root, folder) if folder else root or "."
        name = os.path.basename(folder or root) or "subject"
        try:
            subjects.append(_subject(name, path, files, layout, palette, require_label, subsets))
        except SubjectError as error:
            exclusions.append(Exclusion.of(error))
    return _in_order(subjects, exclusions)


def check_choices(layout: str, palette: str | None) -> None:
    """Refuse unknown layouts and palettes, naming what there is."""
    if layout not in ("auto", *LAYOUTS):
        raise UserError(f"unknown layout {layout!r}: give one of {', '.join(('auto', *LAYOUTS))}.")
    if palette is not None:
        palette_values(palette)


def _in_order(subjects: list[Subject], exclusions: list[Exclusion]) -> tuple[list[Subject], list[Exclusion]]:
    """Sort by name; refuse two subjects of one name, as their results would overwrite one another."""
    folders: dict[str, str] = {}
    for subject in subjects:
        if subject.name in folders:
            reason = f"two folders hold a subject of this name, this one and {folders[subject.name]}"
            raise SubjectError(subject.name, subject.folder, reason, "Rename one, or give each folder once only")
        folders[subject.name] = subject.folder
    return sorted(subjects, key=lambda s: s.name), sorted(exclusions, key=lambda e: (e.subject, e.file))


def shorten(names: Iterable[str]) -> str:
    """The first dozen names, and how many more there are; "nothing" for none."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more or "nothing"


def _candidate_folders(names: Iterable[str], layout: str) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    own = [*folders.pop("", []), *(folder for folder in folders if not is_nifti(folder))]
    if not _names_modality(own, layout):
        return dict(sorted(folders.items()))
    return {"": own, **{folder: files for folder, files in sorted(folders.items()) if _names_modality(files, layout)}}


def _names_modality(files: list[str], layout: str) -> bool:
    files = list(filter(is_nifti, files))
    candidates = by_role(files, recognise(files) if layout == "auto" else layout)
    return any(key in candidates for key in MODALITIES)


def _subject(
    name: str, folder: str, names: list[str], layout: str, palette: str | None, require_label: bool, subsets: bool
) -> Subject:
    error = partial(SubjectError, name, folder)
    files = list(filter(is_nifti, names))
    if not files:
        remedy = "Give every subject a folder of its own; if this one holds folders of subjects, give it as dataset_dir"
        raise error("the folder holds no .nii or .nii.gz file, may not be read, or is a link to nowhere", remedy)
    layout = recognise(files) if layout == "auto" else layout
    roles = by_role(files, layout)
    source = next((source for source in LABEL_SOURCES if source in roles), None)
    masks = roles.get(source, []) if source else []
    wanted = {key: roles.get(key, []) for key in MODALITIES} | ({"label": masks} if require_label else {})
    what = {key: f"{key} image" for key in MODALITIES} | {"label": "tumour mask"}
    missing = [key for key, candidates in wanted.items() if not candidates]
    doubtful = doubtful_names(names, layout, missing) if subsets else []
    scattered = [key for key in MODALITIES if wanted[key]] == [role_of(name, "plain")]
    if missing and (not subsets or doubtful or scattered or set(REQUIRED) <= set(missing)):
        looked_for = "; ".join(f"{what[key]} ({EXPECTED[layout][key]})" for key in missing)
        reason = f"missing, by the names of the {layout} layout: {looked_for}; the folder holds {shorten(files)}"
        remedy = "Add the file, or rename it so that its name says what it is"
        if subsets and doubtful:
            remedy += f"; if the subject has none, take {shorten(doubtful)} out of the folder, or name the files that "
            remedy += "there are by --t1n --t1c --t2w --flair"
        elif subsets and scattered:
            remedy = "The folder has the name of its one image: put all files of a subject into one folder"
        elif subsets:
            remedy += "; a subject may lack others, but not both T1c and T2-FLAIR"
        raise error(reason, remedy)
    for key, candidates in wanted.items():
        if len(candidates) > 1:
            reason = f"{len(candidates)} files could be the {what[key]}: {shorten(candidates)}"
            raise error(reason, "Keep one of them in the folder: one folder per subject")
    images, label = [next(iter(wanted[key]), "") for key in MODALITIES], masks[0] if len(masks) == 1 else None
    used = [*filter(None, images), *([label] if label else [])]
    apart = len({numbers_of(file) for file in used}) > 1
    if len({case_of(file, layout) for file in used}) > 1 or (missing and apart):
        raise error(f"the files belong to different cases: {shorten(used)}", "Keep the files of one case in a folder")
    return Subject(
        name=name,
        layout=layout,
        images=tuple(image and os.path.normpath(os.path.join(folder, image)) for image in images),
        label=os.path.normpath(os.path.join(folder, label)) if label else None,
        palette=palette or DEFAULT_PALETTES[layout],
        label_source=source if label else None,
    )


logger = logging.getLogger("comnet")
PathLike = str | os.PathLike[str]
DatasetDir = PathLike | Sequence[PathLike] | Mapping[str, Any]


def find_subjects(
    dataset_dir: DatasetDir,
    layout: str = "auto",
    palette: str | None = None,
    require_label: bool = True,
    subsets: bool = False,
) -> tuple[list[Subject], list[Exclusion]]:
    """Find subjects by the names of their files; nothing is opened.

    Args:
        dataset_dir: a folder of subject folders, one subject's own folder, a list of such folders, or one subject as
            the arguments of `subject_from_files`.
        layout: one of `LAYOUTS`, or "auto" to recognise it subject by subject.
        palette: key of `PALETTES`; by default that of the layout. Never guessed from voxels.
        require_label: leave subjects without a mask out.
        subsets: take a subject that lacks modalities but has T1c or T2-FLAIR, for inference. Where a file's name leaves
            open whether it is what seems to be missing, the subject is left out all the same. A subject given by files
            may be a subset always.

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
    for root in (roots := dataset_roots(dataset_dir)):
        found, left_out = subjects_from_names(_list_names(root), layout, palette, require_label, str(root), subsets)
        if not found and is_batch(root):
            raise UserError(f"{root} holds results of CoMNeT: give the folder of the images")
        if not found and not left_out:
            layouts = EXPECTED if layout == "auto" else [layout]
            looked_for = "; ".join(f"{one}: {', '.join(EXPECTED[one].values())}" for one in layouts)
            held = shorten(entry.name for entry in _visible(root))
            reason = f"looked for subfolders, or files (.nii or .nii.gz) in it, named as {looked_for}"
            if len(roots) == 1:
                raise UserError(f"no subject in {root}: {reason}. The folder holds {held}.")
            left_out = [Exclusion(root.name, str(root), f"no subject in it: {reason}", f"The folder holds {held}")]
        subjects += found
        exclusions += left_out
    return _in_order(subjects, exclusions)


def subject_from_files(
    t1n: PathLike | None = None,
    t1c: PathLike | None = None,
    t2w: PathLike | None = None,
    flair: PathLike | None = None,
    name: str | None = None,
    label: PathLike | None = None,
    palette: str = "brats2021",
) -> Subject:
    """One subject from its files whatever their names; for inference, T1c or T2-FLAIR is enough.

    `name` is by default what tells these files from those of other subjects: what begins all file names, where that
    holds a digit or the folder has files of others too (`flat/P1_t1.nii.gz` and `flat/P2_t1.nii.gz`), else the
    innermost folder that holds all of them.

    Raises:
        UserError: unknown palette.
        SubjectError: a name that no file can have, or neither T1c nor T2-FLAIR.
    """
    check_choices("auto", palette)
    images = tuple(_absolute(file) if file else "" for file in (t1n, t1c, t2w, flair))
    there = list(filter(None, images))
    check_required(str(name or "the subject"), missing_modalities(images), next(iter(there), "files"))
    return Subject(
        name=str(name or _name_of(there)),
        layout="files",
        images=images,
        label=None if label is None else _absolute(label),
        palette=palette,
        label_source=None if label is None else "unknown",
    )


def _name_of(images: Sequence[str]) -> str:
    names = [os.path.basename(image) for image in images]
    first, last = min(stems := [stem(name) for name in names]), max(stems)  # what these share, all share
    begin = next((first[:n] for n, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), first)
    if not all(name[len(begin) :].startswith(("_", "-", ".", " ")) for name in names):
        begin = re.sub(r"[^_\-. ]*$", "", begin)  # `P1_t` of `P1_t1` and `P1_t2` → `P1_`
    while (last := re.split(r"[_\-. ]", begin.strip("_-. "))[-1]) and role_of(last, "plain") in MODALITIES:
        begin = re.sub(r"[^_\-. ]*$", "", begin.rstrip("_-. "))  # of one file, or of `P1_t2` and `P1_t2_flair`
    begin = names[0][: len(begin)]
    others = begin and glob(f"*{glob_escape(names[0][len(begin) :])}", root_dir=os.path.dirname(images[0]))
    if (name := begin.strip("_-. ")) and (re.search(r"\d", name) or len(others) > 1):
        return name
    return os.path.basename(os.path.commonpath([os.path.dirname(image) for image in images])) or "subject"


def dataset_roots(dataset_dir: DatasetDir) -> list[Path]:
    """The dataset folders as absolute paths.

    Raises:
        FileNotFoundError: a folder does not exist.
        NotADirectoryError: a file was given.
        ValueError: an empty list was given.
    """
    given: list[Any] = list(dataset_dir) if isinstance(dataset_dir, (list, tuple, set)) else [dataset_dir]
    if wrong := [folder for folder in given if not isinstance(folder, (str, os.PathLike))]:
        raise UserError(f"dataset_dir is {wrong[0]!r}, which is no text: put the folder's name in quotes.")
    if not given:
        raise UserError("dataset_dir is an empty list: give at least one folder.")
    roots = [Path(_absolute(folder)) for folder in given]
    for root in roots:
        if not root.exists():
            raise FileError(
                f"dataset_dir {root} does not exist: give a folder of subject folders, or one subject's folder."
            )
        if not root.is_dir():
            raise FileError(
                f"dataset_dir {root} is a file: give the folder that holds it, {root.parent}, "
                "or name the four modalities one by one."
            )
    return roots


def base_folder(dataset_dir: DatasetDir) -> Path:
    """The folder that the paths of a datalist are relative to: the innermost one that holds every dataset folder."""
    return Path(os.path.commonpath(dataset_roots(dataset_dir)))


def _absolute(path: PathLike) -> str:
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


def _list_names(root: Path) -> list[str]:
    """Visible entries of the folder's subfolders, and its own files; an empty subfolder is listed with a slash.

    A folder of results, which may lie among the subjects, is left out.
    """
    names: list[str] = []
    for entry in _visible(root):
        if not entry.is_dir():
            lost = entry.is_symlink() and not os.path.exists(entry.path) and not is_nifti(entry.name)
            names.append(f"{entry.name}/" if lost else entry.name)  # a link to a folder that is not there
            continue
        if is_batch(entry.path):
            logger.info("%s holds results and is no subject", entry.path)
            continue
        try:
            files = [file.name for file in _visible(entry.path)]  # a folder may be what seems to be missing
        except OSError:  # one folder that may not be read must not end the search
            files = []
        names += [f"{entry.name}/{file}" for file in files] or [f"{entry.name}/"]
    return names


def _visible(folder: PathLike) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
