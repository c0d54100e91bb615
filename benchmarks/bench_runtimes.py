r"""Does another runtime give the same mask? Dice of OpenVINO's masks against PyTorch's, on real subjects.

The weights must have been trained: those of an untrained network are positive everywhere or nowhere. A short training
is enough (7 min on two cores), run here at 1 mm whatever the spacing it was trained at:

    python -m monai.bundle run --config_file "['configs/train.json','configs/small.json']" --dataset_dir DATASET_DIR \
      --backbone custom.mednext.mednext_base --max_epochs 24 --val_interval 12 --warmup_epochs 1 --learning_rate 0.001
    python benchmarks/bench_runtimes.py --data DATASET_DIR --checkpoint models/fold0/model.pt
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.metrics import compute_dice
from timing import environment, markdown_table, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.cohort import REGIONS, Cohort
from custom.inference import FewWindowsInferer
from custom.mednext import mednext_base
from custom.mednext.runtime import PRECISIONS, Runtime
from custom.weights import Weights

ROOT = Path(__file__).resolve().parents[1]
PATCH = (128, 160, 112)


@torch.no_grad()
def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder, such as BraTS 2021")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a trained MedNeXt-B")
    parser.add_argument("--subjects", type=int, default=11, help="how many, in order of name")
    parser.add_argument("--output", type=Path, help="Markdown report, such as docs/benchmarks.md; else printed only")
    arguments = parser.parse_args()
    network, inferer = mednext_base(4, 3).eval(), FewWindowsInferer(PATCH)
    Weights(arguments.checkpoint).load(network)
    config = ConfigParser()
    config.read_config(ROOT / "bundles/comnet_mednext/configs/inference.json")
    config.update({"bundle_root": str(ROOT), "path_setup": None})
    prepare = config.get_parsed_content("preprocessing")
    runtimes = {precision: Runtime(network, "openvino", precision).network for precision in PRECISIONS}
    rows, reference_seconds = [], 0.0
    seconds, worst = dict.fromkeys(PRECISIONS, 0.0), dict.fromkeys(PRECISIONS, 1.0)
    for item in list(Cohort(str(arguments.data)).subjects())[: arguments.subjects]:
        image = prepare({"subject": item["subject"], "image": list(item["image"])})["image"].as_tensor()[None]
        start = time.perf_counter()
        reference = (inferer(image, network) > 0).float()
        reference_seconds += time.perf_counter() - start
        for precision, fast in runtimes.items():
            inferer(image, fast)  # compiles
            start = time.perf_counter()
            found = (inferer(image, fast) > 0).float()
            seconds[precision] += time.perf_counter() - start
            dice = compute_dice(found, reference)[0]
            worst[precision] = min(worst[precision], dice.nan_to_num(1).min().item())
            moved = int((found != reference).sum())
            rows.append([item["subject"], precision, *(f"{value:.5f}" for value in dice.tolist()), str(moved)])
            fast.release_memory()
        print(rows[-2:], file=sys.stderr, flush=True)
    table = markdown_table(["", "OpenVINO", *(f"Dice {region}" for region in REGIONS), "voxels moved"], rows)
    summary = "; ".join(
        f"{name}: worst Dice {worst[name]:.5f}, {reference_seconds / seconds[name]:.2f} times PyTorch's speed"
        for name in PRECISIONS
    )
    text = (
        "## OpenVINO's masks against PyTorch's\n\n`python benchmarks/bench_runtimes.py --data BRATS2021 --checkpoint …`"
        f"\n\n{environment()}; MedNeXt-B after a short training. {summary}.\n\n{table}"
    )
    publish(text, arguments.output, "runtimes")


if __name__ == "__main__":
    main()
