"""Held-out Dice of single folds on degraded images, against the untouched truth; the table is in docs/results.md.

    python benchmarks/robustness.py --models_dir MODELS --datalist_file DATALIST --dataset_dir DATA

Each fold's weights, MODELS/fold<k>/model.pt, segment the subjects of that fold, which they have not seen. A mask on
another grid comes back to the truth's by nearest neighbour.
"""

from __future__ import annotations

import csv
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_from_to
from scipy import ndimage
from tqdm import tqdm

from custom import Segmenter
from custom.cohort import MODALITIES, REGIONS, Cohort
from custom.metrics.scores import overlap_scores
from custom.report import region_masks

Images = dict[str, nib.Nifti1Image]


def _voxels(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj, dtype=np.float32)


def _with(image: nib.Nifti1Image, voxels: np.ndarray, affine: np.ndarray | None = None) -> nib.Nifti1Image:
    return nib.Nifti1Image(voxels.astype(np.float32), image.affine if affine is None else affine)


def _thicker(*factors: int) -> Callable[[Images, np.random.Generator], Images]:
    """Voxels that are so many times as large, each the mean of those it covers."""

    def one(image: nib.Nifti1Image) -> nib.Nifti1Image:
        voxels = _voxels(image)
        kept = [size // factor * factor for size, factor in zip(voxels.shape, factors, strict=True)]
        x, y, z = (size // factor for size, factor in zip(kept, factors, strict=True))
        blocks = voxels[: kept[0], : kept[1], : kept[2]].reshape(x, factors[0], y, factors[1], z, factors[2])
        into = np.diag([*factors, 1.0])
        into[:3, 3] = [(factor - 1) / 2 for factor in factors]
        return _with(image, blocks.mean((1, 3, 5)), image.affine @ into)

    return lambda images, rng: {key: one(image) for key, image in images.items()}


def _turned(images: Images, rng: np.random.Generator) -> Images:
    orientation = nib.orientations.axcodes2ornt("PIR")
    return {
        key: image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), orientation))
        for key, image in images.items()
    }


def _tilted(degrees: float) -> Callable[[Images, np.random.Generator], Images]:
    """The head turned about two axes by so many degrees within the grid, as where no atlas has straightened it."""
    angle = np.deg2rad(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    about_z = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])

    def one(image: nib.Nifti1Image) -> nib.Nifti1Image:
        voxels = _voxels(image)
        middle = (np.array(voxels.shape) - 1) / 2
        inverse = (about_x @ about_z).T
        into = np.eye(4)
        into[:3, :3], into[:3, 3] = inverse, middle - inverse @ middle
        return _with(image, ndimage.affine_transform(voxels, inverse, into[:3, 3], order=1), image.affine @ into)

    return lambda images, rng: {key: one(image) for key, image in images.items()}


def _biased(images: Images, rng: np.random.Generator) -> Images:
    """A smooth field from a half to twice, another one in each modality."""
    changed = {}
    for key, image in images.items():
        voxels = _voxels(image)
        coarse = ndimage.zoom(rng.uniform(-1, 1, (3, 3, 3)), 8, order=3)
        field = ndimage.zoom(coarse, [size / 24 for size in voxels.shape], order=1)
        changed[key] = _with(image, voxels * 2 ** (field / np.abs(field).max()))
    return changed


def _noisy(images: Images, rng: np.random.Generator) -> Images:
    """Noise of a tenth of the brain's 99th percentile."""
    changed = {}
    for key, image in images.items():
        voxels = _voxels(image)
        brain = voxels != 0
        noise = rng.normal(0, 0.1 * np.percentile(voxels[brain], 99), voxels.shape)
        changed[key] = _with(image, np.where(brain, voxels + noise, 0))
    return changed


def _brain(images: Images) -> np.ndarray:
    return np.any([_voxels(image) != 0 for image in images.values()], axis=0)


def _eroded(images: Images, rng: np.random.Generator) -> Images:
    inside = ndimage.distance_transform_edt(ndimage.binary_fill_holes(_brain(images))) > 3
    return {key: _with(image, _voxels(image) * inside) for key, image in images.items()}


def _dilated(images: Images, rng: np.random.Generator) -> Images:
    """Three millimetres more, with the nearest voxel's value times a random share, as remains of meninges have."""
    brain = _brain(images)
    distance, nearest = ndimage.distance_transform_edt(~brain, return_indices=True)
    rim = (distance > 0) & (distance <= 3)
    share = rng.uniform(0.2, 1.2, brain.shape)
    return {
        key: _with(image, np.where(rim, _voxels(image)[tuple(nearest)] * share, _voxels(image)))
        for key, image in images.items()
    }


def _without(*absent: str) -> Callable[[Images, np.random.Generator], Images]:
    return lambda images, rng: {key: image for key, image in images.items() if key not in absent}


DEGRADATIONS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "untouched": _without(),
    "2 mm voxels": _thicker(2, 2, 2),
    "6 mm axial slices": _thicker(1, 1, 6),
    "6 mm sagittal slices": _thicker(6, 1, 1),
    "stored as PIR": _turned,
    "head turned by 15°": _tilted(15),
    "bias field, half to twice": _biased,
    "noise, a tenth": _noisy,
    "brain mask 3 mm smaller": _eroded,
    "brain mask 3 mm larger": _dilated,
    "without T1n": _without("t1n"),
    "without T1c": _without("t1c"),
    "without T2w": _without("t2w"),
    "without T2-FLAIR": _without("flair"),
    "T1c and T2-FLAIR": _without("t1n", "t2w"),
    "T1n and T1c": _without("t2w", "flair"),
    "T1c and T2w": _without("t1n", "flair"),
    "T1n and T2-FLAIR": _without("t1c", "t2w"),
    "T2w and T2-FLAIR": _without("t1n", "t1c"),
    "T1c": _without("t1n", "t2w", "flair"),
    "T2-FLAIR": _without("t1n", "t1c", "t2w"),
}


def main(
    models_dir: str,
    datalist_file: str,
    dataset_dir: str,
    output: str = "robustness.csv",
    folds: Sequence[int] = (0,),
    only: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Segment each held-out subject in every degradation, write one row each, print the means as a Markdown table.

    Args:
        models_dir: folder of fold<k>/model.pt.
        datalist_file: the folds' datalist.
        dataset_dir: where its subjects are.
        output: table of Dice by subject and degradation; rows that are there are not computed again.
        folds: which folds.
        only: names of degradations; all by default.
        seed: of what is random in them.
    """
    cohort = Cohort(dataset_dir, datalist_file)
    header = ["fold", "subject", "degradation", *REGIONS]
    rows = list(csv.DictReader(Path(output).read_text().splitlines())) if Path(output).exists() else []
    done = {(row["subject"], row["degradation"]) for row in rows}
    chosen = list(only) or list(DEGRADATIONS)
    for fold in folds:
        segmenter = Segmenter(f"{models_dir}/fold{fold}/model.pt", allow_missing=True)
        for item in tqdm(cohort.validation(fold), desc=f"fold {fold}"):
            images = {key: nib.load(path) for key, path in zip(MODALITIES, item["image"], strict=True)}
            label = nib.load(item["label"])
            truth = region_masks(np.asarray(label.dataobj), item["palette"])
            for name in chosen:
                if (item["subject"], name) in done:
                    continue
                own = zlib.crc32(item["subject"].encode())
                rng = np.random.default_rng([seed, own, list(DEGRADATIONS).index(name)])
                degraded: Mapping[str, nib.Nifti1Image | None] = DEGRADATIONS[name](images, rng)
                found = segmenter.segment(**{key: degraded.get(key) for key in MODALITIES}).label_map
                back = resample_from_to(found, label, order=0)
                masks = region_masks(np.asarray(back.dataobj))
                pairs = {
                    region: (torch.from_numpy(masks[region]), torch.from_numpy(truth[region])) for region in REGIONS
                }
                dice = {region: overlap_scores(*pair)["dice"] for region, pair in pairs.items()}
                rows.append({"fold": fold, "subject": item["subject"], "degradation": name, **dice})
                with Path(output).open("w", newline="") as file:
                    table = csv.DictWriter(file, header, extrasaction="ignore")
                    table.writeheader()
                    table.writerows(rows)
    print("| images | " + " | ".join(REGIONS) + " |\n| --- | " + "--- | " * len(REGIONS))
    for name in chosen:
        values = [[float(row[region]) for row in rows if row["degradation"] == name] for region in REGIONS]
        means = (statistics.mean(v for v in value if v == v) for value in values)
        print(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    fire.Fire(main)
