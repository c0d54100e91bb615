"""One subject's files: whole, on one grid, four different images, and a mask that means what its palette says."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from monai.utils import optional_import
from scipy import ndimage

from ..files import UserError
from .subject import MODALITIES, PALETTES, REGION_TISSUES, REGIONS, Exclusion, Subject, SubjectError
from .volumes import Volume, check_finite, read_volume

GRID_TOLERANCE = 1e-3
LEAST_SIZE = 8
SPACINGS_MM = (0.1, 20.0)
MOST_MM = 600.0
MOST_LABELS = 6
LEAST_BACKGROUND = 0.05
MOST_NOISE = 1e-3
MAGNITUDES = (1e-12, 1e12)
LEAST_SHARED_BRAIN = 0.5


@dataclass
class Scan:
    """The four images of one subject on the grid of the first, ready to compute with.

    Attributes:
        images: four arrays [x, y, z] in the order of `MODALITIES`; of the file's own type unless put right.
        header: of the first file.
        affine: of the first file.
        warnings: what is odd, and what was put right, in sentences for people.
    """

    images: list[np.ndarray]
    header: nib.Nifti1Header
    affine: np.ndarray
    warnings: list[str]


@dataclass
class _Image:
    what: str
    file: str
    volume: Volume

    @property
    def voxels(self) -> np.ndarray:
        return self.volume.voxels

    @property
    def affine(self) -> np.ndarray:
        return self.volume.affine

    def warn(self, sentence: str) -> None:
        self.volume.warnings.append(sentence)


def read_scan(subject: str, images: str | Sequence[str]) -> Scan:
    """Read the images of a subject, each file once; check them, and put right what can be put right without doubt.

    Put right, with a warning: a background that is not 0 (one value, noise around one, or NaN) becomes 0; a modality
    stored along other axes of the same grid is turned; an axis of length 1 behind the three is taken off.

    Args:
        subject: named in errors.
        images: four files in the order of `MODALITIES`, or one file with four channels in this order.

    Raises:
        SubjectError: the first thing found wrong.
    """
    scan = _read_channels(subject, images) if isinstance(images, str) else _read_files(subject, images)
    for image in scan:
        _check_image(subject, image)
        _check_size(subject, image)
    for image in scan[1:]:
        _turn(image, scan[0])
    _check_grids(subject, scan)
    _check_different_voxels(subject, scan)
    _compare_brains(scan)
    warnings = [f"{image.what}: {warning}" for image in scan for warning in image.volume.warnings]
    first = scan[0].volume
    return Scan([image.voxels for image in scan], first.header, first.affine, list(dict.fromkeys(warnings)))


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
    if subject.label is not None:
        _check_different_files(
            subject.name, dict(zip((*MODALITIES, "mask"), (*subject.images, subject.label), strict=True))
        )
    scan = read_scan(subject.name, subject.images)
    facts: dict[str, Any] = {
        "shape": [int(n) for n in scan.images[0].shape],
        "spacing": [round(float(mm), 6) for mm in nib.affines.voxel_sizes(scan.affine)],
        "orientation": "".join(nib.aff2axcodes(scan.affine)),
        "voxels": {},
        "has_et": None,
        "warnings": scan.warnings,
    }
    if subject.label is not None:
        mask = _Image("mask", subject.label, read_volume(subject.name, subject.label))
        check_finite(subject.name, mask.file, mask.voxels)
        first = _Image(MODALITIES[0], subject.images[0], Volume(scan.images[0], scan.header, scan.affine))
        _check_grid(subject.name, first, mask)
        facts["voxels"], warnings = check_labels(subject, mask.voxels, unknown_labels, allow_empty_mask)
        facts["has_et"] = facts["voxels"]["ET"] > 0
        odd = [f"mask: {one}" for one in mask.volume.warnings if f"{first.what}: {one}" not in scan.warnings]
        facts["warnings"] = [*scan.warnings, *odd, *warnings]
    return facts


def _read_files(subject: str, files: Sequence[str]) -> list[_Image]:
    if len(files) != len(MODALITIES):
        reason = f"{len(files)} images, not one each for {', '.join(MODALITIES)}"
        raise SubjectError(
            subject, str(files[0]) if files else "", reason, "Give four files, or one with four channels"
        )
    named = dict(zip(MODALITIES, map(str, files), strict=True))
    _check_different_files(subject, named)
    return [_Image(what, file, read_volume(subject, file)) for what, file in named.items()]


def _read_channels(subject: str, file: str) -> list[_Image]:
    whole = read_volume(subject, file, dimensions=4)
    if whole.voxels.shape[3] != len(MODALITIES):
        reason = f"it holds {whole.voxels.shape[3]} channels, not one each for {', '.join(MODALITIES)}"
        raise SubjectError(subject, file, reason, "Make it of the four modalities with `comnet stack`")
    return [
        _Image(what, file, Volume(whole.voxels[..., channel], whole.header, whole.affine, list(whole.warnings)))
        for channel, what in enumerate(MODALITIES)
    ]


def _check_different_files(subject: str, files: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for what, file in files.items():
        first = seen.setdefault(os.path.realpath(file), what)
        if first != what:
            reason = f"{first} and {what} are the same file"
            raise SubjectError(subject, file, reason, "Give each modality, and the mask, a file of its own")


def _check_image(subject: str, image: _Image) -> None:
    _clear_outside(image)
    check_finite(subject, image.file, image.voxels)
    low, high = image.voxels.min(), image.voxels.max()
    if low == high:
        reason = f"every voxel of the {image.what} image is {low:g}" + (": the image is empty" if low == 0 else "")
        raise SubjectError(subject, image.file, reason, "Export the image again, or leave the subject out")
    labels = _looks_like_labels(image.voxels)
    if labels is not None:
        reason = f"the {image.what} image holds only the values {', '.join(f'{v:g}' for v in labels)}, as a mask does"
        raise SubjectError(subject, image.file, reason, "Check whether image and mask were swapped, or misnamed")
    if _clear_background(image, float(low), float(high)):
        low, high = image.voxels.min(), image.voxels.max()
    if not MAGNITUDES[0] < max(abs(float(low)), abs(float(high))) < MAGNITUDES[1]:
        reason = f"the values of the {image.what} image run from {low:g} to {high:g}: no single precision can hold this"
        raise SubjectError(subject, image.file, reason, "Look for damaged voxels, or rescale the image")
    if (background := 1 - np.count_nonzero(image.voxels) / image.voxels.size) < LEAST_BACKGROUND:
        image.warn(f"only {100 * background:.1f} % of voxels are 0, so the skull is probably not stripped")


def _looks_like_labels(voxels: np.ndarray) -> np.ndarray | None:
    """The distinct values, if they are few and whole; a sparse sample settles nearly every true image."""
    if np.unique(voxels.ravel(order="K")[::97]).size > MOST_LABELS:
        return None
    values = np.unique(voxels)
    return values if values.size <= MOST_LABELS and (values == np.rint(values)).all() else None


def _border(voxels: np.ndarray) -> np.ndarray:
    """The voxels of the six faces, [n]."""
    return np.concatenate([np.take(voxels, end, axis).ravel() for axis in range(3) for end in (0, -1)])


def _clear_outside(image: _Image) -> None:
    """Set NaN or infinity to 0 where it is the background: on most of the border, and what hangs together with that."""
    if image.voxels.dtype.kind != "f" or (bad := ~np.isfinite(image.voxels)).sum() == 0 or _border(bad).mean() < 0.5:
        return
    parts, _ = ndimage.label(bad)
    outside = np.isin(parts, np.setdiff1d(_border(parts), 0))
    image.volume.voxels = np.where(outside, 0, image.voxels)
    image.warn("the background is not 0 but NaN or infinite: taken as 0")


def _clear_background(image: _Image, low: float, high: float) -> bool:
    """Set a background of one value, or of slight noise around one, to 0; voxels of 0 in the brain stay foreground."""
    border = _border(image.voxels).astype(np.float64)
    value = float(np.median(border))
    apart = np.abs(border - value)
    noise = 0.0 if np.mean(apart == 0) >= 0.5 else 8 * float(np.quantile(apart, 0.75))
    if (value == 0 and noise == 0) or noise > MOST_NOISE * max(high - value, value - low):
        return False
    background = np.abs(image.voxels - value) <= noise if noise else image.voxels == value
    inside = np.where(image.voxels == 0, MOST_NOISE * (high - low), image.voxels)
    image.volume.voxels = np.where(background, 0, inside if value else image.voxels)
    image.warn(f"the background is not 0 but {value:.4g}" + (" with noise" if noise else "") + ": taken as 0")
    return True


def _check_size(subject: str, image: _Image) -> None:
    size, spacing = np.array(image.voxels.shape), nib.affines.voxel_sizes(image.affine)
    if size.min() < LEAST_SIZE:
        reason = (
            f"{image.what} has {_size(image.voxels.shape)} voxels; fewer than {LEAST_SIZE} along an axis are no brain"
        )
        raise SubjectError(subject, image.file, reason, "Give the whole volume, not slices or a corner of it")
    if spacing.min() < SPACINGS_MM[0] or spacing.max() > SPACINGS_MM[1] or (size * spacing).max() > MOST_MM:
        sizes = " x ".join(f"{mm:.3g}" for mm in spacing)
        reason = f"{image.what} has voxels of {sizes} mm, {_size(image.voxels.shape)} of them: that is no head"
        raise SubjectError(subject, image.file, reason, "Correct the voxel sizes in the header; they are in mm")


def _turn(image: _Image, grid: _Image) -> None:
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
        image.volume.voxels, image.volume.affine = voxels, affine
        image.warn(f"stored in another orientation of the same grid ({before}): brought into line ({after})")


def _check_different_voxels(subject: str, images: list[_Image]) -> None:
    for first, image in combinations(images, 2):
        sample = (slice(None, None, 7),) * 3  # settles nearly every pair
        if all(np.array_equal(first.voxels[part], image.voxels[part]) for part in (sample, ...)):
            reason = f"{image.what} and {first.what} ({os.path.basename(first.file)}) hold the very same voxels"
            raise SubjectError(subject, image.file, reason, "One was copied over the other: find the right file")


def _compare_brains(images: list[_Image]) -> None:
    """Warn of an image that is 0 in much of what the others show."""
    shown = [image.voxels != 0 for image in images]
    union = max(1, np.count_nonzero(np.logical_or.reduce(shown)))
    for image, mask in zip(images, shown, strict=True):
        if (share := np.count_nonzero(mask) / union) < LEAST_SHARED_BRAIN:
            image.warn(f"is 0 in {100 * (1 - share):.0f} % of the brain that the others show: check its brain mask")


def _check_grids(subject: str, images: list[_Image]) -> None:
    """Compare with the grid most images agree on, so that the odd one out is the one that is named."""
    grid = max(images, key=lambda image: sum(_same_grid(image, o.voxels.shape, o.affine) for o in images))
    for image in images:
        _check_grid(subject, grid, image)


def _same_grid(grid: _Image, shape: tuple[int, ...], affine: np.ndarray) -> bool:
    return grid.voxels.shape == shape and np.allclose(grid.affine, affine, rtol=0, atol=GRID_TOLERANCE)


def _check_grid(subject: str, grid: _Image, image: _Image) -> None:
    shape, affine = image.voxels.shape, image.affine
    if _same_grid(grid, shape, affine):
        return
    if grid.voxels.shape != shape:
        difference = f"shape {_size(shape)}, that of {grid.what} is {_size(grid.voxels.shape)}"
    else:
        difference = f"affine differs from that of {grid.what} by up to {np.abs(affine - grid.affine).max():.3g}"
    reason = f"{image.what} is on another grid: {difference} ({os.path.basename(grid.file)})"
    raise SubjectError(subject, image.file, reason, "Register and resample all files of the subject to one grid")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


MOST_MASK_VALUES = 16
LABEL_TOLERANCE = 0.02


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
    """Voxels of each label; a tool that stored labels with a slope gives 0.9999 back for 1."""
    stored, counts = np.unique(voxels[voxels != 0], return_counts=True)
    values = np.rint(stored)
    if np.unique(values).size > MOST_MASK_VALUES:
        reason = f"the mask holds {stored.size} distinct values from {stored[0]:g} to {stored[-1]:g}, as an image does"
        raise SubjectError(subject.name, str(subject.label), reason, "Check whether image and mask were swapped")
    if (between := stored[np.abs(stored - values) > LABEL_TOLERANCE]).size:
        shown = ", ".join(f"{v:.6g}" for v in between[:MOST_LABELS]) + (", …" if between.size > MOST_LABELS else "")
        remedy = "Resample masks with nearest neighbour, and save them as integers"
        reason = f"the mask holds values that are no whole numbers ({shown})"
        raise SubjectError(subject.name, str(subject.label), reason, remedy)
    labels: Counter[int] = Counter()
    for value, count in zip(values, counts, strict=True):
        labels[int(value)] += int(count)
    labels.pop(0, None)
    return dict(labels)


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
MOST_WORKERS = 4
MOST_LINES = 10

logger = logging.getLogger("comnet")


def check_subjects(
    subjects: Sequence[Subject], num_workers: int | None = None, progress: bool = False, **options: Any
) -> tuple[list[tuple[Subject, dict[str, Any]]], list[Exclusion]]:
    """Run `check_subject` over all subjects in threads (unpacking and hashing let go of the interpreter lock).

    Args:
        subjects: what to check.
        num_workers: threads; by default one per processor core, at most 4, as each holds a subject's images in memory.
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
        except UserError:
            raise
        except Exception as error:  # a fault of ours, or of the machine, must not cost the other subjects
            logger.debug("%s: the check failed", subject.name, exc_info=True)
            reason = f"the check itself failed ({type(error).__name__}: {error})"
            return Exclusion(subject.name, os.path.dirname(subject.images[0]), reason, "Report this, with the message")

    workers = num_workers or min(MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        results = list(_with_bar(pool.map(check, subjects), len(subjects), progress))
    kept = [pair for pair in zip(subjects, results, strict=True) if isinstance(pair[1], dict)]
    return kept, [result for result in results if isinstance(result, Exclusion)]


def log_outcome(
    kept: Sequence[tuple[Subject, dict[str, Any]]],
    exclusions: Sequence[Exclusion],
    source: str,
    report: Path | None = None,
) -> None:
    """Log how many subjects were kept, and as warnings what was excluded or is odd.

    Args:
        kept: subjects with their facts.
        exclusions: what was left out.
        source: the dataset, named in each line.
        report: file that lists all exclusions, if one is written; the datalist beside it then has all warnings.

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


def _with_bar(results: Iterable[T], total: int, progress: bool) -> Iterator[T]:
    if not progress:
        return iter(results)
    tqdm, installed = optional_import("tqdm", name="tqdm")
    if not installed:
        logger.info("tqdm is not installed: checking %d subjects without a progress bar", total)
        return iter(results)
    return iter(tqdm(results, total=total, desc="checking subjects", unit="subject", disable=None))
