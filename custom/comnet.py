"""CoMNeT as one module: fold backbones, their averaged probabilities, and the corrector (paper, 3.2 and Figure 1).

Annotations stay evaluated here: TorchScript cannot resolve postponed ones in a `NamedTuple`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cohort import REGIONS
from .files import option_values
from .inference.inferers import check_mirror_axes
from .weights import NUM_FOLDS

PROBABILITY_MARGIN = 1e-6


class Segmentation(NamedTuple):
    """What the network makes of one batch.

    Attributes:
        logits: ``[B, 3, *spatial]`` of ET, TC, WT.
        spread: standard deviation of the probabilities over folds and over the corrector's samples, in quadrature,
            of the same shape; of n values the one that divides by n - 1, and 0 for one fold and one sample.
    """

    logits: Tensor
    spread: Tensor


class CoMNeT(nn.Module):
    """Average the folds' probability maps voxel by voxel, then refine them.

    The folds run one after the other, so that only one backbone's activations are in memory at a time. With one fold
    this is what cross-validation scores: a backbone and its corrector.

    Args:
        backbone: builds one backbone, image ``[B, 4, *spatial]`` to logits ``[B, 3, *spatial]``.
        num_folds: number of backbones in the ensemble.
        corrector: refines coarse logits given the image, such as :class:`custom.corrdiff.CorrDiff`; ``None`` passes
            the coarse logits through.
        refine_each_fold: refine every fold's own logits and average what comes out (paper, Discussion), instead of
            refining the average once (paper, 3.2).
        refine_regions: for ET, TC and WT, whether the refinement is used; where not, the coarse logits stay.
        uncertainty: append the spread to the output, which then has six channels.
        mirror_axes: spatial axes along which images are seen mirrored too. The folds take turns: the first sees the
            image as it is, the next one mirrored along the first of these axes, and so on, so that it costs no time.
            Of fewer folds than there are turns, each sees all of them, and its logits are averaged.
    """

    turns: list[list[int]]

    def __init__(
        self,
        backbone: Callable[[], nn.Module],
        num_folds: int = NUM_FOLDS,
        corrector: nn.Module | None = None,
        refine_each_fold: bool = False,
        refine_regions: Sequence[bool] = (True, True, True),
        uncertainty: bool = False,
        mirror_axes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        expected = f"one answer each for {', '.join(REGIONS)}: true or false"
        answers = option_values("refine_regions", refine_regions, expected, lambda one: one in (0, 1), (len(REGIONS),))
        self.backbones = nn.ModuleList(backbone() for _ in range(num_folds))
        self.corrector = corrector
        self.refine_each_fold = refine_each_fold
        self.refine_regions = [bool(answer) for answer in answers]
        self.uncertainty = uncertainty
        self.turns = [[], *([2 + int(axis)] for axis in check_mirror_axes(mirror_axes))]
        self.margin = PROBABILITY_MARGIN

    def forward(self, image: Tensor) -> Tensor:
        """Segment.

        Args:
            image: ``[B, 4, *spatial]``, normalised modalities T1n, T1c, T2w, T2-FLAIR.

        Returns:
            Logits ``[B, 3, *spatial]`` of ET, TC, WT; their sigmoid is the mean probability S of the folds where there
            is no corrector. With ``uncertainty``, ``[B, 6, *spatial]``: see :class:`Segmentation`.
        """
        result = self.segment(image)
        return torch.cat([result.logits, result.spread], 1) if self.uncertainty else result.logits

    def segment(self, image: Tensor) -> Segmentation:
        """Segment, and say how far the folds and the samples disagree."""
        logits = torch.zeros(1, device=image.device)
        mean, squares, variance = torch.zeros_like(logits), torch.zeros_like(logits), torch.zeros_like(logits)
        for n, backbone in enumerate(self.backbones):
            turns = self.turns if len(self.backbones) < len(self.turns) else [self.turns[n % len(self.turns)]]
            logits = torch.zeros(1, device=image.device)
            for axes in turns:
                logits = logits + backbone(image.flip(axes)).float().flip(axes)
            logits = logits / len(turns)
            if self.refine_each_fold:
                if not torch.jit.is_scripting():
                    self.release_memory()
                fold = self.refine(image, logits)
                logits, variance = fold.logits, variance + fold.spread.square()
            probability = torch.sigmoid(logits)
            if n == 0:
                mean, squares = probability, torch.zeros_like(probability)
            else:  # Welford's running variance, in place: a brain is large
                difference = probability.sub_(mean)
                mean.add_(difference, alpha=1 / (n + 1))
                squares.addcmul_(difference, difference, value=n / (n + 1))
        if not torch.jit.is_scripting():
            self.release_memory()
        if len(self.backbones) > 1:
            logits = torch.logit(mean, eps=self.margin)
        folds = len(self.backbones)
        spread = (squares / max(folds - 1, 1) + variance / folds).sqrt()
        if self.refine_each_fold:
            return Segmentation(logits, spread)
        refined = self.refine(image, logits)
        return Segmentation(refined.logits, (spread.square() + refined.spread.square()).sqrt())

    @torch.jit.unused
    def release_memory(self) -> None:
        """Have backbones that another library executes free their activations: see :mod:`custom.mednext.runtime`."""
        for backbone in self.backbones:
            if hasattr(backbone, "release_memory"):
                backbone.release_memory()

    def refine(self, image: Tensor, coarse: Tensor) -> Segmentation:
        """Correct ``coarse`` logits ``[B, 3, *spatial]`` in the regions that are to be refined."""
        if self.corrector is None or not any(self.refine_regions):
            return Segmentation(coarse, torch.zeros_like(coarse))
        result = self.corrector.refine(image, coarse, self.corrector.num_samples, self.corrector.seed)
        keep = torch.tensor(self.refine_regions, device=coarse.device).view(1, -1, 1, 1, 1)
        logits = torch.where(keep, result.logits, coarse)
        return Segmentation(logits, torch.where(keep, result.spread, torch.zeros_like(coarse)))
