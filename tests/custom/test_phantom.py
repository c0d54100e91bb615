"""Phantoms: reproducible, anatomically ordered, and the same in millimetres whatever the grid."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from custom.phantom import cohort_seeds, simulate, training_phantoms, write_absent, write_phantom

SHAPE, SPACING = (64, 76, 60), (2.5, 2.5, 2.5)
IMAGES = ("brain_t1.nii.gz", "brain_t1ce.nii.gz", "brain_t2.nii.gz", "brain_flair.nii.gz")
MASK, MANUAL = "tumorseg_FeTS.nii.gz", "rtumorseg_manual_correction.nii.gz"
T1N, T1C, T2W, FLAIR = range(4)


@pytest.fixture(scope="module")
def subject():
    return simulate(SHAPE, SPACING, seed=7)


def _millilitres(label):
    return np.count_nonzero(label) * np.prod(SPACING) / 1000


def _centroid_in_world(path):
    image = nib.load(path)
    return nib.affines.apply_affine(image.affine, np.argwhere(image.get_fdata() > 0).mean(0))


def test_shapes_and_types(subject):
    images, label = subject
    assert images.shape == (4, *SHAPE) and images.dtype == np.float32
    assert label.shape == SHAPE and label.dtype == np.uint8
    assert np.isfinite(images).all() and images.min() == 0


def test_same_seed_gives_the_same_bytes(subject):
    again = simulate(SHAPE, SPACING, seed=7)
    assert again[0].tobytes() == subject[0].tobytes() and again[1].tobytes() == subject[1].tobytes()


def test_another_seed_gives_another_subject(subject):
    _, label = simulate(SHAPE, SPACING, seed=8)
    both = np.count_nonzero((label > 0) & (subject[1] > 0))
    assert both < 0.6 * np.count_nonzero(subject[1])


@pytest.mark.parametrize("seed", range(5))
def test_labels_present_and_tumour_of_plausible_size(seed):
    images, label = simulate(SHAPE, SPACING, seed)
    assert set(np.unique(label)) == {0, 1, 2, 4}
    assert 8 < _millilitres(label > 0) < 320
    assert 2 < _millilitres((label == 1) | (label == 4)) < 150
    assert 1100 < _millilitres(images[T1N]) < 1900


def test_no_enhancing_tumour_when_asked(subject):
    _, label = simulate(SHAPE, SPACING, seed=7, enhancing=False)
    assert set(np.unique(label)) == {0, 1, 2}
    np.testing.assert_array_equal(label > 0, subject[1] > 0)


def test_enhancing_tumour_wraps_the_core(subject):
    _, label = subject
    core = label == 1
    shell = ndimage.binary_dilation(core) & ~core
    assert np.mean(label[shell] == 4) > 0.5


def test_background_is_zero_and_tumour_lies_in_the_brain(subject):
    images, label = subject
    brain = images > 0
    assert (brain == brain[0]).all()
    assert brain[0][label > 0].all()
    assert not images[:, [0, -1]].any() and not images[:, :, [0, -1]].any() and not images[:, :, :, [0, -1]].any()
    assert ndimage.label(brain[0])[1] == 1


@pytest.mark.parametrize(
    ("modality", "darker_to_brighter"),
    [
        (T1N, ("csf", 1, 2, "white")),
        (T1C, ("csf", 1, 2, "white", 4)),
        (T2W, ("white", "grey", 2, 1, "csf")),
        (FLAIR, ("csf", "white", "grey", 1, 2)),
    ],
)
def test_contrast_between_tissues(subject, modality, darker_to_brighter):
    images, label = subject
    healthy = ndimage.binary_erosion((images[0] > 0) & ~ndimage.binary_dilation(label > 0, iterations=2), iterations=2)
    t1, t2 = images[T1N] / np.median(images[T1N][healthy]), images[T2W] / np.median(images[T2W][healthy])
    tissue = {
        "csf": healthy & (t2 > 1.8) & (t1 < 0.7),
        "white": healthy & (t1 > 0.98) & (t2 < 1.05),
        "grey": healthy & (t1 > 0.7) & (t1 < 0.88) & (t2 > 1.1) & (t2 < 1.5),
        **{value: label == value for value in (1, 2, 4)},
    }
    medians = [np.median(images[modality][tissue[name]]) for name in darker_to_brighter]
    assert medians == sorted(medians), dict(zip(darker_to_brighter, medians, strict=True))


def test_ventricles_carry_no_tumour(subject):
    images, label = subject
    flair = images[FLAIR] / np.median(images[FLAIR][images[FLAIR] > 0])
    assert np.mean(flair[label > 0] < 0.5) < 0.01


def test_same_anatomy_at_another_spacing(subject):
    half = simulate([2 * n for n in SHAPE], [s / 2 for s in SPACING], seed=7)[1]
    blocks = (half > 0).reshape(SHAPE[0], 2, SHAPE[1], 2, SHAPE[2], 2).mean(axis=(1, 3, 5)) > 0.5
    coarse = subject[1] > 0
    assert 2 * np.count_nonzero(blocks & coarse) / (blocks.sum() + coarse.sum()) > 0.9


def test_small_field_of_view_holds_a_smaller_brain_whole():
    images, label = simulate((48, 48, 48), (3, 3, 3), seed=2)
    assert not images[:, [0, -1]].any() and not images[:, :, [0, -1]].any() and not images[:, :, :, [0, -1]].any()
    assert set(np.unique(label)) == {0, 1, 2, 4}


@pytest.mark.parametrize(
    ("shape", "spacing"), [((64, 64), (2, 2)), ((64, 64, 64), (2, 2, 0)), ((64, 64, 4), (1, 1, 5))]
)
def test_impossible_grids_are_refused(shape, spacing):
    with pytest.raises(ValueError, match="spacing|field of view"):
        simulate(shape, spacing, seed=0)


def test_files_of_a_subject(tmp_path):
    folder = write_phantom(tmp_path, "BT0042", (60, 72, 30), (3, 2.5, 5), "LPS", seed=3)
    assert sorted(path.name for path in folder.iterdir()) == sorted((*IMAGES, MASK))
    for name in (*IMAGES, MASK):
        image = nib.load(folder / name)
        assert image.shape == (60, 72, 30)
        np.testing.assert_allclose(image.header.get_zooms(), (3, 2.5, 5))
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.header["qform_code"] == 1 and image.header["sform_code"] == 1
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        assert image.get_data_dtype() == (np.uint8 if name == MASK else np.int16)


@pytest.mark.parametrize("orientation", ["RAS", "PIR", "SLA"])
def test_orientation_moves_the_grid_and_not_the_tumour(tmp_path, orientation):
    reference = write_phantom(tmp_path, "reference", (50, 60, 48), (3, 3, 3), "LPS", seed=5)
    turned = write_phantom(tmp_path, "turned", (50, 60, 60), (3, 3, 3), orientation, seed=5)
    assert "".join(nib.aff2axcodes(nib.load(turned / MASK).affine)) == orientation
    difference = _centroid_in_world(turned / MASK) - _centroid_in_world(reference / MASK)
    assert np.abs(difference).max() < 6


def test_orientation_alone_changes_no_voxel(tmp_path):
    lps = write_phantom(tmp_path, "a", (40, 48, 40), (4, 4, 4), "LPS", seed=5)
    pir = write_phantom(tmp_path, "b", (48, 40, 40), (4, 4, 4), "PIR", seed=5)
    for name in (*IMAGES, MASK):
        first, second = (nib.as_closest_canonical(nib.load(folder / name)) for folder in (lps, pir))
        np.testing.assert_array_equal(first.dataobj, second.dataobj)
        np.testing.assert_allclose(first.affine, second.affine, atol=1e-4)


def test_brain_is_the_right_way_round(tmp_path):
    folder = write_phantom(tmp_path, "a", (48, 40, 40), (4, 4, 4), "PIR", seed=5)
    brain = np.asarray(nib.as_closest_canonical(nib.load(folder / IMAGES[0])).dataobj) > 0
    width_below, width_above = (np.ptp(np.nonzero(brain[..., z])[0]) for z in (6, 24))
    assert width_below < width_above, "cerebellum and brainstem are narrower than the cerebrum"
    low_front, low_back = brain[:, 24:, :9].sum(), brain[:, :24, :9].sum()
    assert low_front < 0.2 * low_back, "cerebellum lies behind"


def test_oblique_grid_keeps_voxels_and_spacing(tmp_path):
    straight = write_phantom(tmp_path, "a", (40, 48, 40), (4, 3.5, 4), seed=5)
    oblique = write_phantom(tmp_path, "b", (40, 48, 40), (4, 3.5, 4), seed=5, oblique_degrees=12)
    first, second = nib.load(straight / MASK), nib.load(oblique / MASK)
    np.testing.assert_array_equal(first.dataobj, second.dataobj)
    np.testing.assert_allclose(nib.affines.voxel_sizes(second.affine), (4, 3.5, 4), rtol=1e-5)
    cosine = (np.trace(second.affine[:3, :3] @ np.linalg.inv(first.affine[:3, :3])) - 1) / 2
    assert np.degrees(np.arccos(cosine)) == pytest.approx(12, abs=0.01)


def test_bad_orientation_is_named():
    with pytest.raises(ValueError, match="XYZ"):
        write_phantom("unused", "a", (40, 48, 40), (4, 4, 4), "XYZ")


def test_cohort_shares_and_names(tmp_path):
    folders = write_absent(tmp_path, cohort_seeds(4, 1, first_id=9), (24, 28, 24), (7, 7, 7))
    assert [folder.name for folder in folders] == ["BT0009", "BT0010", "BT0011", "BT0012"]
    without = [not (np.asarray(nib.load(folder / MASK).dataobj) == 4).any() for folder in folders]
    assert without == [False, False, False, True]
    assert not [path for path in tmp_path.rglob(".*")]


def test_manual_mask_is_the_truth_and_the_automatic_one_a_draft(tmp_path):
    plain = write_phantom(tmp_path, "plain", (40, 48, 40), (4, 4, 4), seed=5)
    manual = write_phantom(tmp_path, "manual", (40, 48, 40), (4, 4, 4), seed=5, manual=True)
    truth = np.asarray(nib.load(plain / MASK).dataobj)
    np.testing.assert_array_equal(nib.load(manual / MANUAL).dataobj, truth)
    draft = np.asarray(nib.load(manual / MASK).dataobj)
    assert 0 < np.count_nonzero(draft) < np.count_nonzero(truth) and (draft[draft > 0] == truth[draft > 0]).all()


def test_larger_cohort_begins_with_the_smaller(tmp_path):
    small = write_absent(tmp_path / "small", cohort_seeds(1, 3), (24, 28, 24), (7, 7, 7))
    large = write_absent(tmp_path / "large", cohort_seeds(2, 3), (24, 28, 24), (7, 7, 7))
    first, same, other = (np.asarray(nib.load(folder / IMAGES[2]).dataobj) for folder in (*small, *large))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantom(tmp_path, "a", (24, 28, 24), (7, 7, 7))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_phantoms_to_train_on_are_written_once_and_named_like_no_patient(tmp_path):
    options = {"shape": (48, 56, 40), "spacing": (4.0, 4.0, 4.0)}
    items = training_phantoms(tmp_path, 2, **options)
    assert [item["subject"] for item in items] == ["phantom_0001", "phantom_0002"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.nii.gz")}
    assert training_phantoms(tmp_path, 2, **options) == items
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.nii.gz")} == written
    assert training_phantoms(tmp_path / "none", 0) == [] and not (tmp_path / "none").exists()
