"""One subject's files: whole, on one grid, four different images, and a mask that means what its palette says."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage
from tqdm import tqdm

from ..files import UserError
from .subject import (
    MODALITIES,
    PALETTES,
    REGION_TISSUES,
    REGIONS,
    Exclusion,
    Subject,
    SubjectError,
    check_required,
    missing_modalities,
    named_modalities,
)
from .volumes import Volume, read_volume

GRID_TOLERANCE = np.array([[1e-3, 1e-3, 1e-3, 0.05]] * 4)
"""How much affines of one grid may differ: a thousandth in directions, 0.05 mm in the origin."""

LEAST_SIZE = 8
SPACINGS_MM = (0.1, 20.0)
MOST_MM = 600.0
MOST_LABELS = 6
LEAST_BACKGROUND = 0.05
MOST_NOISE = 1e-3
MOST_GAP = 1e-2
MAGNITUDES = (1e-12, 1e12)
MOST_HIDDEN_BRAIN = 0.5
MOST_OUTSIDE = 0.02
MOST_OVER_BRIGHT = 20
"""Of 136 real images the brightest voxel is at most 1.9 times as bright as 99.9 % of them."""


@dataclass
class Scan:
    """The images of one subject on the grid of the first, ready to compute with.

    Attributes:
        images: four arrays [x, y, z] in the order of `MODALITIES`; of the file's own type unless put right. An absent
            modality is 0 everywhere.
        header: of the first file.
        affine: of the first file.
        brain: [x, y, z] bool, where any image is not 0.
        warnings: what is odd, and what was put right, in sentences for people.
        missing: keys of the modalities that are absent.
    """

    images: list[np.ndarray]
    header: nib.Nifti1Header
    affine: np.ndarray
    brain: np.ndarray
    warnings: list[str]
    missing: tuple[str, ...] = ()


def read_scan(subject: str, images: str | Sequence[str]) -> Scan:
    """Read the images of a subject, each file once; check them, and put right what can be put right without doubt.

    Put right, with a warning: a background that is not 0 (one value, noise around one, or NaN) becomes 0; a modality
    stored along other axes of the same grid is turned; an axis of length 1 behind the three is taken off.

    Args:
        subject: named in errors.
        images: four files in the order of `MODALITIES`, or one file with four channels in this order. An absent
            modality is an empty name, or a channel of zeros.

    Raises:
        SubjectError: the first thing found wrong; neither T1c nor T2-FLAIR is there.
    """
    if isinstance(images, str):
        scan = _read_channels(subject, images)
    elif len(images) == len(MODALITIES):
        named = {key: str(file) for key, file in zip(MODALITIES, images, strict=True) if file}
        _check_different_files(subject, named)
        scan = [read_volume(subject, file, what) for what, file in named.items()]
    else:
        reason = f"{len(images)} images, not one each for {', '.join(MODALITIES)}"
        raise SubjectError(subject, str(next(iter(images), "")), reason, "Give four files, or one with four channels")
    held = {image.what: image for image in scan}
    missing = missing_modalities([held.get(key) for key in MODALITIES])
    check_required(subject, missing, scan[0].file if scan else "")
    for image in scan:
        _check_values(image)
        _check_size(image)
        _turn(image, scan[0])
    grid = max(scan, key=lambda one: sum(_same_grid(one, o.voxels.shape, o.affine) for o in scan))
    for image in scan:  # against the grid of most, so that the odd one out is the one that is named
        _check_grid(grid, image)
    _check_different_voxels(scan)
    brain = _compare_brains(scan)
    warnings = [f"{image.what}: {warning}" for image in scan for warning in image.warnings]
    voxels = [held[key].voxels if key in held else np.zeros_like(scan[0].voxels) for key in MODALITIES]
    return Scan(voxels, scan[0].header, scan[0].affine, brain, warnings, missing)


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
        SubjectError: the first thing found wrong; a modality is missing.
        UserError: `unknown_labels` is neither of the two.
    """
    if unknown_labels not in ("exclude", "background"):
        raise UserError(f'unknown_labels is {unknown_labels!r}: give "exclude" or "background".')
    if missing := missing_modalities(subject.images):
        reason, remedy = f"no {named_modalities(missing)}", "Add it, or use the subject for inference only"
        raise SubjectError(subject.name, subject.folder, reason, remedy)
    if require_label and subject.label is None:
        remedy = "Add one, or use the subject for inference only"
        raise SubjectError(subject.name, subject.folder, "no tumour mask", remedy)
    if subject.label is not None:
        files = zip((*MODALITIES, "mask"), (*subject.images, subject.label), strict=True)
        _check_different_files(subject.name, dict(files))
    scan = read_scan(subject.name, subject.images)
    facts: dict[str, Any] = {
        "shape": [int(n) for n in scan.images[0].shape],
        "spacing": [round(float(mm), 6) for mm in voxel_sizes(scan.affine)],
        "orientation": "".join(nib.aff2axcodes(scan.affine)),
        "voxels": {},
        "has_et": None,
        "warnings": scan.warnings,
    }
    if subject.label is not None:
        mask = read_volume(subject.name, subject.label, "mask")
        mask.check_finite()
        _check_grid(
            Volume(subject.name, subject.images[0], MODALITIES[0], scan.images[0], scan.header, scan.affine), mask
        )
        facts["voxels"], warnings = _check_labels(mask, subject.palette, unknown_labels, allow_empty_mask)
        facts["has_et"] = facts["voxels"]["ET"] > 0
        tumour = mask.voxels != 0
        outside, voxels = np.count_nonzero(tumour & ~scan.brain), np.count_nonzero(tumour)
        if outside > MOST_OUTSIDE * voxels:
            warnings.append(f"{outside} of its {voxels} voxels lie outside the brain")
        new = [one for one in mask.warnings if f"{MODALITIES[0]}: {one}" not in scan.warnings]
        facts["warnings"] = [*scan.warnings, *(f"mask: {one}" for one in [*new, *warnings])]
    return facts


def read_mask(subject: str, file: str, palette: str) -> Volume:
    """Read a mask that a result is to be compared with; it may be without tumour.

    Args:
        subject: named in errors.
        file: a NIfTI file.
        palette: key of `PALETTES`.

    Raises:
        SubjectError: it cannot be read, or holds labels that its palette does not know.
    """
    mask = read_volume(subject, file, "mask")
    mask.check_finite()
    _check_labels(mask, palette, "exclude", True)
    return mask


def _read_channels(subject: str, file: str) -> list[Volume]:
    whole = read_volume(subject, file, dimensions=4)
    if whole.voxels.shape[3] != len(MODALITIES):
        reason = f"it holds {whole.voxels.shape[3]} channels, not one each for {', '.join(MODALITIES)}"
        raise whole.error(reason, "Make it of the four modalities with `comnet stack`")
    channels = [(what, whole.voxels[..., channel]) for channel, what in enumerate(MODALITIES)]
    parts = [replace(whole, what=what, voxels=voxels, warnings=[]) for what, voxels in channels if voxels.any()]
    for first in parts[:1]:
        first.warnings += whole.warnings
    return parts


def _check_different_files(subject: str, files: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for what, file in files.items():
        first = seen.setdefault(os.path.realpath(file), what)
        if first != what:
            reason = f"{first} and {what} are the same file"
            raise SubjectError(subject, file, reason, "Give each modality, and the mask, a file of its own")


def _check_values(image: Volume) -> None:
    image.voxels, background = zero_background(image.voxels)
    image.warnings += [f"the background is not 0 but {background}: taken as 0"] if background else []
    image.check_finite()
    low, high = float(image.voxels.min()), float(image.voxels.max())
    if low == high:
        reason = f"every voxel of the {image.what} image is {low:g}" + (": the image is empty" if low == 0 else "")
        raise image.error(reason, "Export the image again, or leave the subject out")
    if np.unique(image.voxels.ravel(order="K")[::97]).size <= MOST_LABELS:  # settles nearly every true image
        values = np.unique(image.voxels)
        if values.size <= MOST_LABELS and (values == np.rint(values)).all():
            held = ", ".join(f"{value:g}" for value in values)
            reason = f"the {image.what} image holds only the values {held}, as a mask does"
            raise image.error(reason, "Check whether image and mask were swapped, or misnamed")
    if not MAGNITUDES[0] < max(abs(low), abs(high)) < MAGNITUDES[1]:
        reason = f"the values of the {image.what} image run from {low:g} to {high:g}: no single precision can hold this"
        raise image.error(reason, "Look for damaged voxels, or rescale the image")
    shown = image.voxels.ravel(order="K")[::97]
    bright = np.percentile(shown[shown != 0], 99.9) if shown.any() else 0
    if high > MOST_OVER_BRIGHT * bright > 0:
        told = f"its brightest voxel is {high:g} where nearly all are below {bright:.4g}: normalisation suffers"
        image.warnings.append(f"{told}; look for damaged voxels")
    if (share := 1 - np.count_nonzero(image.voxels) / image.voxels.size) < LEAST_BACKGROUND:
        image.warnings.append(f"only {100 * share:.1f} % of voxels are 0, so the skull is probably not stripped")


def zero_background(voxels: np.ndarray) -> tuple[np.ndarray, str]:
    """Set the background to 0 where it is something else: NaN or infinity, one value, or slight noise around one.

    The background is what most of the border holds. NaN counts only where it hangs together with the border; voxels of
    0 in the brain stay foreground. Where the brain has negative values above the background, as in z-scores, the image
    is shifted until it starts just above 0.

    Args:
        voxels: [x, y, z].

    Returns:
        The voxels, unchanged where the background is 0 or none can be told, and what it was, in words, or nothing.
    """
    was = ""
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        bad = ~np.isfinite(voxels)
        if _border(bad).mean() >= 0.5:
            parts, _ = ndimage.label(bad)
            voxels, was = np.where(np.isin(parts, np.setdiff1d(_border(parts), 0)), 0, voxels), "NaN or infinite"
        if was == "" or not np.isfinite(voxels).all():
            return voxels, was
    low, high = float(voxels.min()), float(voxels.max())
    border = _border(voxels).astype(np.float64)
    value = float(np.median(border))
    apart = np.abs(border - value)
    noise = 0.0 if np.mean(apart == 0) >= 0.5 else 8 * float(np.quantile(apart, 0.75))
    if low == high or value == noise == 0 or noise > MOST_NOISE * max(high - value, value - low):
        return voxels, was
    background = np.abs(voxels - value) <= noise if noise else voxels == value
    floor, said = float(voxels[~background].min()), f"noise around {value:.2g}" if noise else f"{value:.4g}"
    if value < floor < 0:  # as in z-scores: 0 is no floor, and resampling would blend the brain's rim with its mean
        return np.where(background, 0, voxels - max(value, floor - MOST_GAP * (high - floor))), said
    return np.where(background, 0, np.where(voxels == 0, MOST_NOISE * (high - low), voxels) if value else voxels), said


def _border(voxels: np.ndarray) -> np.ndarray:
    """The voxels of the six faces, [n]."""
    return np.concatenate([np.moveaxis(voxels, axis, 0)[end].ravel() for axis in range(3) for end in (0, -1)])


def _check_size(image: Volume) -> None:
    size, spacing = np.array(image.voxels.shape), voxel_sizes(image.affine)
    if size.min() < LEAST_SIZE:
        reason = f"{image.what} has {_size(size)} voxels; fewer than {LEAST_SIZE} along an axis are no brain"
        raise image.error(reason, "Give the whole volume, not slices or a corner of it")
    if spacing.min() < SPACINGS_MM[0] or spacing.max() > SPACINGS_MM[1] or (size * spacing).max() > MOST_MM:
        sizes = " x ".join(f"{mm:.3g}" for mm in spacing)
        reason = f"{image.what} has voxels of {sizes} mm, {_size(size)} of them: that is no head"
        raise image.error(reason, "Correct the voxel sizes in the header; they are in mm")


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _turn(image: Volume, grid: Volume) -> None:
    """Bring an image stored along other axes of the same grid into line with it."""
    axes = np.linalg.inv(grid.affine[:3, :3]) @ image.affine[:3, :3]
    order = np.abs(axes).argmax(axis=0)
    if sorted(order) != [0, 1, 2] or np.allclose(axes, np.eye(3), atol=0.1):
        return
    turn = np.column_stack([order, np.sign(axes[order, range(3)])])
    affine = image.affine @ nib.orientations.inv_ornt_aff(turn, image.voxels.shape)
    voxels = nib.orientations.apply_orientation(image.voxels, turn)
    if _same_grid(grid, voxels.shape, affine):
        before, after = ("".join(nib.aff2axcodes(one)) for one in (image.affine, affine))
        image.voxels, image.affine = voxels, affine
        image.warnings.append(f"stored in another orientation of the same grid ({before}): brought into line ({after})")


def _same_grid(grid: Volume, shape: tuple[int, ...], affine: np.ndarray) -> bool:
    return grid.voxels.shape == shape and bool((np.abs(grid.affine - affine) <= GRID_TOLERANCE).all())


def _check_grid(grid: Volume, image: Volume) -> None:
    if _same_grid(grid, image.voxels.shape, image.affine):
        return
    if grid.voxels.shape != image.voxels.shape:
        difference = f"shape {_size(image.voxels.shape)}, that of {grid.what} is {_size(grid.voxels.shape)}"
    else:
        difference = f"affine differs from that of {grid.what} by up to {np.abs(image.affine - grid.affine).max():.3g}"
    reason = f"{image.what} is on another grid: {difference} ({os.path.basename(grid.file)})"
    raise image.error(reason, "Register and resample all files of the subject to one grid")


def _check_different_voxels(images: list[Volume]) -> None:
    sample = (slice(None, None, 7),) * 3  # settles nearly every pair
    for first, image in combinations(images, 2):
        if all(np.array_equal(first.voxels[part], image.voxels[part]) for part in (sample, ...)):
            reason = f"{image.what} and {first.what} ({os.path.basename(first.file)}) hold the very same voxels"
            raise image.error(reason, "One was copied over the other: find the right file")


def _compare_brains(images: list[Volume]) -> np.ndarray:
    """Where any image is not 0; warns of an image that is 0 in much of that."""
    shown = [image.voxels != 0 for image in images]
    brain = np.logical_or.reduce(shown)
    for image, mask in zip(images, shown, strict=True):
        if (share := 1 - np.count_nonzero(mask) / np.count_nonzero(brain)) > MOST_HIDDEN_BRAIN:
            part = f"is 0 in {100 * share:.0f} % of the brain that the others show"
            image.warnings.append(f"{part}: check its brain mask")
    return brain


MOST_MASK_VALUES = 16
LABEL_TOLERANCE = 0.02


def _check_labels(
    mask: Volume, palette_name: str, unknown_labels: str, allow_empty_mask: bool
) -> tuple[dict[str, int], list[str]]:
    """Count the voxels of each region; refuse an image, labels outside the palette, or no tumour, unless allowed.

    Returns:
        Voxels per region, and warnings.
    """
    counts, palette = _count_labels(mask), PALETTES[palette_name]
    warnings = []
    if unknown := {label: count for label, count in counts.items() if label not in palette.values()}:
        found = ", ".join(f"{label} ({count} voxels)" for label, count in unknown.items())
        if unknown_labels == "exclude":
            meaning = ", ".join(f"{tissue} {label}" for tissue, label in palette.items())
            reason = f"the mask holds labels that palette {palette_name} ({meaning}) does not know: {found}"
            remedy = 'Correct the mask, keep the subject with unknown_labels="background", or give the mask\'s palette'
            raise mask.error(reason, remedy)
        warnings.append(f"undocumented labels count as background: {found}")
    regions = {region: sum(counts.get(palette[tissue], 0) for tissue in REGION_TISSUES[region]) for region in REGIONS}
    if regions["WT"] == 0 and not allow_empty_mask:
        raise mask.error("the mask holds no tumour", "Correct it, or keep the subject with allow_empty_mask=True")
    if regions["WT"] == 0:
        warnings.append("holds no tumour")
    elif set(counts) - set(unknown) == {palette["core"]}:
        warnings.append(
            f"holds only label {palette['core']}, which the palette reads as tumour core: "
            "check that it is no mask of the whole tumour or of the brain"
        )
    return regions, warnings


def _count_labels(mask: Volume) -> dict[int, int]:
    """Voxels of each label; a tool that stored labels with a slope gives 0.9999 back for 1."""
    stored, counts = np.unique(mask.voxels[mask.voxels != 0], return_counts=True)
    values = np.rint(stored)
    if np.unique(values).size > MOST_MASK_VALUES:
        reason = f"the mask holds {stored.size} distinct values from {stored[0]:g} to {stored[-1]:g}, as an image does"
        raise mask.error(reason, "Check whether image and mask were swapped")
    if (between := stored[np.abs(stored - values) > LABEL_TOLERANCE]).size:
        shown = ", ".join(f"{v:.6g}" for v in between[:MOST_LABELS]) + (", …" if between.size > MOST_LABELS else "")
        remedy = "Resample masks with nearest neighbour, and save them as integers"
        raise mask.error(f"the mask holds values that are no whole numbers ({shown})", remedy)
    return {int(value): int(counts[values == value].sum()) for value in np.unique(values) if value}


MOST_WORKERS = 4
MOST_LINES = 10

logger = logging.getLogger("comnet")


def check_subjects(
    subjects: Sequence[Subject], num_workers: int | None = None, progress: bool = False, **options: Any
) -> tuple[list[tuple[Subject, dict[str, Any]]], list[Exclusion]]:
    """Run `check_subject`, with `options`, over all subjects in threads: unpacking lets go of the interpreter lock.

    By default there is a thread a core, at most 4, as each holds a subject's images in memory; `progress` is a bar on a
    terminal. Returns good subjects with their facts, and exclusions, both in the order of `subjects`.
    """

    def check(subject: Subject) -> dict[str, Any] | Exclusion:
        try:
            return check_subject(subject, **options)
        except SubjectError as error:
            return Exclusion.of(error)
        except UserError:
            raise
        except Exception as error:  # a fault of ours, or of the machine, must not cost the other subjects
            logger.debug("%s: the check failed", subject.name, exc_info=True)
            reason = f"the check itself failed ({type(error).__name__}: {error})"
            return Exclusion(subject.name, subject.folder, reason, "Report this, with the message")

    workers = num_workers or min(MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        quiet = None if progress else True  # None: no bar where there is no terminal
        bar = tqdm(pool.map(check, subjects), "checking subjects", len(subjects), unit="subject", disable=quiet)
        results = list(bar)
    kept = [pair for pair in zip(subjects, results, strict=True) if isinstance(pair[1], dict)]
    return kept, [result for result in results if isinstance(result, Exclusion)]


def log_outcome(
    kept: Sequence[tuple[Subject, dict[str, Any]]],
    exclusions: Sequence[Exclusion],
    source: str,
    report: Path | None = None,
) -> None:
    """Log how many subjects of `source` were kept, and as warnings what was excluded or is odd.

    `report` is the file that lists all exclusions, if one is written; the datalist beside it then has all warnings.

    Raises:
        UserError: nothing was kept; quotes the first exclusions.
    """
    excluded = _first([str(one) for one in exclusions], f" in {report}" if report else "")
    if not kept:
        raise UserError(f"no usable subject in {source}: all {len(exclusions)} are excluded. {excluded}")
    if not exclusions:
        logger.info("%s: %d subjects kept, none excluded", source, len(kept))
    else:
        logger.warning("%s: %d subjects kept, %d excluded. %s", source, len(kept), len(exclusions), excluded)
    odd = [f"{subject.name}: {warning}." for subject, facts in kept for warning in facts["warnings"]]
    if odd:
        first = _first(odd, " in the facts of the datalist" if report else "")
        logger.warning("%s: %d warnings about subjects that were kept. %s", source, len(odd), first)
    if (patients := len({subject.patient for subject, _ in kept})) < len(kept):
        logger.info("%s: %d subjects are scans of %d patients, whom folds keep together", source, len(kept), patients)


def _first(lines: Sequence[str], places: str) -> str:
    more = f" … and {len(lines) - MOST_LINES} more{places}." if len(lines) > MOST_LINES else ""
    return " | ".join(lines[:MOST_LINES]) + more
