"""Does CorrDiff correct? Overfit it to real subjects whose coarse prediction was damaged on purpose.

The truth of each subject, cropped around the tumour at 2 mm, loses a piece, gains a false island, is shifted by two
voxels and blurred. CorrDiff learns to undo that (VQ-VAE first, then diffusion, batch 1), and what it makes of the
same inputs stands beside four controls: no corrector, the best blur, the same network with an untrained denoiser, and
the tokeniser's own reconstruction of the true residual through the learnt gate, the most the denoiser could reach.

    OMP_NUM_THREADS=1 python benchmarks/corrdiff_overfit.py --data DATASET_DIR
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, SpatialPad
from scipy import ndimage
from timing import environment, markdown_table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.cohort import REGIONS, Cohort
from custom.corrdiff import CorrDiff, CorrDiffLoss, corrdiff_base, corrdiff_tiny
from custom.corrdiff.diffusion import zeroed

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {"tiny": corrdiff_tiny, "base": corrdiff_base}
CROP = (48, 64, 48)
SHIFT, BLUR, CERTAINTY = 2, 1.5, 0.998
Case = tuple[Tensor, Tensor, Tensor]


def load(data: Path, names: Sequence[str], seed: int) -> list[Case]:
    """Image `[1, 4, *CROP]`, damaged coarse logits and region masks `[1, 3, *CROP]` of each subject."""
    config = ConfigParser()
    config.read_config(ROOT / "bundles/comnet_mednext/configs/train.json")
    config.update({"bundle_root": str(ROOT), "path_setup": None, "spacing": [2.0, 2.0, 2.0]})
    image = config.get_parsed_content("image_preprocessing")
    label = [config.get_parsed_content(f"train#preprocessing_transforms#{index}") for index in range(1, 4)]
    found = {item["subject"]: item for item in Cohort(str(data)).subjects()}
    if missing := sorted(set(names) - set(found)):
        raise SystemExit(f"{data} has no subject {', '.join(missing)}: choose from {', '.join(sorted(found))}")
    items = [Compose([*image, *label])(found[name]) for name in names]
    return [case(item["image"].numpy(), item["label"].numpy(), seed + index) for index, item in enumerate(items)]


def case(image: np.ndarray, target: np.ndarray, seed: int) -> Case:
    """Crop around the tumour, and damage the truth."""
    where = np.argwhere(target.any(0))
    middle = (where.min(0) + where.max(0)) // 2
    start = [int(np.clip(m - c // 2, 0, max(0, n - c))) for m, c, n in zip(middle, CROP, target.shape[1:], strict=True)]
    box = (slice(None), *(slice(a, a + c) for a, c in zip(start, CROP, strict=True)))
    image, target = (np.asarray(SpatialPad(CROP)(x[box].astype(np.float32))) for x in (image, target))
    coarse = damage(target, (image != 0).any(0), np.random.default_rng(seed))
    return tuple(torch.from_numpy(np.ascontiguousarray(x))[None] for x in (image, coarse, target))


def damage(target: np.ndarray, brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Logits `[3, *spatial]` of a truth with a piece removed and an island added, shifted and blurred."""
    tumour = target[2] > 0
    damaged = target * ~ball(target.shape[1:], draw(tumour, rng), 0.5 * (0.75 * tumour.sum() / np.pi) ** (1 / 3))
    centre = draw(brain & (ndimage.distance_transform_edt(~tumour) > 8), rng)
    for region, radius in enumerate((3, 4, 6)):
        damaged[region][ball(brain.shape, centre, radius) & brain] = 1
    damaged = np.roll(damaged, SHIFT, axis=1 + int(rng.integers(3)))
    blurred = np.stack([ndimage.gaussian_filter(region, BLUR) for region in damaged]).clip(1 - CERTAINTY, CERTAINTY)
    return np.log(blurred / (1 - blurred)).astype(np.float32)


def ball(shape: Sequence[int], centre: np.ndarray, radius: float) -> np.ndarray:
    """Voxels within `radius` of `centre`."""
    return sum((axis - c) ** 2 for axis, c in zip(np.ogrid[tuple(map(slice, shape))], centre, strict=True)) < radius**2


def draw(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One voxel of `mask`."""
    return rng.choice(np.argwhere(mask))


def train(network: CorrDiff, cases: Sequence[Case], stage: str, steps: int, rate: float) -> None:
    """AdamW with a cosine to zero after a short warm-up, one subject a step; one line of progress every 50 steps."""
    loss, parameters = CorrDiffLoss(), [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps + 1, pct_start=0.05)
    for step in range(steps):
        image, coarse, target = cases[step % len(cases)]
        optimiser.zero_grad()
        loss(network.training_step(image, coarse, target, stage), target).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            logged = ", ".join(f"{name} {value.item():.4f}" for name, value in loss.logged.items())
            print(f"{stage} {step + 1}/{steps}: {logged}", file=sys.stderr, flush=True)


def dice(cases: Sequence[Case], segment: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[float]:
    """Dice of each region, mean over subjects; 1 where truth and prediction are both empty."""
    scores = []
    for case_ in cases:
        found, truth = (segment(*case_) > 0).flatten(2), (case_[2] > 0).flatten(2)
        size = found.sum(2) + truth.sum(2)
        scores.append(torch.where(size > 0, 2 * (found & truth).sum(2) / size.clamp_min(1), torch.ones(size.shape))[0])
    return torch.stack(scores).mean(0).tolist()


def blurred(coarse: Tensor, sigma: float) -> Tensor:
    """Positive where the blurred probability is above one half."""
    probability = coarse.sigmoid()[0].numpy()
    return torch.from_numpy(np.stack([ndimage.gaussian_filter(region, sigma) for region in probability]))[None] - 0.5


def forget(network: CorrDiff) -> CorrDiff:
    """Copy of `network` with a denoiser as before training."""
    fresh = copy.deepcopy(network)
    fresh.diffusion.denoiser = copy.deepcopy(network.diffusion.denoiser)
    for module in fresh.diffusion.denoiser.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for last in (fresh.diffusion.denoiser.end[-1], fresh.diffusion.denoiser.linear[-1]):
        zeroed(last)
    return fresh


def rows(network: CorrDiff, cases: Sequence[Case]) -> dict[str, list[float]]:
    """Dice of the corrector and of each control."""

    def oracle(image: Tensor, coarse: Tensor, target: Tensor) -> Tensor:
        outputs, _ = network.tokenise(target - coarse.sigmoid(), learn=False)
        return network.correct(coarse, network.gain(image, coarse), outputs.reconstruction)

    sigmas = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    blurs = {sigma: dice(cases, lambda _, coarse, __, s=sigma: blurred(coarse, s)) for sigma in sigmas}
    best, fresh = max(sigmas, key=lambda sigma: sum(blurs[sigma])), forget(network)
    return {
        "before: no corrector": dice(cases, lambda _, coarse, __: coarse),
        "after: CorrDiff": dice(cases, lambda image, coarse, _: network(image, coarse)),
        "after: CorrDiff, mean of 4 samples": dice(cases, lambda i, c, _: network.refine(i, c, 4, 0).logits),
        f"best blur, sigma {best} voxels": blurs[best],
        "denoiser not trained": dice(cases, lambda image, coarse, _: fresh(image, coarse)),
        "true residual through tokeniser and gate": dice(cases, oracle),
    }


@torch.no_grad()
def report(network: CorrDiff, cases: Sequence[Case], reconstruction: str) -> str:
    """Markdown: how well the tokeniser alone reconstructs, and a table of Dice."""
    found = {name: (*scores, np.mean(scores)) for name, scores in rows(network, cases).items()}
    table = [[name, *(f"{score:.3f}" for score in scores)] for name, scores in found.items()]
    return f"{reconstruction}\n\n{markdown_table(['', *REGIONS, 'mean Dice'], table)}"


@torch.no_grad()
def tokeniser_report(network: CorrDiff, cases: Sequence[Case]) -> str:
    """L1 over all voxels, and where the coarse probability is wrong by over 0.1, beside decoding zero; perplexity."""
    found = [network.tokenise(target - coarse.sigmoid(), learn=False)[0] for _, coarse, target in cases]
    residual, decoded = (torch.cat([x.flatten() for x in parts]) for parts in zip(*(o[:2] for o in found), strict=True))
    wrong, lines = residual.abs() > 0.1, []
    for name, where in (("everywhere", torch.ones_like(wrong)), ("where |r| > 0.1", wrong)):
        error, size = (decoded - residual)[where].abs().mean(), residual[where].abs().mean()
        lines.append(f"L1 {error:.4f} {name} (mean |r| {size:.4f})")
    used, codes = np.mean([o.perplexity.item() for o in found]), len(network.tokeniser.codebook.codes)
    return f"VQ-VAE alone: {'; '.join(lines)}; perplexity {used:.1f} of {codes} codes"


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of real subjects")
    parser.add_argument("--subjects", nargs="+", default=["BraTS2021_00006", "BraTS2021_01479"])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--vq-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300, help="of the diffusion stage")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0, help="of damage, weights, timesteps and noise")
    args = parser.parse_args()
    start, cases = time.perf_counter(), load(args.data, args.subjects, args.seed)
    torch.manual_seed(args.seed)
    network = PRESETS[args.preset](seed=args.seed)
    train(network, cases, "vq", args.vq_steps, args.learning_rate)
    reconstruction = tokeniser_report(network, cases)
    network.freeze_tokeniser()
    train(network, cases, "diffusion", args.steps, args.learning_rate)
    print(report(network, cases, reconstruction))
    run = f"{args.preset}, {args.vq_steps} + {args.steps} steps, seed {args.seed}, {', '.join(args.subjects)}"
    print(f"\n{run}; {time.perf_counter() - start:.0f} s; {environment()}")


if __name__ == "__main__":
    main()
