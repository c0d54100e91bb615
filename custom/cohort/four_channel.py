"""Four NIfTI files → one checked four-channel file, for tools that take one image a subject, such as MONAI Label."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..files import UserError
from ..inference.writer import image_like, write_whole
from . import MODALITIES, Cohort, check_subject, subject_from_files

logger = logging.getLogger("comnet")

KEPT_TYPES = ("uint8", "int16", "int32", "uint16", "float32")


class StackingError(UserError):
    """Some subjects were not stacked; the message names the first.

    Attributes:
        written: files of the subjects that were.
    """

    def __init__(self, message: str, written: Sequence[str]) -> None:
        super().__init__(message)
        self.written = list(written)


def stack(
    *inputs: str,
    output_dir: str = ".",
    t1n: str | None = None,
    t1c: str | None = None,
    t2w: str | None = None,
    flair: str | None = None,
    name: str | None = None,
) -> list[str]:
    """Make one four-channel file a subject, `<output_dir>/<subject>.nii.gz`: T1n, T1c, T2w, T2-FLAIR in this order.

    Every file is read to its last byte and checked as `comnet validate` does. A subject that fails is named with its
    reason, and the others are stacked.

    Args:
        inputs: subject folders, or dataset folders, or both.
        output_dir: folder for the files, for example the studies folder of a MONAI Label server.
        t1n: one subject instead of folders: its T1 before contrast.
        t1c: its T1 after contrast.
        t2w: its T2.
        flair: its T2-FLAIR.
        name: its name; by default that of the folder of `t1n`.

    Returns:
        The files written.

    Raises:
        ValueError: both or neither of folders and files were given.
        StackingError: subjects failed; all others were written first.
        SubjectError: the one subject given by files failed.
        OSError: a folder is absent or cannot be written.
    """
    files = {"t1n": t1n, "t1c": t1c, "t2w": t2w, "flair": flair}
    if bool(inputs) == any(files.values()) or (any(files.values()) and not all(files.values())):
        raise UserError("give folders, or one subject by all four of --t1n --t1c --t2w --flair")
    if not inputs:
        subject = subject_from_files(**files, name=name)
        check_subject(subject)
        return [stack_files(subject.images, Path(output_dir) / f"{subject.name}.nii.gz")]
    cohort = Cohort([str(folder) for folder in inputs])
    written = [_stack_item(item, output_dir) for item in cohort.inputs()]
    if cohort.exclusions:
        message = f"{len(cohort.exclusions)} subjects were not stacked; the first is {cohort.exclusions[0]}"
        raise StackingError(message, written)
    return written


def stack_files(images: Sequence[str], output: str | Path) -> str:
    """Write four checked files as one, `[X, Y, Z, 4]`, on their grid, whole or not at all.

    The type of the voxels is kept where all four share one that every tool reads, else it is float32. Geometry is the
    header's of the first file, field by field; free text in it, which may identify the patient, is left behind.

    Args:
        images: four files in order of `MODALITIES`, of one grid (see `check_subject`).
        output: file to write, ending in .nii or .nii.gz.

    Returns:
        The file written.

    Raises:
        ValueError: not one file a modality, or the output is one of them.
        OSError: a file cannot be read or written.
    """
    if len(images) != len(MODALITIES):
        raise UserError(f"{len(images)} files given, one each needed for {', '.join(MODALITIES)}")
    if Path(output).resolve() in [Path(image).resolve() for image in images]:
        raise UserError(f"{output} is one of the images: choose another name for the stack")
    loaded = [nib.load(image) for image in images]
    voxels = [np.asanyarray(image.dataobj) for image in loaded]
    types = {str(array.dtype.newbyteorder("=")) for array in voxels}
    dtype = types.pop() if len(types) == 1 and types <= set(KEPT_TYPES) else "float32"
    image = image_like(np.stack(voxels, axis=-1).astype(dtype), loaded[0].header)
    image.header["descrip"] = ", ".join(MODALITIES).encode()
    write_whole(image, Path(output))
    return str(output)


def _stack_item(item: dict[str, Any], output_dir: str) -> str:
    for warning in item["warnings"]:
        logger.warning("%s: %s", item["subject"], warning)
    return stack_files(item["image"], Path(output_dir) / f"{item['subject']}.nii.gz")
