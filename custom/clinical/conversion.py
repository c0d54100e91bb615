"""One series → one NIfTI volume whose geometry is known to be right."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from ..cohort import SubjectError
from ..cohort.volumes import image_at, write_whole
from .reading import NAMES, Series

TOLERANCE_MM = 0.02
MOST_SHEAR = 2e-3
_AGAIN = "Export the series again from the scanner or the PACS"


def convert(series: Series, target: str | Path, subject: str, modality: str) -> list[str]:
    """Write a series as a NIfTI file, [x, y, z], on the scanner's own grid.

    dcm2niix reads the pixels (all transfer syntaxes, enhanced multi-frame, rescale slope); that all slices are there,
    once each and evenly spaced is checked before, and afterwards that the volume lies where DICOM says.

    Args:
        series: of either kind.
        target: the file, ending in .nii.gz; written whole or not at all.
        subject: what the study is called in errors.
        modality: what the series is.

    Returns:
        Warnings.

    Raises:
        SubjectError: the series is no whole volume, or cannot be decoded; the reason names what is wrong.
    """
    where = f"{NAMES[modality]} (series {series.label})"
    if series.kind == "nifti":
        image, warnings = _read_nifti(series.files[0], subject, where), []
    else:
        headers = read_headers(series.files)
        warnings = check_slices(headers, subject, where)
        image = _by_dcm2niix(series.files, subject, where, Path(target).parent)
        _check_grid(image, headers, subject, where)
    voxels = np.asanyarray(image.dataobj)
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        voxels = np.nan_to_num(voxels, posinf=0, neginf=0)
        warnings.append(f"{where}: voxels that are NaN or infinite were set to 0")
    if voxels.max() <= voxels.min():
        raise SubjectError(subject, where, "all its voxels are equal: the image is empty", _AGAIN)
    # a new header: dcm2niix's description holds the time of the scan
    write_whole(image_at(voxels.astype(np.float32), image.affine), Path(target))
    return warnings


def read_headers(files: Sequence[str | Path]) -> list[Any]:
    """DICOM headers of a series, each instance once, in the order of their places."""
    from pydicom import dcmread

    headers: dict[str, Any] = {}
    for file in files:
        header = dcmread(file, stop_before_pixels=True)
        headers.setdefault(str(header.SOPInstanceUID), header)
    return sorted(headers.values(), key=lambda header: (_along(header), int(header.get("InstanceNumber") or 0)))


def slice_geometry(headers: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the slices of a series lie, for single-frame and for enhanced multi-frame images.

    Args:
        headers: of one series.

    Returns:
        Positions [n, 3] in mm, orientations [n, 6] and pixel spacings [n, 2] (rows, columns) in mm; LPS.

    Raises:
        ValueError: a header does not say where its slices are.
    """
    positions, orientations, spacings = [], [], []
    for header in headers:
        shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
        for frame in header.get("PerFrameFunctionalGroupsSequence") or [header]:
            positions.append(_item(frame, shared, header, "PlanePositionSequence", "ImagePositionPatient"))
            orientations.append(_item(frame, shared, header, "PlaneOrientationSequence", "ImageOrientationPatient"))
            spacings.append(_item(frame, shared, header, "PixelMeasuresSequence", "PixelSpacing"))
    return np.array(positions, float), np.array(orientations, float), np.array(spacings, float)


def check_slices(headers: Sequence[Any], subject: str, where: str) -> list[str]:
    """Make sure that a series is one whole volume: one orientation, one grid, no slice missing, doubled or sheared.

    Returns:
        Warnings.

    Raises:
        SubjectError: it is not; the reason says which slice.
    """

    def refuse(reason: str, remedy: str = _AGAIN) -> SubjectError:
        return SubjectError(subject, where, reason, remedy)

    try:
        positions, orientations, spacings = slice_geometry(headers)
    except ValueError as error:
        raise refuse(str(error)) from error
    sizes = {(int(header.Rows), int(header.Columns)) for header in headers}
    if len(sizes) > 1 or np.ptp(spacings, axis=0).max() > 1e-3:
        raise refuse(f"its slices have {len(sizes)} different sizes or pixel spacings")
    if np.ptp(orientations, axis=0).max() > 2e-3:
        raise refuse("its slices lie in different orientations", "Give the series of one orientation alone")
    row, column = orientations[0].reshape(2, 3)
    if abs(row @ column) > 1e-3:
        raise refuse("its rows and columns are not at right angles")
    normal = np.cross(row, column)
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    if len(steps) == 0:
        raise refuse("it has one slice only")
    if same := int((steps < TOLERANCE_MM).sum()):
        places = len(steps) + 1 - same
        if len(along) >= 2 * places:
            reason = f"each place was imaged several times ({len(along)} images at {places} places)"
            raise refuse(reason, "It is a series in time or of several echoes: choose another series")
        at = along[order][:-1][steps < TOLERANCE_MM][0]
        raise refuse(f"{same} of its slices doubled: the first lies {at - along.min():.1f} mm from the end")
    step = float(np.median(steps))
    gaps = np.flatnonzero(np.abs(steps - step) > max(TOLERANCE_MM, 0.01 * step))
    if len(gaps):
        ratio = steps[gaps] / step
        if np.allclose(ratio, np.round(ratio), atol=0.05) and ratio.min() > 1.5:
            lost = int(np.round(ratio).sum() - len(gaps))
            are = "slice is" if lost == 1 else "slices are"
            raise refuse(f"{lost} {are} missing, the first after slice {gaps[0] + 1} of {len(along)}")
        raise refuse(f"the distance of its slices varies from {steps.min():.2f} to {steps.max():.2f} mm")
    drift = np.diff(positions[order], axis=0) - np.outer(steps, normal)
    if np.abs(drift).max() > max(TOLERANCE_MM, 0.01 * step):
        raise refuse(
            "its slices are stacked askew (gantry tilt)", "Resample it to upright slices, or choose another series"
        )
    numbers = sorted(int(header.get("InstanceNumber") or 0) for header in headers)
    if len(headers) > 1 and numbers[-1] - numbers[0] + 1 > len(numbers) and 0 not in numbers:
        return [f"{where}: the numbers of its images have gaps, its slices do not"]
    return []


def _item(frame: Any, shared: Any, header: Any, group: str, name: str) -> Any:
    for source in (frame, shared):
        if source.get(group):
            return source.get(group)[0].get(name)
    if header.get(name) is None:
        raise ValueError(f"its headers do not give {name}")
    return header.get(name)


def _along(header: Any) -> float:
    if header.get("ImagePositionPatient") is None or header.get("ImageOrientationPatient") is None:
        return 0.0
    row, column = np.asarray(header.ImageOrientationPatient, float).reshape(2, 3)
    return float(np.round(np.asarray(header.ImagePositionPatient, float) @ np.cross(row, column), 3))


def _by_dcm2niix(files: Sequence[Path], subject: str, where: str, folder: Path) -> nib.Nifti1Image:
    import dcm2niix

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as temporary:
        source, result = Path(temporary, "in"), Path(temporary, "out")
        source.mkdir()
        result.mkdir()
        for k, file in enumerate(files):
            _link(file, source / f"{k:05d}.dcm")
        options = ["-b", "n", "-z", "n", "-f", "volume", "-w", "1", "-o", str(result), str(source)]
        run = subprocess.run([dcm2niix.bin, *options], capture_output=True, text=True, errors="replace", check=False)
        volumes = sorted(result.glob("*.nii"))
        if len(volumes) != 1:
            _explain_no_volume(files, run.stdout, len(volumes), subject, where)
        image = nib.load(volumes[0])
        return nib.Nifti1Image(np.asanyarray(image.dataobj).copy(), image.affine)


def _explain_no_volume(files: Sequence[Path], said: str, count: int, subject: str, where: str) -> None:
    from pydicom import dcmread

    if count > 1:
        reason = f"it does not convert to one volume but to {count}"
        raise SubjectError(subject, where, reason, "It is a series of several echoes, phases or times: choose another")
    for k, file in enumerate(files, start=1):
        image = dcmread(file)
        expected = int(image.Rows) * int(image.Columns) * int(image.BitsAllocated) // 8
        if not image.file_meta.TransferSyntaxUID.is_encapsulated and len(image.get("PixelData", b"")) < expected:
            raise SubjectError(subject, where, f"image {k} of {len(files)} is truncated", _AGAIN)
    one = dcmread(files[0], stop_before_pixels=True)
    syntax = getattr(one.file_meta.get("TransferSyntaxUID", ""), "name", "unknown")
    lines = [line.strip() for line in said.splitlines() if "rror" in line or "nsupported" in line]
    reason = f"dcm2niix cannot read its pixels ({syntax}{'; ' + _without_paths(lines[0]) if lines else ''})"
    raise SubjectError(subject, where, reason, f"{_AGAIN}, uncompressed (Explicit VR Little Endian)")


def _without_paths(line: str) -> str:
    return " ".join(word for word in line.split() if os.sep not in word)


def _link(file: Path, target: Path) -> None:
    try:
        target.symlink_to(os.path.abspath(file))
    except OSError:  # a file system without links
        shutil.copyfile(file, target)


def _check_grid(image: nib.Nifti1Image, headers: Sequence[Any], subject: str, where: str) -> None:
    """The corners of the volume must lie where DICOM puts them, and highdicom must find it a regular volume too."""
    import highdicom

    positions, orientations, spacings = slice_geometry(headers)
    order = np.argsort(positions @ np.cross(*orientations[0].reshape(2, 3)))
    row, column = orientations[0].reshape(2, 3)
    across = row * spacings[0, 1] * (int(headers[0].Columns) - 1)
    down = column * spacings[0, 0] * (int(headers[0].Rows) - 1)
    ends = positions[order][[0, -1]]
    dicom = np.array([end + a * across + b * down for end in ends for a in (0, 1) for b in (0, 1)]) * (-1, -1, 1)
    if image.ndim != 3:
        size = " x ".join(map(str, image.shape))
        raise SubjectError(subject, where, f"it has {image.ndim} dimensions ({size})", "Choose a series with three")
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.array(image.shape) - 1)
    nifti = apply_affine(image.affine, corners)
    apart = np.linalg.norm(dicom[:, None] - nifti[None], axis=2).min(axis=1).max()
    irregular = len(headers) > 1 and highdicom.spatial.get_series_volume_positions(headers)[0] is None
    if apart > 0.05 or irregular:
        reason = (
            f"its volume lies {apart:.1f} mm from where DICOM puts it" if apart > 0.05 else "it is no regular volume"
        )
        raise SubjectError(subject, where, reason, _AGAIN)


def _read_nifti(path: Path, subject: str, where: str) -> nib.Nifti1Image:
    try:
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises whatever a damaged file provokes
        reason = f"the file is truncated or damaged ({' '.join(str(error).split())[:120]})"
        raise SubjectError(subject, where, _hide(reason, path), "Copy it again") from error
    if voxels.ndim == 4 and voxels.shape[3] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or voxels.dtype.kind not in "iuf":
        raise SubjectError(subject, where, "it is no three-dimensional greyscale image", "Choose another series")
    if image.header["qform_code"] == 0 and image.header["sform_code"] == 0:
        raise SubjectError(
            subject,
            where,
            "its header says neither where the head lies nor which way round",
            "Convert it again from DICOM",
        )
    if abs(np.linalg.det(image.affine[:3, :3])) < 1e-6 or not np.isfinite(image.affine).all():
        raise SubjectError(subject, where, "its affine cannot be inverted", "Convert it again from DICOM")
    axes = image.affine[:3, :3] / voxel_sizes(image.affine)
    if (askew := np.abs(axes.T @ axes - np.eye(3)).max()) > MOST_SHEAR:
        reason = f"its axes are not at right angles (by {np.degrees(np.arcsin(min(askew, 1))):.1f} degrees)"
        raise SubjectError(subject, where, reason, "Resample it to a grid with upright slices")
    return nib.Nifti1Image(voxels, image.affine)


def _hide(text: str, path: Path) -> str:
    return text.replace(str(path), "the file").replace(path.name, "the file")
