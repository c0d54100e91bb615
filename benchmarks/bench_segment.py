"""A whole CoMNeT on one real subject against one sliding-window pass of MONAI's MedNeXt, and how the costs grow.

`comnet segment` runs in processes of its own: read, preprocess, five MedNeXt-B, CorrDiff with 25 steps, post-process,
write, picture, report. The peer is one pass of MONAI's MedNeXt-B in PyTorch over the same brain box, windows of
128×160×112 with overlap 0.25, without reading or writing. The weights are random unless given: time does not depend on
them, but the picture and the volumes then mean nothing. The released weights have a peer of their size: the network of
MONAI's BraTS bundle.

    python benchmarks/bench_segment.py --data DATASET_DIR --runs 5 --output docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench_mednext import FULL, monais
from monai.bundle import ConfigParser
from monai.inferers import Inferer, SlidingWindowInferer
from monai.networks.nets import SegResNet
from timing import environment, markdown_table, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.cohort import Cohort
from custom.comnet import CoMNeT
from custom.corrdiff import corrdiff_base, corrdiff_tiny
from custom.mednext import mednext_base, mednext_tiny
from custom.weights import save_atomically

ROOT = Path(__file__).resolve().parents[1]
STAGED = Path(__file__).with_name("staged_segment.py")
ALONE = ("--num_workers", "0")  # one subject: reading has nothing to overlap with, and the clock sees it
NETWORKS = {"base": (mednext_base, corrdiff_base), "tiny": (mednext_tiny, corrdiff_tiny)}


TITLES = {
    "released": "A whole subject with the released weights",
    "chain": "A whole subject, five MedNeXt-B and CorrDiff at 1 mm",
    "growth": "Growth with folds and samples",
    "many": "Many subjects in a row, five MedNeXt tiny at 2 mm",
}


def make_weights(folder: Path, name: str, folds: int, spacing: float) -> Path:
    """Random weights of a CoMNeT whose corrector is not skipped."""
    backbone, corrector = NETWORKS[name]
    torch.manual_seed(0)
    network = CoMNeT(lambda: backbone(4, 3), folds, corrector())
    network.corrector.alpha.data.fill_(0.02)
    facts = {"backbone": f"custom.mednext.{backbone.__name__}", "corrector": f"custom.corrdiff.{corrector.__name__}"}
    facts |= {"spacing": [spacing] * 3, "num_folds": folds, "notes": "random weights of a benchmark"}
    save_atomically({"model": network.state_dict(), "provenance": facts}, folder / "model.pt")
    return folder


def segment(folders: Sequence[Path], weights: Path, output_dir: Path, *options: str) -> dict[str, float]:
    """Seconds of the process and of its stages, and its peak memory in bytes."""
    command = [sys.executable, str(STAGED), *map(str, folders), "--output_dir", str(output_dir)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--weights", str(weights), *options], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"comnet segment ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "whole process": seconds}


Peer = Callable[[], tuple[torch.nn.Module, Inferer]]


def monai_mednext() -> tuple[torch.nn.Module, Inferer]:
    """MONAI's MedNeXt-B in the windows of the paper."""
    return monais().eval(), SlidingWindowInferer(FULL, overlap=0.25)


def monai_brats_bundle() -> tuple[torch.nn.Module, Inferer]:
    """Network and windows of `brats_mri_segmentation` in MONAI's Model Zoo."""
    network = SegResNet(3, 16, 4, 3, dropout_prob=0.2, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))
    return network.eval(), SlidingWindowInferer((240, 240, 160), overlap=0.5)


def seconds_of(network: torch.nn.Module, inferer: Inferer, item: dict) -> float:
    """Seconds of one pass of a peer over a subject's brain box at 1 mm."""
    parser = ConfigParser()
    parser.read_config(ROOT / "bundles/comnet_mednext/configs/inference.json")
    parser.update({"bundle_root": str(ROOT), "path_setup": None})
    prepared = parser.get_parsed_content("preprocessing")({"subject": item["subject"], "image": list(item["image"])})
    image = prepared["image"].as_tensor()[None]
    start = time.perf_counter()
    with torch.no_grad():
        inferer(image, network)
    return time.perf_counter() - start


def one_subject(item: dict, weights: Path, runs: int, scratch: Path, peer: Peer, name: str) -> str:
    """The chain against a peer, turn by turn, and its stages."""
    ours, peers = [], []
    for run in range(runs):
        ours.append(segment([Path(item["image"][0]).parent], weights, scratch / str(run), *ALONE))
        peers.append(seconds_of(*peer(), item))
        print(f"run {run + 1}: ours {ours[-1]['whole process']:.1f} s, MONAI {peers[-1]:.1f} s", file=sys.stderr)
    median = {name: statistics.median(figures[name] for figures in ours) for name in ours[0]}
    reference, whole, peak = statistics.median(peers), median["whole process"], median.pop("peak") / 1e9
    rows = [[name, f"{reference:.1f}", "1.00"]]
    rows.append(["`comnet segment`, whole process", f"{whole:.1f}", f"{whole / reference:.3f}"])
    staged = {name: value for name, value in median.items() if name != "whole process"}
    rest = whole - sum(staged.values())
    rows += [[f"– {name}", f"{value:.1f}", f"{value / reference:.3f}"] for name, value in staged.items()]
    rows.append(["– the rest, starting Python and importing above all", f"{rest:.1f}", f"{rest / reference:.3f}"])
    table = markdown_table([f"{item['subject']}", "seconds", "of the peer's"], rows)
    return f"{table}\n\nPeak memory of the whole process: {peak:.2f} GB."


def growth(item: dict, scratch: Path) -> str:
    """Folds, steps and samples: one run each."""
    subject, rows = [Path(item["image"][0]).parent], []
    cases = {
        "1 fold, 25 steps": (1, ()),
        "3 folds, 25 steps": (3, ()),
        "5 folds, 25 steps": (5, ()),
        "5 folds, 2 samples of 25 steps": (5, ("--num_samples", "2")),
        "5 folds, whole box at once": (5, ("--inferer", "@whole_volume")),
    }
    for number, (name, (folds, options)) in enumerate(cases.items()):
        weights = make_weights(scratch / f"folds{folds}", "base", folds, 1.0)
        found = segment(subject, weights, scratch / f"growth{number}", *ALONE, *options)
        rows.append([name, *(f"{found[key]:.1f}" for key in ("backbones", "CorrDiff", "whole process"))])
        rows[-1].append(f"{found['peak'] / 1e9:.2f}")
    return markdown_table(["", "backbones, s", "CorrDiff, s", "whole process, s", "peak memory, GB"], rows)


def many_subjects(items: Sequence[dict], scratch: Path, counts: Sequence[int] = (10, 30, 50)) -> str:
    """Links to real subjects, segmented in one go with a small network at 2 mm: memory and time against the number."""
    weights, rows = make_weights(scratch / "tiny", "tiny", 5, 2.0), []
    for count in counts:
        dataset = scratch / f"cohort{count}"
        for number in range(count):
            source = Path(items[number % len(items)]["image"][0]).parent
            target = dataset / f"BraTS2021_{90000 + number}"
            target.mkdir(parents=True)
            for file in source.iterdir():
                os.symlink(file.resolve(), target / file.name.replace(source.name, target.name))
        found = segment([dataset], weights, scratch / f"many{count}", "--runtime", "openvino")
        rows.append([str(count), f"{found['whole process']:.1f}", f"{found['whole process'] / count:.2f}"])
        rows[-1].append(f"{found['peak'] / 1e9:.2f}")
    return markdown_table(["subjects", "seconds", "seconds a subject", "peak memory, GB"], rows)


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder, such as BraTS 2021")
    parser.add_argument("--subject", default="BraTS2021_01476", help="the one that is segmented")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--weights", type=Path, help="of a CoMNeT with MedNeXt-B; random ones if not given")
    parser.add_argument("--parts", nargs="+", default=list(TITLES), choices=TITLES)
    parser.add_argument("--output", type=Path, help="Markdown report, such as docs/benchmarks.md; else printed only")
    arguments = parser.parse_args()
    items = list(Cohort(str(arguments.data)).subjects())
    item = next(item for item in items if item["subject"] == arguments.subject)
    command = f"python benchmarks/bench_segment.py --data BRATS2021 --runs {arguments.runs}"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        makers = {
            "released": lambda: one_subject(
                item,
                ROOT / "bundles/comnet_ensemble/models",
                arguments.runs,
                scratch / "released",
                monai_brats_bundle,
                "MONAI's BraTS bundle, its network alone, PyTorch",
            ),
            "chain": lambda: one_subject(
                item,
                arguments.weights or make_weights(scratch / "whole", "base", 5, 1.0),
                arguments.runs,
                scratch / "chain",
                monai_mednext,
                "MONAI MedNeXt-B, PyTorch, one pass",
            ),
            "growth": lambda: growth(item, scratch),
            "many": lambda: many_subjects(items, scratch),
        }
        for part in arguments.parts:
            text = f"## {TITLES[part]}\n\n`{command} --parts {part}`\n\n{environment()}.\n\n{makers[part]()}"
            publish(text, arguments.output, part)


if __name__ == "__main__":
    main()
