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
from monai.transforms import (
    CropForegroundd,
    MapTransform,
    RandomizableTransform,
    Spacing,
    SpatialResample,
)
from monai.transforms.inverse import InvertibleTransform
from monai.utils import (
    ImageMetaKey,
    MetaKeys,
    SpaceKeys,
    TraceKeys,
    convert_to_dst_type,
    convert_to_tensor,
    ensure_tuple,
)

from .cohort import REGION_TISSUES, REGIONS, SubjectError, named_modalities, palette_values, read_scan
from .files import is_number, option_values

logger = logging.getLogger("comnet")
DEFAULT_PALETTE = "brats2021"
SAME_SPACING = 1e-2
"""Spacings that differ by a smaller share are the same."""


def nonzero_voxels(image: torch.Tensor) -> torch.Tensor:
    """Mark the voxels that are not background; MONAI's own choice, ``> 0``, loses brain of images in z-scores."""
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
    """Dictionary version of :func:`label_map_to_regions`; each subject of the datalist names its "palette".

    Args:
        keys: label maps, each ``[1, *spatial]``; they become ``[3, *spatial]`` uint8.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Convert every label map of ``data``."""
        subject = dict(data)
        palette = subject.get("palette") or DEFAULT_PALETTE
        for key in self.key_iterator(subject):
            subject[key] = label_map_to_regions(subject[key], palette)
        return subject


class LoadSubjectd(MapTransform):
    """Load the four modalities of a subject, check them, and put right what can be put right without doubt.

    Stands in for MONAI's `LoadImaged`, which stops at the last voxel it needs and takes any files for modalities. Each
    file is read once, see `custom.cohort.read_scan`. An absent modality is a channel of zeros, which it stays in
    resampling and normalisation: what `RandDropModalitiesd` makes of one in training.

    Beside the image it leaves ``subject``, the subject's name, by default that of the file; ``brain``, a mask of the
    voxels that are nonzero in any modality, on the input's own grid, ``[1, x, y, z]`` uint8; and ``warnings``, what is
    odd about the images, a list of sentences.

    Args:
        keys: one item: a list of four files in the order of `MODALITIES`, with an empty name for an absent one, or one
            file with four channels. It becomes ``[4, x, y, z]`` float32 with the metadata that `LoadImaged` gives,
            ``meta["subject"]`` and ``meta["missing"]``, the absent modalities by name, such as ``"T1n, T2w"``.
        allow_missing: take subjects that lack modalities, with a warning; T1c or T2-FLAIR must be there.
        missing_dice: what that costs, see :attr:`custom.weights.Weights.missing_dice`.

    Raises:
        SubjectError: on call, what is wrong with which file of the subject.
    """

    def __init__(
        self,
        keys: KeysCollection,
        allow_missing: bool = False,
        missing_dice: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__(keys)
        (self.key,) = self.keys
        self._allow_missing, self._missing_dice = allow_missing, missing_dice

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with the image loaded, and name, brain and warnings beside it."""
        files = [os.fspath(file) for file in ensure_tuple(data[self.key])]
        first = next(filter(None, files), "")
        name = str(data.get("subject") or subject_name({"filename_or_obj": first}))
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
            "subject": name,
            "brain": torch.from_numpy(scan.brain[None].astype(np.uint8, order="C")),
            "warnings": warnings,
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


class CropToBraind(CropForegroundd):
    """MONAI's crop, to the box of voxels that are nonzero in any channel; where it lies is kept by the image alone.

    Args:
        keys: one image ``[C, *spatial]``.
    """

    def __init__(self, keys: KeysCollection) -> None:
        (key,) = ensure_tuple(keys)
        super().__init__(key, key, nonzero_voxels, start_coord_key=None, end_coord_key=None)


def check_spacing(spacing: Any) -> tuple[float, ...]:
    """Return a spacing in mm as a tuple of three lengths.

    Raises:
        UserError: it is something else.
    """
    expected = "three lengths in mm, such as [1,1,1]"
    return option_values("spacing", spacing, expected, lambda one: is_number(one, 0.1, 100), (3,))


class ResampleToSpacingd(MapTransform, InvertibleTransform):
    """Resample to a spacing in mm, only where the input is not already there; invertible.

    MONAI's ``Spacingd`` also touches every item named ``<key>_...`` and fails on plain text such as MONAI Label's
    ``image_path``, and it resamples for spacings that differ by rounding only.

    Args:
        keys: images, channel first, with affines; interpolated linearly.
        pixdim: target spacing in mm.

    Raises:
        UserError: it is not three lengths.
    """

    def __init__(self, keys: KeysCollection, pixdim: Sequence[float]) -> None:
        super().__init__(keys)
        self.pixdim = np.asarray(check_spacing(pixdim), dtype=float)
        self.spacing = Spacing(pixdim=list(pixdim), mode="bilinear", padding_mode="border", dtype=torch.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample every key whose spacing is another one."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            if not np.allclose(np.asarray(subject[key].pixdim), self.pixdim, rtol=SAME_SPACING):
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
        name: class name in ``torchio.transforms``, e.g. ``"RandomAffine"``.
        image_keys: images ``[C, *spatial]``.
        label_keys: label maps or regions ``[C, *spatial]``.
        prob: probability of the transform for one subject.
        kwargs: arguments of the TorchIO transform.
    """

    def __init__(
        self,
        name: str,
        image_keys: KeysCollection = "image",
        label_keys: KeysCollection = "label",
        prob: float = 1.0,
        **kwargs: Any,
    ) -> None:
        try:
            import torchio
        except ImportError as error:
            raise ImportError("training augmentation needs torchio: pip install 'torchio>=1.2,<2'") from error
        self.images = ensure_tuple(image_keys)
        self.labels = ensure_tuple(label_keys)
        MapTransform.__init__(self, (*self.images, *self.labels))
        RandomizableTransform.__init__(self, prob)
        self.name, self.kwargs = name, kwargs  # public: what resumed training is held against
        self.transform = getattr(torchio.transforms, name)(**kwargs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transform all keys with the same random parameters."""
        import torchio

        subject = dict(data)
        self.randomize(None)
        seed = int(self.R.randint(2**31))
        if not self._do_transform:
            return subject
        plain = {key: convert_to_tensor(subject[key], track_meta=False) for key in self.keys}
        wrapped = {key: torchio.ScalarImage(tensor=plain[key].float()) for key in self.images}
        wrapped |= {key: torchio.LabelMap(tensor=plain[key]) for key in self.labels}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed = self.transform(torchio.Subject(wrapped))
        for key in self.keys:
            subject[key] = convert_to_dst_type(changed[key].data, subject[key])[0]
        if not isinstance(self.transform, torchio.transforms.SpatialTransform):
            for key in self.images:
                subject[key] = subject[key] * nonzero_voxels(data[key]).any(dim=0, keepdim=True)
        return subject


def subject_name(meta: Mapping[str, Any]) -> str:
    """Name the subject of an image: its own ``subject`` entry, else the name of its file without extension."""
    if meta.get("subject"):
        return str(meta["subject"])
    filename = str(meta.get("filename_or_obj", "subject")).replace("\\", "/").rsplit("/", 1)[-1]
    return filename.removesuffix(".gz").removesuffix(".nii")
