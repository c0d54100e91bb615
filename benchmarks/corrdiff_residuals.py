"""How well does CorrDiff's VQ-VAE reconstruct real residuals? Read from a finished cross-validation.

The residual of a subject is its truth less the probability of the backbone that has not seen it. For every fold, the
trained tokeniser encodes, quantises and decodes the residuals of the subjects it was trained on and of the held-out
ones, at the spacing of the run.

    python benchmarks/corrdiff_residuals.py --run RUN --data DATASET_DIR [--config small.json]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.transforms import ResampleToMatch
from timing import environment, markdown_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.weights import Weights

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "comnet_corrdiff"
ERROR = 0.1
COLUMNS = ("fold", "subjects", "L1", "mean abs r", f"L1 where abs r > {ERROR}", "mean abs r there", "perplexity")


def parser_of(run: Path, data: Path, configs: Sequence[str], fold: int) -> ConfigParser:
    """Configs of one fold's corrector, as the cross-validation has used them."""
    config = ConfigParser()
    config.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", *configs)])
    places = {"dataset_dir": data, "datalist_file": run / "datalist.json", "backbones_dir": run / "mednext"}
    places |= {"coarse_dir": run / "coarse", "models_dir": run / "comnet", "bundle_root": BUNDLE}
    config.update({name: str(place) for name, place in places.items()} | {"fold": fold})
    return config


@torch.no_grad()
def figures(config: ConfigParser, part: str) -> tuple[int, list[float]]:
    """Number of subjects of "training" or "validation", and the columns from L1 on."""
    cohort, coarse = config.get_parsed_content("cohort"), config.get_parsed_content("coarse")
    network = config.get_parsed_content("network").eval()
    fold = config["fold"]
    Weights(config.get_parsed_content("ckpt_dir") + "/model.pt").load(network)
    items = coarse.add(getattr(cohort, part)(fold))
    residuals, decoded, perplexities = [], [], []
    for item in Dataset(items, config.get_parsed_content("validate#preprocessing")):
        label = label_on_grid(item)
        found, _ = network.corrector.tokenise((label - item["coarse"].as_tensor().sigmoid())[None], learn=False)
        residuals.append(found.residual.flatten())
        decoded.append(found.reconstruction.flatten())
        perplexities.append(found.perplexity.item())
    residual, decoded = torch.cat(residuals), torch.cat(decoded)
    wrong, error = residual.abs() > ERROR, (decoded - residual).abs()
    columns = [error.mean(), residual.abs().mean(), error[wrong].mean(), residual[wrong].abs().mean()]
    return len(items), [*(column.item() for column in columns), float(np.mean(perplexities))]


def label_on_grid(item: dict) -> torch.Tensor:
    """Region masks on the grid of the coarse prediction, as in training."""
    resample = ResampleToMatch(mode="nearest", padding_mode="zeros")
    return resample(item["label"], img_dst=item["image"]).as_tensor().round()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished comnet crossval")
    parser.add_argument("--data", type=Path, required=True, help="folder of its dataset")
    parser.add_argument("--config", nargs="*", default=["small.json"], help="overlays that the run was made with")
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    table = []
    for fold in range(args.folds):
        config = parser_of(args.run, args.data, args.config, fold)
        for part in ("training", "validation"):
            count, columns = figures(config, part)
            *errors, perplexity = columns
            name = f"{count} {'trained on' if part == 'training' else 'held out'}"
            table.append([str(fold), name, *(f"{value:.4f}" for value in errors), f"{perplexity:.1f}"])
            print(*table[-1], file=sys.stderr)
    print(markdown_table(COLUMNS, table))
    print(f"\n{environment()}")


if __name__ == "__main__":
    main()
