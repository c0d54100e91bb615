"""Augmentation that neither MONAI nor TorchIO has: of each modality by itself, and of imperfect brain masks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import Compose, MapTransform, RandBiasField, RandomizableTransform
from monai.utils import ensure_tuple
from torch.nn.functional import max_pool3d

from ..cohort import MODALITIES, REQUIRED
from ..transforms import nonzero_voxels


class RandDropModalitiesd(RandomizableTransform, MapTransform):
    """Set one to three modalities to zero, as inference does with a modality that was not acquired.

    T1c or T2-FLAIR always stays: without both there is neither an enhancing tumour nor an oedema to see.

    Args:
        keys: normalised images, ``[4, *spatial]`` in the order of ``MODALITIES``.
        prob: probability that any is dropped; 0 drops none.
        counts: weights of dropping one, two and three.
        allow_missing_keys: pass over absent keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.0,
        counts: tuple[float, float, float] = (0.6, 0.25, 0.15),
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.counts = counts
        self.dropped: list[int] = []

    def randomize(self, data: Any = None) -> None:
        """Draw which channels are dropped: every subset of a size that leaves T1c or T2-FLAIR is equally likely."""
        super().randomize(None)
        self.dropped = []
        if not self._do_transform:
            return
        total = sum(self.counts)
        count = 1 + int(self.R.choice(len(self.counts), p=[weight / total for weight in self.counts]))
        required = {MODALITIES.index(name) for name in REQUIRED}
        while not self.dropped or required <= set(self.dropped):
            self.dropped = sorted(int(i) for i in self.R.choice(len(MODALITIES), count, replace=False))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Drop the same modalities from every key."""
        subject = dict(data)
        self.randomize()
        for key in self.key_iterator(subject) if self.dropped else ():
            subject[key] = subject[key].clone()
            subject[key][self.dropped] = 0
        return subject


class RandBrainMaskd(RandomizableTransform, MapTransform):
    """Make the brain masks of skull-stripped images imperfect, each modality's in its own way.

    A modality's mask is eroded by up to `max_voxels`, so that brain is missing at its rim, or dilated by as much; what
    is new there takes the brightest value nearby, scaled at random, as remains of meninges and skull do.

    Args:
        keys: images ``[C, *spatial]`` whose background is zero.
        prob: probability for one subject; 0 leaves every image as it is.
        channel_prob: probability for each modality of such a subject.
        max_voxels: largest number of voxels that a mask shrinks or grows.
        allow_missing_keys: pass over absent keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.0,
        channel_prob: float = 0.5,
        max_voxels: int = 1,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.channel_prob = channel_prob
        self.max_voxels = max_voxels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the rim of some modalities of each key."""
        subject = dict(data)
        self.randomize(None)
        for key in self.key_iterator(subject) if self._do_transform else ():
            subject[key] = subject[key].clone()
            for channel in range(len(subject[key])):
                if self.R.random() < self.channel_prob:
                    steps = int(self.R.randint(1, self.max_voxels + 1)) * (1 if self.R.random() < 0.5 else -1)
                    subject[key][channel] = _move_rim(subject[key][channel], steps, float(self.R.uniform(0.2, 1.0)))
        return subject


def _move_rim(image: torch.Tensor, steps: int, brightness: float) -> torch.Tensor:
    """Grow (positive `steps`) or shrink the nonzero part of one modality ``[x, y, z]``."""
    brain = nonzero_voxels(image)
    size, pad = 2 * abs(steps) + 1, abs(steps)
    if steps < 0:
        outside = max_pool3d((~brain).float()[None], size, 1, pad)[0] > 0
        return image * ~outside
    low = image.min()
    grown = max_pool3d(torch.where(brain, image, low)[None], size, 1, pad)[0]
    near = (max_pool3d(brain.float()[None], size, 1, pad)[0] > 0) & ~brain
    return torch.where(near, grown * brightness, image)


class RandModalityBiasFieldd(RandomizableTransform, MapTransform):
    """Shade each modality by a smooth field of its own, as coils do, and bring it back to the level it had.

    A field multiplies intensities above the background, but normalised images are centred on the brain, so a field on
    them would leave ordinary tissue as it is. So the background is put back where it was first, by a random number of
    standard deviations below the brain's mean; afterwards the brain has its old mean and standard deviation again, as
    preprocessing of such an image would give it.

    Args:
        keys: normalised images ``[C, *spatial]`` whose background is zero, which it stays.
        prob: probability for each modality; 0 leaves every image as it is.
        degree: degree of the polynomial whose exponential is the field.
        coeff_range: range of its coefficients, on axes from -1 to 1.
        level: range of the brain's mean above the background, in standard deviations.
        allow_missing_keys: pass over absent keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.0,
        degree: int = 3,
        coeff_range: tuple[float, float] = (-0.2, 0.2),
        level: tuple[float, float] = (2.0, 5.0),
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.field = RandBiasField(degree, coeff_range, prob=1.0)
        self.level = level

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Shade some modalities of each key."""
        subject = dict(data)
        self.field.set_random_state(state=self.R)
        for key in self.key_iterator(subject):
            subject[key] = subject[key].clone()
            for channel in subject[key]:
                self.randomize(None)
                brain = nonzero_voxels(channel)
                if self._do_transform and brain.sum() > 1:
                    mean, std = channel[brain].mean(), channel[brain].std()
                    level = float(self.R.uniform(*self.level))
                    shaded = self.field((channel + level)[None])[0][brain]
                    channel[brain] = mean + std * (shaded - shaded.mean()) / shaded.std().clamp_min(1e-6)
        return subject


class RandModalityContrastd(RandomizableTransform, MapTransform):
    """Change contrast and brightness of each modality in its own way, as scanners and sequences do.

    Intensities of the brain go through a random gamma curve, inverted for some, and are brought back to mean 0 and
    standard deviation 1, as the preprocessing of such an image would; then they are scaled and shifted a little.

    Args:
        keys: normalised images ``[C, *spatial]`` whose background is zero, which it stays.
        prob: probability for each modality; 0 leaves every image as it is.
        log_gamma: largest absolute logarithm of gamma.
        scale: largest relative change of scale.
        shift: largest shift in standard deviations.
        allow_missing_keys: pass over absent keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.0,
        log_gamma: float = 0.5,
        scale: float = 0.2,
        shift: float = 0.2,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.log_gamma = log_gamma
        self.scale = scale
        self.shift = shift

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change some modalities of each key."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            subject[key] = subject[key].clone()
            for channel in subject[key]:
                self.randomize(None)
                gamma = float(self.R.uniform(-self.log_gamma, self.log_gamma))
                flip, scale, shift = self.R.random() < 0.5, self.R.uniform(-1, 1), self.R.uniform(-1, 1)
                brain = nonzero_voxels(channel)
                if self._do_transform and brain.sum() > 1:
                    values = _gamma(channel[brain], 2.718281828**gamma, flip)
                    channel[brain] = values * (1 + self.scale * float(scale)) + self.shift * float(shift)
        return subject


def _gamma(values: torch.Tensor, gamma: float, flip: bool) -> torch.Tensor:
    """Standardised values after a gamma curve over their range; `flip` bends the bright end rather than the dark."""
    low, high = values.min(), values.max()
    share = (values - low) / (high - low).clamp_min(1e-6)
    curve = 1 - (1 - share) ** gamma if flip else share**gamma
    return (curve - curve.mean()) / curve.std().clamp_min(1e-6)


class WithinBrain(Compose):
    """Run transforms one after another, and set what was background before them to zero again, in each modality.

    Args:
        transforms: MONAI transforms that move no voxel.
        keys: images ``[C, *spatial]`` whose background is zero.
    """

    def __init__(self, transforms: Sequence[Callable], keys: KeysCollection = "image") -> None:
        super().__init__(transforms)
        self.keys = ensure_tuple(keys)

    def __call__(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Transform ``data``, one subject or a list of samples; its background stays zero."""
        if isinstance(data, list):  # MONAI hands the samples of one crop to a Compose together
            return [self(sample, *args, **kwargs) for sample in data]
        brain = {key: nonzero_voxels(data[key]) for key in self.keys}
        subject = dict(super().__call__(data, *args, **kwargs))
        for key, inside in brain.items():
            subject[key] = subject[key] * inside
        return subject
