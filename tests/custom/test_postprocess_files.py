"""NIfTI output of post-processing, field by field against its input."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd, SaveImaged
from numpy.testing import assert_array_equal
from scipy.spatial.transform import Rotation

from custom import __version__
from custom.inference import NativeGridWriter, PostprocessRegionsd, SaveSubjectd

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
    return SaveImaged("pred", output_dir=folder, writer="custom.inference.NativeGridWriter", **options)


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


@pytest.mark.parametrize("name", ["1.2.826.0.1", "sub-01_v1.5", "Dr. House", "plain", "a.nii"])
def test_names_with_dots_stay_whole(name, tmp_path):
    meta = {"subject": name, "affine": torch.eye(4), "original_affine": np.eye(4)}
    with pytest.warns(UserWarning, match="no NIfTI source"):
        SaveSubjectd("pred", tmp_path, "seg")({"pred": MetaTensor(torch.zeros(1, 4, 4, 4), meta=meta)})
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.gz")] == [f"{name}/{name}_seg.nii.gz"]


def test_a_mask_of_someone_else_is_not_replaced(tmp_path):
    theirs = tmp_path / "a" / "a_seg.nii.gz"
    theirs.parent.mkdir()
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), theirs)
    before = theirs.read_bytes()
    pred = MetaTensor(torch.zeros(1, 4, 4, 4), meta={"subject": "a", "affine": torch.eye(4)})
    with pytest.raises(Exception, match="is not CoMNeT's and is not replaced"):
        SaveSubjectd("pred", tmp_path, "seg")({"pred": pred})
    assert theirs.read_bytes() == before
