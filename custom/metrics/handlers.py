"""Region Dice inside MONAI's engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from monai.handlers import IgniteMetricHandler
from monai.metrics import DiceMetric

from ..cohort import REGIONS
from .summary import mean_of_defined

if TYPE_CHECKING:
    from ignite.engine import Engine


class RegionDice(DiceMetric):
    """Dice of each region averaged over subjects, for prediction and reference `[B, 3, *spatial]`, binary.

    Unlike `DiceMetric(reduction="mean_batch")`, a region that no subject has is NaN rather than 0, and the values are
    not rounded. Subjects are gathered from all processes.

    Args:
        ignore_empty: leave out subjects whose reference is empty; otherwise both empty scores 1, else 0.
    """

    def __init__(self, ignore_empty: bool = True) -> None:
        super().__init__(include_background=True, reduction="none", ignore_empty=ignore_empty)

    def aggregate(self, reduction: Any = None) -> torch.Tensor:
        """Return `[3]`, NaN for a region without a score.

        Raises:
            ValueError: no subject was scored.
        """
        scores = self.get_buffer()
        if scores is None:
            raise ValueError("no subject was scored: check that the validation list is not empty")
        return torch.nanmean(scores, dim=0)


class MeanRegionDice(IgniteMetricHandler):
    """Region-wise average Dice (eq. 8) as key metric of an engine, each region under a name of its own besides.

    Attached as `val_mean_dice`, it sets `val_mean_dice`, `val_dice_et`, `val_dice_tc` and `val_dice_wt` in
    `engine.state.metrics`, and every subject's values in `engine.state.metric_details`, where `MetricsSaver` finds
    them. The average runs over the regions that have a score, so it is NaN only where none has.

    `{"_target_": "custom.metrics.MeanRegionDice", "output_transform": "$from_engine(['pred', 'label'])"}`

    Args:
        output_transform: turns `engine.state.output` into a pair of prediction and reference; see `RegionDice`.
        ignore_empty: see `RegionDice`.
        prefix: of the regions' names.
        save_details: whether to keep every subject's values.
    """

    def __init__(
        self,
        output_transform: Callable = lambda output: output,
        ignore_empty: bool = True,
        prefix: str = "val_dice",
        save_details: bool = True,
    ) -> None:
        super().__init__(RegionDice(ignore_empty), output_transform=output_transform, save_details=save_details)
        self.prefix = prefix
        self.region_means = [math.nan] * len(REGIONS)

    def compute(self) -> float:
        """Return the mean over regions of the means over subjects."""
        self.region_means = super().compute().tolist()
        return mean_of_defined(self.region_means)

    def completed(self, engine: Engine, name: str) -> None:
        """Write the average under `name`, and the regions beside it."""
        super().completed(engine, name)
        for region, value in zip(REGIONS, self.region_means, strict=True):
            engine.state.metrics[f"{self.prefix}_{region.lower()}"] = value
