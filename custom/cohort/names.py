"""Which role a file plays, told by its name alone, in each of the four naming conventions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from .subject import MODALITIES

LAYOUTS = ("utsw", "brats2021", "brats2023", "plain")
LABEL_SOURCES = ("manual", "expert", "unknown", "automatic")
DEFAULT_PALETTES = {"utsw": "brats2021", "brats2021": "brats2021", "brats2023": "brats2023", "plain": "brats2021"}

EXPECTED: dict[str, dict[str, str]] = {
    "utsw": {
        "t1n": "brain_t1",
        "t1c": "brain_t1ce",
        "t2w": "brain_t2",
        "flair": "brain_flair",
        "label": "rtumorseg_manual_correction or tumorseg_FeTS",
    },
    "brats2021": {
        "t1n": "<case>_t1",
        "t1c": "<case>_t1ce",
        "t2w": "<case>_t2",
        "flair": "<case>_flair",
        "label": "<case>_seg",
    },
    "brats2023": {
        "t1n": "<case>-t1n",
        "t1c": "<case>-t1c",
        "t2w": "<case>-t2w",
        "flair": "<case>-t2f",
        "label": "<case>-seg",
    },
    "plain": {
        "t1n": "T1, T1n or T1w",
        "t1c": "T1c, T1ce, T1Gd or T1post",
        "t2w": "T2 or T2w",
        "flair": "FLAIR, T2-FLAIR or T2f",
        "label": "seg, label or mask",
    },
}

_UTSW_ROLES = {
    "brain_t1": "t1n",
    "brain_t1ce": "t1c",
    "brain_t2": "t2w",
    "brain_flair": "flair",
    "rtumorseg_manual_correction": "manual",
    "tumorseg_fets": "automatic",
}
_CASE_SUFFIXES = {
    "brats2021": ("_", {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "flair", "seg": "expert"}),
    "brats2023": ("-", {"t1n": "t1n", "t1c": "t1c", "t2w": "t2w", "t2f": "flair", "seg": "expert"}),
}
_PLAIN_WORDS = {
    "t1n": {"t1", "t1n", "t1w", "t1pre", "t1native"},
    "t1c": {"t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1contrast", "t1wce"},
    "t2w": {"t2", "t2w"},
    "flair": {"flair", "t2flair", "t2f", "t2wflair"},
}
_CONTRAST_WORDS = {"c", "ce", "gd", "gad", "gado", "post", "postcontrast", "contrast"}
_MASK_WORDS = {"seg", "segm", "segmentation", "label", "labels", "labelmap", "mask", "tumorseg", "tumourseg"}
_OTHER_IMAGES = {"ants", "map", "mapping", "star", "swi"}


def is_nifti(name: str) -> bool:
    """Whether a file name is that of a visible NIfTI file (`._T1.nii.gz`, which macOS leaves behind, is not)."""
    return name.lower().endswith((".nii", ".nii.gz")) and not name.startswith(".")


def stem(name: str) -> str:
    """File name in lower case without folder and without `.nii` or `.nii.gz`."""
    return name.rpartition("/")[2].lower().removesuffix(".gz").removesuffix(".nii")


def case_of(name: str, layout: str) -> str:
    """The `<case>` part of a BraTS file name, empty in the other layouts."""
    return stem(name).rpartition(_CASE_SUFFIXES[layout][0])[0] if layout in _CASE_SUFFIXES else ""


def role_of(name: str, layout: str) -> str | None:
    """A modality key, a label source (then the file is a tumour mask), or None where the name says neither."""
    if layout == "utsw":
        return _UTSW_ROLES.get(stem(name))
    if layout == "plain":
        return _plain_role(re.split(r"[_\-. ]+", stem(name)))
    separator, roles = _CASE_SUFFIXES[layout]
    case, _, suffix = stem(name).rpartition(separator)
    return roles.get(suffix) if case else None


def by_role(names: Iterable[str], layout: str) -> dict[str, list[str]]:
    """All candidates for each role; names that play none are left out."""
    candidates: dict[str, list[str]] = {}
    for name in sorted(names):
        if role := role_of(name, layout):
            candidates.setdefault(role, []).append(name)
    return candidates


def recognise(names: Iterable[str]) -> str:
    """The layout in which most modalities have a name.

    On a tie the stricter convention wins: every BraTS name can also be read as a plain one, and the palette hangs on
    the difference.
    """
    names = list(names)
    return max(LAYOUTS, key=lambda layout: sum(key in MODALITIES for key in by_role(names, layout)))


def _plain_role(words: list[str]) -> str | None:
    roles = {role for role, known in _PLAIN_WORDS.items() if known.intersection(words)}
    if "t1n" in roles and _names_contrast(words):
        roles = roles - {"t1n"} | {"t1c"}
    if roles == {"t2w", "flair"}:
        roles = {"flair"}
    if _MASK_WORDS.intersection(words):
        return None if roles or "brain" in words else "unknown"
    return roles.pop() if len(roles) == 1 and not _OTHER_IMAGES.intersection(words) else None


def _names_contrast(words: list[str]) -> bool:
    """Whether a word for contrast stands next to T1; elsewhere it may belong to the case name (`pat-c_01_T1`)."""
    pairs = list(pairwise(words))
    after = any(a in _PLAIN_WORDS["t1n"] and b in _CONTRAST_WORDS for a, b in pairs)
    before = any(b in _PLAIN_WORDS["t1n"] and a in _CONTRAST_WORDS - {"c"} for a, b in pairs)
    return after or before
