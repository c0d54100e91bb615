"""Where does CorrDiff help, where does it harm, and what could it reach? Read from a trained corrector of one fold.

The residual of a subject is its truth less the probability of the backbone that has not seen it. For the subjects that
neither backbone nor corrector has seen this prints, on the grid of the coarse predictions: how large the residual is
and where; how the tokeniser reconstructs it; Dice with the true residual straight through the gate, through the
tokeniser, and through tokeniser and denoiser in one step from several levels of noise (with all of it, the denoiser's
guess without sampling); Dice with the means of 1, 4, ... samples; and which voxels a sample puts right and wrong.

    python benchmarks/corrdiff_residuals.py --fold 0 --config small.json --set dataset_dir=DATASET \
        datalist_file=RUN/datalist.json backbones_dir=RUN/mednext coarse_dir=RUN/coarse models_dir=RUN/comnet

`--config` and `--set` are the overlays and values that the corrector was trained with.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.transforms import ResampleToMatch
from scipy import ndimage
from timing import environment, markdown_table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.cohort import REGIONS
from custom.corrdiff import CorrDiff, brain_mask
from custom.corrdiff.vqvae import crop_like
from custom.weights import Weights

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "comnet_corrdiff"
WRONG = 0.1
"""A residual above this counts as an error of the backbone, one of probability."""
SURE = 0.05
"""A probability this near to 0 or 1 is one of which the backbone is sure."""
NEAR = 2
"""Voxels from the truth's surface within which a voxel is near it."""
LEVELS = (7, 63, 127, 199)
"""Timesteps from which the denoiser takes one step to the clean latent; the last is noise alone."""


RESIDUAL_COLUMNS = ("", "mean abs r", "share near the surface", "elsewhere and unsure", "sure and wrong")
TOKENISER_COLUMNS = ("L1", "mean abs r", f"L1 where abs r > {WRONG}", "mean abs r there", "perplexity")


class Case(NamedTuple):
    """A held-out subject: image `[1, 4, *spatial]`, coarse logits and region masks `[1, 3, *spatial]`."""

    subject: str
    image: Tensor
    coarse: Tensor
    target: Tensor


class Corrections(NamedTuple):
    """Residuals `[1, 3, *spatial]` by the name of their row, and TOKENISER_COLUMNS."""

    residuals: dict[str, Tensor]
    tokeniser: list[float]


def parser_of(configs: Sequence[str], values: Sequence[str], fold: int) -> ConfigParser:
    """Configs of one fold's corrector, as its training has used them."""
    config = ConfigParser()
    config.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", *configs)])
    pairs = (value.split("=", 1) for value in values)
    config.update({name: literal(value) for name, value in pairs} | {"bundle_root": str(BUNDLE), "fold": fold})
    return config


def literal(value: str) -> Any:
    """A value of the command line: a number or a list where it reads as one, else text."""
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def cases(config: ConfigParser, part: str = "validation") -> Iterator[Case]:
    """The subjects of the held-out fold, or those of "training"."""
    cohort, coarse = config.get_parsed_content("cohort"), config.get_parsed_content("coarse")
    resample = ResampleToMatch(mode="nearest", padding_mode="zeros")
    items = coarse.add(getattr(cohort, part)(config["fold"]))
    for item in Dataset(items, config.get_parsed_content("validate#preprocessing")):
        target = resample(item["label"], img_dst=item["image"]).as_tensor().round()
        yield Case(item["subject"], *(x[None] for x in (item["image"].as_tensor(), item["coarse"].as_tensor(), target)))


@torch.no_grad()
def corrections(network: CorrDiff, case: Case, samples: Sequence[int]) -> Corrections:
    """What would be added to the coarse logits, once through the gate: true residuals and sampled ones."""
    outputs, latent = network.tokenise(case.target - case.coarse.sigmoid(), learn=False)
    residuals = {
        "true residual": outputs.residual,
        "true residual through the tokeniser": outputs.reconstruction,
    }
    clean, guide = network.latent_scale.normalise(latent), network.encode_condition(case.image, case.coarse)
    generator = torch.Generator().manual_seed(0)
    for timestep in LEVELS:
        time = torch.tensor([timestep])
        noisy = network.diffusion.add_noise(clean, torch.randn(clean.shape, generator=generator), time)
        found = network.diffusion.clean(noisy, network.diffusion.predict_noise(noisy, time, guide), time)
        signal = network.diffusion.signal[timestep] ** 0.5
        name = f"one step from {signal:.2f} of its latent"
        residuals[name] = crop_like(network.decode(found), case.coarse)
    total = torch.zeros_like(case.coarse)
    for number in range(max(samples)):
        total += crop_like(network.decode(network.diffusion.sample(guide, network.seed, number)), case.coarse)
        if number + 1 in samples:
            residuals[f"mean of {number + 1}" if number else "one sample"] = total / (number + 1)
    error, size = (outputs.reconstruction - outputs.residual).abs(), outputs.residual.abs()
    wrong = size > WRONG
    figures = [error.mean(), size.mean(), error[wrong].mean(), size[wrong].mean(), outputs.perplexity]
    return Corrections(residuals, [value.item() for value in figures])


def where(case: Case) -> np.ndarray:
    """Of each region, `[3, 4]`: mean |r|, and the shares of its sum that RESIDUAL_COLUMNS names."""
    probability = case.coarse.sigmoid()[0].numpy()
    size = np.abs(case.target[0].numpy() - probability)
    near = np.stack([near_surface(region > 0) for region in case.target[0].numpy()])
    sure = (probability < SURE) | (probability > 1 - SURE)
    total = size.sum((1, 2, 3)).clip(1e-9)
    shares = [np.where(part, size, 0).sum((1, 2, 3)) / total for part in (near, ~near & ~sure, sure & (size > 0.5))]
    return np.stack([size.mean((1, 2, 3)), *shares], 1)


def near_surface(mask: np.ndarray) -> np.ndarray:
    """Voxels within NEAR of the surface of `mask`."""
    ball = ndimage.iterate_structure(ndimage.generate_binary_structure(3, 1), NEAR)
    return ndimage.binary_dilation(mask, ball) & ~ndimage.binary_erosion(mask, ball)


def overlap(logits: Tensor, target: Tensor) -> np.ndarray:
    """Dice, sensitivity and precision of each region, `[3, 3]`; not a number where nothing is to be found."""
    found, truth = (logits[0] > 0).flatten(1), (target[0] > 0).flatten(1)
    both, found_, truth_ = ((x.sum(1).double()) for x in (found & truth, found, truth))
    scores = torch.stack([2 * both / (found_ + truth_), both / truth_, both / found_], 1)
    return torch.where(truth_[:, None] > 0, scores, torch.nan).numpy()


def explained(case: Case, residual: Tensor) -> np.ndarray:
    """Share of each region's squared true residual that a multiple of `residual` explains where unsure, `[3]`; 0 to 1.

    0 also where only a negative multiple would explain any.
    """
    probability = case.coarse.sigmoid()
    unsure = (probability > SURE) & (probability < 1 - SURE) & brain_mask(case.image)
    found, truth = ((x * unsure)[0].flatten(1).double() for x in (residual, case.target - probability))
    product = (found * truth).sum(1).clamp_min(0)
    return (product**2 / (found.square().sum(1) * truth.square().sum(1)).clamp_min(1e-12)).numpy()


def flips(before: Tensor, after: Tensor, target: Tensor) -> np.ndarray:
    """Voxels of each region `[3, 4]`: added rightly, added wrongly, removed rightly, removed wrongly."""
    before, after, target = ((x[0] > 0).flatten(1) for x in (before, after, target))
    added, removed = after & ~before, before & ~after
    return torch.stack([x.sum(1) for x in (added & target, added & ~target, removed & ~target, removed & target)], 1)


def report(network: CorrDiff, subjects: Iterable[Case], samples: Sequence[int]) -> list[str]:
    """The tables, in markdown: means over the subjects, regions that are empty left out of Dice."""
    places, tokeniser, dice, moved, shares = [], [], {}, {}, {}
    for case in subjects:
        found, gain = corrections(network, case, samples), network.gain(case.image, case.coarse)
        places.append(where(case))
        tokeniser.append(found.tokeniser)
        dice.setdefault("backbone alone", []).append(overlap(case.coarse, case.target))
        for name, residual in found.residuals.items():
            refined = network.correct(case.coarse, gain, residual)
            dice.setdefault(name, []).append(overlap(refined, case.target))
            moved.setdefault(name, []).append(flips(case.coarse, refined, case.target))
            shares.setdefault(name, []).append(explained(case, residual))
        print(case.subject, *(f"{name}: {scores[-1][:, 0].round(3)}" for name, scores in dice.items()), file=sys.stderr)
    numbers = [f"{value:.4f}" for value in np.mean(tokeniser, 0)]
    where_ = [
        [region, f"{row[0]:.4f}", *(f"{share:.2f}" for share in row[1:])]
        for region, row in zip(REGIONS, np.mean(places, 0), strict=True)
    ]
    scored = []
    for name, rows in dice.items():
        mean = np.nanmean(rows, 0)
        parts = [f"{share:.2f}" for share in np.mean(shares[name], 0)] if name in shares else [""] * 3
        scored.append([name, *(f"{row[0]:.3f}" for row in mean), *parts, *(f"{p:.3f} / {q:.3f}" for _, p, q in mean)])
    changes = [[name, *(" ".join(f"{v:.0f}" for v in row) for row in np.mean(rows, 0))] for name, rows in moved.items()]
    scores = [f"{region}, {score}" for score in ("Dice", "explained", "sensitivity / precision") for region in REGIONS]
    return [
        markdown_table(RESIDUAL_COLUMNS, where_),
        markdown_table(TOKENISER_COLUMNS, [numbers]),
        markdown_table(["", *scores], scored),
        markdown_table(["voxels + right, + wrong, - right, - wrong", *REGIONS], changes),
    ]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--config", nargs="*", default=["release.json"], help="overlays, as in training")
    parser.add_argument("--set", nargs="*", default=[], help="name=value of the configs, as in training")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 8])
    args = parser.parse_args()
    config = parser_of(args.config, args.set, args.fold)
    network = config.get_parsed_content("network").eval()
    Weights(config.get_parsed_content("ckpt_dir") + "/model.pt").load(network)
    print("\n\n".join([*report(network.corrector, cases(config), args.samples), environment()]))
