"""What the way from the scanner costs: subjects in a head, scanned to thick slices, prepared, segmented, brought back.

Each subject gets a phantom's meninges, skull, scalp and face, or those of a real head (`--head`), is "scanned" as a
DICOM study with T1c of 1 mm, tilted, and the other series of 5 mm slices, each moved by a known rigid motion, and goes
the whole way of `segment --raw`. Compared, on the grid of T1c as scanned, are the mask of the untouched subject, by the
same weights, and the truth. Then one step at a time is put in place of what is known: poses, the brain.

`python benchmarks/clinical_heads.py --models_dir FOLDS --datalist_file DATALIST --data BRATS2021 --subjects …`, each
subject with the fold that has not seen it (FOLDS/fold<k>/model.pt), or `--weights FILE` for all.
Without `--data`, a phantom is the subject (`make bench`): that measures time and memory only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from scipy import ndimage
from timing import environment, forget_peak, markdown_table, peak_resident_bytes, publish

from custom.api import Segmenter
from custom.clinical.brain import extract_brain
from custom.clinical.masks import to_scanned
from custom.clinical.registration import one_mm_grid, ras_affine, resample
from custom.clinical.scanner import HEAD_MM, Protocol, Scan, cover, labels_on, scan_head
from custom.clinical.study import Prepared, load_prepared
from custom.cohort import MODALITIES, PALETTES, find_subjects
from custom.phantom import simulate
from custom.phantom.dataset import CONTRAST

REGIONS = ("ET", "TC", "WT")
PROTOCOLS = {
    "t1n": Protocol("t1_se_tra", 500, 12),
    "t2w": Protocol("t2_tse_tra", 4200, 98, tilt=6),
    "flair": Protocol("flair_cor", 9000, 120, 2500, plane="coronal"),
    "t1c": Protocol("t1_mprage_sag", 1900, 3, 900, sequence="GR", agent="Gadobutrol", tilt=4, thickness=1.0),
}


@dataclass(frozen=True)
class Subject:
    """A stripped subject in the middle of an empty head: images [4, x, y, z], label map, affine; 1 mm, RAS."""

    name: str
    images: np.ndarray
    label: np.ndarray
    affine: np.ndarray

    @property
    def brain(self) -> np.ndarray:
        """Where the stripped images are not 0."""
        return self.images.any(axis=0)

    def in_a_head(self, of: Path | None) -> np.ndarray:
        """With skull and scalp, a phantom's or those `of` a prepared study; as bright as a phantom's, times 1000."""
        scaled = np.clip(_as_usual(self.images, self.brain), 0, 4)
        covered = self._in_the_head(scaled, load_prepared(of)) if of else cover(scaled, self.affine)
        return np.clip(covered * 1000, 0, 4095)

    def _in_the_head(self, scaled: np.ndarray, host: Prepared) -> np.ndarray:
        """A real head, stretched until its brain is as long, wide and high as the subject's, round the subject's brain.

        What is brain in the one and not in the other is filled with the nearest of what surrounds the other's brain.
        Without T1c, T1n stands for it.
        """
        poses = {m: np.array(f["matrix_ras"]) for m, f in host.record["registration"].items()}
        heads = _heads(host, poses | {host.reference: np.eye(4)})
        affine = _whole_grid(host)[1]
        file = nib.load(host.folder / "brain_mask.nii.gz")
        grid = next(iter(heads.values())).shape
        theirs = _on_whole_grid(np.asanyarray(file.dataobj), file.affine, affine, grid) > 0
        images = _as_usual(np.stack([heads.get(m, heads.get("t1n")) for m in MODALITIES]), theirs)
        images, flat = nib.as_closest_canonical(nib.Nifti1Image(np.moveaxis(images, 0, -1), affine)), np.eye(4)
        theirs = np.asanyarray(nib.as_closest_canonical(nib.Nifti1Image(theirs.astype(np.uint8), affine)).dataobj)
        (low, high), (own_low, own_high) = (
            np.percentile(np.argwhere(mask), (1, 99), axis=0) for mask in (theirs, self.brain)
        )
        flat[:3, :3] = np.diag((high - low) / (own_high - own_low))
        flat[:3, 3] = low - flat[:3, :3] @ own_low
        shape = self.brain.shape
        outside = (ndimage.affine_transform(theirs, flat, output_shape=shape, order=0) == 0) & ~self.brain
        nearest = ndimage.distance_transform_edt(~outside, return_distances=False, return_indices=True)
        result = scaled.copy()
        for channel, image in enumerate(np.moveaxis(np.asanyarray(images.dataobj), -1, 0)):
            around = ndimage.affine_transform(image, flat, output_shape=shape, order=1)
            result[channel] = np.where(self.brain, scaled[channel], around[tuple(nearest)])
        return result


def _as_usual(images: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Images [4, x, y, z] with white and grey matter as bright as a phantom's."""
    usual = np.mean([CONTRAST["white"], CONTRAST["grey"]], axis=0)
    medians = [np.median(image[brain]) for image in images]
    return images * (usual / medians)[:, None, None, None].astype(np.float32)


def subjects(data: list[Path], names: list[str]) -> Iterator[Subject]:
    """Those with these names, in that order of the folders; all where there are no names."""
    affine = np.eye(4)
    affine[:3, 3] = -(HEAD_MM - 1) / 2
    if not data:
        shape = [int(n) for n in HEAD_MM]
        yield Subject("phantom", *simulate(shape, (1.0,) * 3, 2), affine)
    for one in (one for folder in data for one in find_subjects(folder)[0]):
        if names and one.name not in names:
            continue
        files = [nib.as_closest_canonical(nib.load(file)) for file in (*one.images, one.label)]
        *images, label = (np.asanyarray(file.dataobj) for file in files)
        inside = np.argwhere(np.any(images, axis=0))
        low, high = inside.min(0), inside.max(0) + 1
        at = ((HEAD_MM - (high - low)) / 2).astype(int)
        there = tuple(slice(a, a + n) for a, n in zip(at, high - low, strict=True))
        here = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        moved = np.zeros((5, *HEAD_MM.astype(int)), np.float32)
        for channel, voxels in enumerate((*images, label)):
            moved[channel][there] = voxels[here]
        yield Subject(one.name, moved[:4], moved[4].astype(np.uint8), affine)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * (first & second).sum() / total if (total := first.sum() + second.sum()) else float("nan")


def regions(label_map: np.ndarray, palette: str) -> list[np.ndarray]:
    values = PALETTES[palette]
    core = (label_map == values["core"]) | (label_map == values["enhancing"])
    return [label_map == values["enhancing"], core, label_map > 0]


def segment_on_t1c(
    segmenter: Segmenter, heads: dict[str, np.ndarray], brain: np.ndarray, prepared: Prepared
) -> np.ndarray:
    """The label map on T1c as scanned, of registered heads [x, y, z] on the 1 mm grid, and of a brain mask there."""
    affine = _whole_grid(prepared)[1]
    stripped = {m: nib.Nifti1Image(np.where(brain, np.maximum(a, 1e-3), 0), affine) for m, a in heads.items()}
    found = segmenter.segment(**stripped, probabilities=True)
    values, scanned = to_scanned(found.probabilities, prepared)
    return segmenter._regions(MetaTensor(values, affine=scanned.affine))[0].numpy()


def _whole_grid(prepared: Prepared) -> tuple[object, np.ndarray]:
    import SimpleITK as sitk

    grid = one_mm_grid(sitk.ReadImage(str(prepared.scanned(prepared.reference)), sitk.sitkFloat32))
    return grid, ras_affine(grid)


def _heads(prepared: Prepared, poses: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import SimpleITK as sitk

    grid = _whole_grid(prepared)[0]
    read = {m: sitk.ReadImage(str(prepared.scanned(m)), sitk.sitkFloat32) for m in prepared.images}
    return {m: sitk.GetArrayFromImage(resample(read[m], grid, poses[m])).transpose(2, 1, 0) for m in read}


def _on_whole_grid(mask: np.ndarray, affine: np.ndarray, target: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return labels_on(mask.astype(np.uint8), np.linalg.inv(affine) @ target, shape, 1)


def whole_way(segmenter: Segmenter, study: Path, output: Path) -> tuple[np.ndarray, Prepared, dict[str, float], float]:
    """Label map on T1c's grid, the preparation, CPU seconds of each step, and peak memory in bytes."""
    forget_peak()
    started = time.process_time()
    # CPU seconds of this process: others may be at work on the machine
    with mock.patch("custom.clinical.study.time", SimpleNamespace(perf_counter=time.process_time)):
        found = segmenter.segment_raw(study, output)
    total = time.process_time() - started
    (folder,) = (output / "prepared").glob("study-*")
    prepared = load_prepared(folder)
    seconds = dict(prepared.record["seconds"])
    seconds["network, masks, DICOM-SEG, picture"] = total - sum(seconds.values())
    return np.asanyarray(found.label_map.dataobj), prepared, seconds | {"all": total}, peak_resident_bytes()


def measure(
    segmenter: Segmenter, subject: Subject, of: Path | None, seed: int, motion: tuple[float, float], scratch: Path
) -> dict:
    images = {m: nib.Nifti1Image(i, subject.affine) for m, i in zip(MODALITIES, subject.images, strict=True)}
    untouched = np.asanyarray(segmenter.segment(**images).label_map.dataobj)
    head = subject.in_a_head(of)
    scan = scan_head(scratch / "study", head, subject.label, subject.affine, 1.0, seed, motion, True, PROTOCOLS)
    final, prepared, seconds, peak = whole_way(segmenter, scan.folder, scratch / "out")
    scanned = nib.load(prepared.scanned("t1c"))

    def to_t1c(label_map: np.ndarray) -> np.ndarray:
        return labels_on(label_map, np.linalg.inv(subject.affine) @ scanned.affine, scanned.shape, 1)

    truth, before = regions(to_t1c(subject.label), "brats2021"), regions(to_t1c(untouched), "brats2023")
    estimated = {m: np.array(f["matrix_ras"]) for m, f in prepared.record["registration"].items()} | {"t1c": np.eye(4)}
    grid, affine = _whole_grid(prepared)
    shape = grid.GetSize()
    own = _on_whole_grid(subject.brain, subject.affine, affine, shape) > 0
    file = nib.load(prepared.folder / "brain_mask.nii.gz")
    found = _on_whole_grid(np.asanyarray(file.dataobj), file.affine, affine, shape) > 0
    tumour = _on_whole_grid(subject.label > 0, subject.affine, affine, shape) > 0
    known, moved = _heads(prepared, scan.poses), _heads(prepared, estimated)
    alone = extract_brain({"T1c": known["t1c"]}, affine, subject.name)[0]
    masks = {
        "resampling alone": segment_on_t1c(segmenter, known, own, prepared),
        "and registration": segment_on_t1c(segmenter, moved, own, prepared),
        "and extraction, not registration": segment_on_t1c(segmenter, known, found, prepared),
        "the whole way": final,
    }
    rows = {"untouched": [None, [dice(*pair) for pair in zip(before, truth, strict=True)]]}
    for name, mask in masks.items():
        parts = regions(mask, "brats2023")
        rows[name] = [[dice(*pair) for pair in zip(parts, other, strict=True)] for other in (before, truth)]
    return {
        "name": subject.name,
        "dice": rows,
        "registration_mm": _errors(scan, estimated, affine, own),
        "brain": {
            name: [dice(mask, own), (tumour & ~mask).sum() / max(tumour.sum(), 1)]
            for name, mask in {"T1c alone": alone, "T1c and FLAIR": found}.items()
        },
        "warnings": prepared.record["warnings"],
        "seconds": seconds,
        "peak_gb": peak / 1e9,
    }


def _errors(scan: Scan, estimated: dict[str, np.ndarray], affine: np.ndarray, brain: np.ndarray) -> dict[str, float]:
    """Mean distance in mm of the brain's points from where they belong."""
    points = nib.affines.apply_affine(affine, np.argwhere(brain)[::101])
    apply = nib.affines.apply_affine
    return {
        m: float(np.linalg.norm(apply(estimated[m], points) - apply(scan.poses[m], points), axis=1).mean())
        for m in ("t1n", "t2w", "flair")
    }


def tables(found: list[dict], motion: tuple[float, float]) -> str:
    said = [
        f"{len(found)} subjects: {', '.join(one['name'] for one in found)}; "
        f"motions of {motion[0]:g}° and {motion[1]:g} mm."
    ]
    rows = []
    for step in found[0]["dice"]:
        row = [step]
        for against in (0, 1):
            scores = [one["dice"][step][against] for one in found]
            row += [f"{mean:.3f}" for mean in np.nanmean(scores, axis=0)] if scores[0] is not None else ["–"] * 3
        rows.append(row)
    against = [f"{region}, {to}" for to in ("untouched mask", "truth") for region in REGIONS]
    said.append(markdown_table(["Dice on T1c's grid", *against], rows))
    rows = [
        [one["name"], *(f"{mm:.2f}" for mm in one["registration_mm"].values())]
        + [text for agree, lost in one["brain"].values() for text in (f"{agree:.3f}", f"{lost:.2%}")]
        for one in found
    ]
    head = ["", "T1n, mm", "T2w, mm", "FLAIR, mm", "brain, T1c alone", "WT cut away", "brain, union", "WT cut away"]
    said.append(markdown_table(head, rows))
    steps = list(found[0]["seconds"])
    cpu = [[step, *(f"{one['seconds'].get(step, 0):.1f}" for one in found)] for step in steps]
    cpu.append(["peak memory, GB", *(f"{one['peak_gb']:.2f}" for one in found)])
    said.append(markdown_table(["CPU seconds", *(one["name"] for one in found)], cpu))
    return "\n\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="by default those of the bundle")
    parser.add_argument("--models_dir", type=Path, help="or fold<k>/model.pt, each for whom it has not seen")
    parser.add_argument("--datalist_file", type=Path, help="with --models_dir: who is in which fold")
    parser.add_argument("--head", type=Path, help="prepared study whose skull and scalp the subjects get")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders of subjects with masks")
    parser.add_argument("--subjects", nargs="*", default=[], help="names; by default all")
    parser.add_argument("--degrees", type=float, default=12)
    parser.add_argument("--mm", type=float, default=15)
    parser.add_argument("--json", type=Path, help="file for all figures, one subject a line; these are not done again")
    parser.add_argument("--output", type=Path, help="Markdown report")
    given = parser.parse_args()
    motion, found, folds = (given.degrees, given.mm), [], {}
    if given.models_dir:
        listed = json.loads(given.datalist_file.read_text(encoding="utf-8"))["training"]
        folds = {one["subject"]: given.models_dir / f"fold{one['fold']}" / "model.pt" for one in listed}
    if given.json and given.json.exists():
        found = [json.loads(line) for line in given.json.read_text(encoding="utf-8").splitlines()]
    segmenter = cache(lambda weights: Segmenter(weights, device="cpu"))
    for seed, subject in enumerate(subjects(given.data, given.subjects)):
        if subject.name in {one["name"] for one in found}:
            continue
        weights = folds[subject.name] if folds else given.weights
        with tempfile.TemporaryDirectory() as scratch:
            found.append(measure(segmenter(weights), subject, given.head, seed, motion, Path(scratch)))
        if given.json:
            with open(given.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(found[-1]) + "\n")
    command = "python benchmarks/clinical_heads.py" + (
        " --models_dir FOLDS --datalist_file DATALIST --data DATA… --subjects …" if given.data else ""
    )
    text = f"## From the scanner\n\n`{command}`\n\n{environment()}\n\n{tables(found, motion)}"
    publish(text, given.output, "clinical" if given.data else "clinical phantom")


if __name__ == "__main__":
    main()
