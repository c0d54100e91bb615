"""Our lesion-wise scores beside those of the challenges' own package, on masks that were spoiled on purpose.

The package (`pip install brats-evaluation`, AGPL-3.0) runs in an environment of its own; nothing here imports it:

    python benchmarks/lesion_scores.py spoil BRATS2021 OUT
    brats-evaluate --config gli --ref_path OUT/ref --pred_path OUT/pred --summary_json OUT/summary.json
    python benchmarks/lesion_scores.py compare OUT
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from custom.metrics import lesion_scores
from custom.report import region_masks

THEIRS = {"lesion_dice": "sq_dsc", "lesion_nsd": "sq_nsd", "lesion_hd95": "sq_hd95", "lesion_f1": "rq"}
COUNTS = {"lesions": "n_ref_instances", "lesions_found": "tp", "lesions_false": "fp"}


def spoil(dataset_dir: str, output_dir: str, num_subjects: int = 10, seed: int = 0) -> None:
    """Write true masks with the challenge's labels and, beside them, eroded or grown, shifted and with islands.

    Args:
        dataset_dir: folder of BraTS subjects; each has one `*_seg.nii.gz` with the labels of 2021.
        output_dir: receives `ref` and `pred`.
        num_subjects: how many, by name.
        seed: of what is done to them.
    """
    rng = np.random.default_rng(seed)
    for path in sorted(Path(dataset_dir).glob("**/*_seg.nii.gz"))[:num_subjects]:
        image = nib.load(path)
        truth = np.asarray(image.dataobj).astype(np.uint8)
        truth[truth == 4] = 3
        name = f"{path.name.removesuffix('_seg.nii.gz')[-5:]}.nii.gz"
        for folder, labels in (("ref", truth), ("pred", _spoiled(truth, rng))):
            Path(output_dir, folder).mkdir(parents=True, exist_ok=True)
            nib.Nifti1Image(labels, image.affine).to_filename(Path(output_dir, folder, name))


def _spoiled(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    change = ndimage.grey_erosion if rng.random() < 0.5 else ndimage.grey_dilation
    labels = np.roll(change(truth, size=(3, 3, 2)), rng.integers(-2, 3, 3), axis=(0, 1, 2))
    islands, count = ndimage.label(labels > 0, np.ones((3, 3, 3)))
    for island in range(1, count + 1):
        if rng.random() < 0.3 and count > 1:
            labels[islands == island] = 0
    brain = np.argwhere(ndimage.binary_dilation(truth > 0, iterations=12))
    for corner in brain[rng.integers(len(brain), size=rng.integers(1, 6))]:
        size = rng.integers(1, 6, 3)
        labels[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = rng.integers(1, 4)
    return labels


def compare(output_dir: str) -> None:
    """Print both packages' scores of every subject and region, and the largest difference.

    Raises:
        SystemExit: some score differs by more than 1e-6, or some count at all.
    """
    theirs = json.loads(Path(output_dir, "summary.json").read_text())["metrics"]
    print("| subject | region | lesions | found | false | Dice | NSD | HD95 [mm] | F1 | largest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for subject in theirs:
        pair = [nib.load(Path(output_dir, folder, subject["subject_name"])) for folder in ("pred", "ref")]
        spacing = [float(size) for size in pair[1].header.get_zooms()]
        masks = [region_masks(np.asarray(image.dataobj), "brats2023") for image in pair]
        for region in masks[0]:
            ours = lesion_scores(*(torch.from_numpy(one[region]) for one in masks), spacing)
            found = subject[region.lower()]
            gap = max(_gap(ours[mine], found.get(name)) for mine, name in {**THEIRS, **COUNTS}.items())
            worst = max(worst, gap)
            figures = " | ".join(f"{ours[name]:.0f}" for name in COUNTS)
            figures += "".join(f" | {ours[name]:.4f}" for name in THEIRS)
            print(f"| {subject['subject_name'].removesuffix('.nii.gz')} | {region} | {figures} | {gap:.1g} |")
    print(f"\nlargest difference {worst:.2g}")
    if worst > 1e-6:
        raise SystemExit(1)


def _gap(ours: float, theirs: float | None) -> float:
    """Distance of two scores; what is not defined here is NaN, there also infinite or, without a reference, 0."""
    undefined = theirs is None or not math.isfinite(theirs)
    if math.isnan(ours):
        return 0.0 if undefined or theirs == 0 else math.inf
    return math.inf if undefined else abs(ours - theirs)


if __name__ == "__main__":
    fire.Fire({"spoil": spoil, "compare": compare})
