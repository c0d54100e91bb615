"""Names → subjects: no file is opened here, so that a listing is as good as a disk."""

from __future__ import annotations

import os
from collections.abc import Iterable

from .names import DEFAULT_PALETTES, EXPECTED, LABEL_SOURCES, LAYOUTS, by_role, case_of, is_nifti, recognise
from .subject import MODALITIES, PALETTES, Exclusion, Subject, SubjectError

_SHOWN = 12


def subjects_from_names(
    names: Iterable[str],
    layout: str = "auto",
    palette: str | None = None,
    require_label: bool = True,
    root: str = "",
) -> tuple[list[Subject], list[Exclusion]]:
    """Pair files with modalities by name, one subject per folder.

    Args:
        names: paths relative to the dataset folder, with forward slashes; a folder without files ends in a slash.
        layout: one of `LAYOUTS`, or "auto" to recognise it folder by folder.
        palette: key of `PALETTES`; by default that of the layout.
        require_label: leave subjects without a mask out.
        root: dataset folder, put in front of every path. Its own files are one subject if any names a modality.

    Returns:
        Subjects in order of their names, and the folders that are none.

    Raises:
        ValueError: unknown layout or palette.
        SubjectError: two folders of the same name.
    """
    check_choices(layout, palette)
    subjects, exclusions = [], []
    for folder, files in _candidate_folders(names, layout).items():
        path = os.path.join(root, folder) if folder else root or "."
        name = os.path.basename(folder or root) or "subject"
        try:
            subjects.append(_subject(name, path, files, layout, palette, require_label))
        except SubjectError as error:
            exclusions.append(Exclusion.of(error))
    reject_namesakes(subjects)
    return sorted(subjects, key=lambda s: s.name), sorted(exclusions, key=lambda e: (e.subject, e.file))


def check_choices(layout: str, palette: str | None) -> None:
    """Refuse unknown layouts and palettes.

    Raises:
        ValueError: naming what there is.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"unknown layout {layout!r}: give one of {', '.join(('auto', *LAYOUTS))}.")
    if palette is not None and palette not in PALETTES:
        raise ValueError(f"unknown palette {palette!r}: give one of {', '.join(PALETTES)}.")


def reject_namesakes(subjects: Iterable[Subject]) -> None:
    """Refuse two subjects of one name: their results would overwrite one another.

    Raises:
        SubjectError: naming both folders.
    """
    folders: dict[str, str] = {}
    for subject in subjects:
        folder = os.path.dirname(subject.images[0])
        if subject.name in folders:
            reason = f"two folders hold a subject of this name, this one and {folders[subject.name]}"
            raise SubjectError(subject.name, folder, reason, "Rename one, or give each folder once only")
        folders[subject.name] = folder


def shorten(names: Iterable[str]) -> str:
    """The first dozen names, and how many more there are; "nothing" for none."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more or "nothing"


def _candidate_folders(names: Iterable[str], layout: str) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        files = folders.setdefault(folder, [])
        if is_nifti(file):
            files.append(file)
    own = folders.pop("", [])
    if not _names_modality(own, layout):
        return dict(sorted(folders.items()))
    return {"": own, **{folder: files for folder, files in sorted(folders.items()) if _names_modality(files, layout)}}


def _names_modality(files: list[str], layout: str) -> bool:
    candidates = by_role(files, recognise(files) if layout == "auto" else layout)
    return any(key in candidates for key in MODALITIES)


def _subject(
    name: str, folder: str, files: list[str], layout: str, palette: str | None, require_label: bool
) -> Subject:
    if not files:
        remedy = "Give every subject a folder of its own; if this one holds folders of subjects, give it as dataset_dir"
        raise SubjectError(name, folder, "the folder holds no .nii or .nii.gz file", remedy)
    layout = recognise(files) if layout == "auto" else layout
    roles = by_role(files, layout)
    source = next((source for source in LABEL_SOURCES if source in roles), None)
    masks = roles.get(source, []) if source else []
    wanted = {key: roles.get(key, []) for key in MODALITIES} | ({"label": masks} if require_label else {})
    _none_missing(name, folder, files, layout, wanted)
    _none_twice(name, folder, wanted)
    images, label = [wanted[key][0] for key in MODALITIES], masks[0] if len(masks) == 1 else None
    _one_case(name, folder, [*images, *([label] if label else [])], layout)
    return Subject(
        name=name,
        layout=layout,
        images=tuple(os.path.normpath(os.path.join(folder, image)) for image in images),
        label=os.path.normpath(os.path.join(folder, label)) if label else None,
        palette=palette or DEFAULT_PALETTES[layout],
        label_source=source if label else None,
    )


def _what(key: str) -> str:
    return "tumour mask" if key == "label" else f"{key} image"


def _none_missing(name: str, folder: str, files: list[str], layout: str, wanted: dict[str, list[str]]) -> None:
    missing = [key for key, candidates in wanted.items() if not candidates]
    if missing:
        looked_for = "; ".join(f"{_what(key)} ({EXPECTED[layout][key]})" for key in missing)
        reason = f"missing, by the names of the {layout} layout: {looked_for}; the folder holds {shorten(files)}"
        raise SubjectError(name, folder, reason, "Add the file, or rename it so that its name says what it is")


def _none_twice(name: str, folder: str, wanted: dict[str, list[str]]) -> None:
    for key, candidates in wanted.items():
        if len(candidates) > 1:
            reason = f"{len(candidates)} files could be the {_what(key)}: {shorten(candidates)}"
            raise SubjectError(name, folder, reason, "Keep one of them in the folder: one folder per subject")


def _one_case(name: str, folder: str, files: list[str], layout: str) -> None:
    cases = {case_of(file, layout) for file in files}
    if len(cases) > 1:
        reason = f"the files belong to different cases: {shorten(files)}"
        raise SubjectError(name, folder, reason, "Keep the files of one case in a folder")
