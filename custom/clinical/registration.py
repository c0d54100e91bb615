"""Rigid registration of one series to the reference, skull on, and one interpolation onto the reference's 1 mm grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from ..cohort import SubjectError
from .reading import NAMES

if TYPE_CHECKING:
    import SimpleITK as sitk

SPACING_MM = 1.0
SAMPLES, BINS = 80_000, 50
MAX_DEGREES, MAX_MM = 60.0, 150.0
MIN_GAIN, MIN_COVERAGE = 1.15, 0.75
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Motion:
    """How a series was moved onto the reference.

    Attributes:
        matrix: places of the reference → places of the series, rigid, [4, 4], mm, RAS.
        information: mutual information at the end (nats, of SimpleITK's Mattes metric on 50 bins).
        gain: that over the same where the series is 12 mm out of place, averaged over six directions.
        degrees: angle of the rotation.
        mm: how far points of the head moved, on average.
        starts_apart_mm: how far apart the results from the two starts lie.
        coverage: share in [0, 1] of the reference's head that the series shows.
    """

    matrix: np.ndarray
    information: float
    gain: float
    degrees: float
    mm: float
    starts_apart_mm: float
    coverage: float

    def record(self) -> dict[str, Any]:
        """All as plain numbers, for a record."""
        figures = {name: round(float(value), 4) for name, value in vars(self).items() if name != "matrix"}
        return {"matrix_ras": np.round(self.matrix, 7).tolist(), **figures}


def one_mm_grid(image: sitk.Image) -> sitk.Image:
    """An empty image of 1 mm voxels along the axes of `image`, which covers it."""
    import SimpleITK as sitk

    extent = np.array(image.GetSize()) * image.GetSpacing()
    size = np.ceil(extent / SPACING_MM - 1e-6).astype(int)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    middle = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    grid = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
    grid.SetSpacing((SPACING_MM,) * 3)
    grid.SetDirection(image.GetDirection())
    grid.SetOrigin(tuple(middle - direction @ ((size - 1) / 2 * SPACING_MM)))
    return grid


def resample(image: sitk.Image, grid: sitk.Image, matrix: np.ndarray | None = None) -> sitk.Image:
    """`image` on another grid, float32, linearly, 0 outside; `matrix` [4, 4] RAS maps places of the grid to its own."""
    import SimpleITK as sitk

    transform = sitk.Transform() if matrix is None else _transform(matrix)
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(grid)
    resampler.SetTransform(transform)
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.SetOutputPixelType(sitk.sitkFloat32)
    resampler.SetNumberOfThreads(1)
    return resampler.Execute(image)


def ras_affine(image: sitk.Image) -> np.ndarray:
    """Affine [4, 4] of a SimpleITK image, in mm, RAS."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


def register(fixed: sitk.Image, moving: sitk.Image, seed: int = 0) -> Motion:
    """Register `moving` rigidly to `fixed` by mutual information, from two starts, and keep the better.

    The starts are what the headers say and the centres of mass; the levels are voxels of 4 mm, from both starts, and of
    2 mm, from the better result. One thread and a fixed seed: the same images give the same numbers.

    Args:
        fixed: the reference with the skull, on `one_mm_grid`.
        moving: the other series with the skull, on its own grid.
        seed: of the voxels that the metric looks at.
    """
    import SimpleITK as sitk

    fixed, moving = sitk.Cast(fixed, sitk.sitkFloat32), sitk.Cast(moving, sitk.sitkFloat32)
    coarse = sitk.BinShrink(fixed, [2, 2, 2])  # Shrink takes one voxel of eight, and so is half a voxel out of place
    header = sitk.Euler3DTransform()
    header.SetCenter(_middle(coarse))
    moments = sitk.CenteredTransformInitializer(
        coarse, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    results = []
    for start in (header, sitk.Euler3DTransform(moments)):
        method = _method(coarse, seed, shrink=2, sigma=2.0)
        method.SetInitialTransform(start, inPlace=False)
        try:
            found = method.Execute(coarse, moving)
        except RuntimeError:  # the start leaves no overlap
            continue
        results.append((_information(coarse, moving, _matrix(found)), found))
    if not results:
        raise ValueError("the two images do not overlap")
    results.sort(key=lambda result: result[0], reverse=True)
    method = _method(coarse, seed, shrink=1, sigma=1.0)
    method.SetInitialTransform(sitk.Euler3DTransform(_rigid(results[0][1])), inPlace=False)
    matrix = _matrix(method.Execute(coarse, moving))
    information = _information(coarse, moving, matrix)
    points = _head_points(coarse)
    apart = _mean_distance(points, *(_matrix(found) for _, found in (results[0], results[-1])))
    shifted = [
        _information(coarse, moving, _shifted(matrix, axis, 12.0 * sign)) for axis in range(3) for sign in (-1, 1)
    ]
    gain = information / max(float(np.mean(shifted)), 1e-6)
    angle = np.degrees(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)))
    return Motion(
        matrix,
        information,
        gain,
        float(angle),
        _mean_distance(points, matrix, np.eye(4)),
        apart,
        _coverage(points, moving, matrix),
    )


def check(motion: Motion, subject: str, modality: str) -> list[str]:
    """Judge a registration; return warnings.

    Raises:
        SubjectError: it failed: too far a turn or shift, or the images do not agree better in place than out of place.
    """
    where = NAMES[modality]
    remedy = "Look at the series: is it the same head, and the whole of it? Choose another one or take it out"
    if motion.degrees > MAX_DEGREES or motion.mm > MAX_MM:
        reason = f"registration turned it by {motion.degrees:.0f} degrees and moved it by {motion.mm:.0f} mm: it failed"
        raise SubjectError(subject, where, reason, remedy)
    if motion.gain < MIN_GAIN:
        reason = f"registration failed: in place it agrees only {motion.gain:.2f} times as well as 12 mm out of place"
        raise SubjectError(subject, where, reason, remedy)
    warnings = []
    if motion.coverage < MIN_COVERAGE:
        warnings.append(f"{where} shows {motion.coverage:.0%} of the head that the reference shows")
    if motion.degrees > 25:
        warnings.append(f"{where} was turned by {motion.degrees:.0f} degrees: look at the picture")
    return warnings


def enhancement(t1n: np.ndarray, t1c: np.ndarray, brain: np.ndarray) -> float:
    """How much more became brighter than darker by contrast: vessels enhance in every brain.

    Args:
        t1n: T1 before contrast, registered, 1 mm, any units.
        t1c: T1 after contrast, same grid.
        brain: where the brain is, boolean.

    Returns:
        Of the differences of the two images, each divided by its median: the mean of the highest two voxels in a
        thousand over that of the lowest, both measured from the median. Above 1 where T1c enhances; the inverse where
        the two are swapped.
    """
    inside = ndimage.binary_erosion(brain, iterations=2)
    scaled = []
    for image in (t1n, t1c):
        smooth = ndimage.gaussian_filter(image.astype(np.float32), 1.0)[inside]
        scaled.append(smooth / max(float(np.median(smooth)), 1e-6))
    difference = scaled[1] - scaled[0]
    difference -= np.median(difference)
    low, high = np.percentile(difference, (0.2, 99.8))
    return float(difference[difference >= high].mean() / max(-difference[difference <= low].mean(), 1e-6))


def _method(fixed: sitk.Image, seed: int, shrink: int, sigma: float) -> Any:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, SAMPLES * shrink**2 / np.prod(fixed.GetSize())), seed + 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=0.01, numberOfIterations=100, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([shrink])
    method.SetSmoothingSigmasPerLevel([sigma])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    return method


def _rigid(transform: Any) -> Any:
    """The rigid transform that the registration hands back inside a composite."""
    import SimpleITK as sitk

    return (
        sitk.CompositeTransform(transform).GetBackTransform()
        if transform.GetName() == "CompositeTransform"
        else transform
    )


def _information(fixed: sitk.Image, moving: sitk.Image, matrix: np.ndarray) -> float:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, SAMPLES / np.prod(fixed.GetSize())), 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(_transform(matrix))
    try:
        return -method.MetricEvaluate(fixed, moving)
    except RuntimeError:  # no overlap
        return 0.0


def _transform(matrix: np.ndarray) -> Any:
    import SimpleITK as sitk

    lps = LPS @ matrix @ LPS
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def _matrix(transform: Any) -> np.ndarray:
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    axes = [np.array(transform.TransformPoint(tuple(unit))) - origin for unit in np.eye(3)]
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = np.stack(axes, axis=1), origin
    return LPS @ lps @ LPS


def _shifted(matrix: np.ndarray, axis: int, mm: float) -> np.ndarray:
    moved = matrix.copy()
    moved[axis, 3] += mm
    return moved


def _middle(image: sitk.Image) -> tuple[float, ...]:
    return image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])


def _head_points(image: sitk.Image) -> np.ndarray:
    """Some places of the head, [n, 3] RAS mm: the voxels above a tenth of the bright ones."""
    import SimpleITK as sitk

    voxels = sitk.GetArrayViewFromImage(image)
    index = np.argwhere(voxels > 0.1 * np.percentile(voxels, 99))[::997, ::-1]
    direction = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return (index @ direction.T + image.GetOrigin()) * (-1, -1, 1)


def _mean_distance(points: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    difference = first - second
    return float(np.linalg.norm(points @ difference[:3, :3].T + difference[:3, 3], axis=1).mean())


def _coverage(points: np.ndarray, moving: sitk.Image, matrix: np.ndarray) -> float:
    places = (points @ matrix[:3, :3].T + matrix[:3, 3]) * (-1, -1, 1)
    direction = np.array(moving.GetDirection()).reshape(3, 3) * moving.GetSpacing()
    index = np.linalg.solve(direction, (places - moving.GetOrigin()).T).T
    return float(((index > -1) & (index < moving.GetSize())).all(axis=1).mean())
