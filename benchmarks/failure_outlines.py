"""A picture of the worst held-out subjects for a model card: outlines of mask and truth on a blank brain, no voxel.

    python benchmarks/failure_outlines.py SCORES --dataset_dir DATASET --only BraTS2021 --output failures.png

SCORES is the output folder of `inference.json` with `evaluate.json`, for one fold or all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.pyplot import subplots

from custom.cohort import REGIONS, find_subjects
from custom.report.pictures import REGION_COLOURS, REGION_NAMES, region_masks
from custom.report.runs import read_scores, worst_first


def main(scores: str, dataset_dir: str | Sequence[str], output: str, number: int = 4, only: str = "") -> None:
    """Draw each subject's axial slice on which mask and truth differ most.

    Args:
        scores: folder of records and masks of held-out subjects.
        dataset_dir: where their images and true masks are; or several such folders.
        output: PNG.
        number: of subjects, worst first by the mean Dice, a region wrongly predicted counting 0.
        only: start of the names of the subjects that may be drawn, e.g. those whose terms allow it.
    """
    subjects = {one.name: one for one in find_subjects(dataset_dir)[0]}
    table = read_scores(scores)
    worst = [name for name in worst_first(table) if name.startswith(only)][:number]
    rows = {row["subject"]: row for row in table}
    figure, panels = subplots(1, len(worst), figsize=(3 * len(worst), 3.6), squeeze=False)
    for axes, name in zip(panels[0], worst, strict=True):
        brain = np.asarray(_canonical(subjects[name].images[3]).dataobj) > 0
        truth = region_masks(np.asarray(_canonical(subjects[name].label).dataobj), subjects[name].palette)
        (mask,) = Path(scores).glob(f"**/{name}/{name}_seg.nii.gz")
        found = region_masks(np.asarray(_canonical(mask).dataobj))
        wrong = np.sum([truth[region] ^ found[region] for region in REGIONS], axis=0)
        level = int(wrong.sum(axis=(0, 1)).argmax())
        axes.imshow(brain[::-1, :, level].T, origin="lower", cmap="Greys", vmin=0, vmax=6)
        for region in reversed(REGIONS):
            for masks, style in ((found, "solid"), (truth, "dashed")):
                if masks[region][:, :, level].any():
                    plane = masks[region][::-1, :, level].T
                    axes.contour(plane, [0.5], colors=REGION_COLOURS[region], linestyles=style, linewidths=1.2)
        dice = ", ".join(f"{region} {rows[name][f'{region}_dice']:.2f}".replace("nan", "–") for region in REGIONS)
        axes.set_title(f"{name}\n{dice}", fontsize=9)
        across, up = (np.flatnonzero(brain[::-1].any(axis=others)) for others in ((1, 2), (0, 2)))
        axes.set(xlim=(across[0] - 4, across[-1] + 4), ylim=(up[0] - 4, up[-1] + 4))
        axes.axis("off")
    handles = [Line2D([], [], color=REGION_COLOURS[region], label=REGION_NAMES[region]) for region in REGIONS]
    handles += [Line2D([], [], color="0.3", linestyle=s, label=t) for t, s in (("mask", "solid"), ("truth", "dashed"))]
    figure.legend(handles=handles, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(output, dpi=110, bbox_inches="tight")


def _canonical(path: str | Path) -> nib.Nifti1Image:
    return nib.as_closest_canonical(nib.load(path))


if __name__ == "__main__":
    fire.Fire(main)
