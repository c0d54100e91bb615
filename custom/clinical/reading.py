"""What is in a study's folder: its series and what their headers say. Nothing is decided here."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from ..cohort import MODALITY_NAMES as NAMES
from ..cohort import SubjectError
from ..cohort.names import without_contrast
from ..files import is_batch

MAPPING = "studies.csv"
MAPPING_COLUMNS = ("study", "folder", "patient_name", "patient_id", "study_date", "study_uid")
RECORD = "preparation.json"
_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("PatientID", "PatientName", "PatientBirthDate", "StudyDate", "StudyTime", "AcquisitionTime", "ContentTime"),
    *("SeriesTime", "AcquisitionDate", "SeriesNumber", "InstanceNumber", "AcquisitionNumber", "SeriesDescription"),
    *("ProtocolName", "BodyPartExamined", "ImageType", "BurnedInAnnotation", "ScanningSequence", "SequenceVariant"),
    *("SequenceName", "MRAcquisitionType", "RepetitionTime", "EchoTime", "InversionTime", "ContrastBolusAgent"),
    *("ContrastBolusAgentSequence", "ContrastBolusStartTime", "TemporalPositionIdentifier", "NumberOfFrames", "Rows"),
    *("Columns", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "ImageOrientationPatient"),
    *("ImagePositionPatient", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DiffusionBValue"),
)


@dataclass
class Series:
    """One series of a study.

    Attributes:
        label: the scanner's number of the series, made unique; for NIfTI the file's place in the folder.
        files: its files.
        kind: "dicom" or "nifti".
        facts: what its headers say: name, TR, TE, TI (ms), agent, dimensions, plane, slices, order, and others.
        modality: one of `MODALITIES`, "t1" where contrast is not known, or None.
        contrast: whether a contrast agent was given; None is not known.
        reason: why it is that modality, or why it is not used.
        used: whether it was chosen.
        uid: what tells it from others.
        known_words: the words of its name that told what it is.
    """

    label: str
    files: list[Path]
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    modality: str | None = None
    contrast: bool | None = None
    reason: str = ""
    used: bool = False
    uid: str = ""
    known_words: Sequence[str] = ()

    def row(self) -> dict[str, Any]:
        """The series as a row of series.csv: nothing in it names the patient."""
        shown = {name: self.facts.get(name, "") for name in ("name", "tr", "te", "ti", "dimensions", "plane", "slices")}
        if self.kind == "nifti":  # a file's name may be a patient's
            shown["name"] = " ".join(self.known_words)
        modality = NAMES.get(self.modality or "", "")
        return {"series": self.label, **shown, "modality": modality, "used": self.used, "reason": self.reason}


@dataclass
class Study:
    """All series of one study of one patient.

    Attributes:
        uid: what tells the study from others: the study's UID, for NIfTI a digest of the files.
        series: in the order of their labels.
        patient: name, id, study date and UID, for the table that maps back; empty for NIfTI.
        warnings: about the study as a whole.
    """

    uid: str
    series: list[Series]
    patient: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_study(folder: str | Path, number: int | None = None, name: str = "study") -> Study:
    """Read the headers of everything in a folder and its subfolders.

    Args:
        folder: DICOM files whatever their names, or NIfTI files with the scanner's names; nothing is written there.
        number: which study, counted by date from 1, where the folder holds several.
        name: what the study is called in errors.

    Raises:
        SubjectError: nothing that could be a study, several patients, or several studies and no number.
    """
    paths = []
    for root, folders, files in os.walk(folder):
        folders[:] = [one for one in folders if not _is_output(Path(root, one))]
        paths += [Path(root, file) for file in files if not file.startswith(".")]
    if not paths:
        raise SubjectError(name, "the folder", "it is empty", "Give the folder of one study from the scanner")
    nifti = sorted(path for path in paths if path.name.lower().endswith((".nii", ".nii.gz")))
    headers = _dicom_headers(sorted(set(paths) - set(nifti)))
    if headers:
        study = _dicom_study(headers, number, name)
        if nifti:
            study.warnings.append(f"{len(nifti)} NIfTI files beside DICOM were left alone")
        return study
    if nifti and number not in (None, 1):
        raise SubjectError(name, "the folder", f"there is no study {number}", "NIfTI files in one folder are one study")
    if not nifti:
        reason = f"none of its {len(paths)} files is a DICOM or a NIfTI file"
        raise SubjectError(name, "the folder", reason, "Give the folder of one study from the scanner or the PACS")
    return _nifti_study(nifti)


def words_of(text: str) -> list[str]:
    """Words of a series' description or of a file's name, in lower case; `+` and `*` belong to them, `C-` denies."""
    return [word for word in re.split(r"[^a-z0-9+*]+", without_contrast(text.lower())) if word]


def _is_output(folder: Path) -> bool:
    """Whether results lie there, which a study whose folder was given as output_dir too holds."""
    if is_batch(folder) or folder.joinpath(RECORD).is_file():
        return True
    try:
        with open(folder / MAPPING, encoding="utf-8") as table:
            return table.readline().startswith(",".join(MAPPING_COLUMNS))
    except (OSError, ValueError):
        return False


def _dicom_headers(paths: Iterable[Path]) -> list[tuple[Path, Any]]:
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    headers = []
    for path in paths:
        try:
            header = dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        except (InvalidDicomError, OSError, EOFError, ValueError, NotImplementedError):
            continue
        if "SOPClassUID" in header and "SeriesInstanceUID" in header:
            headers.append((path, header))
    return headers


def _dicom_study(headers: Sequence[tuple[Path, Any]], number: int | None, name: str) -> Study:
    patients = {str(h.get("PatientID") or h.get("PatientName") or "") for _, h in headers}
    if len(patients) > 1:
        reason = f"it holds images of {len(patients)} patients"
        raise SubjectError(name, "the folder", reason, "Give the folder of one patient's study")
    studies: dict[str, list[tuple[Path, Any]]] = {}
    for path, header in headers:
        studies.setdefault(str(header.get("StudyInstanceUID", "")), []).append((path, header))
    ordered = sorted(studies.values(), key=lambda group: _when(group[0][1], ("StudyDate", "StudyTime")))
    if len(ordered) > 1 and number is None:
        reason = f"it holds {len(ordered)} studies of one patient"
        raise SubjectError(name, "the folder", reason, f"Say which: --study 1 (the oldest) to --study {len(ordered)}")
    if number is not None and not 1 <= number <= len(ordered):
        raise SubjectError(name, "the folder", f"there is no study {number}", f"It holds {len(ordered)}")
    group = ordered[(number or 1) - 1]
    one = group[0][1]
    patient = {
        "patient_name": str(one.get("PatientName", "")),
        "patient_id": str(one.get("PatientID", "")),
        "study_date": str(one.get("StudyDate", "")),
        "study_uid": str(one.get("StudyInstanceUID", "")),
    }
    study = Study(patient["study_uid"], _dicom_series(group), patient)
    frames = {str(h.get("FrameOfReferenceUID")) for _, h in group if "FrameOfReferenceUID" in h}
    if len(frames) > 1:
        study.warnings.append(f"the series lie in {len(frames)} frames of reference: the patient was repositioned")
    return study


def _dicom_series(group: Sequence[tuple[Path, Any]]) -> list[Series]:
    by_uid: dict[str, dict[str, tuple[Path, Any]]] = {}
    for path, header in group:
        by_uid.setdefault(str(header.SeriesInstanceUID), {}).setdefault(
            str(header.get("SOPInstanceUID", path)), (path, header)
        )
    content: dict[frozenset[str], str] = {}
    unique = {}
    for uid, instances in by_uid.items():  # an image in two folders is one image
        if frozenset(instances) not in content:
            content[frozenset(instances)] = uid
            unique[uid] = list(instances.values())
    numbers = [int(files[0][1].get("SeriesNumber") or 0) for files in unique.values()]
    found = []
    for (uid, files), number in zip(unique.items(), numbers, strict=True):
        one = Series(str(number), [path for path, _ in files], "dicom", uid=uid)
        one.facts = dicom_facts([header for _, header in files])
        found.append(one)
    found.sort(key=lambda one: (int(one.label), one.facts["time"], one.uid))
    _number_namesakes(found)
    for place, one in enumerate(sorted(found, key=lambda one: one.facts["time"])):
        one.facts["order"] = place + 1 if one.facts["time"] else None
    return found


def _number_namesakes(found: Sequence[Series]) -> None:
    labels = [one.label for one in found]
    for label in {label for label in labels if labels.count(label) > 1}:
        for k, one in enumerate((one for one in found if one.label == label), start=1):
            one.label = f"{label}{ascii_lowercase[k - 1]}" if k <= 26 else f"{label}z{k}"


def dicom_facts(headers: Sequence[Any]) -> dict[str, Any]:
    """What the headers of one series say: name, TR, TE, TI in ms, agent, slices, plane, and what it is at all."""
    one = headers[0]
    shared = (one.get("SharedFunctionalGroupsSequence") or [{}])[0]
    frame = (one.get("PerFrameFunctionalGroupsSequence") or [{}])[0]

    def get(name: str, *groups: str) -> Any:
        if one.get(name) is not None:
            return one.get(name)
        for source in (shared, frame):
            for group in groups:
                values = source.get(group) or [{}]
                if values[0].get(name) is not None:
                    return values[0].get(name)
        return None

    timing = (
        "MRTimingAndRelatedParametersSequence",
        "MREchoSequence",
        "MRModifierSequence",
        "MRImageFrameTypeSequence",
    )
    orientation = get("ImageOrientationPatient", "PlaneOrientationSequence")
    echo = get("EchoTime") or get("EffectiveEchoTime", *timing)
    agents = [str(item.get("CodeMeaning", "agent")) for item in one.get("ContrastBolusAgentSequence") or []]
    name = " ".join(dict.fromkeys(str(one.get(key) or "") for key in ("SeriesDescription", "ProtocolName"))).strip()
    inversion = get("InversionTime") or get("InversionTimes", *timing)
    return {
        "name": name,
        "modality": str(one.get("Modality", "")),
        "sop_class": str(one.get("SOPClassUID", "")),
        "tr": _number(get("RepetitionTime", *timing)),
        "te": _number(echo),
        "ti": _number(inversion[0] if isinstance(inversion, (list, tuple)) and inversion else inversion),
        "agent": str(one.get("ContrastBolusAgent") or "").strip() or ", ".join(agents),
        "dimensions": str(get("MRAcquisitionType") or ""),
        "plane": plane(orientation),
        "planes": _different(headers, "ImageOrientationPatient", 0.02),
        "slices": max(len(headers), *(int(h.get("NumberOfFrames") or 1) for h in headers)),
        "places": _different(headers, "ImagePositionPatient", 0.02),
        "thickness": _number(get("SliceThickness", "PixelMeasuresSequence")),
        "image_type": [str(word).upper() for word in one.get("ImageType") or ()],
        "sequence": str(one.get("ScanningSequence") or ""),
        "body_part": str(one.get("BodyPartExamined") or "").upper(),
        "burnt_in": str(one.get("BurnedInAnnotation") or "").upper() == "YES",
        "colour": int(one.get("SamplesPerPixel") or 1) > 1,
        "image": bool(one.get("Rows")),
        "time": _when(one, ("AcquisitionDate", "AcquisitionTime")) or _when(one, ("StudyDate", "SeriesTime")),
    }


def _nifti_study(paths: Sequence[Path]) -> Study:
    found, digest = [], hashlib.sha256()
    for number, path in enumerate(paths, start=1):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        digest.update(path.read_bytes()[: 1 << 20])
        one = Series(str(number), [path], "nifti", facts=_nifti_facts(path), uid=path.name)
        found.append(one)
    return Study(digest.hexdigest(), found)


def _nifti_facts(path: Path) -> dict[str, Any]:
    """What a NIfTI file's header, its name and the JSON file beside it (as dcm2niix writes) say."""
    import nibabel as nib

    stem = path.name.lower().removesuffix(".gz").removesuffix(".nii")
    try:
        beside = json.loads((path.with_name(path.name[: len(stem)] + ".json")).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        beside = {}
    beside = beside if isinstance(beside, dict) else {}
    facts = {"name": " ".join(words_of(f"{stem} {beside.get('SeriesDescription', '')}")), "image": True}
    facts |= {
        k: _number(beside.get(key), 1000)
        for k, key in (("tr", "RepetitionTime"), ("te", "EchoTime"), ("ti", "InversionTime"))
    }
    facts |= {
        "agent": str(beside.get("ContrastBolusIngredient", "")),
        "dimensions": beside.get("MRAcquisitionType", ""),
    }
    facts |= {"modality": "MR", "image_type": [], "body_part": "", "time": str(beside.get("AcquisitionTime", ""))}
    try:
        header = nib.load(path)
        zooms = header.header.get_zooms()
        facts |= {"shape": header.shape, "thickness": float(max(zooms[:3])), "slices": min(header.shape[:3])}
        facts["colour"] = header.get_data_dtype().names is not None
        axis = int(np.argmax(zooms[:3]))
        facts["plane"] = ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(header.affine[:3, axis])))]
        facts["dimensions"] = facts["dimensions"] or ("3D" if max(zooms[:3]) < 1.6 * min(zooms[:3]) else "2D")
    except Exception as error:  # nibabel raises whatever a damaged file provokes
        facts |= {"image": False, "damage": " ".join(str(error).split())}
    return facts


def _different(headers: Sequence[Any], name: str, tolerance: float) -> int:
    """How many values of an attribute differ by more than the tolerance."""
    values = [np.asarray(header.get(name), float) for header in headers if header.get(name) is not None]
    found: list[np.ndarray] = []
    for value in values:
        if not any(np.abs(value - other).max() <= tolerance for other in found):
            found.append(value)
    return len(found)


def plane(orientation: Sequence[float] | None) -> str:
    """Plane of a DICOM orientation (six direction cosines), or nothing."""
    if orientation is None or len(orientation) != 6:
        return ""
    row, column = np.asarray(orientation, float).reshape(2, 3)
    return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(np.cross(row, column))))]


def _when(header: Any, names: Sequence[str]) -> str:
    return " ".join(str(header.get(name) or "") for name in names).strip()


def _number(value: Any, factor: float = 1.0) -> float | None:
    try:
        return None if value in (None, "") else round(float(value) * factor, 3)
    except (TypeError, ValueError):
        return None
