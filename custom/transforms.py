"""Transforms that MONAI lacks: label palettes to regions, tolerant resampling, TorchIO augmentation (paper, 3.1)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.meta_tensor import get_track_meta
from monai.transforms import MapTransform, RandomizableTransform, Spacing, SpatialResample, Transform
from monai.transforms.inverse import InvertibleTransform
from monai.utils import TraceKeys, ensure_tuple

from .cohort import MODALITIES, REGION_TISSUES, REGIONS, palette_values
from .files import UserError

DEFAULT_PALETTE = "brats2021"


def nonzero_voxels(image: torch.Tensor) -> torch.Tensor:
    """Mark the voxels that are not background; given to MONAI's ``CropForegroundd`` as ``select_fn``.

    MONAI's own choice is ``> 0``, which cuts brain away from images that were normalised beforehand.
    """
    return image != 0


def label_map_to_regions(label_map: torch.Tensor, palette: str = DEFAULT_PALETTE) -> torch.Tensor:
    """Turn a label map into the binary regions ET, TC and WT (paper, 3.1).

    Args:
        label_map: ``[1, *spatial]`` or ``[*spatial]``, whole numbers.
        palette: a name of ``PALETTES``; values outside of it count as background.

    Returns:
        ``[3, *spatial]`` uint8 in region order: ET, TC = ET + core, WT = TC + oedema.

    Raises:
        ValueError: the palette has no such name.
    """
    values = palette_values(palette)
    labels = label_map[0] if label_map.ndim == 4 else label_map
    tissues = [[values[tissue] for tissue in REGION_TISSUES[region]] for region in REGIONS]
    return torch.stack([torch.isin(labels, labels.new_tensor(numbers)) for numbers in tissues]).to(torch.uint8)


class LabelMapToRegionsd(MapTransform):
    """Dictionary version of :func:`label_map_to_regions`; the palette comes with each subject of the datalist.

    Args:
        keys: label maps, each ``[1, *spatial]``; they become ``[3, *spatial]`` uint8.
        palette_key: item of the subject that names its palette.
        default_palette: used where a subject names none.
        allow_missing_keys: pass over absent keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        palette_key: str = "palette",
        default_palette: str = DEFAULT_PALETTE,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.palette_key = palette_key
        self.default_palette = default_palette

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Convert every label map of ``data``."""
        subject = dict(data)
        palette = subject.get(self.palette_key) or self.default_palette
        for key in self.key_iterator(subject):
            subject[key] = label_map_to_regions(subject[key], palette)
        return subject


class CheckModalitiesd(MapTransform):
    """Refuse an image that does not have one channel a modality, before a network sees it.

    Args:
        keys: images, channel first.
        num_modalities: 4: T1n, T1c, T2w, T2-FLAIR.

    Raises:
        ValueError: on call, for another number of channels.
    """

    def __init__(self, keys: KeysCollection, num_modalities: int = len(MODALITIES)) -> None:
        super().__init__(keys)
        self.num_modalities = num_modalities

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` unchanged."""
        for key in self.key_iterator(data):
            shape = tuple(data[key].shape)
            if len(shape) != 4 or shape[0] != self.num_modalities:
                raise UserError(
                    f"{key} has shape {shape}, expected ({self.num_modalities}, x, y, z): give the four modalities "
                    f"{', '.join(MODALITIES)} as a list of four 3D files or as one 4D file in that order"
                )
        return dict(data)


class KeepBraind(MapTransform):
    """Remember where the brain is on the input's own grid: voxels that are nonzero in any modality.

    Args:
        keys: one image, ``[4, *spatial]``, as loaded.
        brain_key: item that receives the mask, ``[1, *spatial]`` uint8.
    """

    def __init__(self, keys: KeysCollection, brain_key: str = "brain") -> None:
        super().__init__(keys)
        self.brain_key = brain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with the brain's mask beside the image."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            subject[self.brain_key] = _brain(_plain(subject[key])).to(torch.uint8)
        return subject


class MaskToBraind(MapTransform):
    """Set probabilities outside the brain to zero; the truth of the 11 BraTS subjects we measured has no voxel there.

    Args:
        keys: probabilities on the input's own grid, ``[3, *spatial]``.
        brain_key: mask from :class:`KeepBraind`, on the same grid.
    """

    def __init__(self, keys: KeysCollection, brain_key: str = "brain") -> None:
        super().__init__(keys)
        self.brain_key = brain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with the keys masked."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            subject[key] = subject[key] * subject[self.brain_key].to(subject[key].device)
        return subject


class ResampleToSpacingd(MapTransform, InvertibleTransform):
    """Resample to a spacing in mm, only where the input is not already there; invertible.

    MONAI's ``Spacingd`` also touches every item named ``<key>_...`` and fails on plain text such as MONAI Label's
    ``image_path``, and it resamples for spacings that differ by rounding only.

    Args:
        keys: images, channel first, with affines.
        pixdim: target spacing in mm.
        mode: interpolation, ``"bilinear"`` (in 3D: trilinear) or ``"nearest"``.
        tolerance: relative difference of spacings that counts as none.
    """

    def __init__(
        self, keys: KeysCollection, pixdim: Sequence[float], mode: str = "bilinear", tolerance: float = 1e-2
    ) -> None:
        super().__init__(keys)
        self.pixdim = np.asarray(pixdim, dtype=float)
        self.tolerance = tolerance
        self.spacing = Spacing(pixdim=list(pixdim), mode=mode, padding_mode="border", dtype=torch.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample every key whose spacing is another one."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            if not np.allclose(np.asarray(subject[key].pixdim), self.pixdim, rtol=self.tolerance):
                subject[key] = self.spacing(subject[key])
        return subject

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Undo the resampling where one was done."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            applied = subject[key].applied_operations
            if applied and applied[-1].get(TraceKeys.CLASS_NAME) == SpatialResample.__name__:
                subject[key] = self.spacing.inverse(subject[key])
        return subject


class RandTorchIOd(RandomizableTransform, MapTransform):
    """Run a random TorchIO transform on images and label maps of one subject.

    MONAI's own adapter hands every tensor to TorchIO as an image, so that labels are interpolated, and draws from the
    global random state. Here labels stay labels (nearest neighbour, no intensity change), MetaTensors keep their
    affines, the draw follows MONAI's random state, and background stays exactly zero as in skull-stripped input.

    Args:
        image_keys: images ``[C, *spatial]``.
        label_keys: label maps or regions ``[C, *spatial]``.
        name: class name in ``torchio.transforms``, e.g. ``"RandomAffine"``.
        prob: probability of the transform for one subject.
        kwargs: arguments of the TorchIO transform.
    """

    def __init__(
        self, image_keys: KeysCollection, label_keys: KeysCollection, name: str, prob: float = 1.0, **kwargs: Any
    ) -> None:
        self.images = ensure_tuple(image_keys)
        self.labels = ensure_tuple(label_keys)
        MapTransform.__init__(self, (*self.images, *self.labels))
        RandomizableTransform.__init__(self, prob)
        self.transform = _torchio_transform(name, kwargs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transform all keys with the same random parameters."""
        import torchio

        subject = dict(data)
        self.randomize(None)
        seed = int(self.R.randint(2**31))
        if not self._do_transform:
            return subject
        wrapped = {key: torchio.ScalarImage(tensor=_plain(subject[key]).float()) for key in self.images}
        wrapped |= {key: torchio.LabelMap(tensor=_plain(subject[key])) for key in self.labels}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed = self.transform(torchio.Subject(wrapped))
        for key in self.keys:
            subject[key] = _like(changed[key].data, subject[key])
        for key in self.images if not self._moves_voxels else ():
            subject[key] = subject[key] * _brain(data[key])
        return subject

    @property
    def _moves_voxels(self) -> bool:
        from torchio.transforms import SpatialTransform

        return isinstance(self.transform, SpatialTransform)


def _torchio_transform(name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        import torchio
    except ImportError as error:
        raise ImportError("training augmentation needs torchio: pip install 'torchio>=1.2,<2'") from error
    return getattr(torchio.transforms, name)(**arguments)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def _like(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    values = values.to(reference.dtype)
    if isinstance(reference, MetaTensor) and get_track_meta():
        return MetaTensor(values, meta=reference.meta, applied_operations=reference.applied_operations)
    return values


def _brain(image: torch.Tensor) -> torch.Tensor:
    return nonzero_voxels(image).any(dim=0, keepdim=True)


class KeepSubjectNamed(MapTransform):
    """Write the subject's name into the image's metadata, so that outputs can be named by subject, not by file.

    Args:
        keys: images with metadata.
        subject_key: item that holds the name; where it is absent the file's own name serves.
    """

    def __init__(self, keys: KeysCollection, subject_key: str = "subject") -> None:
        super().__init__(keys)
        self.subject_key = subject_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with ``meta["subject"]`` set on every key."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            name = subject.get(self.subject_key) or subject_name(subject[key].meta)
            subject[key].meta[self.subject_key] = name
            subject[self.subject_key] = name
        return subject


def subject_name(meta: Mapping[str, Any]) -> str:
    """Name the subject of an image: its own ``subject`` entry, else the name of its file without extension."""
    if meta.get("subject"):
        return str(meta["subject"])
    filename = str(meta.get("filename_or_obj", "subject")).replace("\\", "/").rsplit("/", 1)[-1]
    return filename.removesuffix(".gz").removesuffix(".nii")


def output_name(meta: Mapping[str, Any], transform: Transform | None = None) -> dict[str, Any]:
    """Name outputs by subject; given to MONAI's ``SaveImaged`` as ``output_name_formatter``."""
    return {"subject": subject_name(meta), "idx": None}
