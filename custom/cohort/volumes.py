"""One NIfTI file: read once, to its last byte and no further than its header says; written whole or not at all."""

from __future__ import annotations

import errno
import gzip
import math
import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ..files import FileError, UserError, whole_file
from .subject import SubjectError

MOST_VOXELS = 2**29
MOST_PADDING_BYTES = 2**20
DEFLATE_MOST = 1032
"""How many times a byte of a gzip stream can unpack to at most."""

_GZIP_START = b"\x1f\x8b"
_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540
_NIFTI2_STARTS = ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, OverflowError, ImageFileError, HeaderDataError)
_COPY_AGAIN = "Copy or download the file again"


@dataclass
class Volume:
    """What a NIfTI file of a subject holds, or one channel of it.

    Attributes:
        subject: named in errors.
        file: named in errors.
        what: key of the modality, or "mask".
        voxels: [x, y, z] or, where asked for, [x, y, z, channels]; intercept and slope are applied.
        header: as in the file.
        affine: voxels → mm, RAS, [4, 4]: the sform, else the qform.
        warnings: what is odd about it, without the name of the file.
    """

    subject: str
    file: str
    what: str
    voxels: np.ndarray
    header: nib.Nifti1Header
    affine: np.ndarray
    warnings: list[str] = field(default_factory=list)

    def error(self, reason: str, remedy: str) -> SubjectError:
        """The error to raise about this file."""
        return SubjectError(self.subject, self.file, reason, remedy)

    def check_finite(self) -> None:
        """Refuse NaN and infinity.

        Raises:
            SubjectError: saying how many there are.
        """
        if self.voxels.dtype.kind == "f" and not np.isfinite(self.voxels).all():
            nan, infinite = np.count_nonzero(np.isnan(self.voxels)), np.count_nonzero(np.isinf(self.voxels))
            remedy = "Replace them, for example by 0 where they lie outside the brain"
            raise self.error(f"{nan} voxels are NaN and {infinite} infinite", remedy)


def read_volume(subject: str, file: str, what: str = "image", dimensions: int = 3) -> Volume:
    """Read a NIfTI file of a subject; axes of length 1 behind the ones that are wanted are taken off.

    `nibabel.load` stops at the last voxel it needs and so never sees the checksum that ends a gzip stream: the file is
    unpacked whole here, which checks it. What its header claims is believed only as far as the file can hold it.

    Args:
        subject: named in errors, as is file.
        file: path ending in .nii or .nii.gz.
        what: key of the modality, or "mask".
        dimensions: 3, or 4 for channels in one file.

    Raises:
        SubjectError: absent, truncated or damaged file; a header that claims more than the file holds; other
            dimensions; no real numbers; an affine that cannot be inverted.
    """
    error = partial(SubjectError, subject, file)
    try:
        data = _read_file(file, error)
        image = (nib.Nifti2Image if data[:4] in _NIFTI2_STARTS else nib.Nifti1Image).from_bytes(data)
        volume = Volume(subject, file, what, np.asanyarray(image.dataobj), image.header, image.affine)
    except SubjectError:
        raise
    except MemoryError as cause:
        raise error("there is not enough memory to unpack it", "Free some, or crop it") from cause
    except FileNotFoundError as cause:
        raise error("the file does not exist", "Put it there, or take it off the list") from cause
    except EOFError as cause:
        raise error("the file is truncated: its gzip stream has no end", _COPY_AGAIN) from cause
    except (gzip.BadGzipFile, zlib.error) as cause:
        reason = f"the file is damaged: its gzip stream does not unpack ({_one_line(cause)})"
        raise error(reason, _COPY_AGAIN) from cause
    except PermissionError as cause:
        raise error(f"cannot be read ({_one_line(cause)})", "Check its permissions") from cause
    except _UNREADABLE as cause:
        raise error(f"not a whole NIfTI file ({_one_line(cause)})", _COPY_AGAIN) from cause
    _take_off_axes(volume, dimensions)
    _check_affine(volume)
    return volume


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_file(file: str, error: Callable[[str, str], SubjectError]) -> bytes:
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise error("it is no file", "Give the NIfTI file itself")
    with open(file, "rb") as raw:
        packed = raw.read(2) == _GZIP_START
        raw.seek(0)
        if packed and not file.lower().endswith(".gz"):
            raise error("it is compressed, but its name is not that of a .gz file", "Add .gz to it")
        if file.lower().endswith(".gz") and not packed and status.st_size:
            remedy = f"{_COPY_AGAIN}, or take .gz off its name if it is a bare .nii"
            raise error("the file is damaged or misnamed: it holds no gzip stream", remedy)
        if not packed:
            return _read_stream(raw, status.st_size, error)
        with gzip.GzipFile(fileobj=raw) as stream:
            return _read_stream(stream, status.st_size * DEFLATE_MOST, error)


def _read_stream(stream: BinaryIO | gzip.GzipFile, most: int, error: Callable[[str, str], SubjectError]) -> bytes:
    """All bytes that the header accounts for; `most` is how many there can be by the size of the file."""
    start = stream.read(_NIFTI2_BYTES)
    if len(start) < _NIFTI1_BYTES:
        reason = f"not a whole NIfTI file ({len(start)} bytes; the header alone takes {_NIFTI1_BYTES})"
        raise error(reason, _COPY_AGAIN)
    if start[:4] in _NIFTI2_STARTS:
        header = nib.Nifti2Header(start[:_NIFTI2_BYTES], check=False)
    else:
        header = nib.Nifti1Header(start[:_NIFTI1_BYTES], check=False)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    size = " x ".join(map(str, shape))
    if dtype.kind not in "iufb":
        raise error(f"voxels are of type {dtype}, not plain numbers", "Save it as a greyscale image of real numbers")
    claimed = int(header["vox_offset"]) + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 1 or claimed > most:
        reason = f"its header claims {size or 'no'} voxels, which are {claimed} bytes; it is too short"
        raise error(f"not a whole NIfTI file ({reason})", _COPY_AGAIN)
    if math.prod(shape) > MOST_VOXELS:
        raise error(f"its header claims {size} voxels, more than any scan of a head has", "Crop or resample it")
    data = start + stream.read(max(0, claimed - len(start)))
    padding = 0
    while chunk := stream.read(MOST_PADDING_BYTES):
        padding += len(chunk)
        if padding > MOST_PADDING_BYTES:
            raise error(f"it goes on after the {size} voxels of its header: the file is damaged", _COPY_AGAIN)
    return data


def _take_off_axes(volume: Volume, dimensions: int) -> None:
    shape = volume.voxels.shape
    size = " x ".join(map(str, shape))
    if dimensions == 4 and len(shape) == 5 and shape[3] == 1:  # how ITK stores several channels
        volume.voxels = volume.voxels[:, :, :, 0]
    elif len(shape) > dimensions and set(shape[dimensions:]) == {1}:
        volume.voxels = volume.voxels.reshape(shape[:dimensions], order="F")
        ordinal = "fourth" if dimensions == 3 else "fifth"
        volume.warnings.append(f"a {ordinal} axis of length 1 was taken off ({size})")
    if volume.voxels.ndim != dimensions:
        remedy = "Save each modality as a three-dimensional file of its own"
        remedy = remedy if dimensions == 3 else f"{remedy}, or all four in one file"
        raise volume.error(f"the image has {len(shape)} dimensions ({size}), not {dimensions}", remedy)


def _check_affine(volume: Volume) -> None:
    affine, header = volume.affine, volume.header
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        reason = "the affine in the header cannot be inverted: no voxel size, no orientation"
        raise volume.error(reason, "Export the image again with a valid sform or qform")
    if not (header["sform_code"] or header["qform_code"]):
        volume.warnings.append("the header has neither sform nor qform, so left and right are a guess")
    elif header["sform_code"] and header["qform_code"]:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in volume.voxels.shape[:3]], 1)).reshape(4, -1)
        apart = np.linalg.norm(((affine - header.get_qform()) @ corners)[:3], axis=0).max()
        if apart > voxel_sizes(affine).max():
            volume.warnings.append(f"sform and qform differ by up to {apart:.3g} mm: the sform is used")


SPATIAL_FIELDS = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)


def image_like(array: np.ndarray, source: nib.Nifti1Header) -> nib.Nifti1Image:
    """Make an image of voxels with the geometry of a header, field by field, and nothing else of it."""
    image_class = nib.Nifti2Image if isinstance(source, nib.Nifti2Header) else nib.Nifti1Image
    header = image_class.header_class()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    for name in SPATIAL_FIELDS:
        header[name] = source[name]
    header["pixdim"][:4] = source["pixdim"][:4]
    return image_class(array, header.get_best_affine(), header)


def image_at(voxels: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """Make an image; qform and sform both say that `affine` [4, 4] leads from voxels to the scanner's mm, RAS."""
    image = nib.Nifti1Image(voxels, affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    return image


def write_whole(image: nib.Nifti1Image, path: Path) -> None:
    """Save `image` as `path`, whole or not at all.

    Raises:
        ValueError: `path` ends in neither .nii nor .nii.gz.
        FileError: it cannot be written; nothing is left behind, and a file already there stays as it was.
    """
    if not path.name.lower().endswith((".nii.gz", ".nii")):
        raise UserError(f"{path}: only NIfTI is written; use a name that ends in .nii.gz or .nii")
    try:
        with whole_file(path) as partial:
            nib.save(image, partial)
    except OSError as error:
        remedy = "choose a folder that is writable and has space"
        advice = f"cannot write {path} ({error.strerror or error}): {remedy}"
        raise FileError(error.errno or errno.EIO, advice) from error
