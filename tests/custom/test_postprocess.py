"""Post-processing against flood fills written here, and NIfTI output field by field against its input."""

from __future__ import annotations

import errno
import gzip
import logging
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd, SaveImaged
from numpy.testing import assert_array_equal
from scipy.spatial.transform import Rotation

from custom import __version__
from custom.cohort import PALETTES
from custom.postprocess import (
    NativeGridWriter,
    PostprocessRegions,
    PostprocessRegionsd,
    clean_regions,
    fill_holes,
    nest_regions,
    regions_to_label_map,
    remove_small_components,
)

# --- references -----------------------------------------------------------------------------------------------------


def neighbours(connectivity: int) -> list[tuple[int, int, int]]:
    steps = [(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)]
    return [step for step in steps if 0 < sum(map(abs, step)) <= (1 if connectivity == 6 else 3)]


def flood_fill(mask: np.ndarray, connectivity: int) -> list[set[tuple[int, ...]]]:
    """Connected components as sets of voxels, by walking from voxel to voxel."""
    unseen = {tuple(map(int, voxel)) for voxel in np.argwhere(mask)}
    components = []
    while unseen:
        front = [unseen.pop()]
        component = set(front)
        while front:
            voxel = front.pop()
            for step in neighbours(connectivity):
                other = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if other in unseen:
                    unseen.remove(other)
                    component.add(other)
                    front.append(other)
        components.append(component)
    return components


def holes_in(mask: np.ndarray) -> int:
    """Background voxels that cannot be reached from outside by face neighbours."""
    outside = next(c for c in flood_fill(~np.pad(mask, 1), 6) if (0, 0, 0) in c)
    return int((~np.pad(mask, 1)).sum()) - len(outside)


def random_regions(seed: int, shape: tuple[int, int, int] = (11, 10, 9)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    density = rng.uniform(0.01, 0.1, size=(3, 1, 1, 1)) * (1 + 5 * (seed % 2))
    regions = rng.random((3, *shape)) < density
    for region in regions:
        corner = rng.integers(0, 5, size=3)
        size = rng.integers(2, 6, size=3)
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        region[box] |= rng.random(region[box].shape) < rng.uniform(0.5, 1)
    return regions


def ball(radius: float, size: int = 24) -> np.ndarray:
    grid = np.indices((size,) * 3) - (size - 1) / 2
    return np.sqrt((grid**2).sum(0)) < radius


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_components_are_those_of_a_flood_fill(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 8, 7)) < 0.12
    expected = np.zeros_like(mask)
    for component in flood_fill(mask, 26):
        expected[tuple(np.array(sorted(component)).T)] = len(component) >= 4
    assert 0 < expected.sum() < mask.sum()
    assert_array_equal(remove_small_components(mask, 4), expected)


def test_voxels_touching_by_a_corner_are_one_component() -> None:
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[1, 1, 1] = mask[2, 2, 2] = True
    assert remove_small_components(mask, 2).sum() == 2
    assert remove_small_components(mask, 3).sum() == 0


def test_a_hole_is_background_no_face_path_leads_out_of() -> None:
    mask = np.zeros((5, 5, 5), dtype=bool)
    mask[1:4, 1:4, 1:4] = True
    mask[2, 2, 2] = False
    assert fill_holes(mask)[2, 2, 2]
    mask[1, 1, 1] = False
    assert fill_holes(mask)[2, 2, 2], "a leak through a corner only does not open the hole"
    mask[2, 2, 3] = False
    assert_array_equal(fill_holes(mask), mask)


def test_background_enclosed_only_by_the_edge_of_the_image_is_no_hole() -> None:
    mask = np.ones((4, 4, 4), dtype=bool)
    mask[0, 1:3, 1:3] = False
    assert_array_equal(fill_holes(mask), mask)


def test_nesting_never_loses_a_voxel() -> None:
    regions = random_regions(3)
    nested = nest_regions(regions)
    assert_array_equal(nested[1], regions[0] | regions[1])
    assert_array_equal(nested[2], regions[0] | regions[1] | regions[2])


@pytest.mark.parametrize("holes", [True, (False, True, True), (True, False, True), False])
@pytest.mark.parametrize("min_voxels", [1, 6, (3, 8, 20), (20, 8, 3), (4, 30, 9)])
@pytest.mark.parametrize("seed", range(6))
def test_invariants_hold_together_and_cleaning_is_idempotent(seed: int, min_voxels: object, holes: object) -> None:
    cleaned = clean_regions(random_regions(seed), min_voxels, holes)
    et, tc, wt = cleaned
    assert not (et & ~tc).any() and not (tc & ~wt).any()
    fewest = min_voxels if isinstance(min_voxels, tuple) else (min_voxels,) * 3
    fills = holes if isinstance(holes, tuple) else (holes,) * 3
    for region, size, fill in zip(cleaned, fewest, fills, strict=True):
        assert all(len(component) >= size for component in flood_fill(region, 26))
        assert not fill or holes_in(region) == 0
    assert_array_equal(clean_regions(cleaned, min_voxels, holes), cleaned)


@pytest.mark.parametrize("seed", range(6))
def test_bounding_box_changes_nothing(seed: int) -> None:
    regions = random_regions(seed)
    padded = np.pad(regions, ((0, 0), (5, 3), (0, 7), (2, 0)))
    assert_array_equal(clean_regions(padded, 6)[:, 5:-3, :-7, 2:], clean_regions(regions, 6))


def test_input_is_left_alone() -> None:
    regions = random_regions(1)
    before = regions.copy()
    clean_regions(regions, 6)
    assert_array_equal(regions, before)


def test_enhancing_voxels_outside_the_whole_tumour_are_kept() -> None:
    et, wt = ball(8), ball(10)
    wt[:12] = False
    cleaned = clean_regions(np.stack([et, et, wt]))
    assert_array_equal(cleaned[0], et)
    assert (cleaned[2] >= et).all()


def test_a_stray_enhancing_speck_does_not_enlarge_the_outer_regions() -> None:
    regions = np.zeros((3, 24, 24, 24), dtype=bool)
    regions[2] = ball(6)
    regions[0, 1:3, 1:3, 1:3] = True
    cleaned = clean_regions(regions)
    assert_array_equal(cleaned[2], ball(6))
    assert not cleaned[:2].any()


@pytest.mark.parametrize("min_voxels", [(3, 60, 70), (3, 3, 70), (3, 60, 3)])
def test_a_component_too_small_for_an_outer_region_takes_its_content_along(min_voxels: tuple[int, ...]) -> None:
    regions = np.zeros((3, 16, 16, 16), dtype=bool)
    regions[:, 9:15, 9:15, 9:15] = True
    expected = regions.copy()
    regions[0, 1:3, 1:3, 1:3] = regions[1, 1:3, 1:3, 1:4] = regions[2, 1:4, 1:4, 1:4] = True
    if min_voxels[2] == 3:
        expected[2] = regions[2]
    assert_array_equal(clean_regions(regions, min_voxels), expected)


def test_necrosis_in_a_closed_rim_stays_necrosis_unless_told_otherwise() -> None:
    rim, core = ball(9) & ~ball(7), ball(9)
    regions = np.stack([rim, core, ball(11)])
    assert_array_equal(clean_regions(regions), regions)
    assert_array_equal(clean_regions(regions, holes=True)[0], core)


def test_empty_regions_stay_empty() -> None:
    empty = np.zeros((3, 6, 5, 4), dtype=bool)
    assert_array_equal(clean_regions(empty), empty)


@pytest.mark.parametrize("palette", PALETTES)
def test_label_map_takes_the_values_of_the_palette(palette: str) -> None:
    regions = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool).reshape(3, 4, 1, 1)
    values = PALETTES[palette]
    label_map = regions_to_label_map(regions, palette)
    assert label_map.dtype == np.uint8
    assert label_map.ravel().tolist() == [values["enhancing"], values["core"], values["oedema"], 0]


# --- transform ------------------------------------------------------------------------------------------------------


def probabilities(regions: np.ndarray, spacing: float = 1.0) -> MetaTensor:
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0], dtype=torch.float64))
    noise = np.random.default_rng(0).uniform(0, 0.4, regions.shape)
    return MetaTensor(torch.from_numpy(np.where(regions, 1 - noise, noise).astype(np.float32)), affine=affine)


def test_transform_from_json_gives_one_uint8_channel_and_keeps_metadata() -> None:
    config = {"_target_": "custom.postprocess.PostprocessRegionsd", "keys": "pred", "thresholds": [0.5, 0.5, 0.5]}
    transform = ConfigParser({"post": config}).get_parsed_content("post")
    image = probabilities(np.stack([ball(4), ball(6), ball(9)]))
    image.meta["filename_or_obj"] = "somewhere.nii.gz"
    label_map = transform({"pred": image, "other": 1})["pred"]
    assert isinstance(label_map, MetaTensor) and label_map.dtype == torch.uint8 and label_map.shape == (1, 24, 24, 24)
    assert label_map.meta["filename_or_obj"] == "somewhere.nii.gz"
    assert_array_equal(label_map.affine.numpy(), image.affine.numpy())
    assert_array_equal(label_map[0].numpy(), np.select([ball(4), ball(6), ball(9)], [3, 1, 2], 0))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_transform_returns_the_kind_of_array_it_was_given(kind: Callable) -> None:
    image = kind(np.stack([ball(4), ball(6), ball(9)]).astype(np.float32))
    label_map = PostprocessRegions(palette="brats2021")(image)
    assert type(label_map) is type(image)
    assert_array_equal(np.asarray(label_map)[0], np.select([ball(4), ball(6), ball(9)], [4, 1, 2], 0))


def test_thresholds_are_per_region_and_inclusive() -> None:
    image = torch.full((3, 6, 6, 6), 0.5)
    label_map = PostprocessRegions(thresholds=[0.6, 0.51, 0.5], min_volume_mm3=0)(image)
    assert (label_map == 2).all()


@pytest.mark.parametrize(("spacing", "kept"), [(1.0, False), (2.0, True), (0.5, False)])
def test_size_limit_is_a_volume(spacing: float, kept: bool) -> None:
    regions = np.zeros((3, 8, 8, 8), dtype=bool)
    regions[:, 2:5, 2:5, 2:5] = True
    assert bool(PostprocessRegions()(probabilities(regions, spacing)).any()) is kept


@pytest.mark.parametrize(("voxels", "kept"), [(49, False), (50, True)])
@pytest.mark.parametrize("spacing", [1.0, 1 - 1e-7, 1 + 1e-7])
def test_fifty_voxels_at_one_millimetre_are_kept(voxels: int, kept: bool, spacing: float) -> None:
    regions = np.zeros((3, 10, 10, 10), dtype=bool)
    regions.reshape(3, -1)[:, :voxels] = True
    assert bool(PostprocessRegions()(probabilities(regions, spacing)).any()) is kept


def test_a_region_lost_to_the_size_limit_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    image = probabilities(np.stack([ball(1.5), ball(6), ball(9)]))
    image.meta["filename_or_obj"] = "BT0001/brain_t1.nii.gz"
    with caplog.at_level(logging.WARNING):
        PostprocessRegions()(image)
    assert [record.getMessage() for record in caplog.records] == [
        "BT0001/brain_t1.nii.gz: ET had only small components and is now empty"
    ]


@pytest.mark.parametrize("value", [float("nan"), -3.0, 7.0])
def test_logits_and_nan_are_refused(value: float) -> None:
    image = torch.zeros(3, 4, 4, 4)
    image[1, 2, 2, 2] = value
    with pytest.raises(ValueError, match="sigmoid"):
        PostprocessRegions()(image)


@pytest.mark.parametrize("shape", [(1, 4, 4, 4), (1, 3, 4, 4, 4), (3, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[3, X, Y, Z\]"):
        PostprocessRegions()(torch.zeros(shape))


def test_unknown_palette_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="brats2021, brats2023"):
        PostprocessRegions(palette="brats")


def test_real_annotations_pass_nearly_unchanged(real_data: Path) -> None:
    truth = np.asarray(nib.load(next(real_data.glob("brats2021/*00006/*_seg.nii.gz"))).dataobj)
    regions = np.stack([truth == 4, (truth == 4) | (truth == 1), truth > 0])
    label_map = PostprocessRegions(palette="brats2021")(regions.astype(np.float32))[0]
    assert np.count_nonzero(label_map != truth) < 10


# --- files ----------------------------------------------------------------------------------------------------------

SHAPE = (14, 12, 10)
GEOMETRY = ["qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
GEOMETRY += ["srow_x", "srow_y", "srow_z", "xyzt_units"]


def oriented(codes: str, spacing: tuple[float, float, float], tilt: float = 0.0) -> np.ndarray:
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(tuple(codes)), SHAPE)
    affine = affine @ np.diag([*spacing, 1])
    affine[:3, :3] = Rotation.from_euler("xyz", [tilt, -tilt / 2, tilt], degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] += (-71.3, 13.7, 101.1)
    return affine


def sform_only() -> nib.Nifti1Image:
    image = nib.Nifti1Image(voxels(), oriented("PIR", (0.9, 1.1, 3.3)))
    image.header["qform_code"], image.header["sform_code"] = 0, 4
    return image


def qform_only_rotated() -> nib.Nifti1Image:
    image = nib.Nifti1Image(voxels(), None)
    image.set_qform(oriented("LPS", (1, 1.25, 2.5), tilt=17), code=1)
    image.set_sform(None, code=0)
    image.header["srow_x"] = (9, 8, 7, 6)
    return image


def both_forms_and_codes(image_class: type = nib.Nifti1Image) -> nib.Nifti1Image:
    image = image_class(voxels(), oriented("LPS", (1, 1, 1)))
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=2)
    image.header.set_xyzt_units("mm", "sec")
    return image


def forms_that_disagree() -> nib.Nifti1Image:
    image = both_forms_and_codes()
    image.header.set_qform(oriented("RAS", (2, 1, 1), tilt=5), code=1)
    image.header.set_sform(oriented("RAS", (2, 1, 1), tilt=6), code=3)
    return image


def big_endian() -> nib.Nifti1Image:
    header = both_forms_and_codes().header.as_byteswapped(">")
    return nib.Nifti1Image(voxels().astype(">i2"), None, header)


SOURCES: dict[str, Callable[[], nib.Nifti1Image]] = {
    "sform_only": sform_only,
    "qform_only_rotated": qform_only_rotated,
    "both": both_forms_and_codes,
    "nifti2": lambda: both_forms_and_codes(nib.Nifti2Image),
    "disagree": forms_that_disagree,
    "big_endian": big_endian,
}


def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)


def write_inputs(folder: Path, image: nib.Nifti1Image, ending: str) -> list[str]:
    image.header["descrip"] = b"DOE^JANE 1970"
    image.header.set_slope_inter(2.0, 10.0) if image.header.endianness == "<" else None
    paths = [folder / f"{name}{ending}" for name in ("t1n", "t1c", "t2w", "flair")]
    for path in paths:
        nib.save(image, path)
    return [str(path) for path in paths]


def saver(folder: Path, **kwargs: object) -> SaveImaged:
    options = {"output_postfix": "seg", "separate_folder": False, "print_log": False} | kwargs
    return SaveImaged("pred", output_dir=folder, writer="custom.postprocess.NativeGridWriter", **options)


def assert_same_geometry(written: Path, source: str) -> None:
    output, expected = nib.load(written).header, nib.load(source).header
    for field in GEOMETRY:
        assert_array_equal(output[field], expected[field], err_msg=field)
    assert_array_equal(output["pixdim"][:4], expected["pixdim"][:4])
    assert_array_equal(output.get_best_affine(), expected.get_best_affine())


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", SOURCES)
def test_mask_returns_on_the_inputs_own_grid(tmp_path: Path, name: str, ending: str) -> None:
    paths = write_inputs(tmp_path, SOURCES[name](), ending)
    native = np.asarray(nib.load(paths[0]).dataobj)
    load = Compose([LoadImaged("image", ensure_channel_first=True), Orientationd("image", axcodes="RAS", labels=None)])
    subject = load({"image": paths})
    cut = float(np.median(native))
    subject["pred"] = (subject["image"][:3] > cut).float()
    finish = Compose(
        [
            Invertd("pred", load, orig_keys="image", nearest_interp=False, to_tensor=True),
            PostprocessRegionsd("pred", min_volume_mm3=0, fill_holes=False),
            saver(tmp_path, output_ext=ending),
        ]
    )
    finish(subject)
    written = tmp_path / f"t1n_seg{ending}"
    assert_same_geometry(written, paths[0])
    image = nib.load(written)
    assert image.get_data_dtype() == np.uint8 and image.shape == SHAPE
    assert_array_equal(np.asarray(image.dataobj), np.where(native > cut, 3, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*map(os.path.basename, paths), written.name])


def mask_like(path: str, channels: int = 1, dtype: torch.dtype = torch.uint8) -> MetaTensor:
    image = LoadImaged("image", ensure_channel_first=True)({"image": path})["image"][:1]
    mask = MetaTensor(torch.zeros((channels, *image.shape[1:]), dtype=dtype), meta=image.meta)
    mask[0, 2:4, 2:4, 2:4] = 1
    return mask


def test_header_says_what_the_file_is_and_nothing_about_the_patient(tmp_path: Path) -> None:
    path = write_inputs(tmp_path, both_forms_and_codes(), ".nii.gz")[0]
    saver(tmp_path)({"pred": mask_like(path)})
    raw = gzip.decompress((tmp_path / "t1n_seg.nii.gz").read_bytes())
    assert b"DOE" not in raw
    header = nib.Nifti1Header(raw[:348])
    assert bytes(header["descrip"]).rstrip(b"\0") == f"CoMNeT {__version__}".encode()
    assert header.get_intent()[0] == "label"
    assert (header["scl_slope"], header["scl_inter"]) == (1, 0)


def test_probabilities_are_stored_as_unscaled_float32(tmp_path: Path) -> None:
    path = write_inputs(tmp_path, both_forms_and_codes(), ".nii.gz")[0]
    values = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    saver(tmp_path, output_dtype=None)({"pred": MetaTensor(values, meta=mask_like(path).meta)})
    written = nib.load(tmp_path / "t1n_seg.nii.gz")
    assert written.get_data_dtype() == np.float32 and written.shape == (*SHAPE, 3)
    assert_array_equal(np.moveaxis(np.asarray(written.dataobj), -1, 0), values.numpy())
    assert written.header.get_intent()[0] == "none"
    assert_same_geometry(tmp_path / "t1n_seg.nii.gz", path)


def test_grid_of_a_four_channel_file_is_kept(tmp_path: Path) -> None:
    source = nib.Nifti1Image(np.zeros((*SHAPE, 4), np.float32), oriented("LPS", (1, 1, 2)))
    nib.save(source, tmp_path / "joined.nii.gz")
    saver(tmp_path)({"pred": mask_like(str(tmp_path / "joined.nii.gz"))})
    assert nib.load(tmp_path / "joined_seg.nii.gz").shape == SHAPE
    assert_same_geometry(tmp_path / "joined_seg.nii.gz", str(tmp_path / "joined.nii.gz"))


def test_single_slice_keeps_its_third_axis(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((9, 8, 1), np.int16), np.eye(4)), tmp_path / "slice.nii")
    image = LoadImaged("image", ensure_channel_first=True)({"image": str(tmp_path / "slice.nii")})["image"]
    saver(tmp_path, output_ext=".nii")({"pred": image.to(torch.uint8)})
    assert nib.load(tmp_path / "slice_seg.nii").shape == (9, 8, 1)


def test_float_labels_are_stored_as_uint8_on_request(tmp_path: Path) -> None:
    path = write_inputs(tmp_path, both_forms_and_codes(), ".nii.gz")[0]
    saver(tmp_path, output_dtype=np.uint8)({"pred": mask_like(path, dtype=torch.float32)})
    assert nib.load(tmp_path / "t1n_seg.nii.gz").get_data_dtype() == np.uint8


@pytest.mark.parametrize("value", [0.5, 256, -1, float("nan")])
def test_values_that_do_not_fit_uint8_are_refused(tmp_path: Path, value: float) -> None:
    writer = NativeGridWriter(output_dtype=np.uint8)
    writer.set_data_array(np.full((1, *SHAPE), value, dtype=np.float32))
    writer.set_metadata({"affine": np.eye(4)}, resample=False)
    with pytest.raises(ValueError, match="not whole numbers"):
        writer.write(tmp_path / "mask.nii.gz")


def test_array_left_in_another_orientation_is_refused_even_if_its_shape_fits(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.diag([-1, -1, 1, 1])), tmp_path / "cube.nii")
    load = Compose([LoadImaged("pred", ensure_channel_first=True), Orientationd("pred", axcodes="RAS", labels=None)])
    with pytest.raises(RuntimeError, match="invert the preprocessing before saving"):
        saver(tmp_path)(load({"pred": str(tmp_path / "cube.nii")}))
    assert [path.name for path in tmp_path.iterdir()] == ["cube.nii"]


def test_array_of_another_shape_is_refused(tmp_path: Path) -> None:
    mask = mask_like(write_inputs(tmp_path, both_forms_and_codes(), ".nii.gz")[0])
    writer = NativeGridWriter()
    writer.set_data_array(mask[:, :-1])
    writer.set_metadata(mask.meta, resample=False)
    with pytest.raises(ValueError, match=r"\(13, 12, 10\).*not on the grid of .*t1n\.nii\.gz"):
        writer.write(tmp_path / "mask.nii.gz")


def test_resample_brings_the_mask_back_to_the_source_grid(tmp_path: Path) -> None:
    path = write_inputs(tmp_path, sform_only(), ".nii.gz")[0]
    mask = mask_like(path)
    turned = Orientationd("pred", axcodes="RAS", labels=None)({"pred": mask})
    saver(tmp_path, resample=True)(turned)
    assert_same_geometry(tmp_path / "t1n_seg.nii.gz", path)
    assert_array_equal(np.asarray(nib.load(tmp_path / "t1n_seg.nii.gz").dataobj), mask[0].numpy())


@pytest.mark.parametrize("state", ["gone", "not NIfTI"])
def test_without_a_source_header_the_affine_is_written_with_a_warning(tmp_path: Path, state: str) -> None:
    path = write_inputs(tmp_path, qform_only_rotated(), ".nii.gz")[0]
    mask = mask_like(path)
    Path(path).unlink() if state == "gone" else Path(path).write_text("text")
    with pytest.warns(UserWarning, match=r"no NIfTI source at .*t1n\.nii\.gz"):
        saver(tmp_path)({"pred": mask})
    written = nib.load(tmp_path / "t1n_seg.nii.gz")
    np.testing.assert_allclose(written.affine, mask.affine.numpy(), atol=1e-4)
    assert written.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["save", "replace"])
def test_failure_half_way_leaves_neither_the_file_nor_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, stage: str
) -> None:
    mask = mask_like(write_inputs(tmp_path, both_forms_and_codes(), ".nii.gz")[0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier.nii.gz").write_bytes(b"earlier result")

    def half_way(image: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    def refuse(*_: object) -> None:
        raise failure

    monkeypatch.setattr(nib, "save", half_way) if stage == "save" else monkeypatch.setattr(os, "replace", refuse)
    for name in ("mask.nii.gz", "earlier.nii.gz"):
        writer = NativeGridWriter()
        writer.set_data_array(mask)
        writer.set_metadata(mask.meta, resample=False)
        with pytest.raises(type(failure)):
            writer.write(tmp_path / "out" / name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["earlier.nii.gz"]
    assert (tmp_path / "out" / "earlier.nii.gz").read_bytes() == b"earlier result"


def test_unwritable_folder_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    writer = NativeGridWriter()
    writer.set_data_array(np.zeros((1, *SHAPE), np.uint8))
    writer.set_metadata(None)
    with pytest.warns(UserWarning), pytest.raises(OSError, match=r"mask\.nii\.gz.*writable") as caught:
        writer.write(tmp_path / "file" / "mask.nii.gz")
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_other_file_endings_are_refused(tmp_path: Path) -> None:
    writer = NativeGridWriter()
    writer.set_data_array(np.zeros((1, *SHAPE), np.uint8))
    writer.set_metadata(None)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"\.nii\.gz or \.nii"):
        writer.write(tmp_path / "mask.nrrd")


def test_same_mask_gives_the_same_bytes(tmp_path: Path) -> None:
    mask = mask_like(write_inputs(tmp_path, both_forms_and_codes(), ".nii.gz")[0])
    for name in ("first", "second"):
        saver(tmp_path / name)({"pred": mask})
    first, second = (path.read_bytes() for path in sorted(tmp_path.glob("*/t1n_seg.nii.gz")))
    assert first == second
