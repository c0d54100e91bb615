"""How to cover a brain with the least computing: Dice and seconds of window plans, on subjects held out of training.

Every plan runs the same backbones, each on the subjects of its own held-out fold:

- few windows of at most the voxels of a training patch, the default;
- the whole brain box in one pass;
- sliding windows of the training patch, overlap 0.25 and 0.5 (the paper's);
- one window around the tumour, which a first pass at half the resolution finds; voxels outside it keep the logits of
  that first pass, and where it finds nothing the whole box is computed.

    OMP_NUM_THREADS=2 python benchmarks/window_plans.py --run RUN --data DATASET_DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.inferers import Inferer, SlidingWindowInferer
from monai.transforms import Compose
from timing import environment, markdown_table, publish
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.cohort import REGIONS
from custom.inference import FewWindowsInferer, WholeVolumeInferer
from custom.mednext import mednext_tiny
from custom.weights import Weights, fold_checkpoint

ROOT = Path(__file__).resolve().parents[1]


class TumourWindow(Inferer):
    """A first pass at half the resolution, then the box of its tumour and a margin at the full one."""

    def __init__(self, probability: float = 0.3, margin: int = 8) -> None:
        super().__init__()
        self.probability, self.margin = probability, margin
        self.whole = WholeVolumeInferer()

    def __call__(self, inputs: Tensor, network, *args, **kwargs) -> Tensor:
        """Logits of `inputs` `[1, 4, *spatial]`."""
        half = F.interpolate(inputs, scale_factor=0.5, mode="trilinear")
        logits = F.interpolate(self.whole(half, network), inputs.shape[2:], mode="trilinear")
        found = (logits[0, 2].sigmoid() > self.probability).nonzero()
        if not len(found):
            return self.whole(inputs, network)
        low, high = found.amin(0) - self.margin, found.amax(0) + 1 + self.margin
        box = (..., *(slice(max(0, int(a)), int(b)) for a, b in zip(low, high, strict=True)))
        logits[box] = self.whole(inputs[box], network)
        return logits


def load(config: Path, spacing: list[float]) -> Compose:
    """Preprocessing of images and labels."""
    parser = ConfigParser()
    parser.read_config(config)
    parser.update({"bundle_root": str(ROOT), "path_setup": None, "spacing": spacing})
    labels = [parser.get_parsed_content(f"train#preprocessing_transforms#{index}") for index in range(1, 4)]
    return Compose([*parser.get_parsed_content("image_preprocessing"), *labels])


def dice(found: Tensor, truth: Tensor) -> list[float]:
    """Dice of each region; 1 where both are empty."""
    both, either = (found & truth).flatten(1).sum(1), (found.flatten(1).sum(1) + truth.flatten(1).sum(1))
    return torch.where(either > 0, 2 * both / either.clamp_min(1), 1.0).tolist()


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of `comnet crossval --config small.json`")
    parser.add_argument("--data", type=Path, required=True, help="the dataset it was made with")
    parser.add_argument("--output", type=Path, help="Markdown report, such as docs/benchmarks.md; else printed only")
    arguments = parser.parse_args()
    small = json.loads((ROOT / "bundles/comnet_mednext/configs/small.json").read_text())
    prepare = load(ROOT / "bundles/comnet_mednext/configs/train.json", small["spacing"])
    patch = small["patch_size"]
    plans = {
        "few windows": FewWindowsInferer(patch),
        "whole box": WholeVolumeInferer(),
        "windows, overlap 0.25": SlidingWindowInferer(patch, overlap=0.25, mode="gaussian"),
        "windows, overlap 0.5": SlidingWindowInferer(patch, overlap=0.5, mode="gaussian"),
        "tumour window": TumourWindow(),
    }
    scores: dict[str, list[list[float]]] = {plan: [] for plan in plans}
    seconds: dict[str, list[float]] = {plan: [] for plan in plans}
    network = mednext_tiny(4, 3).eval()
    for item in json.loads((arguments.run / "datalist.json").read_text())["training"]:
        Weights(fold_checkpoint(arguments.run / "mednext", item["fold"])).load(network)
        paths = {key: [str(arguments.data / path) for path in item[key]] if isinstance(item[key], list) else
                 str(arguments.data / item[key]) for key in ("image", "label")}  # fmt: skip
        subject = prepare({**item, **paths})
        image, truth = subject["image"].as_tensor()[None], subject["label"].as_tensor() > 0
        for plan, inferer in plans.items():
            times = []
            for _ in range(3):
                start = time.perf_counter()
                with torch.no_grad():
                    logits = inferer(image, network)
                times.append(time.perf_counter() - start)
            seconds[plan].append(statistics.median(times))
            scores[plan].append(dice(logits[0] > 0, truth))
    rows = []
    for plan in plans:
        means = [statistics.mean(values) for values in zip(*scores[plan], strict=True)]
        total = sum(seconds[plan]) / sum(seconds["whole box"])
        rows.append([plan, *(f"{mean:.3f}" for mean in (*means, statistics.mean(means))), f"{total:.2f}"])
    header = ["plan", *(f"Dice {region}" for region in REGIONS), "mean", "seconds / whole box"]
    count = len(scores["whole box"])
    text = (
        f"## Window plans\n\n`python benchmarks/window_plans.py --run RUN --data BRATS2021`\n\n{environment()}; "
        f"{count} subjects, each by the backbone of its held-out fold, at {small['spacing'][0]:g} mm, windows of "
        f"{'×'.join(map(str, patch))}; median of 3 runs each.\n\n{markdown_table(header, rows)}"
    )
    publish(text, arguments.output, "window plans")


if __name__ == "__main__":
    main()
