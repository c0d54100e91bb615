"""A scanner that does not exist: a phantom's head with skull and scalp, as a DICOM study on grids of its own.

Tests need no patient for anything from the search for series to DICOM-SEG: the pose of the head in every series and
the tumour on T1c's own grid are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ..cohort import MODALITIES
from ..phantom import simulate
from .registration import LPS

HEAD_MM = np.array((196.0, 236.0, 216.0))
#                  T1n   T1c   T2w   FLAIR
COVERINGS = {
    "meninges": (0.28, 0.40, 1.00, 0.15),
    "skull": (0.06, 0.06, 0.05, 0.05),
    "scalp": (0.95, 0.98, 0.70, 0.60),
    "face": (0.50, 0.60, 0.35, 0.35),
    "mucosa": (0.45, 1.30, 0.95, 0.80),
    "eye": (0.25, 0.25, 1.05, 0.20),
}


@dataclass(frozen=True)
class Protocol:
    """What the scanner was told for one series.

    Attributes:
        name: the series' description.
        tr, te, ti: repetition, echo and inversion time in ms; no inversion is None.
        plane: "axial", "coronal" or "sagittal".
        sequence: DICOM's ScanningSequence.
        agent: contrast agent, if one was recorded.
        tilt: degrees by which the slices are oblique.
        thickness: distance of slices in mm.
    """

    name: str
    tr: float
    te: float
    ti: float | None = None
    plane: str = "axial"
    sequence: str = "SE"
    agent: str | None = None
    tilt: float = 0.0
    thickness: float = 5.0


PROTOCOLS = {
    "t1n": Protocol("t1_se_tra", 500, 12),
    "t2w": Protocol("t2_tse_tra", 4200, 98, tilt=6),
    "flair": Protocol("flair_cor", 9000, 120, 2500, plane="coronal"),
    "t1c": Protocol("t1_se_tra", 520, 12, agent="Gadobutrol", tilt=4),
}


@dataclass(frozen=True)
class Scan:
    """A scanned phantom.

    Attributes:
        folder: the study.
        poses: where the head lay in each series: rigid maps [4, 4], mm, RAS, from T1c's scan to that series.
        affine: of T1c's grid, RAS, [4, 4].
        truth: the tumour on T1c's grid, uint8, palette "brats2021" (1 core, 2 oedema, 4 enhancing tumour).
    """

    folder: Path
    poses: dict[str, np.ndarray]
    affine: np.ndarray
    truth: np.ndarray


def scan_phantom(
    folder: str | Path,
    seed: int = 0,
    voxel: float = 2.0,
    displacement: tuple[float, float] = (8.0, 6.0),
    extras: bool = True,
    protocols: dict[str, Protocol] | None = None,
) -> Scan:
    """Write a DICOM study of a phantom's head, by `scan_head`.

    Args:
        folder: where the study goes.
        seed: of the anatomy, the tumour and the motions.
        voxel: in-plane voxel size in mm, also that of the head that is scanned.
        displacement: degrees and mm of every motion.
        extras: also a localizer and an apparent diffusion coefficient, which preparation must leave alone.
        protocols: other protocols, by modality.

    Returns:
        The study, and all that is known about it.
    """
    return scan_head(folder, *head(seed, voxel), voxel, seed, displacement, extras, protocols)


def scan_head(
    folder: str | Path,
    images: np.ndarray,
    label: np.ndarray,
    affine: np.ndarray,
    voxel: float,
    seed: int = 0,
    displacement: tuple[float, float] = (8.0, 6.0),
    extras: bool = True,
    protocols: dict[str, Protocol] | None = None,
) -> Scan:
    """Write a DICOM study of a head: four series on different grids, a localizer and a derived map.

    Between T1c and every other series the patient has moved by a rigid motion that is drawn from the seed.

    Args:
        folder: where the study goes.
        images: [4, x, y, z] in the order of `MODALITIES`, white matter at 400 to 900, within `HEAD_MM`.
        label: of the tumour, [x, y, z], palette "brats2021".
        affine: of both, [4, 4], mm, RAS, the origin in the middle of the head.
        voxel: in-plane voxel size in mm; thick slices are averaged from layers as thick as that.
        seed: of the motions and the noise.
        displacement: degrees and mm of every motion.
        extras: also a localizer and an apparent diffusion coefficient.
        protocols: other protocols, by modality.

    Returns:
        The study, and all that is known about it.

    Raises:
        ValueError: T1c is not among the protocols.
    """
    rng = np.random.default_rng(seed)
    study = _Study(Path(folder), seed)
    poses, result = {}, None
    for number, (modality, protocol) in enumerate((protocols or PROTOCOLS).items(), start=2):
        pose = np.eye(4) if modality == "t1c" else rigid(rng, *displacement)
        grid, shape = _grid(protocol, voxel)
        to_head = np.linalg.inv(affine) @ np.linalg.inv(pose) @ grid
        volume = _averaged(images[MODALITIES.index(modality)], to_head, shape, protocol.thickness / voxel)
        volume = np.hypot(volume + rng.normal(0, 8, shape), rng.normal(0, 8, shape))
        study.write(number, protocol, volume, grid)
        poses[modality] = pose
        if modality == "t1c":
            result = grid, labels_on(label, to_head, shape, protocol.thickness / voxel)
    if extras:
        plain = Protocol("localizer", 8, 3, sequence="GR", thickness=60)
        grid, shape = _grid(plain, 4.0)
        localizer = _averaged(images[0], np.linalg.inv(affine) @ grid, shape, plain.thickness / voxel)
        study.write(1, plain, localizer, grid, ImageType=["ORIGINAL", "PRIMARY", "M", "LOCALIZER"])
        diffusion = Protocol("ep2d_diff_ADC", 5000, 90, sequence="EP")
        grid, shape = _grid(diffusion, 4.0)
        study.write(9, diffusion, np.ones(shape) * 700, grid, ImageType=["DERIVED", "PRIMARY", "DIFFUSION", "ADC"])
    if result is None:
        raise ValueError("a scan without T1c has no truth: give its protocol")
    return Scan(study.folder, poses, *result)


def rigid(rng: np.random.Generator, degrees: float, mm: float) -> np.ndarray:
    """A rotation by that angle about an axis drawn at random and a shift of that length, as [4, 4]."""
    axis, shift = (vector / np.linalg.norm(vector) for vector in rng.standard_normal((2, 3)))
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(degrees * axis, degrees=True).as_matrix()
    pose[:3, 3] = mm * shift
    return pose


@cache
def head(seed: int, voxel: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A phantom with meninges, skull, scalp, eyes and a face.

    Args:
        seed: as for `custom.phantom.simulate`.
        voxel: voxel size in mm.

    Returns:
        Images float32 [4, x, y, z] in the order of `MODALITIES`, white matter at 400 to 900; the label map uint8
        [x, y, z]; and the affine [4, 4], RAS, whose origin is the middle of the head.
    """
    shape = np.round(HEAD_MM / voxel).astype(int)
    images, label = simulate(shape.tolist(), (voxel,) * 3, seed)
    affine = np.diag([voxel, voxel, voxel, 1.0])
    affine[:3, 3] = -voxel * (shape - 1) / 2
    return cover(images, affine) * 1000, label, affine


def cover(images: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Brains [4, x, y, z] without a skull, white matter at 0.4 to 0.9, with meninges, skull, scalp, eyes and a face."""
    images, voxel, shape = images.copy(), float(affine[0, 0]), images.shape[1:]
    brain = ndimage.binary_fill_holes(images[0] > 0)
    x, y, z = (np.arange(n).reshape([-1 if a == axis else 1 for a in range(3)]) for axis, n in enumerate(shape))
    x, y, z = (axis * voxel + affine[i, 3] for i, axis in enumerate((x, y, z)))
    outside = ndimage.distance_transform_edt(~brain, sampling=voxel)
    face = (x / 48) ** 2 + ((y - 62) / 42) ** 2 + ((z + 62) / 44) ** 2 < 1
    neck = (x / 55) ** 2 + ((y + 12) / 55) ** 2 < 1
    neck = neck & (z < -40)
    nose = ((x / 16) ** 2 + ((y - 82) / 22) ** 2 + ((z + 58) / 26) ** 2 < 1) & (np.sin(z / 2.5) > -0.3)
    eyes = ((np.abs(x) - 32) / 13) ** 2 + ((y - 84) / 13) ** 2 + ((z + 34) / 13) ** 2 < 1
    parts = {
        "face": (face | neck) & (outside > 8),
        "scalp": (outside > 8) & (outside <= 15) & ~(face | neck),
        "skull": (outside > 2.5) & (outside <= 8),
        "meninges": (outside > 0) & (outside <= 2.5),
        "mucosa": nose & (outside > 8),
        "eye": eyes & (outside > 8),
    }
    for name, part in parts.items():
        images[:, part] = np.array(COVERINGS[name], np.float32)[:, None]
    return images


def _grid(protocol: Protocol, voxel: float) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine (RAS; columns, rows, slices) and shape of a series; it covers the head."""
    axes = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}[protocol.plane]
    signs = {"axial": (-1, -1, 1), "coronal": (-1, -1, 1), "sagittal": (-1, -1, -1)}[protocol.plane]
    step = np.array((voxel, voxel, protocol.thickness))
    shape = tuple(int(n) for n in np.ceil((HEAD_MM[list(axes)] + 10) / step))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, column] = sign * step[column]
    affine[:3, :3] = Rotation.from_euler("x", protocol.tilt, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine, shape


def _averaged(volume: np.ndarray, to_volume: np.ndarray, shape: Sequence[int], layers: float) -> np.ndarray:
    """A volume [x, y, z] on a grid, float32; a thick slice is the mean of thinner layers."""
    parts = max(1, round(layers))
    result = np.zeros(shape, np.float32)
    for part in range(parts):
        inside = to_volume.copy()
        inside[:3, 3] += to_volume[:3, 2] * ((part + 0.5) / parts - 0.5)
        result += ndimage.affine_transform(volume, inside, output_shape=tuple(shape), order=1) / parts
    return result


def labels_on(label: np.ndarray, to_label: np.ndarray, shape: Sequence[int], layers: float) -> np.ndarray:
    """A label map on a grid: tumour where more than half of a voxel is, and then what most of that is."""
    values = [int(value) for value in np.unique(label) if value]
    shares = [_averaged((label == value).astype(np.float32), to_label, shape, layers) for value in values]
    tumour = np.sum(shares, axis=0) > 0.5
    return np.where(tumour, np.array(values)[np.argmax(shares, axis=0)], 0).astype(np.uint8)


class _Study:
    """Writes series after series into one folder, with the names and numbers of a patient who does not exist."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.study_uid = self.uid("study")

    def uid(self, *words: Any) -> Any:
        from pydicom.uid import generate_uid

        return generate_uid(entropy_srcs=[str(word) for word in ("comnet", self.seed, *words)])

    def write(self, number: int, protocol: Protocol, volume: np.ndarray, affine: np.ndarray, **attributes: Any) -> None:
        """Write `volume` [columns, rows, slices]; `attributes` replace what the protocol would say."""
        lps = LPS @ affine
        columns, rows, slices = volume.shape
        voxel = np.linalg.norm(lps[:3, :3], axis=0)
        pixels = np.clip(np.rint(volume), 0, 4095).astype(np.uint16)
        folder = self.folder / f"S{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(slices):
            one = self._header(number, k, protocol)
            one.Rows, one.Columns = rows, columns
            one.PixelSpacing = [f"{voxel[1]:.6g}", f"{voxel[0]:.6g}"]
            one.SliceThickness = one.SpacingBetweenSlices = f"{voxel[2]:.6g}"
            one.ImageOrientationPatient = [f"{v:.10g}" for v in (lps[:3, :2] / voxel[:2]).T.ravel()]
            one.ImagePositionPatient = [f"{v:.8g}" for v in (lps @ [0, 0, k, 1])[:3]]
            one.PixelData = pixels[:, :, k].T.tobytes()
            for name, value in attributes.items():
                setattr(one, name, value)
            one.save_as(folder / f"IM{slices - k:04d}", enforce_file_format=True)

    def _header(self, number: int, k: int, protocol: Protocol) -> Any:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = MRImageStorage
        one.SOPInstanceUID = self.uid(number, k)
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        one.StudyInstanceUID, one.SeriesInstanceUID = self.study_uid, self.uid(number)
        one.FrameOfReferenceUID = self.uid("frame")
        one.PatientName, one.PatientID = "Phantom^Paula", f"PHANTOM-{self.seed}"
        one.PatientBirthDate, one.PatientSex = "19700101", "F"
        one.StudyDate = one.SeriesDate = one.AcquisitionDate = "20260102"
        one.StudyTime, one.StudyID, one.AccessionNumber = "100000", "1", ""
        one.SeriesTime = one.AcquisitionTime = f"10{number:02d}00"
        one.ReferringPhysicianName = ""
        one.Modality, one.Manufacturer, one.BodyPartExamined = "MR", "Synthetic", "HEAD"
        one.ManufacturerModelName = "Phantom"
        one.SeriesNumber, one.InstanceNumber, one.AcquisitionNumber = number, k + 1, 1
        one.SeriesDescription = one.ProtocolName = protocol.name
        one.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
        one.ScanningSequence, one.SequenceVariant, one.ScanOptions = protocol.sequence, "NONE", ""
        one.MRAcquisitionType = "2D" if protocol.thickness > 2 else "3D"
        one.RepetitionTime, one.EchoTime = protocol.tr, protocol.te
        if protocol.ti is not None:
            one.InversionTime = protocol.ti
        if protocol.agent is not None:
            one.ContrastBolusAgent = protocol.agent
        one.EchoTrainLength, one.FlipAngle, one.MagneticFieldStrength = 1, 90, 1.5
        one.PatientPosition, one.PositionReferenceIndicator, one.Laterality = "HFS", "", ""
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 12, 11, 0
        one.WindowCenter, one.WindowWidth = 500, 1000
        return one
