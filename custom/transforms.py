"""Transforms that MONAI lacks: label palettes to regions, tolerant resampling, TorchIO augmentation (paper, 3.1)."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.meta_tensor import get_track_meta
from monai.transforms import MapTransform, RandomizableTransform, Spacing, SpatialResample, Transform
from monai.transforms.inverse import InvertibleTransform
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys, TraceKeys, ensure_tuple

from .cohort import REGION_TISSUES, REGIONS, SubjectError, named_modalities, palette_values, read_scan

logger = logging.getLogger("comnet")
DEFAULT_PALETTE = "brats2021"


def nonzero_voxels(image: torch.Tensor) -> torch.Tensor:
    """Mark the voxels that are not background; given to MONAI's ``CropForegroundd`` as ``select_fn``.

    MONAI's own choice is ``> 0``, which cuts brain away from images that were normalised beforehand.
    """
    return image != 0


def label_map_to_regions(label_map: torch.Tensor, palette: str = DEFAULT_PALETTE) -> torch.Tensor:
    """Turn a label map into the binary regions ET, TC and WT (paper, 3.1).

    Args:
        label_map: ``[1, *spatial]`` or ``[*spatial]``, whole numbers, or nearly so where they were stored scaled.
        palette: a name of ``PALETTES``; values outside of it count as background.

    Returns:
        ``[3, *spatial]`` uint8 in region order: ET, TC = ET + core, WT = TC + oedema.

    Raises:
        ValueError: the palette has no such name.
    """
    values = palette_values(palette)
    labels = label_map[0] if label_map.ndim == 4 else label_map
    if labels.is_floating_point():
        labels = labels.round()
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


class LoadSubjectd(MapTransform):
    """Load the four modalities of a subject, check them, and put right what can be put right without doubt.

    Stands in for MONAI's `LoadImaged`, which stops at the last voxel it needs and takes any files for modalities. Each
    file is read once, see `custom.cohort.read_scan`. An absent modality is a channel of zeros, which it stays in
    resampling and normalisation: what `RandDropModalitiesd` makes of one in training.

    Args:
        keys: one item: a list of four files in the order of `MODALITIES`, with an empty name for an absent one, or one
            file with four channels. It becomes ``[4, x, y, z]`` float32 with the metadata that `LoadImaged` gives,
            ``meta["subject"]`` and ``meta["missing"]``, the absent modalities by name, such as ``"T1n, T2w"``.
        subject_key: item that holds the subject's name; where it is absent the file's own name serves.
        brain_key: item that receives the brain's mask on the input's own grid, ``[1, x, y, z]`` uint8: voxels that are
            nonzero in any modality.
        warnings_key: item that receives what is odd about the images, a list of sentences.
        allow_missing: take subjects that lack modalities, with a warning; T1c or T2-FLAIR must be there.
        missing_dice: what that costs, see :attr:`custom.weights.Weights.missing_dice`.

    Raises:
        SubjectError: on call, what is wrong with which file of the subject.
    """

    def __init__(
        self,
        keys: KeysCollection,
        subject_key: str = "subject",
        brain_key: str = "brain",
        warnings_key: str = "warnings",
        allow_missing: bool = False,
        missing_dice: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__(keys)
        (self.key,) = self.keys
        self.subject_key, self.brain_key, self.warnings_key = subject_key, brain_key, warnings_key
        self._allow_missing, self._missing_dice = allow_missing, missing_dice

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with the image loaded, and name, brain and warnings beside it."""
        files = [os.fspath(file) for file in ensure_tuple(data[self.key])]
        first = next(filter(None, files), "")
        name = str(data.get(self.subject_key) or subject_name({"filename_or_obj": first}))
        scan = read_scan(name, first if len(files) == 1 else files)
        warnings = [*self._told_missing(name, first, scan.missing), *scan.warnings]
        voxels = torch.from_numpy(np.stack(scan.images, dtype=np.float32, casting="unsafe"))
        meta = {
            MetaKeys.AFFINE: torch.from_numpy(scan.affine.copy()),
            MetaKeys.ORIGINAL_AFFINE: scan.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(voxels.shape[1:]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
            ImageMetaKey.FILENAME_OR_OBJ: first,
            "subject": name,
            "missing": named_modalities(scan.missing),
        }
        return dict(data) | {
            self.key: MetaTensor(voxels, meta=meta),
            self.subject_key: name,
            self.brain_key: torch.from_numpy(scan.brain[None].astype(np.uint8, order="C")),
            self.warnings_key: warnings,
        }

    def _told_missing(self, name: str, file: str, missing: Sequence[str]) -> list[str]:
        """What is to be said of absent modalities; an error where they are not allowed."""
        if not missing:
            return []
        names, costs = named_modalities(missing), self._missing_dice
        if not self._allow_missing:
            reason = f"no {names}, and these weights are not known to have been trained for missing modalities"
            remedy = "Add what is missing, or say --allow_missing for a mask that cannot be relied on"
            raise SubjectError(name, file, reason, remedy)
        told = "less accurate, how much was not measured"
        if costs is None:
            told = "these weights were not trained for missing modalities, the mask cannot be relied on"
        elif {key := "+".join(missing), "nothing"} <= set(costs):
            held_out, full = ([f"{dice:.2f}" for dice in costs[one]] for one in (key, "nothing"))
            regions = ", ".join(f"{region} {dice}" for region, dice in zip(REGIONS, held_out, strict=True))
            told = f"held-out Dice {regions}; with all four {', '.join(full)}"
        logger.warning("%s: without %s: %s", name, names, told)
        return [f"without {names}: {told}"]


class MaskToBraind(MapTransform):
    """Set probabilities outside the brain to zero; the truth of the 11 BraTS subjects we measured has no voxel there.

    Args:
        keys: probabilities on the input's own grid, ``[3, *spatial]``.
        brain_key: mask from :class:`LoadSubjectd`, on the same grid.
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


def subject_name(meta: Mapping[str, Any]) -> str:
    """Name the subject of an image: its own ``subject`` entry, else the name of its file without extension."""
    if meta.get("subject"):
        return str(meta["subject"])
    filename = str(meta.get("filename_or_obj", "subject")).replace("\\", "/").rsplit("/", 1)[-1]
    return filename.removesuffix(".gz").removesuffix(".nii")


def output_name(meta: Mapping[str, Any], transform: Transform | None = None) -> dict[str, Any]:
    """Name outputs by subject; given to MONAI's ``SaveImaged`` as ``output_name_formatter``."""
    return {"subject": subject_name(meta), "idx": None}
