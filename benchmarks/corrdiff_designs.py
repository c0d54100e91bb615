"""Which CorrDiff would help? Designs within the paper's equations, trained and scored on crops around the tumour.

A design learns from the out-of-fold maps of a fold's training subjects: 64x80x64 voxels around the tumour, of which
each step sees a flipped piece. On the subjects that neither it nor the backbone has seen it gets the tables of
`corrdiff_residuals.py`, of the same crops. Training goes on where it was stopped.

`direct` is no CorrDiff: it foretells the correction of each voxel that is unsure straight from intensities, coarse
logits and their local means, which needs neither tokeniser nor samples. What it cannot gain is hardly in the data.

    python benchmarks/corrdiff_designs.py fine --state STATE.pt --fold 0 --set dataset_dir=DATASET ...
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import corrdiff_residuals
import numpy as np
import torch
import torch.nn.functional as F
from corrdiff_residuals import Case
from timing import environment, markdown_table
from torch import Tensor, nn

from custom.cohort import REGIONS
from custom.corrdiff import CorrDiff, CorrDiffLoss, Denoiser, LatentDiffusion, ResidualVQVAE, brain_mask
from custom.corrdiff.diffusion import zeroed
from custom.weights import Checkpoint, save_atomically

CROP, PIECE = (64, 80, 64), (48, 64, 48)
DOUBT = 0.02
"""Probabilities at least this far from 0 and 1 are in doubt."""
OUTSIDE = (0.0, -14.0, 0.0)
"""Of image, coarse logits and masks, beyond the volume."""


class FromNoise(LatentDiffusion):
    """L_seg is of what the denoiser makes of noise alone, where sampling starts.

    CorrDiff takes it from a true latent at any timestep, most of which still shows the true residual, so that gate and
    alpha learn to trust what no sampler gets to see.
    """

    def draw_timesteps(self, subjects: int, times: int) -> Tensor:
        """As CorrDiff's, but the first of each subject, which is L_seg's, is the last of the schedule."""
        drawn = super().draw_timesteps(subjects, times)
        drawn[::times] = self.num_train_timesteps - 1
        return drawn


def honest() -> CorrDiff:
    """The tiny preset, with L_seg from noise and a gate that is open where the backbone is unsure only."""
    tokeniser = ResidualVQVAE(channels=(32,), stride=4, latent_channels=32, codes_per_vector=4)
    return gated(CorrDiff(tokeniser, FromNoise(Denoiser(32, channels=(32, 64)))))


def fine() -> CorrDiff:
    """The same with a latent of half the image's size in place of a quarter, narrow enough to be as fast to train."""
    tokeniser = ResidualVQVAE(channels=(16,), stride=2, latent_channels=8, codes_per_vector=2)
    diffusion = FromNoise(Denoiser(8, guide_channels=16, channels=(16, 32, 64)))
    return gated(CorrDiff(tokeniser, diffusion, guide_channels=16, timesteps_per_subject=2))


def gated(network: CorrDiff, focus: float = 4.0) -> CorrDiff:
    """The gate begins at the logistic function of -focus where the entropy is 0, and of focus where it is 1."""
    with torch.no_grad():
        network.gate.bias.fill_(-focus)
        network.gate.weight[:, len(REGIONS) :, 0, 0, 0].fill_diagonal_(2 * focus)
    return network


DESIGNS = {"honest": honest, "fine": fine}


def around_tumour(case: Case) -> Case:
    """CROP around the middle of the whole tumour, padded where the volume is smaller."""
    tumour = case.target[0, 2].nonzero()
    middle = ((tumour.amin(0) + tumour.amax(0)) // 2).tolist()
    starts = [max(0, min(m - c // 2, n - c)) for m, c, n in zip(middle, CROP, case.target.shape[2:], strict=True)]
    return Case(case.subject, *(cut(x, starts, CROP, v) for x, v in zip(case[1:], OUTSIDE, strict=True)))


def cut(x: Tensor, starts: Sequence[int], size: Sequence[int], value: float) -> Tensor:
    """`size` voxels of `x` `[B, C, *spatial]` from `starts` on, padded with `value` at the end."""
    (a, b, c), (d, e, f) = starts, size
    piece = x[:, :, a : a + d, b : b + e, c : c + f]
    missing = [n - m for n, m in zip(size, piece.shape[2:], strict=True)]
    return F.pad(piece, [p for n in reversed(missing) for p in (0, n)], value=value)


def piece(case: Case, draw: random.Random) -> list[Tensor]:
    """A flipped PIECE of a crop: image, coarse logits, masks."""
    starts = [draw.randint(0, c - p) for c, p in zip(CROP, PIECE, strict=True)]
    axes = [axis for axis in (2, 3, 4) if draw.random() < 0.5]
    return [cut(x, starts, PIECE, 0.0).flip(axes).contiguous() for x in case[1:]]


def open_gate(network: CorrDiff, logits: float = 4.0) -> None:
    """For a tokeniser that was trained alone: every voxel's residual counts, one of 1 as so many logits."""
    with torch.no_grad():
        network.gate.weight.zero_()
        network.gate.bias.fill_(20.0)
        network.alpha.fill_(logits / network.scale)


def begin(network: CorrDiff, start: Path) -> None:
    """Tokeniser, conditioning and denoiser as trained before; gate and alpha as the design begins with."""
    found = {name.removeprefix("corrector."): value for name, value in Checkpoint.at(start).tensors().items()}
    own = {name: value for name, value in network.state_dict().items() if name.split(".")[0] in ("gate", "alpha")}
    network.load_state_dict({name: found[name] for name in network.state_dict()} | own)


def train(network: CorrDiff, cases: Sequence[Case], steps: Sequence[int], rate: float, state: Path) -> None:
    """The tokeniser for the first number of `steps`, the rest for the second; AdamW, from `rate` to 0 in each."""
    loss, done = CorrDiffLoss(), 0
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-5)
    if state.exists():
        found = torch.load(state, weights_only=True)
        network.load_state_dict(found["network"])
        optimiser.load_state_dict(found["optimiser"])
        done = found["done"]
    for step in range(done, sum(steps)):
        stage, length, at = ("vq", steps[0], step) if step < steps[0] else ("diffusion", steps[1], step - steps[0])
        if stage == "diffusion":
            network.freeze_tokeniser()
        optimiser.param_groups[0]["lr"] = rate * min(1, (at + 1) / 20) * (1 - at / length)
        torch.manual_seed(step)
        draw = random.Random(step)
        image, coarse, target = piece(draw.choice(cases), draw)
        optimiser.zero_grad()
        loss(network.training_step(image, coarse, target, stage), target).backward()
        nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], 1.0)
        optimiser.step()
        if step % 20 == 19 or step + 1 == sum(steps):
            content = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "done": step + 1}
            save_atomically(content, state)
            logged = ", ".join(f"{name} {value.item():.4f}" for name, value in loss.logged.items())
            print(f"{stage} {step + 1}: {logged}; alpha {network.alpha.tolist()}", file=sys.stderr, flush=True)


def features_of(case: Case) -> tuple[Tensor, Tensor]:
    """Features `[V, 38]` of the brain's voxels where any region is in doubt, and where they are `[*spatial]`."""
    probability = case.coarse.sigmoid()
    doubt = ((probability > DOUBT) & (probability < 1 - DOUBT)).any(1)[0] & brain_mask(case.image)[0, 0]
    means = [torch.cat([case.image, probability], 1)]
    for size in (3, 5, 5, 5):
        means.append(F.avg_pool3d(means[-1], size, 1, size // 2))
    return torch.cat([*means, case.coarse.clamp(-10, 10) / 10], 1)[0][:, doubt].T, doubt


def direct(training: Sequence[Case], held_out: Sequence[Case], epochs: int = 2, share: int = 8000) -> str:
    """Train a network of one hidden layer on `share` voxels a subject; Dice and log loss with parts of its answer."""
    parts = []
    for case in training:
        features, doubt = features_of(case)
        picked = torch.randperm(len(features))[:share]
        parts.append([x[picked] for x in (features, case.coarse[0][:, doubt].T, case.target[0][:, doubt].T)])
    x, coarse, truth = (torch.cat(column) for column in zip(*parts, strict=True))
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    network = nn.Sequential(nn.Linear(x.shape[1], 16), nn.GELU(), zeroed(nn.Linear(16, 3)))
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.1)
    batches = [k for _ in range(epochs) for k in torch.randperm(len(x)).split(2048)]
    for step, k in enumerate(batches):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / len(batches))
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(coarse[k] + network((x[k] - mean) / deviation), truth[k]).backward()
        optimiser.step()
    shares, scores, losses = (0.0, 0.25, 0.5, 1.0), [], []
    for case in held_out:
        features, doubt = features_of(case)
        with torch.no_grad():
            change = network((features - mean) / deviation).T
        for part in shares:
            refined = case.coarse.clone()
            refined[0][:, doubt] += part * change
            scores.append(corrdiff_residuals.overlap(refined, case.target)[:, 0])
            losses.append(F.binary_cross_entropy_with_logits(refined[0][:, doubt], case.target[0][:, doubt]).item())
    dice = np.nanmean(np.reshape(scores, (len(held_out), len(shares), -1)), 0)
    loss = np.mean(np.reshape(losses, (len(held_out), -1)), 0)
    rows = [[f"{p}", *(f"{d:.4f}" for d in row), f"{e:.4f}"] for p, row, e in zip(shares, dice, loss, strict=True)]
    return markdown_table(["part of the correction", *REGIONS, "log loss where in doubt"], rows)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("design", choices=[*DESIGNS, "direct"])
    parser.add_argument("--state", type=Path, default=Path("corrdiff_design.pt"), help="file of the training's state")
    parser.add_argument("--start", type=Path, help="model.pt of comnet_corrdiff to take all but gate and alpha from")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--config", nargs="*", default=["release.json"], help="overlays, for the preprocessing")
    parser.add_argument("--set", nargs="*", default=[], help="name=value of the configs")
    parser.add_argument("--steps", type=int, nargs=2, default=[200, 300], help="of the tokeniser, of the rest")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    config = corrdiff_residuals.parser_of(args.config, args.set, args.fold)
    training, held_out = (
        [around_tumour(case) for case in corrdiff_residuals.cases(config, part)] for part in ("training", "validation")
    )
    torch.manual_seed(0)
    if args.design == "direct":
        print("\n\n".join([direct(training, held_out), environment()]))
        return
    network = DESIGNS[args.design]()
    if args.start:
        begin(network, args.start)
    train(network, training, args.steps, args.learning_rate, args.state)
    if not args.steps[1] and not args.start:
        open_gate(network)
    tables = corrdiff_residuals.report(network.eval(), held_out, args.samples)
    print("\n\n".join([*tables, f"{args.design}, {args.steps} steps; {environment()}"]))


if __name__ == "__main__":
    main()
