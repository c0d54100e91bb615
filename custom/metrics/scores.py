"""Scores of one subject and of many: overlap, surface distance, lesions, calibration, and their handlers."""

from __future__ import annotations

import functools
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import (
    CalibrationErrorMetric,
    DiceMetric,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from monai.transforms import MapTransform
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import convert_to_tensor

from ..cohort import REGIONS

if TYPE_CHECKING:
    from ignite.engine import Engine
    from panoptica import Panoptica_Evaluator

logger = logging.getLogger("comnet")

LESION_SCORES = ("lesion_dice", "lesion_dice_brats", "lesion_nsd", "lesion_hd95", "lesion_f1")
COUNTS = ("lesions", "lesions_found", "lesions_false")


def lesion_scores(prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float]) -> dict[str, float]:
    """Score the lesions of one region.

    Args:
        prediction: boolean `[X, Y, Z]`.
        reference: the same shape.
        spacing: size of a voxel along each axis, in mm.

    Returns:
        `lesion_dice` and `lesion_nsd`, in [0, 1], and `lesion_hd95` in mm: means over the pairs of lesions. Without a
        pair 0, 0 and NaN; NaN where the reference is empty. `lesion_dice_brats` is the same Dice, but 0 where only the
        reference is empty and 1 where both are. Surfaces count as the same up to the smallest side of a voxel.
        `lesion_f1`, of detection, in [0, 1]: pairs over the mean number of predicted and true lesions; NaN where there
        are none. `lesions`, those of the reference; `lesions_found`, those of them with a pair; `lesions_false`,
        predicted ones without. All NaN, after one warning, where panoptica is not installed.
    """
    if (evaluator := _evaluator()) is None:
        return dict.fromkeys((*LESION_SCORES, *COUNTS), math.nan)
    if not (prediction.any() or reference.any()):
        return dict.fromkeys(LESION_SCORES, math.nan) | {"lesion_dice_brats": 1.0} | dict.fromkeys(COUNTS, 0.0)
    ours, theirs = (mask.numpy().astype(np.uint8) for mask in crop_to_masks(prediction, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of voxels of 0.5 mm, which it takes for a default
        (found,) = evaluator.evaluate(ours, theirs, voxelspacing=tuple(spacing), result_all=False).values()
    pairs, missed, false = int(found.tp), int(found.fn), int(found.fp)
    values = {"dice": float(found.sq_dsc), "nsd": float(found.sq_nsd), "hd95": float(found.sq_hd95)}
    scores = {f"lesion_{name}": value if pairs + missed else math.nan for name, value in values.items()}
    scores |= {"lesion_dice_brats": values["dice"], "lesion_f1": 2 * pairs / (2 * pairs + missed + false)}
    return scores | {name: float(n) for name, n in zip(COUNTS, (pairs + missed, pairs, false), strict=True)}


@functools.cache
def _evaluator() -> Panoptica_Evaluator | None:
    try:
        import panoptica
        from panoptica.instance_matcher import MaxBipartiteMatching
        from panoptica.utils.citation_reminder import disable_citation_reminder
        from panoptica.utils.edge_case_handling import EdgeCaseHandler, EdgeCaseResult, MetricZeroTPEdgeCaseHandling
    except ImportError as error:
        logger.warning("no lesion-wise scores (NaN): %s; pip install 'panoptica>=2.1,<3'", error)
        return None
    disable_citation_reminder()  # it would be printed among the results; it is cited above
    dice, nsd, hd95 = panoptica.Metric.DSC, panoptica.Metric.NSD, panoptica.Metric.HD95
    without_pairs = {dice: EdgeCaseResult.ZERO, nsd: EdgeCaseResult.ZERO, hd95: EdgeCaseResult.NAN}
    return panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(panoptica.CCABackend.cc3d),
        instance_matcher=MaxBipartiteMatching(dice, matching_threshold=0.0, strict_threshold=True),
        edge_case_handler=EdgeCaseHandler(
            {metric: MetricZeroTPEdgeCaseHandling(result) for metric, result in without_pairs.items()}
        ),
        instance_metrics=[dice, nsd, hd95],
        global_metrics=[],
    )


def crop_to_masks(prediction: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut both masks `[X, Y, Z]` to the box around their union, which must not be empty."""
    start, end = generate_spatial_bounding_box((prediction | reference)[None])
    box = tuple(map(slice, start, end))
    return prediction[box], reference[box]


EMPTY_HD95_MM = 373.12866
"""Diagonal of the 240×240×155 grid at 1 mm: BraTS' distance where exactly one of the two masks is empty."""


def overlap_scores(prediction: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Dice of two boolean masks `[X, Y, Z]` in both conventions for empty ones."""
    pair = {"y_pred": prediction[None, None], "y": reference[None, None], "include_background": True}
    return {"dice": compute_dice(**pair).item(), "dice_brats": compute_dice(**pair, ignore_empty=False).item()}


def surface_scores(
    prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """Surface distance and surface Dice of two boolean masks `[X, Y, Z]`; spacing and tolerance in mm."""
    empty = (not prediction.any(), not reference.any())
    if all(empty):
        return {"hd95": math.nan, "hd95_brats": 0.0, "nsd": math.nan, "nsd_brats": 1.0}
    if any(empty):
        nsd = math.nan if empty[1] else 0.0
        return {"hd95": math.nan, "hd95_brats": EMPTY_HD95_MM, "nsd": nsd, "nsd_brats": 0.0}
    ours, theirs = crop_to_masks(prediction, reference)
    pair = {"y_pred": ours[None, None], "y": theirs[None, None], "include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = compute_hausdorff_distance(**pair, percentile=95).item()
        nsd = compute_surface_dice(**pair, class_thresholds=[tolerance], use_subvoxels=True).item()
    return {"hd95": hd95, "hd95_brats": hd95, "nsd": nsd, "nsd_brats": nsd}


def volumes(prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float]) -> dict[str, float]:
    """Volumes of two boolean masks `[X, Y, Z]` and their signed difference, in ml."""
    ours, theirs = (mask.sum().item() * math.prod(spacing) / 1000 for mask in (prediction, reference))
    return {"volume_ml": ours, "reference_ml": theirs, "volume_error_ml": ours - theirs}


SCORES = ("dice", "dice_brats", "hd95", "hd95_brats", "nsd", "nsd_brats")


def score_subject(
    prediction: NdarrayOrTensor,
    reference: NdarrayOrTensor,
    spacing: Sequence[float] | np.ndarray = (1.0, 1.0, 1.0),
    tolerance_mm: float = 1.0,
) -> dict[str, float]:
    """Score one subject's regions.

    Args:
        prediction: binary `[3, X, Y, Z]`, ET, TC and WT, on the full native grid.
        reference: the same shape.
        spacing: size of a voxel along each axis, in mm.
        tolerance_mm: distance up to which two surfaces count as the same in the surface Dice.

    Returns:
        For each region, as `ET_dice` and so on:
        `dice` (eq. 7) and `dice_brats`, in [0, 1];
        `hd95` and `hd95_brats`, the larger of the two directed 95th percentiles of surface distances, in mm;
        `nsd` and `nsd_brats`, the surface Dice weighted by area (Nikolov et al. 2021, doi 10.2196/26151), in [0, 1];
        `volume_ml`, `reference_ml` and `volume_error_ml`, the first less the second;
        `lesion_dice`, `lesion_dice_brats`, `lesion_nsd`, `lesion_hd95`, `lesion_f1`, and the counts `lesions` (of the
        reference), `lesions_found` and `lesions_false`, see `lesion_scores`; NaN without panoptica.
        And `mean_dice` (eq. 8) to `mean_lesion_f1`, the means over the regions that have a score.

    Raises:
        ValueError: the shapes differ or are no `[3, X, Y, Z]`, a mask is not binary, or the spacing is not three
            positive numbers.
    """
    predicted, expected = _binary(prediction, "prediction"), _binary(reference, "reference")
    if predicted.shape != expected.shape:
        raise ValueError(f"prediction {tuple(predicted.shape)} and reference {tuple(expected.shape)} differ in shape")
    size = [float(length) for length in spacing]
    if len(size) != 3 or not all(0 < length < math.inf for length in size):
        raise ValueError(f"spacing {tuple(spacing)} is not three positive numbers (mm)")
    start, end = generate_spatial_bounding_box(torch.cat([predicted, expected]), margin=2, allow_smaller=True)
    box = (slice(None), *map(slice, start, end))  # no score depends on the rest, and it is most of a volume
    predicted, expected = predicted[box], expected[box]
    row: dict[str, float] = {}
    for region, ours, theirs in zip(REGIONS, predicted, expected, strict=True):
        scores = overlap_scores(ours, theirs) | surface_scores(ours, theirs, size, tolerance_mm)
        scores |= volumes(ours, theirs, size) | lesion_scores(ours, theirs, size)
        row |= {f"{region}_{name}": value for name, value in scores.items()}
    means = {name: mean_of_defined(row[f"{region}_{name}"] for region in REGIONS) for name in SCORES + LESION_SCORES}
    return row | {f"mean_{name}": value for name, value in means.items()}


def _binary(mask: NdarrayOrTensor, name: str) -> torch.Tensor:
    tensor = convert_to_tensor(mask, track_meta=False, device="cpu")
    if tensor.ndim != 4 or tensor.shape[0] != len(REGIONS):
        raise ValueError(f"{name} {tuple(tensor.shape)} is not [3, X, Y, Z], one mask for each of {', '.join(REGIONS)}")
    binary = tensor.bool()
    if not torch.equal(binary.to(tensor.dtype), tensor):
        raise ValueError(f"{name} has values other than 0 and 1: threshold it, or convert the label map to regions")
    return binary


class RegionDice(DiceMetric):
    """Dice of each region averaged over subjects, for prediction and reference `[B, 3, *spatial]`, binary.

    Unlike `DiceMetric(reduction="mean_batch")`, a region that no subject has is NaN rather than 0, and the values are
    not rounded. Subjects are gathered from all processes.
    """

    def __init__(self) -> None:
        super().__init__(include_background=True, reduction="none")

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
    """

    def __init__(self, output_transform: Callable = lambda output: output) -> None:
        super().__init__(RegionDice(), output_transform=output_transform)
        self.region_means = [math.nan] * len(REGIONS)

    def compute(self) -> float:
        """Return the mean over regions of the means over subjects."""
        self.region_means = super().compute().tolist()
        return mean_of_defined(self.region_means)

    def completed(self, engine: Engine, name: str) -> None:
        """Write the average under `name`, and the regions beside it."""
        super().completed(engine, name)
        for region, value in zip(REGIONS, self.region_means, strict=True):
            engine.state.metrics[f"val_dice_{region.lower()}"] = value


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, sample standard deviation and count of every column of numbers.

    Args:
        rows: one mapping per subject, or per fold for the ± of the paper's Table 2. NaN and absent values are left
            out, and so are columns without a number, such as the subject's name.

    Returns:
        For each column `{"mean", "sd", "n"}`; `sd` divides by n - 1 and is NaN below two values, `mean` below one.
    """
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, Real) and not isinstance(value, bool):
                columns.setdefault(name, []).append(float(value))
    return {name: _moments(values) for name, values in columns.items()}


def mean_of_defined(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN where there is none."""
    return _moments(values)["mean"]


def _moments(values: Iterable[float]) -> dict[str, float]:
    defined: Sequence[float] = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(defined) if defined else math.nan
    return {"mean": mean, "sd": statistics.stdev(defined) if len(defined) > 1 else math.nan, "n": len(defined)}


OUTPUT_KEY, BRIER_KEY = "calibration", "brier"


def calibration_scores(
    probabilities: NdarrayOrTensor, reference: NdarrayOrTensor, brain: NdarrayOrTensor, num_bins: int = 20
) -> dict[str, dict[str, float]]:
    """Expected calibration error and Brier score of each region over the brain.

    Only voxels of the brain count: outside of it probabilities are zero by construction, and as many correct zeros as
    the image has background would make every model look calibrated.

    Args:
        probabilities: `[3, *spatial]` in [0, 1], ET, TC and WT.
        reference: binary, the same shape.
        brain: `[1, *spatial]` or `[*spatial]`, nonzero inside.
        num_bins: of equal width over [0, 1].

    Returns:
        `{"ece": {"ET": ..., "TC": ..., "WT": ...}, "brier": {...}}`, all in [0, 1], 0 best: the mean over voxels of the
        distance between a bin's mean probability and its share of reference voxels (Guo et al. 2017), and the mean
        squared distance of probability and reference. NaN where the brain is empty.

    Raises:
        ValueError: the shapes do not fit, probabilities lie outside of [0, 1], or the reference is not binary.
    """
    predicted = convert_to_tensor(probabilities, track_meta=False, dtype=torch.float32)
    expected = convert_to_tensor(reference, track_meta=False, device=predicted.device)
    inside = convert_to_tensor(brain, track_meta=False, device=predicted.device)
    _check_shapes(predicted, expected, inside)
    voxels = inside.reshape(predicted.shape[1:]) != 0
    predicted, expected = predicted[:, voxels], expected[:, voxels].float()
    if not ((predicted >= -1e-4) & (predicted <= 1 + 1e-4)).all():  # weights of an interpolation sum to 1 + 1e-7
        raise ValueError("probabilities have values outside of [0, 1]: apply the sigmoid first")
    predicted = predicted.clamp(0, 1)
    if not ((expected == 0) | (expected == 1)).all():
        raise ValueError("the reference has values other than 0 and 1: convert the label map to regions")
    errors = CalibrationErrorMetric(num_bins, metric_reduction="none")(predicted[None], expected[None])[0]
    brier = (predicted - expected).square().mean(dim=1)
    return {"ece": _by_region(errors), "brier": _by_region(brier)}


class CalibrationErrord(MapTransform):
    """Measure the calibration of a subject's probabilities, see :func:`calibration_scores`, over its brain only.

    For a chain of postprocessing, after the mask of the brain and before the threshold. The numbers are plain floats,
    which ``custom.batch.Batch`` puts among the scores.

    Reads "label", the reference regions, and "brain" of :class:`custom.transforms.LoadSubjectd`; "calibration" and
    "brier" receive ``{"ET": error, "TC": error, "WT": error}``, each in [0, 1].

    Args:
        keys: one item of probabilities, ``[3, *spatial]``, on the input's own grid.

    Raises:
        KeyError: on call, where an item is absent.
        ValueError: on call, see :func:`calibration_scores`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with the numbers beside the probabilities, which stay as they are."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            scores = calibration_scores(subject[key], subject["label"], subject["brain"])
            subject |= {OUTPUT_KEY: scores["ece"], BRIER_KEY: scores["brier"]}
        return subject


def calibration_columns(subject: Mapping[Any, Any]) -> dict[str, float]:
    """Columns of a row of scores for what :class:`CalibrationErrord` has left in a subject.

    Returns:
        `ET_ece` to `mean_ece` and `ET_brier` to `mean_brier`; nothing where the transform did not run.
    """
    columns: dict[str, float] = {}
    for name, key in (("ece", OUTPUT_KEY), ("brier", BRIER_KEY)):
        if (values := subject.get(key)) is not None:
            columns |= {f"{region}_{name}": float(values[region]) for region in REGIONS}
            columns[f"mean_{name}"] = mean_of_defined(columns[f"{region}_{name}"] for region in REGIONS)
    return columns


def _check_shapes(probabilities: torch.Tensor, reference: torch.Tensor, brain: torch.Tensor) -> None:
    grid = probabilities.shape[1:]
    if probabilities.shape != (len(REGIONS), *grid) or reference.shape != probabilities.shape:
        shapes = f"probabilities {tuple(probabilities.shape)} and reference {tuple(reference.shape)}"
        raise ValueError(f"{shapes} are not both [3, *spatial], one channel for each of {', '.join(REGIONS)}")
    if brain.shape not in (grid, (1, *grid)):
        raise ValueError(f"brain {tuple(brain.shape)} is not on the grid {tuple(grid)} of the probabilities")


def _by_region(values: torch.Tensor) -> dict[str, float]:
    return dict(zip(REGIONS, values.tolist(), strict=True))
