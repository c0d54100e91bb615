"""Masks back to where the patient was scanned: on T1c's own grid, on the other series', and as DICOM-SEG."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from .. import __version__
from ..cohort import MODALITIES, PALETTES, REGION_TISSUES, REGIONS, SubjectError, named_modalities
from ..cohort.volumes import image_at, write_whole
from ..files import whole_file
from .conversion import read_headers, slice_geometry
from .reading import read_study
from .registration import LPS
from .study import Prepared, study_folder

if TYPE_CHECKING:
    from ..inference import PostprocessRegions

logger = logging.getLogger("comnet")

UID_ROOT_WORDS = ("comnet", "segmentation")
# DICOM PS3.16, context groups 7150 and 7168 (brain lesion segmentation types with necrosis): DICOM itself takes the
# code for enhancement from the NCI thesaurus, as SNOMED CT has none, and that of necrosis for all non-enhancing core.
CATEGORY = ("49755003", "SCT", "Morphologically Abnormal Structure")
SEGMENTS = {
    "core": ("Necrotic and non-enhancing tumor core", ("6574001", "SCT", "Necrosis")),
    "oedema": ("Peritumoral edema", ("79654002", "SCT", "Edema")),
    "enhancing": ("Enhancing tumor", ("C113842", "NCIt", "Enhancing Lesion")),
}
BRAIN = ("12738006", "SCT", "Brain")
COLOURS = {"core": (0xF0, 0xE4, 0x42), "oedema": (0x56, 0xB4, 0xE9), "enhancing": (0xD5, 0x5E, 0x00)}


def deliver(
    prepared: Prepared,
    probabilities: nib.Nifti1Image,
    folder: str | Path,
    postprocess: PostprocessRegions,
    every_series: bool = False,
    pictures: bool = True,
) -> tuple[nib.Nifti1Image, list[str]]:
    """Bring the masks of a segmented study back to where it was scanned.

    Writes `<name>_seg_<modality>.nii.gz` on the grid of the reference as scanned (of every series by choice),
    `<name>_scanned.png` and, where DICOM came in, `<name>_seg.dcm`, a DICOM Segmentation, which carries the patient's
    identity.

    Args:
        prepared: the study.
        probabilities: of ET, TC and WT, [x, y, z, 3], on the prepared grid.
        folder: for the results.
        postprocess: makes a label map of probabilities.
        every_series: write a mask on the grid of each series.
        pictures: draw the slices as scanned with outlines.

    Returns:
        The label map on the reference's grid, and warnings, those of the preparation among them.

    Raises:
        SubjectError: the DICOM study is no longer there.
    """
    from monai.data import MetaTensor

    from .overlays import draw_segmentation

    folder, name, palette = Path(folder), prepared.name, postprocess.palette
    missing = [modality for modality in MODALITIES if modality not in prepared.images]
    warnings = [f"without {named_modalities(missing)}: less accurate"] if missing else []
    warnings += prepared.record["warnings"]
    for modality in prepared.images if every_series else [prepared.reference]:
        regions, scanned = to_scanned(probabilities, prepared, modality)
        label_map = postprocess(MetaTensor(regions, affine=scanned.affine))[0].numpy()
        mask = save_mask(label_map, scanned, folder / f"{name}_seg_{modality}.nii.gz")
        if modality != prepared.reference:
            continue
        delivered = mask
        headers = reference_headers(prepared)
        if headers and label_map.any():
            warnings += write_dicom_seg(folder / f"{name}_seg.dcm", label_map, scanned, headers, palette)
        if not label_map.any():
            (folder / f"{name}_seg.dcm").unlink(missing_ok=True)
            warnings.append("no tumour was found" + (": there is no DICOM-SEG" if headers else ""))
        if not pictures:
            continue
        brain = nib.load(prepared.folder / "brain_mask.nii.gz")
        inside = ndimage.affine_transform(
            np.asanyarray(brain.dataobj),
            np.linalg.inv(brain.affine) @ scanned.affine,
            output_shape=scanned.shape,
            order=0,
        )
        values = PALETTES[palette]
        shown = [np.isin(label_map, [values[tissue] for tissue in REGION_TISSUES[region]]) for region in REGIONS]
        draw_segmentation(folder / f"{name}_scanned.png", scanned, np.stack(shown), inside > 0, name, warnings)
    for warning in warnings:
        logger.warning("%s: %s", name, warning)
    return delivered, warnings


def to_scanned(
    probabilities: nib.Nifti1Image, prepared: Prepared, modality: str | None = None
) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Probabilities of ET, TC and WT on the grid of a series as it was scanned.

    A voxel of a thick slice gets the mean over its thickness, as the scanner's own signal does.

    Args:
        probabilities: [x, y, z, 3] in [0, 1], on the prepared grid.
        prepared: the study.
        modality: whose grid; by default the reference's, T1c.

    Returns:
        Float32 [3, x, y, z] in the order ET, TC, WT; and the series they lie on.
    """
    modality = modality or prepared.reference
    scanned = nib.load(prepared.scanned(modality))
    pose = np.eye(4)
    if modality != prepared.reference:  # places of the reference → places of the series
        pose = np.array(prepared.record["registration"][modality]["matrix_ras"])
    to_prepared = np.linalg.inv(probabilities.affine) @ np.linalg.inv(pose) @ scanned.affine
    values = np.asanyarray(probabilities.dataobj, dtype=np.float32)
    steps = np.linalg.norm(to_prepared[:3, :3], axis=0)
    thick = int(np.argmax(steps))
    parts = max(1, round(float(steps[thick])))
    result = np.zeros((3, *scanned.shape), np.float32)
    for part in range(parts):
        inside = to_prepared.copy()
        inside[:3, 3] += to_prepared[:3, thick] * ((part + 0.5) / parts - 0.5)
        for channel in range(3):
            result[channel] += ndimage.affine_transform(
                values[..., channel], inside, output_shape=scanned.shape, order=1
            )
    return np.clip(result / parts, 0, 1), scanned


def save_mask(label_map: np.ndarray, scanned: nib.Nifti1Image, path: str | Path) -> nib.Nifti1Image:
    """Write a label map [x, y, z], uint8, with the geometry of the series that it lies on; whole or not at all."""
    image = image_at(label_map.astype(np.uint8), scanned.affine)
    write_whole(image, Path(path))
    return image


def write_dicom_seg(
    path: str | Path,
    label_map: np.ndarray,
    scanned: nib.Nifti1Image,
    headers: Sequence[Any],
    palette: str = "brats2023",
    algorithm: str = "CoMNeT",
) -> list[str]:
    """Write a label map as a DICOM Segmentation (BINARY) of the series that it lies on.

    It carries the patient's and the study's identity, as it must to be filed with them.

    Args:
        path: the .dcm file, written whole or not at all.
        label_map: uint8 [x, y, z].
        scanned: the series as NIfTI: the grid of the label map.
        headers: of the DICOM series, from `read_headers`.
        palette: which label is which tissue.
        algorithm: name of what made the mask; its version is this package's.

    Returns:
        Warnings.

    Raises:
        ValueError: the label map is empty, which DICOM-SEG cannot hold, or does not lie on the series.
    """
    import highdicom as hd
    from pydicom.uid import generate_uid

    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it logs the UIDs of the patient's images
    volume, geometry = _frames(label_map, scanned.affine, headers)
    present = [(tissue, value) for tissue, value in PALETTES[palette].items() if (volume == value).any()]
    if not present:
        raise ValueError("no tumour was found: there is nothing to write as DICOM-SEG")
    numbered = np.zeros(volume.shape, np.uint8)
    descriptions = []
    source = str(headers[0].SeriesInstanceUID)
    identification = hd.AlgorithmIdentificationSequence(
        name=algorithm, version=__version__, family=hd.sr.CodedConcept("123109", "DCM", "Artificial Intelligence")
    )
    for number, (tissue, value) in enumerate(present, start=1):
        numbered[volume == value] = number
        label, code = SEGMENTS[tissue]
        descriptions.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=label,
                segmented_property_category=_coded(CATEGORY),
                segmented_property_type=_coded(code),
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=identification,
                tracking_uid=generate_uid(entropy_srcs=[*UID_ROOT_WORDS, source, tissue]),
                tracking_id=f"{algorithm} {label}",
                anatomic_regions=[_coded(BRAIN)],
                display_color=hd.color.CIELabColor.from_rgb(*COLOURS[tissue]),
            )
        )
    clean, warnings = _without_invalid(headers)
    segmentation = hd.seg.Segmentation(
        source_images=clean,
        pixel_array=hd.Volume(
            numbered, geometry, coordinate_system="PATIENT", frame_of_reference_uid=str(headers[0].FrameOfReferenceUID)
        ),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=generate_uid(),
        series_number=int(headers[0].get("SeriesNumber") or 0) + 9000,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=algorithm,
        manufacturer_model_name=algorithm,
        software_versions=__version__,
        device_serial_number="0",
        content_description="Glioma: core, oedema and enhancing tumour",
        content_label="GLIOMA",
        series_description=f"{algorithm} segmentation (research use)",
    )
    with whole_file(path) as partial:
        segmentation.save_as(partial)
    return warnings


def reference_headers(prepared: Prepared) -> list[Any] | None:
    """DICOM headers of the reference series, read again from the study; None where the study came as NIfTI.

    Raises:
        SubjectError: the study or the series is no longer there.
    """
    if prepared.record["kind"] != "dicom":
        return None
    label = prepared.record["series"][prepared.reference]
    if prepared.source is not None and prepared.source.exists():
        with study_folder(prepared.source, prepared.folder.parent) as folder:
            for one in read_study(folder, prepared.number, prepared.name).series:
                if one.label == label:
                    return read_headers(one.files)
    raise SubjectError(prepared.name, f"series {label}", "the DICOM study is no longer there", "Prepare it again")


def _frames(label_map: np.ndarray, affine: np.ndarray, headers: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The label map as [slices, rows, columns] in the order of the DICOM slices, and the affine of these, LPS."""
    positions, orientations, spacings = slice_geometry(headers)
    row, column = orientations[0].reshape(2, 3)
    order = np.argsort(positions @ np.cross(row, column))
    first, last = positions[order][[0, -1]]
    geometry = np.eye(4)
    geometry[:3, 0] = (last - first) / max(len(positions) - 1, 1)
    geometry[:3, 1] = column * spacings[0, 0]
    geometry[:3, 2] = row * spacings[0, 1]
    geometry[:3, 3] = first
    shape = (len(positions), int(headers[0].Rows), int(headers[0].Columns))
    to_index = np.linalg.inv(affine) @ LPS @ geometry
    exact = np.round(to_index)
    corner = np.array([*(n - 1 for n in shape), 1])
    if np.abs((to_index - exact) @ corner).max() > 0.1:
        raise ValueError("the mask does not lie on the grid of the DICOM series")
    return ndimage.affine_transform(label_map, exact, output_shape=shape, order=0), geometry


def _without_invalid(headers: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Copies of the headers with values that DICOM does not allow, as de-identified images have, left blank."""
    from copy import deepcopy

    from pydicom.valuerep import DA, TM

    blanked = set()
    copies = [deepcopy(header) for header in headers]
    for one in copies:
        if one.get("PatientSex", "") not in ("", None, "M", "F", "O"):
            one.PatientSex = ""
            blanked.add("PatientSex")
        for name, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
            try:
                kind(one.get(name) or "")
            except (ValueError, TypeError):
                setattr(one, name, "")
                blanked.add(name)
        for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"):
            if name not in one:
                setattr(one, name, "")
        for name in ("AccessionNumber", "ReferringPhysicianName"):
            if name not in one:
                setattr(one, name, "")
    return copies, [f"DICOM-SEG: {name} of the series is invalid and was left blank" for name in sorted(blanked)]


def _coded(code: tuple[str, str, str]) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(*code)
