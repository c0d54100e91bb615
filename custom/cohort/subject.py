"""What one subject is: four modalities, perhaps a mask, and the palette that mask is written in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..files import UserError

MODALITIES = ("t1n", "t1c", "t2w", "flair")
MODALITY_NAMES = {"t1n": "T1n", "t1c": "T1c", "t2w": "T2w", "flair": "T2-FLAIR"}
REQUIRED = ("t1c", "flair")
"""One of these is there in any subject: without both there is neither an enhancing tumour nor an oedema to see."""
REGIONS = ("ET", "TC", "WT")
PALETTES: dict[str, dict[str, int]] = {
    "brats2021": {"core": 1, "oedema": 2, "enhancing": 4},
    "brats2023": {"core": 1, "oedema": 2, "enhancing": 3},
}
REGION_TISSUES: dict[str, tuple[str, ...]] = {
    "ET": ("enhancing",),
    "TC": ("core", "enhancing"),
    "WT": ("core", "oedema", "enhancing"),
}

MOST_NAME_BYTES = 180
"""Of a name; what is added to it must still be a file name, of which most file systems take 255 bytes."""

_BIDS_PATIENT = re.compile(r"(sub-[a-z0-9]+)(?:_|$)", re.IGNORECASE)
_PATIENT_OF = re.compile(r"(BraTS-[a-z]+-\d{5})-\d{3}|(UPENN-GBM-\d{5})_\d\d", re.IGNORECASE)
_TIME_POINT = re.compile(
    r"[_\-. ]+(?:"
    r"(?:ses(?:sion)?|time[-_ ]?point|time|tp|visit|scan|week|month|day|year|fu|follow[-_ ]?up|t|v)"
    r"[-_ ]?\d+[a-z]?(?:-\d+)?"
    r"|baseline|follow[-_ ]?up|pre|post|pre[-_]?op|post[-_]?op"
    r"|(?:19|20)\d\d[-.]?(?:0\d|1[0-2])[-.]?[0-3]\d(?:[T_-]\d{4,6})?"
    r")$",
    re.IGNORECASE,
)


def palette_values(palette: str) -> dict[str, int]:
    """Return the label of each tissue in a palette.

    Raises:
        ValueError: the palette has no such name.
    """
    if palette not in PALETTES:
        raise UserError(f"unknown palette {palette!r}: give one of {', '.join(PALETTES)}.")
    return PALETTES[palette]


def missing_modalities(images: Sequence[object]) -> tuple[str, ...]:
    """Keys of the modalities for which there is nothing in `images`, one each in the order of `MODALITIES`."""
    return tuple(key for key, image in zip(MODALITIES, images, strict=True) if not image)


def named_modalities(keys: Iterable[str]) -> str:
    """The names of modalities as people write them: `T1n, T2w`."""
    return ", ".join(MODALITY_NAMES[key] for key in keys)


class SubjectError(UserError):
    """What is wrong with one subject, in which file, and what to do about it; `str()` is one line with all four."""

    def __init__(self, subject: str, file: str, reason: str, remedy: str) -> None:
        """Name subject and file; `reason` and `remedy` come without a full stop."""
        super().__init__(subject, file, reason, remedy)
        self.subject, self.file, self.reason, self.remedy = subject, file, reason, remedy

    def __str__(self) -> str:
        """All four on one line."""
        return f"{self.subject}: {self.file}: {self.reason}. {self.remedy}."


def check_required(subject: str, missing: Sequence[str], file: str) -> None:
    """Refuse a subject without T1c and without T2-FLAIR: an error that names subject and file, and what to add."""
    if set(REQUIRED) <= set(missing):
        reason = f"no {named_modalities(missing)}: without T1c and T2-FLAIR there is no tumour to outline"
        raise SubjectError(subject, file, reason, f"Add {named_modalities(REQUIRED).replace(', ', ' or ')}")


@dataclass(frozen=True)
class Subject:
    """One scan of one patient.

    Attributes:
        name: name of the subject's folder.
        layout: the naming convention its files follow, see `LAYOUTS`.
        images: four paths in the order of `MODALITIES`; an absent modality's is empty, for inference only.
        label: path of the tumour mask, if there is one.
        palette: key of `PALETTES` that gives meaning to the values in the mask.
        label_source: "manual", "automatic", "expert" or "unknown"; None without a mask.
    """

    name: str
    layout: str
    images: tuple[str, ...]
    label: str | None
    palette: str
    label_source: str | None

    def __post_init__(self) -> None:
        """Refuse a name that files of its own cannot have.

        Raises:
            SubjectError: it is empty, hidden, too long, or holds a slash or what no text file can hold.
        """
        size = len(self.name.encode("utf-8", "surrogateescape"))
        printable = self.name.isprintable() and not set(self.name) & set("/\\")
        if not printable or not self.name.strip() or self.name.startswith(".") or size > MOST_NAME_BYTES:
            shown = ascii(self.name[:40])
            reason = (
                f"{shown} can name no output files (at most {MOST_NAME_BYTES} bytes of plain text, no slash, no dot)"
            )
            raise SubjectError(shown, self.folder, reason, "Rename the folder, or give another name")

    @property
    def folder(self) -> str:
        """Folder of the first image there is."""
        return os.path.dirname(next(filter(None, self.images), ""))

    @property
    def patient(self) -> str:
        """Name shared by all scans of a patient, told by the name alone.

        What ends a name and tells a time is taken off: a session (BIDS: all after `sub-<label>`), a time point, a
        visit, a date, before and after an operation; `-001` of BraTS >= 2023. What is left must tell a patient, that
        is, hold a digit; else all of `glioma_visit_3` would be one.
        """
        if known := _BIDS_PATIENT.match(self.name) or _PATIENT_OF.fullmatch(self.name):
            return next(group for group in known.groups() if group)
        name = re.sub(r"(?<=\d)(.*)-\d{3}$", r"\1", self.name) if self.layout == "brats2023" else self.name
        while re.search(r"\d", shorter := _TIME_POINT.sub("", name)) and shorter != name:
            name = shorter
        return name


@dataclass(frozen=True)
class Exclusion:
    """A subject that was left out, and why: one row of the exclusion report."""

    subject: str
    file: str
    reason: str
    remedy: str

    @classmethod
    def of(cls, error: SubjectError) -> Exclusion:
        """Exclusion for the subject that `error` complains of."""
        return cls(*error.args)

    def __str__(self) -> str:
        """All four on one line."""
        return f"{self.subject}: {self.file}: {self.reason}. {self.remedy}."
