"""One NIfTI file, read once and to its last byte."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from .subject import SubjectError

_COPY_AGAIN = "Copy or download the file again"
_NIFTI1_HEADER_BYTES = 348
_NIFTI2_STARTS = ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
_UNREADABLE = (OSError, EOFError, ValueError, OverflowError, zlib.error, ImageFileError, HeaderDataError)


def read_volume(subject: str, file: str) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Voxels (finite numbers, [x, y, z], intercept and slope applied) and the image they came from.

    `nibabel.load` stops at the last voxel it needs and so never sees the checksum that ends a gzip stream: the file is
    decompressed whole here, which checks it.

    Raises:
        SubjectError: absent, truncated or damaged file; not three-dimensional; no real numbers; NaN or infinite voxels;
            an affine that cannot be inverted.
    """
    data = _read_bytes(subject, file)
    if len(data) < _NIFTI1_HEADER_BYTES:
        reason = f"not a whole NIfTI file ({len(data)} bytes; the header alone takes {_NIFTI1_HEADER_BYTES})"
        raise SubjectError(subject, file, reason, _COPY_AGAIN)
    try:
        kind = nib.Nifti2Image if data[:4] in _NIFTI2_STARTS else nib.Nifti1Image
        image = kind.from_bytes(data)
        voxels = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        reason = f"not a whole NIfTI file ({_one_line(error)})"
        raise SubjectError(subject, file, reason, _COPY_AGAIN) from error
    _check_dimensions(subject, file, voxels)
    _check_finite(subject, file, voxels)
    _check_affine(subject, file, image.affine)
    return voxels, image


def _read_bytes(subject: str, file: str) -> bytes:
    try:
        data = Path(file).read_bytes()
    except FileNotFoundError as error:
        raise SubjectError(subject, file, "the file does not exist", "Put it there, or take it off the list") from error
    except OSError as error:
        raise SubjectError(subject, file, f"cannot be read ({_one_line(error)})", "Check its permissions") from error
    if not file.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise SubjectError(subject, file, "the file is truncated: its gzip stream has no end", _COPY_AGAIN) from error
    except (OSError, zlib.error) as error:
        reason = f"the file is damaged: its gzip stream does not unpack ({_one_line(error)})"
        raise SubjectError(subject, file, reason, _COPY_AGAIN) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_dimensions(subject: str, file: str, voxels: np.ndarray) -> None:
    if voxels.dtype.kind not in "iufb":
        reason = f"voxels are of type {voxels.dtype}, not plain numbers"
        raise SubjectError(subject, file, reason, "Save it as a greyscale image of real numbers")
    if voxels.ndim != 3 or 0 in voxels.shape:
        size = " x ".join(map(str, voxels.shape))
        reason = f"the image has {voxels.ndim} dimensions ({size}), not 3"
        raise SubjectError(subject, file, reason, "Save each modality as a three-dimensional file of its own")


def _check_finite(subject: str, file: str, voxels: np.ndarray) -> None:
    if voxels.dtype.kind != "f" or np.isfinite(voxels).all():
        return
    nan, infinite = np.count_nonzero(np.isnan(voxels)), np.count_nonzero(np.isinf(voxels))
    reason = f"{nan} voxels are NaN and {infinite} infinite"
    raise SubjectError(subject, file, reason, "Replace them, for example by 0 where they lie outside the brain")


def _check_affine(subject: str, file: str, affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        reason = "the affine in the header cannot be inverted: no voxel size, no orientation"
        raise SubjectError(subject, file, reason, "Export the image again with a valid sform or qform")
