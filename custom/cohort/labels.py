"""What the values of a tumour mask mean, and whether they mean anything."""

from __future__ import annotations

import numpy as np

from .subject import PALETTES, REGION_TISSUES, REGIONS, Subject, SubjectError

MOST_MASK_VALUES = 16


def check_labels(
    subject: Subject, voxels: np.ndarray, unknown_labels: str, allow_empty_mask: bool
) -> tuple[dict[str, int], list[str]]:
    """Count the voxels of each region in a mask of the subject's palette.

    Returns:
        Voxels per region, and warnings.

    Raises:
        SubjectError: an image in place of a mask, labels outside the palette, or no tumour, unless allowed.
    """
    counts = _count_labels(subject, voxels)
    palette = PALETTES[subject.palette]
    unknown = {label: count for label, count in counts.items() if label not in palette.values()}
    warnings = _check_unknown(subject, unknown, unknown_labels) if unknown else []
    regions = {region: sum(counts.get(palette[tissue], 0) for tissue in REGION_TISSUES[region]) for region in REGIONS}
    if regions["WT"] == 0:
        warnings.append(_check_empty(subject, allow_empty_mask))
    elif set(counts) - set(unknown) == {palette["core"]}:
        warnings.append(
            f"mask: holds only label {palette['core']}, which the palette reads as tumour core: "
            "check that it is no mask of the whole tumour or of the brain"
        )
    return regions, warnings


def _count_labels(subject: Subject, voxels: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(voxels[voxels != 0], return_counts=True)
    if values.size > MOST_MASK_VALUES:
        reason = f"the mask holds {values.size} distinct values from {values[0]:g} to {values[-1]:g}, as an image does"
        raise SubjectError(subject.name, str(subject.label), reason, "Check whether image and mask were swapped")
    if (values != np.rint(values)).any():
        reason = f"the mask holds values that are no whole numbers ({', '.join(f'{v:g}' for v in values)})"
        remedy = "Resample masks with nearest neighbour, and save them as integers"
        raise SubjectError(subject.name, str(subject.label), reason, remedy)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def _check_unknown(subject: Subject, unknown: dict[int, int], unknown_labels: str) -> list[str]:
    labels = ", ".join(f"{label} ({count} voxels)" for label, count in unknown.items())
    meaning = ", ".join(f"{tissue} {label}" for tissue, label in PALETTES[subject.palette].items())
    if unknown_labels == "background":
        return [f"mask: undocumented labels count as background: {labels}"]
    reason = f"the mask holds labels that palette {subject.palette} ({meaning}) does not know: {labels}"
    remedy = 'Correct the mask, keep the subject with unknown_labels="background", or give the palette it is written in'
    raise SubjectError(subject.name, str(subject.label), reason, remedy)


def _check_empty(subject: Subject, allow_empty_mask: bool) -> str:
    if not allow_empty_mask:
        remedy = "Correct the mask, or keep the subject with allow_empty_mask=True"
        raise SubjectError(subject.name, str(subject.label), "the mask holds no tumour", remedy)
    return "mask: holds no tumour"
