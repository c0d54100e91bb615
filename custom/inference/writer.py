"""NIfTI output on the subject's own grid, with its spatial header bit for bit, written whole or not at all."""

from __future__ import annotations

import gzip
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import DtypeLike, KeysCollection, NdarrayOrTensor, PathLike
from monai.data import FolderLayoutBase, ImageWriter, NibabelWriter
from monai.transforms import SaveImaged
from monai.utils import convert_to_numpy, ensure_tuple, get_equivalent_dtype

from .. import __version__
from ..cohort.volumes import image_at, image_like, write_whole
from ..files import UserError
from ..transforms import subject_name

MARK = b"CoMNeT"


class NativeGridWriter(NibabelWriter):
    """Writer for MONAI's `SaveImaged` that gives masks and probabilities back on the input's own grid.

    `{"_target_": "SaveImaged", "keys": "pred", "writer": "custom.inference.NativeGridWriter", ...}`

    The header's geometry (pixdim, qform, sform, their codes, units) is copied field by field from the file named by
    `meta["filename_or_obj"]`, the first one where several images were joined. Free text and extensions of that file,
    which may identify the patient, are left behind. If it is gone or is no NIfTI file, a warning is given and the
    affine of the metadata is written as MONAI would. Whole-number arrays are stored as uint8, all others as float32,
    unscaled; an integer `output_dtype` also stores floats that hold whole numbers as uint8.

    Args:
        output_dtype: given by `SaveImaged`; see above.
        kwargs: passed on to MONAI.
    """

    def __init__(self, output_dtype: DtypeLike = np.float32, **kwargs: Any) -> None:
        super().__init__(output_dtype=output_dtype, **kwargs)
        self.output_dtype: Any = self.output_dtype
        self.source: Path | None = None

    def set_data_array(
        self,
        data_array: NdarrayOrTensor,
        channel_dim: int | None = 0,
        squeeze_end_dims: bool = True,
        **kwargs: Any,
    ) -> None:
        """Take the array, `[C, X, Y, Z]` by default; a single channel is dropped, a spatial axis of length 1 is not."""
        array = convert_to_numpy(data_array)
        requested = get_equivalent_dtype(self.output_dtype, np.ndarray)
        whole_numbers = array.dtype.kind in "bui" or np.issubdtype(requested or array.dtype, np.integer)
        self.output_dtype = np.uint8 if whole_numbers else np.float32
        super().set_data_array(array, channel_dim, squeeze_end_dims=False, **kwargs)
        self.data_obj: Any = self.data_obj
        if squeeze_end_dims and self.data_obj.shape[-1] == 1:
            self.data_obj = self.data_obj[..., 0]

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        """Take the metadata: the source file, the array's affine and, where `resample` is set, the original grid."""
        original_affine, self.affine, _ = self.get_meta_info(meta_dict)
        if resample and original_affine is not None:
            super().set_metadata(meta_dict, resample=True, **options)
        names = ensure_tuple((meta_dict or {}).get("filename_or_obj"))
        self.source = Path(names[0]) if names and isinstance(names[0], (str, os.PathLike)) else None

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        """Write `filename`, ending in .nii or .nii.gz.

        Raises:
            ValueError: the array is not on the grid of the source file, a label does not fit uint8, or the ending is
                another one.
            FileError: the file cannot be written. Neither it nor a part of it is left behind.
        """
        ImageWriter.write(self, filename, verbose=verbose)
        write_whole(self.image(), Path(filename))

    def image(self) -> nib.Nifti1Image:
        """Return the array with the metadata as an image in memory.

        Raises:
            ValueError: the array is not on the grid of the source file, or a label does not fit uint8.
        """
        data = convert_to_numpy(self.data_obj)
        with np.errstate(invalid="ignore"):
            array = data.astype(self.output_dtype)
        if array.dtype == np.uint8 and not np.array_equal(array, data):
            raise ValueError(f"labels from {data.min()} to {data.max()} are not whole numbers of 0 to 255")
        affine = np.eye(4) if self.affine is None else convert_to_numpy(self.affine)
        header = _read_header(self.source)
        if header is None:
            warnings.warn(f"no NIfTI source at {self.source}; using the affine of the metadata", stacklevel=2)
            image = image_at(array, affine)
        else:
            _check_grid(array.shape, affine, header, self.source)
            image = image_like(array, header)
        image.header["descrip"] = MARK + f" {__version__}".encode()
        image.header.set_intent("label" if array.dtype == np.uint8 else "none")
        return image


class SubjectLayout(FolderLayoutBase):
    """Names an output ``<output_dir>/<subject>/<subject>_<postfix>.nii.gz``, whatever dots the name has.

    MONAI's `FolderLayout` takes what follows the last dot for an extension: ``1.2.826.1`` and ``1.2.826.2`` would share
    one file.
    """

    def __init__(self, output_dir: PathLike, postfix: str) -> None:
        self.output_dir, self.postfix = output_dir, postfix

    def filename(self, subject: str, **kwargs: Any) -> PathLike:  # type: ignore[override]
        """Path of a subject's output.

        Raises:
            UserError: a file of that name is there that is not ours.
        """
        path = Path(self.output_dir, subject, f"{subject}_{self.postfix}.nii.gz")
        if os.path.lexists(path) and not is_ours(path):
            raise UserError(f"{path} is not CoMNeT's and is not replaced: choose another output_dir, or move it away")
        return path


class SaveSubjectd(SaveImaged):
    """MONAI's `SaveImaged` for results of a subject: see `SubjectLayout` and `NativeGridWriter`.

    `{"_target_": "custom.inference.SaveSubjectd", "keys": "pred", "output_dir": "@output_dir", "postfix": "seg"}`

    Args:
        keys: arrays ``[C, X, Y, Z]``, label maps (integers) or probabilities (floats).
        output_dir: folder of all outputs.
        postfix: what the output is: "seg", "prob" or "uncertainty".
    """

    def __init__(self, keys: KeysCollection, output_dir: PathLike, postfix: str) -> None:
        super().__init__(
            keys,
            output_dtype=np.uint8 if postfix == "seg" else np.float32,
            print_log=False,
            writer=NativeGridWriter,
            output_name_formatter=lambda meta, _: {"subject": subject_name(meta), "idx": None},
            folder_layout=SubjectLayout(output_dir, postfix),
        )


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether an image was written by `NativeGridWriter`, or is none at all: it may be replaced or deleted."""
    try:
        return bytes(nib.load(path).header["descrip"]).startswith(MARK)
    except (nib.filebasedimages.ImageFileError, gzip.BadGzipFile, EOFError, zlib.error):
        return True
    except (OSError, KeyError, ValueError):
        return False


def _read_header(source: Path | None) -> nib.Nifti1Header | None:
    if source is None:
        return None
    try:
        header = nib.load(source).header
    except (OSError, nib.filebasedimages.ImageFileError):
        return None
    return header if isinstance(header, nib.Nifti1Header) else None


def _check_grid(shape: tuple[int, ...], affine: np.ndarray, header: nib.Nifti1Header, source: Path | None) -> None:
    grid, best = header.get_data_shape()[:3], header.get_best_affine()
    placed = _same(affine, best) or any(_same(affine, f(coded=True)[0]) for f in (header.get_sform, header.get_qform))
    if shape[: len(grid)] != grid or not placed:
        raise ValueError(
            f"an array {shape} with affine {np.round(affine, 3).tolist()} is not on the grid of {source}, {grid} with "
            f"affine {np.round(best, 3).tolist()}: invert the preprocessing before saving, or set resample"
        )


def _same(affine: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and np.allclose(affine, other, rtol=0, atol=1e-3)
