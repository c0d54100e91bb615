from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, Invertd, NormalizeIntensityd, Orientationd

from custom.transforms import (
    CheckModalitiesd,
    KeepBraind,
    KeepSubjectNamed,
    LabelMapToRegionsd,
    MaskToBraind,
    RandTorchIOd,
    ResampleToSpacingd,
    label_map_to_regions,
    nonzero_voxels,
    output_name,
)


def image(shape=(4, 20, 24, 18), spacing=(1.0, 1.0, 1.0), seed=0):
    voxels = torch.zeros(shape)
    inside = tuple(slice(4, size - 3) for size in shape[1:])
    generator = torch.Generator().manual_seed(seed)
    voxels[(slice(None), *inside)] = torch.rand(voxels[(slice(None), *inside)].shape, generator=generator) + 1
    return MetaTensor(voxels, affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))


@pytest.mark.parametrize(("palette", "enhancing"), [("brats2021", 4), ("brats2023", 3)])
def test_regions_nest_and_follow_the_palette(palette, enhancing):
    labels = torch.tensor([[0, 1, 2, enhancing, 7]]).reshape(1, 5, 1, 1)
    regions = label_map_to_regions(labels, palette)
    assert regions.flatten(1).tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0]]


def test_a_three_is_not_enhancing_tumour_unless_the_palette_says_so():
    labels = torch.full((1, 2, 2, 2), 3)
    assert label_map_to_regions(labels, "brats2021").sum() == 0
    subject = LabelMapToRegionsd("label")({"label": labels, "palette": "brats2023"})
    assert subject["label"].sum() == 3 * 8


def test_unknown_palette_is_refused():
    with pytest.raises(ValueError, match=r"unknown palette 'fets'.*brats2021"):
        label_map_to_regions(torch.zeros(1, 2, 2, 2), "fets")


def test_zscore_over_nonzero_voxels_is_equation_1():
    voxels = image()
    normalised = NormalizeIntensityd("image", nonzero=True, channel_wise=True)({"image": voxels.clone()})["image"]
    for before, after in zip(voxels.numpy(), normalised.numpy(), strict=True):
        omega = before != 0
        expected = np.where(omega, (before - before[omega].mean()) / (before[omega].std() + 1e-8), 0)
        np.testing.assert_allclose(after, expected, atol=1e-4)


def test_negative_intensities_are_foreground():
    assert nonzero_voxels(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [True, False, True]


def test_probabilities_end_where_the_brain_ends():
    source = image()
    source[1:, 4:8] = 0
    kept = KeepBraind("image")({"image": source})
    masked = MaskToBraind("pred")(kept | {"pred": torch.full((3, 20, 24, 18), 0.7)})["pred"]
    assert kept["brain"].shape == (1, 20, 24, 18)
    assert torch.equal(masked > 0, (source.as_tensor() != 0).any(0).expand(3, -1, -1, -1))
    assert masked.max() == pytest.approx(0.7)


@pytest.mark.parametrize("shape", [(3, 8, 8, 8), (4, 8, 8), (1, 8, 8, 8)])
def test_wrong_number_of_modalities_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(4, x, y, z\).*t1n, t1c, t2w, flair"):
        CheckModalitiesd("image")({"image": torch.zeros(shape)})


def test_one_millimetre_input_is_not_resampled():
    voxels = image(spacing=(1.0, 1.000004, 0.9999))
    assert ResampleToSpacingd("image", [1, 1, 1])({"image": voxels})["image"] is voxels


def test_deterministic_preprocessing_is_invertible_on_odd_grids():
    spacing, labels = (1.3, 0.8, 2.0), torch.zeros(1, 20, 24, 18)
    labels[:, 8:14, 8:16, 6:12] = 1
    source = image(spacing=spacing)
    source.affine = torch.diag(torch.tensor([-1.3, 0.8, -2.0, 1.0], dtype=torch.float64))
    preprocessing = Compose(
        [
            Orientationd("image", "RAS", labels=None),
            ResampleToSpacingd("image", [1, 1, 1]),
            CropForegroundd("image", "image", nonzero_voxels),
        ]
    )
    steps = preprocessing({"image": source})
    on_preprocessed = preprocessing({"image": MetaTensor(labels.repeat(4, 1, 1, 1) + (source != 0), meta=source.meta)})
    back = Invertd("pred", preprocessing, "image")({"image": steps["image"], "pred": on_preprocessed["image"][:1] - 1})
    assert tuple(steps["image"].pixdim.tolist()) == pytest.approx((1, 1, 1))
    assert back["pred"].shape == labels.shape
    np.testing.assert_allclose(back["pred"].affine, source.affine)
    agreement = ((back["pred"] > 0.5).float() * labels).sum() * 2 / ((back["pred"] > 0.5).sum() + labels.sum())
    assert agreement > 0.9


def torchio(name, **kwargs):
    return RandTorchIOd("image", "label", name, **kwargs)


AUGMENTATIONS = [
    ("RandomFlip", {"axes": [0, 1, 2], "flip_probability": 0.9}),
    ("RandomAffine", {"degrees": 20, "translation": 2, "default_pad_value": 0}),
    ("RandomGamma", {"log_gamma": [0.3, 0.3]}),
    ("RandomNoise", {"std": [0.2, 0.2]}),
    ("RandomBlur", {"std": [1.0, 1.0]}),
]


def augmented(name, kwargs, seed=1):
    source = image()
    label = (source[:3] > 1.5).to(torch.uint8)
    transform = torchio(name, **kwargs)
    transform.set_random_state(seed)
    return source, label, transform({"image": source, "label": MetaTensor(label, affine=source.affine)})


@pytest.mark.parametrize(("name", "kwargs"), AUGMENTATIONS)
def test_augmentation_keeps_labels_labels_and_affines_true(name, kwargs):
    source, _, subject = augmented(name, kwargs)
    assert not torch.equal(subject["image"].as_tensor(), source.as_tensor())
    assert subject["label"].dtype == torch.uint8 and set(subject["label"].unique().tolist()) <= {0, 1}
    assert torch.equal(subject["image"].affine, source.affine)
    assert subject["image"].shape == source.shape and subject["image"].dtype == torch.float32


@pytest.mark.parametrize(("name", "kwargs"), AUGMENTATIONS[2:])
def test_intensity_augmentation_leaves_labels_and_background_alone(name, kwargs):
    source, label, subject = augmented(name, kwargs)
    assert torch.equal(subject["label"].as_tensor(), label)
    assert (subject["image"][:, (source == 0).all(0)] == 0).all()


def test_flip_moves_image_and_label_together():
    source, label, subject = augmented("RandomFlip", {"axes": [0], "flip_probability": 1.0})
    assert torch.equal(subject["image"].as_tensor(), source.as_tensor().flip(1))
    assert torch.equal(subject["label"].as_tensor(), label.flip(1))


def test_augmentation_follows_monai_random_state_only():
    first, again, other = (augmented("RandomNoise", {"std": [0.2, 0.2]}, seed)[2]["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    augmented("RandomNoise", {"std": [0.2, 0.2]})
    assert torch.equal(state, torch.get_rng_state())


def test_probability_zero_never_transforms():
    transform = torchio("RandomNoise", prob=0.0)
    source = image()
    assert transform({"image": source, "label": source})["image"] is source


def test_outputs_are_named_by_subject_else_by_file():
    named = KeepSubjectNamed("image")({"image": image(), "subject": "BT0001"})
    assert output_name(named["image"].meta) == {"subject": "BT0001", "idx": None}
    unnamed = image()
    unnamed.meta["filename_or_obj"] = "folder/case.nii.gz"
    assert KeepSubjectNamed("image")({"image": unnamed})["subject"] == "case"
