"""What one subject is: four modalities, perhaps a mask, and the palette that mask is written in."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..files import UserError

MODALITIES = ("t1n", "t1c", "t2w", "flair")
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

_TIME_POINT = re.compile(r"-\d{3}$")


def palette_values(palette: str) -> dict[str, int]:
    """Return the label of each tissue in a palette.

    Raises:
        ValueError: the palette has no such name.
    """
    if palette not in PALETTES:
        raise UserError(f"unknown palette {palette!r}: choose one of {', '.join(PALETTES)}")
    return PALETTES[palette]


class SubjectError(UserError):
    """What is wrong with one subject, in which file, and what to do about it; `str()` is one line with all four."""

    def __init__(self, subject: str, file: str, reason: str, remedy: str) -> None:
        """Name subject and file; `reason` and `remedy` come without a full stop."""
        super().__init__(subject, file, reason, remedy)
        self.subject, self.file, self.reason, self.remedy = subject, file, reason, remedy

    def __str__(self) -> str:
        """All four on one line."""
        return f"{self.subject}: {self.file}: {self.reason}. {self.remedy}."


@dataclass(frozen=True)
class Subject:
    """One scan of one patient.

    Attributes:
        name: name of the subject's folder.
        layout: the naming convention its files follow, see `LAYOUTS`.
        images: four paths in the order of `MODALITIES`.
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

    @property
    def patient(self) -> str:
        """Name shared by all scans of a patient: BraTS >= 2023 ends a case name in a time point (`-000`, `-001`)."""
        return _TIME_POINT.sub("", self.name) if self.layout == "brats2023" else self.name


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
        return cls(error.subject, error.file, error.reason, error.remedy)

    def __str__(self) -> str:
        """All four on one line."""
        return f"{self.subject}: {self.file}: {self.reason}. {self.remedy}."
