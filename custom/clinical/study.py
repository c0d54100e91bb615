"""One study from the scanner → four prepared modalities, with a record of how, and nothing that names the patient."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import logging
import os
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from .. import __version__
from ..cohort import MODALITIES, SubjectError
from ..cohort.volumes import image_at, write_whole
from ..files import FULL, UserError, whole_file, write_table, write_text
from .brain import TOOLS, check_brain, extract_brain, read_brain_mask
from .conversion import convert
from .reading import MAPPING, MAPPING_COLUMNS, NAMES, RECORD, Series, Study, read_study
from .registration import check, enhancement, one_mm_grid, ras_affine, register, resample
from .series import choose
from .shading import without_shading

logger = logging.getLogger("comnet")

EXTRA = ("dcm2niix", "highdicom", "pydicom", "SimpleITK")
SERIES_COLUMNS = ("series", "name", "tr", "te", "ti", "dimensions", "plane", "slices", "modality", "used", "reason")
MARGIN_MM = 4
REFERENCES: tuple[str, ...] = ("t1c", "t1n", "flair", "t2w")
SWAPPED = 0.5


@dataclass(frozen=True)
class Prepared:
    """A study that is prepared.

    Attributes:
        name: `study-<hash>`, or the folder's own name where names were to be kept.
        folder: holds t1n.nii.gz, t1c.nii.gz, t2w.nii.gz and flair.nii.gz (skull-stripped, on one grid of 1 mm along the
            reference's axes), brain_mask.nii.gz, series_<label>.nii.gz (each used series as scanned), series.csv,
            preparation.png and preparation.json.
        record: what preparation.json holds.
        source: where the study came from, where that is known: it is not in the record, which names nobody.
        number: which of the studies there.
    """

    name: str
    folder: Path
    record: dict[str, Any]
    source: Path | None = None
    number: int | None = None

    @property
    def images(self) -> dict[str, Path]:
        """The prepared files by modality."""
        return {modality: self.folder / f"{modality}.nii.gz" for modality in self.record["series"]}

    @property
    def reference(self) -> str:
        """The modality whose grid all others were brought to: T1c where there is one."""
        return self.record["reference"]

    def scanned(self, modality: str) -> Path:
        """The series of a modality as scanned, with the skull."""
        return self.folder / f"series_{self.record['series'][modality]}.nii.gz"


def prepare_study(
    study: str | Path,
    output_dir: str | Path,
    chosen: Mapping[str, str | None] | None = None,
    without: Sequence[str] = (),
    number: int | None = None,
    brain_mask: str | Path | None = None,
    brain: str = "deepbet",
    n4: bool = False,
    keep_names: bool = False,
    pictures: bool = True,
) -> Prepared:
    """Find the series of a study, convert, register and skull-strip them. A study that is prepared is taken up again.

    Args:
        study: folder of DICOM or NIfTI files as they left the scanner, or a zip file of one; nothing is written there.
        output_dir: holds a folder for each study, and studies.csv, readable by its owner only, which says whose it is.
        chosen: labels of series by modality, where the user has answered a question.
        without: modalities that may be missing.
        number: which study, counted by date from 1, where the folder holds several.
        brain_mask: a mask of one's own on any grid in the reference's space.
        brain: what finds the brain otherwise: "deepbet" or "hd-bet", slower and with an extra of its own.
        n4: even out the shading of each image, by `without_shading`.
        keep_names: name the results after the study's folder instead of a hash.
        pictures: draw preparation.png.

    Raises:
        UserError: a library is missing, or there is no such tool for the brain, or no such modality to go without.
        SubjectError: the study cannot be prepared, or a question only the user can answer.
        OSError: the output cannot be written.
    """
    if brain not in TOOLS:
        raise UserError(f"--brain {brain}: choose {' or '.join(TOOLS)}")
    if unknown := set(without) - set(MODALITIES):
        raise UserError(f"--without {','.join(sorted(unknown))}: give some of {', '.join(MODALITIES)}")
    require_clinical(None if brain_mask else brain)
    path, output = Path(study), Path(output_dir)
    if not path.exists():
        raise SubjectError("the study", str(study), "it does not exist", "Give the folder of a study, or a zip file")
    answers = {modality: str(label) for modality, label in (chosen or {}).items() if label is not None}
    options: dict[str, Any] = {"chosen": answers, "without": list(without), "number": number, "pictures": pictures}
    options["n4"] = n4
    options["brain"] = _stat(Path(brain_mask)) if brain_mask else brain
    options["zip"] = None if path.is_dir() else _stat(path)
    started = time.perf_counter()
    anonymous = _anonymous(str(path.resolve()))
    own = read_brain_mask(brain_mask, anonymous) if brain_mask else None
    with study_folder(path, output) as folder:
        found = read_study(folder, number, anonymous)
        # some tools for anonymous studies give all of them one UID
        name = _anonymous(" ".join(filter(None, (found.uid, found.patient.get("patient_id")))))
        if keep_names:
            name = path.resolve().name.removesuffix(".zip")
            _refuse_namesake(output, name, path, found)
        target = output / name
        _write_mapping(output, name, path, found)
        key = _key(found, folder, options)
        if (earlier := _earlier(target, key)) is not None:
            logger.info("%s is prepared already", name)
            return replace(earlier, source=path, number=number)
        (target / RECORD).unlink(missing_ok=True)
        try:
            prepared = _prepare(found, target, name, key, options, own, started)
            return replace(prepared, source=path, number=number)
        except OSError as error:
            if error.errno not in FULL:
                raise
            reason = "no space is left on the disk"
            raise SubjectError(name, "the output folder", reason, "Make room for about 300 MB a study") from error


def prepare_studies(
    studies: Sequence[str | Path], output_dir: str | Path, **options: Any
) -> tuple[list[Prepared], list[SubjectError]]:
    """Prepare study after study by `prepare_study`, whose options these are; one bad study stops no other.

    Returns:
        What is prepared, and what is wrong with each of the others, which is logged too.

    Raises:
        UserError: no study, or series chosen for several of them.
    """
    if not studies:
        raise UserError("nothing to prepare: name the folder or the zip file of a study")
    chosen = [label for label in (options.get("chosen") or {}).values() if label is not None]
    if len(studies) > 1 and (chosen or options.get("number") or options.get("brain_mask")):
        raise UserError("series, a study's number and a brain mask belong to one study: give one at a time")
    prepared, failures = [], []
    for study in studies:
        try:
            prepared.append(prepare_study(study, output_dir, **options))
        except SubjectError as error:
            failures.append(error)
        except UserError:
            raise
        except Exception as error:  # a fault of ours must not cost the other studies
            if len(studies) == 1:
                raise
            name, reason = _anonymous(str(Path(study).resolve())), f"its preparation failed ({type(error).__name__})"
            failures.append(SubjectError(name, "the study", reason, "Prepare it alone, and report the traceback"))
        else:
            continue
        logger.error("%s", failures[-1])
    return prepared, failures


def require_clinical(brain: str | None) -> None:
    """Make sure that the libraries of the extra `clinical` are there, and what finds the brain.

    Raises:
        UserError: naming what is missing and how to install it.
    """
    warnings.filterwarnings("ignore", module=r"pydicom\.")  # they quote values of the patient's
    missing = []
    for module in (*EXTRA, *([TOOLS[brain]] if brain else [])):
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(module if error.name in (module, None) else f"{module} ({error.name})")
    if missing:
        extra = "clinical,hd-bet" if brain == "hd-bet" else "clinical"
        raise UserError(f"{', '.join(missing)} not installed: pip install 'comnet-glioma[{extra}]'")


@contextmanager
def study_folder(path: Path, scratch: Path) -> Iterator[Path]:
    """Yield the study's folder; a zip file is unpacked beside the output, for its owner only, and removed again.

    Raises:
        SubjectError: neither a folder nor a zip file, or one that cannot be unpacked.
    """
    if path.is_dir():
        yield path
        return
    if not zipfile.is_zipfile(path):
        name = _anonymous(str(path.resolve()))
        raise SubjectError(name, "the study", "it is neither a folder nor a zip file", "Give one of these")
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=scratch) as temporary, zipfile.ZipFile(path) as archive:
        try:
            archive.extractall(temporary)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            reason = f"the zip file is damaged, encrypted or packed in a way that Python cannot read ({error})"
            remedy = "Copy it again, or unpack it"
            raise SubjectError(_anonymous(str(path.resolve())), "the study", reason, remedy) from error
        yield Path(temporary)


def load_prepared(folder: str | Path) -> Prepared:
    """A study that was prepared earlier.

    Raises:
        SubjectError: the folder holds no finished preparation.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SubjectError(folder.name, RECORD, "the study is not prepared", "Run `comnet prepare` first") from error
    return Prepared(folder.name, folder, record)


def _prepare(
    study: Study,
    target: Path,
    name: str,
    key: str,
    options: Mapping[str, Any],
    own: nib.Nifti1Image | None,
    started: float,
) -> Prepared:
    import SimpleITK as sitk

    seconds, clock = {}, started
    told = list(study.warnings)

    def lap(step: str) -> None:
        nonlocal clock
        seconds[step], clock = round(time.perf_counter() - clock, 2), time.perf_counter()

    try:
        series = choose(study, options["chosen"], options["without"], name)
    finally:
        write_table(target / "series.csv", SERIES_COLUMNS, [one.row() for one in study.series])
    lap("series")
    for modality, one in series.items():
        told += convert(one, target / f"series_{one.label}.nii.gz", name, modality)
    lap("conversion")
    scanned = {
        m: sitk.ReadImage(str(target / f"series_{one.label}.nii.gz"), sitk.sitkFloat32) for m, one in series.items()
    }
    reference = next(modality for modality in REFERENCES if modality in scanned)
    grid = one_mm_grid(scanned[reference])
    heads = {reference: resample(scanned[reference], grid)}
    motions = {}
    for modality in (modality for modality in scanned if modality != reference):
        try:
            motions[modality] = register(heads[reference], scanned[modality])
        except ValueError as error:
            raise SubjectError(
                name, NAMES[modality], f"registration failed: {error}", "Choose another series"
            ) from error
        told += check(motions[modality], name, modality)
        heads[modality] = resample(scanned[modality], grid, motions[modality].matrix)
    lap("registration")
    affine = ras_affine(grid)
    arrays = {m: sitk.GetArrayFromImage(heads[m]).transpose(2, 1, 0) for m in MODALITIES if m in heads}
    if own is not None:
        brain = _on_grid(own, grid) > 0.5
        told += check_brain(brain, affine)
    else:
        looked_at = {NAMES[m]: arrays[m] for m in dict.fromkeys((reference, "flair")) if m in arrays}
        brain, more = extract_brain(looked_at, affine, name, options["brain"])
        told += more
    lap("brain")
    if not brain.any():
        raise SubjectError(name, "the brain mask", "it does not meet the reference image", "Check where it lies")
    if options["n4"]:
        arrays = {modality: without_shading(array, brain) for modality, array in arrays.items()}
        lap("n4")
    facts: dict[str, Any] = {"n4": options["n4"]}
    if "t1n" in arrays and "t1c" in arrays:
        facts["enhancement"] = round(enhancement(arrays["t1n"], arrays["t1c"], brain), 3)
        told += _judge_enhancement(facts["enhancement"], series, options["chosen"], name)
    box, cropped = _box(brain), affine.copy()
    cropped[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    for modality, array in arrays.items():
        # 0 is outside the brain for all that follows; within it nothing is
        stripped = np.where(brain, np.maximum(array, 1e-3), 0)[box].astype(np.float32)
        write_whole(image_at(stripped, cropped), target / f"{modality}.nii.gz")
    write_whole(image_at(brain[box].astype(np.uint8), cropped), target / "brain_mask.nii.gz")
    lap("writing")
    if options["pictures"]:
        from .overlays import draw_preparation

        draw_preparation(
            target / "preparation.png", {m: a[box] for m, a in arrays.items()}, brain[box], cropped, name, told
        )
        lap("pictures")
    record = {
        "study": name,
        "key": key,
        "comnet_version": __version__,
        "reference": reference,
        "series": {modality: one.label for modality, one in series.items()},
        "kind": next(iter(series.values())).kind,
        "registration": {modality: motion.record() for modality, motion in motions.items()},
        "brain_ml": round(float(brain.sum()) / 1000, 1),
        **facts,
        "warnings": told,
        "seconds": seconds,
    }
    write_text(target / RECORD, json.dumps(record, indent=2))
    for warning in told:
        logger.warning("%s: %s", name, warning)
    return Prepared(name, target, record)


def _judge_enhancement(ratio: float, series: Mapping[str, Series], chosen: Mapping[str, str], name: str) -> list[str]:
    if ratio >= 1:
        return []
    t1n, t1c = series["t1n"].label, series["t1c"].label
    if ratio < SWAPPED and not {"t1n", "t1c"} <= set(chosen):
        reason = f"T1c (series {t1c}) is darker than T1n (series {t1n}) where contrast should brighten it: swapped?"
        remedy = f"If so, say --t1n {t1c} --t1c {t1n}; if not, --t1n {t1n} --t1c {t1c}"
        raise SubjectError(name, "T1n and T1c", reason, remedy)
    return [f"T1c shows no enhancement over T1n (ratio {ratio:.2f}): was contrast given, or are they swapped?"]


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(max(0, int(used[0]) - MARGIN_MM), min(mask.shape[axis], int(used[-1]) + 1 + MARGIN_MM)))
    return tuple(box)


def _on_grid(image: nib.Nifti1Image, grid: Any) -> np.ndarray:
    from scipy import ndimage

    to_own = np.linalg.inv(image.affine) @ ras_affine(grid)
    voxels = np.asanyarray(image.dataobj).astype(np.float32)
    return ndimage.affine_transform(voxels, to_own, output_shape=grid.GetSize(), order=1)


def _anonymous(text: str) -> str:
    return "study-" + hashlib.sha256(text.encode()).hexdigest()[:10]


def _key(study: Study, folder: Path, options: Mapping[str, Any]) -> str:
    """Digest of the files and the options; of what is unpacked from a zip file, the zip's own time counts."""
    stats = [(os.path.relpath(file, folder), file.stat()) for one in study.series for file in one.files]
    files = [(name, stat.st_size, 0 if options["zip"] else stat.st_mtime_ns) for name, stat in stats]
    content = json.dumps([__version__, sorted(files), options], default=str, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _stat(path: Path) -> list[Any]:
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else [str(path)]


def _earlier(target: Path, key: str) -> Prepared | None:
    try:
        prepared = load_prepared(target)
    except SubjectError:
        return None
    files = [*prepared.images.values(), target / "brain_mask.nii.gz"]
    return prepared if prepared.record.get("key") == key and all(file.is_file() for file in files) else None


def _read_mapping(output: Path) -> list[dict[str, str]]:
    try:
        with open(output / MAPPING, newline="", encoding="utf-8") as table:
            return list(csv.DictReader(table))
    except FileNotFoundError:
        return []


def _refuse_namesake(output: Path, name: str, path: Path, study: Study) -> None:
    """Two studies may have one name; a study of DICOM is the same by its UID and patient, wherever it lies.

    The output folder may hold the study itself, or something else of its name.
    """
    target, place = output / name, str(path.resolve())
    told = [study.patient.get(key, "") for key in ("study_uid", "patient_id")]
    rows = [row for row in _read_mapping(output) if row["study"] == name]
    others = [
        row["folder"]
        for row in rows
        if ([row["study_uid"], row["patient_id"]] != told if told[0] else row["folder"] != place)
    ]
    reason = ""
    if str(target.resolve()) == place:
        reason = "its results would lie among its own files"
    elif others:
        reason = f"{target} is of another study of this name, from {others[0]}"
    elif not rows and target.is_dir() and any(target.iterdir()) and not (target / RECORD).is_file():
        reason = f"{target} holds what no preparation has made, and would be replaced"
    if reason:
        remedy = "Rename its folder, or choose another output_dir"
        raise SubjectError(_anonymous(place), "the study", reason, remedy)


def _write_mapping(output: Path, name: str, path: Path, study: Study) -> None:
    """Add the study to the one table that names patients; only its owner may read it."""
    file, rows = output / MAPPING, _read_mapping(output)
    row = {"study": name, "folder": str(path.resolve())} | study.patient
    if any(other["study"] == name and other["folder"] == row["folder"] for other in rows):
        return
    with whole_file(file) as partial:
        partial.chmod(0o600)
        with open(partial, "w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, MAPPING_COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, row])
