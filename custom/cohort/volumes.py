"""One NIfTI file: read once, to its last byte and no further than its header says; written whole or not at all."""

from __future__ import annotations

import errno
import gzip
import math
import os
import stat
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ..files import FileError, UserError, whole_file
from .subject import SubjectError

MOST_VOXELS = 2**29
MOST_PADDING_BYTES = 2**20
DEFLATE_MOST = 1032
"""How many times a byte of a gzip stream can unpack to at most."""

_GZIP_START = b"\x1f\x8b"
_HEADER_BYTES = {1: 348, 2: 540}
_NIFTI2_STARTS = ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, OverflowError, ImageFileError, HeaderDataError)
_COPY_AGAIN = "Copy or download the file again"
_GREYSCALE = "Save it as a greyscale image of real numbers"


@dataclass
class Volume:
    """What a NIfTI file holds.

    Attributes:
        voxels: [x, y, z] or, where asked for, [x, y, z, channels]; intercept and slope are applied.
        header: as in the file.
        affine: voxels → mm, RAS, [4, 4]: the sform, else the qform.
        warnings: what is odd about it, without the name of the file.
    """

    voxels: np.ndarray
    header: nib.Nifti1Header
    affine: np.ndarray
    warnings: list[str] = field(default_factory=list)


def read_volume(subject: str, file: str, dimensions: int = 3) -> Volume:
    """Read a NIfTI file; axes of length 1 behind the ones that are wanted are taken off.

    `nibabel.load` stops at the last voxel it needs and so never sees the checksum that ends a gzip stream: the file is
    unpacked whole here, which checks it. What its header claims is believed only as far as the file can hold it.

    Args:
        subject: named in errors.
        file: path ending in .nii or .nii.gz.
        dimensions: 3, or 4 for channels in one file.

    Raises:
        SubjectError: absent, truncated or damaged file; a header that claims more than the file holds; other
            dimensions; no real numbers; an affine that cannot be inverted.
    """
    try:
        data = _read_bytes(subject, file)
        kind = nib.Nifti2Image if data[:4] in _NIFTI2_STARTS else nib.Nifti1Image
        image = kind.from_bytes(data)
        voxels = np.asanyarray(image.dataobj)
    except SubjectError:
        raise
    except MemoryError as error:
        raise SubjectError(subject, file, "there is not enough memory to unpack it", "Free some, or crop it") from error
    except _UNREADABLE as error:
        reason = f"not a whole NIfTI file ({_one_line(error)})"
        raise SubjectError(subject, file, reason, _COPY_AGAIN) from error
    if voxels.dtype.kind not in "iufb":
        raise SubjectError(subject, file, f"voxels are of type {voxels.dtype}, not plain numbers", _GREYSCALE)
    volume = Volume(voxels, image.header, image.affine)
    _take_off_axes(volume, dimensions)
    _check_dimensions(subject, file, volume.voxels, dimensions)
    _check_affine(subject, file, volume)
    return volume


def check_finite(subject: str, file: str, voxels: np.ndarray) -> None:
    """Refuse NaN and infinity.

    Raises:
        SubjectError: saying how many there are.
    """
    if voxels.dtype.kind != "f" or np.isfinite(voxels).all():
        return
    nan, infinite = np.count_nonzero(np.isnan(voxels)), np.count_nonzero(np.isinf(voxels))
    reason = f"{nan} voxels are NaN and {infinite} infinite"
    raise SubjectError(subject, file, reason, "Replace them, for example by 0 where they lie outside the brain")


def _read_bytes(subject: str, file: str) -> bytes:
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise SubjectError(subject, file, "it is no file", "Give the NIfTI file itself")
        with open(file, "rb") as raw:
            packed = raw.read(2) == _GZIP_START
            raw.seek(0)
            _check_ending(subject, file, packed, status.st_size)
            if not packed:
                return _read_stream(subject, file, raw, status.st_size)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _read_stream(subject, file, stream, status.st_size * DEFLATE_MOST)
    except FileNotFoundError as error:
        raise SubjectError(subject, file, "the file does not exist", "Put it there, or take it off the list") from error
    except EOFError as error:
        raise SubjectError(subject, file, "the file is truncated: its gzip stream has no end", _COPY_AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        reason = f"the file is damaged: its gzip stream does not unpack ({_one_line(error)})"
        raise SubjectError(subject, file, reason, _COPY_AGAIN) from error
    except OSError as error:
        raise SubjectError(subject, file, f"cannot be read ({_one_line(error)})", "Check its permissions") from error


def _check_ending(subject: str, file: str, packed: bool, size: int) -> None:
    named_packed = file.lower().endswith(".gz")
    if packed and not named_packed:
        raise SubjectError(subject, file, "it is compressed, but its name is not that of a .gz file", "Add .gz to it")
    if named_packed and not packed and size:
        reason = "the file is damaged or misnamed: it holds no gzip stream"
        raise SubjectError(subject, file, reason, f"{_COPY_AGAIN}, or take .gz off its name if it is a bare .nii")


def _read_stream(subject: str, file: str, stream: BinaryIO | gzip.GzipFile, most: int) -> bytes:
    """All bytes that the header accounts for; `most` is how many there can be by the size of the file."""
    start = stream.read(_HEADER_BYTES[2])
    if len(start) < _HEADER_BYTES[1]:
        reason = f"not a whole NIfTI file ({len(start)} bytes; the header alone takes {_HEADER_BYTES[1]})"
        raise SubjectError(subject, file, reason, _COPY_AGAIN)
    shape, claimed = _claimed(subject, file, start)
    size = " x ".join(map(str, shape))
    if claimed > most:
        reason = f"not a whole NIfTI file (its header claims {size} voxels, which are {claimed} bytes; it is too short)"
        raise SubjectError(subject, file, reason, _COPY_AGAIN)
    if math.prod(shape) > MOST_VOXELS:
        reason = f"its header claims {size} voxels, more than any scan of a head has"
        raise SubjectError(subject, file, reason, "Crop or resample it")
    data = start + stream.read(max(0, claimed - len(start)))
    padding = 0
    while chunk := stream.read(MOST_PADDING_BYTES):
        padding += len(chunk)
        if padding > MOST_PADDING_BYTES:
            reason = f"it goes on after the {size} voxels of its header: the file is damaged"
            raise SubjectError(subject, file, reason, _COPY_AGAIN)
    return data


def _claimed(subject: str, file: str, start: bytes) -> tuple[tuple[int, ...], int]:
    """Shape in the header, and the bytes of the whole file by it."""
    version = 2 if start[:4] in _NIFTI2_STARTS else 1
    header_class = nib.Nifti2Header if version == 2 else nib.Nifti1Header
    header = header_class(start[: _HEADER_BYTES[version]], check=False)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.kind not in "iufb":
        raise SubjectError(subject, file, f"voxels are of type {dtype}, not plain numbers", _GREYSCALE)
    if min(shape, default=0) < 1:
        reason = f"not a whole NIfTI file (its header claims {' x '.join(map(str, shape)) or 'no'} voxels)"
        raise SubjectError(subject, file, reason, _COPY_AGAIN)
    return shape, int(header["vox_offset"]) + math.prod(shape) * dtype.itemsize


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _take_off_axes(volume: Volume, dimensions: int) -> None:
    shape = volume.voxels.shape
    if dimensions == 4 and len(shape) == 5 and shape[3] == 1:  # how ITK stores several channels
        volume.voxels = volume.voxels[:, :, :, 0]
    elif len(shape) > dimensions and set(shape[dimensions:]) == {1}:
        volume.voxels = volume.voxels.reshape(shape[:dimensions], order="F")
        ordinal = "fourth" if dimensions == 3 else "fifth"
        volume.warnings.append(f"a {ordinal} axis of length 1 was taken off ({' x '.join(map(str, shape))})")


def _check_dimensions(subject: str, file: str, voxels: np.ndarray, dimensions: int) -> None:
    if voxels.ndim != dimensions:
        size = " x ".join(map(str, voxels.shape))
        reason = f"the image has {voxels.ndim} dimensions ({size}), not {dimensions}"
        remedy = "Save each modality as a three-dimensional file of its own"
        raise SubjectError(subject, file, reason, remedy if dimensions == 3 else f"{remedy}, or all four in one file")


def _check_affine(subject: str, file: str, volume: Volume) -> None:
    affine, header = volume.affine, volume.header
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        reason = "the affine in the header cannot be inverted: no voxel size, no orientation"
        raise SubjectError(subject, file, reason, "Export the image again with a valid sform or qform")
    if not (header["sform_code"] or header["qform_code"]):
        volume.warnings.append("the header has neither sform nor qform, so left and right are a guess")
    elif header["sform_code"] and header["qform_code"]:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in volume.voxels.shape[:3]], 1)).reshape(4, -1)
        apart = np.linalg.norm(((affine - header.get_qform()) @ corners)[:3], axis=0).max()
        if apart > nib.affines.voxel_sizes(affine).max():
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
    return image_class(array, None, header)


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
