"""One subject's files: whole, on one grid, four different images, and a mask that means what its palette says."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from monai.utils import optional_import

from ..files import UserError
from .subject import MODALITIES, PALETTES, REGION_TISSUES, REGIONS, Exclusion, Subject, SubjectError
from .volumes import read_volume

GRID_TOLERANCE = 1e-3
MOST_LABELS = 6
LEAST_BACKGROUND = 0.05


@dataclass(frozen=True)
class _Image:
    what: str
    file: str
    shape: tuple[int, ...]
    affine: np.ndarray
    oriented: bool
    digest: bytes
    background: float


def check_subject(
    subject: Subject,
    unknown_labels: str = "exclude",
    allow_empty_mask: bool = False,
    require_label: bool = False,
) -> dict[str, Any]:
    """Read every file of a subject once, to the last byte, and say what is in it.

    Args:
        subject: its mask is checked where it has one.
        unknown_labels: "exclude" refuses a mask with labels outside its palette, "background" keeps it with a warning.
        allow_empty_mask: keep a mask without tumour, with a warning.
        require_label: refuse a subject without a mask.

    Returns:
        "shape" [x, y, z], "spacing" in mm, "orientation" such as "LPS", "voxels" per region (empty without a mask),
        "has_et" (None without a mask) and "warnings", sentences for people. All values are fit for JSON.

    Raises:
        SubjectError: the first thing found wrong.
        ValueError: `unknown_labels` is neither of the two.
    """
    if unknown_labels not in ("exclude", "background"):
        raise UserError(f'unknown_labels is {unknown_labels!r}: give "exclude" or "background".')
    if require_label and subject.label is None:
        folder = os.path.dirname(subject.images[0])
        raise SubjectError(subject.name, folder, "no tumour mask", "Add one, or use the subject for inference only")
    _check_different_files(subject)
    images = [_read_image(subject.name, *pair) for pair in zip(MODALITIES, subject.images, strict=True)]
    _check_different_voxels(subject.name, images)
    grid = _common_grid(subject.name, images)
    facts = _geometry(grid) | {"voxels": {}, "has_et": None, "warnings": _image_warnings(images)}
    if subject.label is not None:
        voxels, mask = read_volume(subject.name, subject.label)
        _check_grid(subject.name, grid, "mask", subject.label, mask.shape, mask.affine)
        facts["voxels"], warnings = check_labels(subject, voxels, unknown_labels, allow_empty_mask)
        facts["has_et"] = facts["voxels"]["ET"] > 0
        facts["warnings"] += warnings
    return facts


def _check_different_files(subject: Subject) -> None:
    seen: dict[str, str] = {}
    files = [*zip(MODALITIES, subject.images, strict=True), *([("mask", subject.label)] if subject.label else [])]
    for what, file in files:
        first = seen.setdefault(os.path.realpath(file), what)
        if first != what:
            reason = f"{first} and {what} are the same file"
            raise SubjectError(subject.name, file, reason, "Give each modality, and the mask, a file of its own")


def _read_image(subject: str, modality: str, file: str) -> _Image:
    voxels, image = read_volume(subject, file)
    low, high = voxels.min(), voxels.max()
    if low == high:
        reason = f"every voxel of the {modality} image is {low:g}" + (": the image is empty" if low == 0 else "")
        raise SubjectError(subject, file, reason, "Export the image again, or leave the subject out")
    labels = _looks_like_labels(voxels)
    if labels is not None:
        reason = f"the {modality} image holds only the values {', '.join(f'{v:g}' for v in labels)}, as a mask does"
        raise SubjectError(subject, file, reason, "Check whether image and mask were swapped, or misnamed")
    return _Image(
        what=modality,
        file=file,
        shape=voxels.shape,
        affine=image.affine,
        oriented=bool(image.header["sform_code"] or image.header["qform_code"]),
        digest=hashlib.blake2b(np.ascontiguousarray(voxels.T, dtype=np.float32)).digest(),
        background=1 - np.count_nonzero(voxels) / voxels.size,
    )


def _looks_like_labels(voxels: np.ndarray) -> np.ndarray | None:
    """The distinct values, if they are few and whole; a sparse sample settles nearly every true image."""
    if np.unique(voxels.ravel(order="K")[::97]).size > MOST_LABELS:
        return None
    values = np.unique(voxels)
    return values if values.size <= MOST_LABELS and (values == np.rint(values)).all() else None


def _check_different_voxels(subject: str, images: list[_Image]) -> None:
    seen: dict[bytes, _Image] = {}
    for image in images:
        first = seen.setdefault(image.digest, image)
        if first is not image:
            reason = f"{image.what} and {first.what} ({os.path.basename(first.file)}) hold the very same voxels"
            raise SubjectError(subject, image.file, reason, "One was copied over the other: find the right file")


def _common_grid(subject: str, images: list[_Image]) -> _Image:
    """The grid most images agree on, so that the odd one out is the one that is named."""
    grid = max(images, key=lambda image: sum(_same_grid(image, other.shape, other.affine) for other in images))
    for image in images:
        _check_grid(subject, grid, image.what, image.file, image.shape, image.affine)
    return grid


def _same_grid(grid: _Image, shape: tuple[int, ...], affine: np.ndarray) -> bool:
    return grid.shape == shape and np.allclose(grid.affine, affine, rtol=0, atol=GRID_TOLERANCE)


def _check_grid(subject: str, grid: _Image, what: str, file: str, shape: tuple[int, ...], affine: np.ndarray) -> None:
    if _same_grid(grid, shape, affine):
        return
    if grid.shape != shape:
        difference = f"shape {_size(shape)}, that of {grid.what} is {_size(grid.shape)}"
    else:
        difference = f"affine differs from that of {grid.what} by up to {np.abs(affine - grid.affine).max():.3g}"
    reason = f"{what} is on another grid: {difference} ({os.path.basename(grid.file)})"
    raise SubjectError(subject, file, reason, "Register and resample all files of the subject to one grid")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _geometry(grid: _Image) -> dict[str, Any]:
    return {
        "shape": [int(n) for n in grid.shape],
        "spacing": [round(float(mm), 6) for mm in nib.affines.voxel_sizes(grid.affine)],
        "orientation": "".join(nib.aff2axcodes(grid.affine)),
    }


def _image_warnings(images: list[_Image]) -> list[str]:
    warnings = [
        f"{image.what}: only {100 * image.background:.1f} % of voxels are 0, so the skull is probably not stripped"
        for image in images
        if image.background < LEAST_BACKGROUND
    ]
    return warnings + [
        f"{image.what}: the header has neither sform nor qform, so left and right are a guess"
        for image in images
        if not image.oriented
    ]


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


T = TypeVar("T")
MOST_WORKERS = 8
MOST_LINES = 10

logger = logging.getLogger("comnet")


def check_subjects(
    subjects: Sequence[Subject], num_workers: int | None = None, progress: bool = False, **options: Any
) -> tuple[list[tuple[Subject, dict[str, Any]]], list[Exclusion]]:
    """Run `check_subject` over all subjects in threads (unpacking and hashing let go of the interpreter lock).

    Args:
        subjects: what to check.
        num_workers: threads; by default one per processor core, at most 8, as each holds an image in memory.
        progress: show a bar with the time left on a terminal.
        options: passed on to `check_subject`.

    Returns:
        Good subjects with their facts, and exclusions, both in the order of `subjects`.
    """

    def check(subject: Subject) -> dict[str, Any] | Exclusion:
        try:
            return check_subject(subject, **options)
        except SubjectError as error:
            return Exclusion.of(error)

    workers = num_workers or min(MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        results = list(_with_bar(pool.map(check, subjects), len(subjects), progress))
    kept = [pair for pair in zip(subjects, results, strict=True) if isinstance(pair[1], dict)]
    return kept, [result for result in results if isinstance(result, Exclusion)]


def log_outcome(
    kept: Sequence[tuple[Subject, dict[str, Any]]], exclusions: Sequence[Exclusion], source: str, places: str = ""
) -> None:
    """Log how many subjects were kept, and as warnings what was excluded or is odd; `places` tells where to read on.

    Raises:
        ValueError: nothing was kept; quotes the first exclusions.
    """
    excluded = [str(exclusion) for exclusion in exclusions]
    if not kept:
        raise UserError(f"no usable subject in {source}: all {len(excluded)} are excluded. {_first(excluded, places)}")
    if not excluded:
        logger.info("%s: %d subjects kept, none excluded", source, len(kept))
    else:
        logger.warning(
            "%s: %d subjects kept, %d excluded. %s", source, len(kept), len(excluded), _first(excluded, places)
        )
    odd = [f"{subject.name}: {warning}." for subject, facts in kept for warning in facts["warnings"]]
    if odd:
        logger.warning("%s: %d warnings about subjects that were kept. %s", source, len(odd), _first(odd, places))


def _first(lines: Sequence[str], places: str) -> str:
    more = f" … and {len(lines) - MOST_LINES} more{places}." if len(lines) > MOST_LINES else ""
    return " | ".join(lines[:MOST_LINES]) + more


def _with_bar(results: Iterable[T], total: int, progress: bool) -> Iterator[T]:
    if not progress:
        return iter(results)
    tqdm, installed = optional_import("tqdm", name="tqdm")
    if not installed:
        logger.info("tqdm is not installed: checking %d subjects without a progress bar", total)
        return iter(results)
    return iter(tqdm(results, total=total, desc="checking subjects", unit="subject", disable=None))
