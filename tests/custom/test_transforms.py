from __future__ import annotations

import builtins
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import (
    Compose,
    Invertd,
    LoadImaged,
    MaskIntensityd,
    NormalizeIntensityd,
    Orientationd,
)

from custom.cohort import SubjectError
from custom.cohort.four_channel import stack_files
from custom.phantom import write_phantom
from custom.phantom.dataset import IMAGE_FILES
from custom.transforms import (
    CropToBraind,
    LabelMapToRegionsd,
    LoadSubjectd,
    RandTorchIOd,
    ResampleToSpacingd,
    label_map_to_regions,
    nonzero_voxels,
    subject_name,
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


@pytest.fixture
def files(tmp_path):
    folder = write_phantom(tmp_path, "BT0007", (16, 18, 14), (9.0, 8.0, 10.0), "PIR", 1, oblique_degrees=12.0)
    return [str(folder / name) for name in IMAGE_FILES]


def test_a_subject_is_loaded_as_monai_loads_it(files):
    loaded = LoadSubjectd("image")({"image": files, "subject": "Ada", "note": "kept"})
    expected = LoadImaged("image", ensure_channel_first=True)({"image": files})["image"]
    assert torch.equal(loaded["image"].as_tensor(), expected.as_tensor()) and loaded["image"].dtype == torch.float32
    for key in ("affine", "original_affine", "spatial_shape"):
        np.testing.assert_array_equal(loaded["image"].meta[key], expected.meta[key])
    for key in ("space", "filename_or_obj", "original_channel_dim"):
        assert loaded["image"].meta[key] == expected.meta[key]
    assert (loaded["subject"], loaded["image"].meta["subject"], loaded["note"]) == ("Ada", "Ada", "kept")
    assert loaded["warnings"] == []


def test_each_file_is_opened_once(files, monkeypatch):
    opened = []
    genuine = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(str(file)) or genuine(file, *a, **k))
    LoadSubjectd("image")({"image": files})
    assert [file for file in opened if file.endswith(".nii.gz")] == files


def test_one_file_with_four_channels_is_the_same_subject(files, tmp_path):
    stacked = stack_files(files, tmp_path / "study.nii.gz")
    one, four = (LoadSubjectd("image")({"image": given}) for given in (stacked, files))
    assert torch.equal(one["image"].as_tensor(), four["image"].as_tensor())
    np.testing.assert_array_equal(one["image"].affine, four["image"].affine)
    assert (one["subject"], one["image"].meta["filename_or_obj"]) == ("study", stacked)


def test_what_is_odd_travels_through_a_loader(files):
    for file in files[:1]:
        image = nib.load(file)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine), file)
    for batch in DataLoader(Dataset([{"image": files}], LoadSubjectd("image")), batch_size=1):
        (item,) = decollate_batch(batch)
    assert item["warnings"] == ["t1n: a fourth axis of length 1 was taken off (16 x 18 x 14 x 1)"]


def test_probabilities_end_where_the_brain_ends(files):
    loaded = LoadSubjectd("image")({"image": files})
    brain = (loaded["image"].as_tensor() != 0).any(0)
    masked = MaskIntensityd("pred", mask_key="brain")(loaded | {"pred": torch.full((3, 16, 18, 14), 0.7)})["pred"]
    assert loaded["brain"].shape == (1, 16, 18, 14) and 0 < brain.sum() < brain.numel()
    assert torch.equal(masked > 0, brain.expand(3, -1, -1, -1))
    assert masked.max() == pytest.approx(0.7)


def test_wrong_number_of_modalities_is_refused(files, tmp_path):
    with pytest.raises(SubjectError, match=r"Ada: .*3 images, not one each for t1n, t1c, t2w, flair"):
        LoadSubjectd("image")({"image": files[:3], "subject": "Ada"})
    image = nib.load(files[0])
    nib.save(nib.Nifti1Image(np.stack([np.asarray(image.dataobj)] * 3, -1), image.affine), tmp_path / "three.nii.gz")
    with pytest.raises(SubjectError, match=r"three: .*3 channels, not one each for t1n, t1c, t2w, flair"):
        LoadSubjectd("image")({"image": str(tmp_path / "three.nii.gz")})
    with pytest.raises(SubjectError, match=r"has 3 dimensions .*not 4"):
        LoadSubjectd("image")({"image": files[0]})


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
            CropToBraind("image"),
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
    return RandTorchIOd(name, **kwargs)


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


def test_outputs_are_named_by_subject_else_by_file(files, tmp_path):
    named = LoadSubjectd("image")({"image": files, "subject": "BT0001"})
    assert subject_name(named["image"].meta) == "BT0001"
    case = stack_files(files, tmp_path / "folder" / "case.nii.gz")
    assert LoadSubjectd("image")({"image": case})["subject"] == "case"


def test_loading_a_label_says_nothing_of_readers_that_are_not_there():
    pytest.importorskip("pydicom", reason="MONAI complains only where pydicom is installed")
    code = "import custom; from monai.transforms import LoadImaged; LoadImaged('label')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nvImageCodec" not in done.stderr + done.stdout
