"""The first minute: phantoms or a folder of the user's, segmented with the released weights, scored where masks are."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cohort import REGIONS, Subject, SubjectError, find_subjects
from .cohort.checks import GRID_TOLERANCE, read_mask
from .phantom import cohort_seeds, write_absent

GEOMETRY: dict[str, Any] = {"shape": (128, 154, 128), "spacing": (1.25, 1.25, 1.25)}
"""A whole head; at 1 mm it takes twice as long to make."""
RAW_VOXEL_MM = 1.0
PHANTOM_REMARK = "Phantoms are simulated: that they are segmented well or badly says nothing about patients."


def write_phantoms(folder: Path, num_subjects: int, seed: int = 0, **geometry: Any) -> list[Path]:
    """Write those of the phantoms `phantom_<seed>_1`, … that are not there yet; return the subjects' folders.

    Another seed gives other phantoms, of other names, and none that weights were trained on. `geometry` is shape and
    spacing, see `write_absent`; by default `GEOMETRY`.
    """
    return write_absent(folder, cohort_seeds(num_subjects, seed, names=f"phantom_{seed}_{{}}"), **GEOMETRY | geometry)


def write_study(folder: Path, seed: int = 0) -> Path:
    """Write a phantom's DICOM study, see `scan_phantom`, if it is not there yet; return its folder.

    Raises:
        UserError: the extra `clinical` is not installed.
    """
    study = folder / f"phantom_{seed}"
    if not study.exists():
        from .clinical.scanner import scan_phantom
        from .clinical.study import require_clinical

        require_clinical("deepbet")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            scan_phantom(Path(unfinished, "study"), seed, RAW_VOXEL_MM)
            Path(unfinished, "study").rename(study)
    return study


def write_demo_report(
    run: Path, folders: Sequence[Path], remark: str = "", palette: str | None = None
) -> tuple[Path, str]:
    """Gather what `comnet segment` has left in `run`/segmented as one page and a table; score it where there are masks.

    A subject that the weights were trained on is not scored, nor one whose mask cannot be read or lies on another grid.

    Args:
        run: folder of the demo; the page is its report.html.
        folders: subject folders or dataset folders that were segmented.
        remark: what the reader of the scores must know.
        palette: of the masks, a key of `PALETTES`; by default that of each subject's layout.

    Returns:
        The page, and the table as text: volumes in ml, and Dice.
    """
    from .bundle_run import bundle_root
    from .report import write_segment_report
    from .report.reports import DONE, EARLIER
    from .weights import Weights

    weights = Weights(bundle_root("comnet_ensemble") / "models")
    subjects, exclusions = find_subjects([*folders], palette=palette, require_label=False, subsets=True)
    with (run / "segmented" / "volumes.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] != EARLIER]
    done = {row["subject"]: row for row in rows if row["status"] == DONE}
    pictures, scores, remarks = {}, [], [remark] * bool(remark)
    for subject in (one for one in subjects if one.name in done):
        results = run / "segmented" / subject.name
        pictures[subject.name] = results / f"{subject.name}_qc.png"
        try:
            if subject.label is not None:
                scores.append({"subject": subject.name} | score(subject, results, weights))
        except SubjectError as error:
            remarks.append(f"Not scored: {error}")
    page = run / "report.html"
    write_segment_report(
        page, rows, exclusions, pictures, {"weights_note": weights.note}, "CoMNeT: demo", scores, remarks
    )
    return page, text_table(rows, scores)


def score(subject: Subject, results: Path, weights: Any) -> dict[str, float]:
    """Dice of a subject with a mask by region, from the label map in its folder; NaN where the true region is empty.

    Raises:
        SubjectError: the `Weights` were trained on the subject, or its mask is not what it should be.
    """
    import nibabel as nib
    import torch

    from .metrics.scores import overlap_scores
    from .transforms import label_map_to_regions

    if subject.name in weights.trained_on:
        reason = "the weights were trained on this subject: a score would be too good"
        raise SubjectError(subject.name, str(subject.label), reason, "Score subjects that they have not seen")
    mask = read_mask(subject.name, str(subject.label), subject.palette)
    label_map = nib.load(results / f"{subject.name}_seg.nii.gz")
    if mask.voxels.shape != label_map.shape or (np.abs(mask.affine - label_map.affine) > GRID_TOLERANCE).any():
        raise mask.error("the mask is on another grid than the images", "Resample it to theirs")
    reference, found = (
        label_map_to_regions(torch.from_numpy(np.asarray(voxels, np.float32)), palette).bool()
        for voxels, palette in ((mask.voxels, subject.palette), (label_map.dataobj, "brats2023"))
    )
    pairs = zip(REGIONS, found, reference, strict=True)
    return {region: overlap_scores(ours, theirs)["dice"] for region, ours, theirs in pairs}


def text_table(rows: Sequence[dict[str, str]], scores: Sequence[dict[str, Any]]) -> str:
    """Volumes in ml, and Dice where there are scores, a line a subject; a dash stands for what is not defined."""
    by_subject = {str(one["subject"]): one for one in scores}
    width = max([len("subject"), *(len(row["subject"]) for row in rows)])
    heads = [*(f"{region} ml" for region in REGIONS), *(f"Dice {region}" for region in REGIONS if scores)]
    lines = [" ".join(["subject".ljust(width), *(head.rjust(8) for head in heads)])]
    for row in rows:
        values = [(float(row[f"{region.lower()}_ml"] or math.nan), 1) for region in REGIONS]
        values += [(by_subject.get(row["subject"], {}).get(region, math.nan), 3) for region in REGIONS if scores]
        cells = ["–" if math.isnan(value) else f"{value:.{decimals}f}" for value, decimals in values]
        lines.append(" ".join([row["subject"].ljust(width), *(cell.rjust(8) for cell in cells)]))
    return "\n".join(lines)
