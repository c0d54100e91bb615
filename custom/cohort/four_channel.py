"""Four NIfTI files → one checked four-channel file, for tools that take one image a subject, such as MONAI Label."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ..files import UserError
from .checks import read_scan
from .cohort import Cohort
from .layouts import DatasetDir
from .subject import MODALITIES, Exclusion, SubjectError, named_modalities
from .volumes import image_like, write_whole

logger = logging.getLogger("comnet")

KEPT_TYPES = ("uint8", "int16", "int32", "uint16", "float32")


class StackingError(UserError):
    """Some subjects were not stacked; the message names each.

    Attributes:
        written: files of the subjects that were.
    """

    def __init__(self, failed: Sequence[Exclusion], written: Sequence[str]) -> None:
        super().__init__(f"{len(failed)} subjects were not stacked: {' | '.join(map(str, failed))}")
        self.written = list(written)


def stack(dataset_dir: DatasetDir, output_dir: str | os.PathLike[str] = ".") -> list[str]:
    """Make one four-channel file a subject, `<output_dir>/<subject>.nii.gz`: T1n, T1c, T2w, T2-FLAIR in this order.

    Every file is read to its last byte and checked as `comnet validate` does. A subject that fails is named with its
    reason, and the others are stacked. An absent modality is a channel of zeros, with a warning: such a file is for
    inference only.

    Args:
        dataset_dir: subjects, see `find_subjects`.
        output_dir: folder for the files, for example the studies folder of a MONAI Label server.

    Returns:
        The files written.

    Raises:
        StackingError: subjects failed; all others were written first.
        UserError: there is no subject.
        OSError: a folder is absent or cannot be written.
    """
    cohort = Cohort(dataset_dir)
    written, failed = [], []
    for item in cohort.inputs():
        try:
            written.append(stack_files(item["image"], Path(output_dir) / f"{item['subject']}.nii.gz", item["subject"]))
        except SubjectError as error:
            failed.append(Exclusion.of(error))
    if failed := [*cohort.exclusions, *failed]:
        raise StackingError(failed, written)
    return written


def stack_files(images: Sequence[str], output: str | Path, subject: str = "subject") -> str:
    """Check a subject's files and write them as one, `[X, Y, Z, 4]`, on the grid of the first, whole or not at all.

    The type of the voxels is kept where all share one that every tool reads, else it is float32. Geometry is the
    header's of the first file, field by field; free text in it, which may identify the patient, is left behind.

    Args:
        images: four files in order of `MODALITIES`, with an empty name for an absent one.
        output: file to write, ending in .nii or .nii.gz, which is returned.
        subject: named in errors.

    Raises:
        SubjectError: see `read_scan`; another file than this very stack is where the output would be.
        ValueError: the output is one of the images.
        OSError: the file cannot be written.
    """
    if Path(output).resolve() in [Path(image).resolve() for image in images if image]:
        raise UserError(f"{output} is one of the images: choose another name for the stack")
    scan = read_scan(subject, images)
    if scan.missing:
        logger.warning("%s: no %s: stacked as zeros", subject, named_modalities(scan.missing))
    for warning in scan.warnings:
        logger.warning("%s: %s", subject, warning)
    types = {str(array.dtype.newbyteorder("=")) for array in scan.images}
    dtype = types.pop() if len(types) == 1 and types <= set(KEPT_TYPES) else "float32"
    image = image_like(np.stack(scan.images, axis=-1).astype(dtype), scan.header)
    image.header["descrip"] = ", ".join(MODALITIES).encode()
    if os.path.lexists(output) and not _is_same(image, output):
        reason = f"there is another file of this name already, of somebody else or of another {subject}"
        raise SubjectError(subject, str(output), reason, "Move it away, or choose another output_dir")
    write_whole(image, Path(output))
    return str(output)


def _is_same(stack: nib.Nifti1Image, path: str | os.PathLike[str]) -> bool:
    try:
        there = nib.load(path)
        return np.allclose(there.affine, stack.affine) and np.array_equal(there.dataobj, stack.dataobj)
    except Exception:  # nibabel raises whatever a damaged file provokes
        return False
