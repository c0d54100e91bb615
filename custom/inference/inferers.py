"""Inference: a whole volume at any size, and a loop over subjects that one bad subject cannot stop."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer, sliding_window_inference
from monai.utils import BlendMode, convert_to_dst_type

from ..files import UserError, option_values

logger = logging.getLogger("comnet")

SUBJECT_KEY = "subject"
FAILURE_KEY = "failure"
WARNINGS_KEY = "warnings"
CUDA_MEMORY_ADVICE = "use a smaller patch_size (--patch_size '[96,96,96]'), or the CPU"


def check_patch_size(patch_size: Any) -> tuple[int, ...]:
    """Return a patch size as a tuple of three lengths in voxels.

    Raises:
        UserError: it is something else.
    """
    expected = "three lengths in voxels, such as [128,160,112]"
    return option_values("patch_size", patch_size, expected, lambda one: type(one) is int and one > 0, (3,))


def check_mirror_axes(mirror_axes: Any) -> tuple[int, ...]:
    """Return spatial axes along which to mirror as a tuple.

    Raises:
        UserError: they are something else.
    """
    return option_values(
        "mirror_axes", mirror_axes, "axes 0, 1 or 2, in brackets", lambda one: one in (0, 1, 2), range(4)
    )


class WholeVolumeInferer(Inferer):
    """Run the network once on the whole volume, padded to sizes that its four downsamplings divide.

    The global statistics of GRN then cover the whole brain, and no voxel is computed twice.

    Args:
        divisor: every spatial size is padded with zeros (the background) to a multiple of this; 16 for MedNeXt.
        execution: turns a network into what executes it, such as :class:`custom.mednext.runtime.Runtime`: servers take
            the inferer of a bundle and call it with a network of their own.
        mirror_axes: spatial axes; for each the image is inferred once more, mirrored, and the logits are averaged.
            In images oriented to RAS, 0 is left and right.

    Raises:
        UserError: an axis is none of 0, 1 and 2.
    """

    def __init__(
        self,
        divisor: int = 16,
        execution: Callable[[Any], Any] | None = None,
        mirror_axes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.divisor = divisor
        self.execution = execution
        self.mirror_axes = check_mirror_axes(mirror_axes)

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Infer ``[B, C, *spatial]`` of any size; the result has the same spatial size and, if any, metadata."""
        network = network if self.execution is None else self.execution(network)

        def run(image: torch.Tensor) -> torch.Tensor:
            return self.infer(image, lambda part: network(part, *args, **kwargs))

        output = run(inputs)
        for axis in self.mirror_axes:
            output = output + run(inputs.flip(2 + axis)).flip(2 + axis)
        return output / (1 + len(self.mirror_axes)) if self.mirror_axes else output

    def infer(self, inputs: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Infer without mirroring, by a network that is ready to be called."""
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        padding = [(-size) % self.divisor for size in image.shape[2:]]
        padded = F.pad(image, [amount for size in reversed(padding) for amount in (size // 2, size - size // 2)])
        output = network(padded)
        for axis, (size, amount) in enumerate(zip(image.shape[2:], padding, strict=True), start=2):
            output = output.narrow(axis, amount // 2, size)
        return convert_to_dst_type(output, inputs)[0] if isinstance(inputs, MetaTensor) else output


class FewWindowsInferer(WholeVolumeInferer):
    """Cover the volume with windows of at most the voxels of a patch, at the least computing.

    GRN and normalisation take their statistics over a window. Windows of a training patch gave small networks better
    masks than one pass over a whole brain, and they bound the memory ("Window plans" in docs/benchmarks.md); a longer
    trained network was better in windows as large as a brain (docs/results.md). All windows of a volume are equal,
    multiples of `divisor`, and blended where they overlap; one may be enough.

    Args:
        patch_size: a window has at most as many voxels, of any shape.
        overlap: least number of voxels that neighbours share.
        divisor: every window size is a multiple of this; 16 for MedNeXt.
        execution, mirror_axes: see :class:`WholeVolumeInferer`.

    Raises:
        UserError: the patch is not three lengths, or holds no window.
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        overlap: int = 8,
        divisor: int = 16,
        execution: Callable[[Any], Any] | None = None,
        mirror_axes: Sequence[int] = (),
    ) -> None:
        super().__init__(divisor, execution, mirror_axes)
        self.patch_size = check_patch_size(patch_size)
        self.overlap = overlap
        if math.prod(self.patch_size) < divisor**3:
            raise UserError(f"patch_size {self.patch_size} has fewer voxels than the smallest window: enlarge it")

    def infer(self, inputs: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Infer without mirroring, by a network that is ready to be called."""
        size = inputs.shape[2:]
        window, counts = self.plan(size)
        if math.prod(counts) == 1:
            return super().infer(inputs, network)
        steps = [-(-(full - one) // max(1, n - 1)) for full, one, n in zip(size, window, counts, strict=True)]
        overlap = [1 - (max(step, 1) + 0.5) / one for step, one in zip(steps, window, strict=True)]  # MONAI rounds down
        return sliding_window_inference(inputs, window, 1, network, overlap, BlendMode.GAUSSIAN)

    def plan(self, size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the window for a spatial size, and the number of windows along each axis."""
        limit, plans = math.prod(self.patch_size), []
        most = [max(1, -(-(length - self.overlap) // (self.divisor - self.overlap))) for length in size]
        for counts in itertools.product(*(range(1, count + 1) for count in most)):
            window = tuple(self._window(length, n) for length, n in zip(size, counts, strict=True))
            if math.prod(window) <= limit:
                plans.append((math.prod(window) * math.prod(counts), math.prod(counts), window, counts))
        return min(plans)[2:]

    def _window(self, length: int, count: int) -> int:
        """Length of `count` equal windows that cover `length` voxels."""
        return -(-(length + (count - 1) * self.overlap) // (count * self.divisor)) * self.divisor


class SlidingWindowsInferer(WholeVolumeInferer):
    """Slide a window of the training patch over the volume, blended by a Gaussian where windows overlap.

    MONAI's inferer of nearly that name neither mirrors nor takes what executes the network.

    Args:
        patch_size: the window in voxels.
        overlap: share of a window that its neighbours cover too.
        execution, mirror_axes: see :class:`WholeVolumeInferer`.

    Raises:
        UserError: the patch is not three lengths.
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        overlap: float = 0.5,
        execution: Callable[[Any], Any] | None = None,
        mirror_axes: Sequence[int] = (),
    ) -> None:
        super().__init__(execution=execution, mirror_axes=mirror_axes)
        self.patch_size = check_patch_size(patch_size)
        self.overlap = overlap

    def infer(self, inputs: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Infer without mirroring, by a network that is ready to be called."""
        return sliding_window_inference(inputs, self.patch_size, 1, network, self.overlap, BlendMode.GAUSSIAN)


class SubjectLoader(DataLoader):
    """Loader of one subject at a time that prepares the next one in a thread while the network computes.

    A process for it would need shared memory, which containers have little of (Docker's /dev/shm holds 64 MB, a subject
    takes more), and everything it is given to be pickled, where processes are not forked.

    Args:
        dataset: the subjects.
        num_workers: 0 prepares each subject when its turn comes; any other number reads one ahead.

    Raises:
        UserError: the number is none.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 1) -> None:
        option_values("num_workers", num_workers, "a whole number", lambda one: type(one) is int, (1,))
        super().__init__(dataset, batch_size=1, num_workers=0)
        self.reads_ahead = num_workers > 0

    def __iter__(self) -> Iterator[Any]:
        """Yield each subject as a batch of one, in order."""
        if not self.reads_ahead:
            yield from super().__iter__()
            return
        with ThreadPoolExecutor(1, "subjects") as pool:
            ahead = pool.submit(self._batch, 0)
            for index in range(1, len(self) + 1):
                batch = ahead.result()
                if index < len(self):
                    ahead = pool.submit(self._batch, index)
                yield batch
                del batch

    def _batch(self, index: int) -> Any:
        return self.collate_fn([self.dataset[index]])


class SubjectDataset(Dataset):
    """Dataset for which a subject that cannot be read or preprocessed is an item that says so, not an exception."""

    def _transform(self, index: int) -> Any:
        try:
            item = super()._transform(index)
            return item | {WARNINGS_KEY: "\n".join(item.get(WARNINGS_KEY, ()))}  # MONAI cannot decollate empty lists
        except Exception as error:
            return {SUBJECT_KEY: self.data[index].get(SUBJECT_KEY, str(index)), FAILURE_KEY: describe(error)}


class SubjectEvaluator(SupervisedEvaluator):
    """MONAI's evaluator for a batch of subjects: a subject that fails is recorded, and the next one follows.

    After a subject, ``engine.state.failure`` is ``None`` or the reason why it failed, ``engine.state.subject`` its name
    and ``engine.state.warnings`` what is odd about its images. ``failures`` collects the reasons. Failures in reading,
    in the network and in postprocessing (writing included) are all caught; an interruption (Ctrl-C) is not.

    Raises:
        UserError: the inferer is none, or its window is no patch: every subject would fail.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failures: dict[str, str] = {}
        super().__init__(*args, **kwargs)
        if not callable(self.inferer):
            raise UserError(f"inferer is {self.inferer!r}: a part of the config is named with an @, as in @few_windows")
        self.add_event_handler(Events.STARTED, lambda engine: self.failures.clear())

    def run(self) -> None:
        """Infer on all subjects; where there are none, do nothing."""
        if self.state.epoch_length:
            super().run()

    def _iteration(self, engine: SupervisedEvaluator, batchdata: Mapping[str, Any]) -> Any:
        engine.state.subject = _first(batchdata.get(SUBJECT_KEY, engine.state.iteration))
        engine.state.failure = _first(batchdata.get(FAILURE_KEY))
        engine.state.warnings = (_first(batchdata.get(WARNINGS_KEY)) or "").splitlines()
        output: Any = {}
        if engine.state.failure is None:
            try:
                super()._iteration(engine, batchdata)
                output = engine.state.output
            except Exception as error:
                logger.debug("subject %s failed", engine.state.subject, exc_info=True)
                engine.state.failure = describe(error)
        if engine.state.failure is not None:
            self.failures[str(engine.state.subject)] = engine.state.failure
            logger.error("subject %s: %s", engine.state.subject, engine.state.failure)
        return output


def describe(error: BaseException) -> str:
    """Say in one line what went wrong: the innermost cause, with advice where memory ran out."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"out of memory: {CUDA_MEMORY_ADVICE}"
    text = str(error)
    if "Traceback (most recent call last)" in text:  # MONAI's SaveImage tells errors so
        return re.sub(r"^custom\.files\.\w+: ", "", text.strip().splitlines()[-1])
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text}" if not isinstance(error, ValueError) else text


def _first(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[0] if value else None
    return value
