from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage

from custom import cli
from custom.cohort.four_channel import StackingError, stack, stack_files
from custom.files import UserError
from custom.phantom import write_phantom

FILES = {"t1n": "brain_t1", "t1c": "brain_t1ce", "t2w": "brain_t2", "flair": "brain_flair"}


@pytest.fixture
def subject(tmp_path) -> Path:
    return write_phantom(tmp_path / "data", "BT0007", (16, 18, 14), (9.0, 8.0, 10.0), "PIR", 1, oblique_degrees=12.0)


def paths(subject: Path) -> dict[str, str]:
    return {key: str(subject / f"{name}.nii.gz") for key, name in FILES.items()}


def change(path: str, voxels: np.ndarray | None = None, affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    voxels = np.asarray(image.dataobj) if voxels is None else voxels
    nib.save(nib.Nifti1Image(voxels, image.affine if affine is None else affine), path)


def test_channels_are_the_modalities_in_order_on_the_same_grid(subject, tmp_path):
    (file,) = stack(str(subject), output_dir=str(tmp_path / "out"))
    assert Path(file) == tmp_path / "out" / "BT0007.nii.gz"
    made, first = nib.load(file), nib.load(paths(subject)["t1n"])
    assert made.shape == (*first.shape, 4) and made.get_data_dtype() == first.get_data_dtype()
    for channel, path in enumerate(paths(subject).values()):
        assert np.array_equal(np.asarray(made.dataobj)[..., channel], np.asarray(nib.load(path).dataobj))
    assert np.array_equal(made.affine, first.affine)
    for field in ("qform_code", "sform_code", "srow_x", "quatern_b", "qoffset_x", "xyzt_units"):
        assert np.array_equal(made.header[field], first.header[field]), field
    assert np.array_equal(made.header["pixdim"][:4], first.header["pixdim"][:4])


def test_monai_reads_it_as_four_channels(subject, tmp_path):
    (file,) = stack(paths(subject) | {"name": "mine"}, tmp_path)
    image = LoadImage(image_only=True, ensure_channel_first=True)(file)
    assert tuple(image.shape) == (4, *nib.load(paths(subject)["t1n"]).shape) and Path(file).name == "mine.nii.gz"
    assert np.allclose(image.affine, nib.load(paths(subject)["t1n"]).affine)


def test_scaled_and_mixed_types_become_float32(subject, tmp_path):
    first = paths(subject)["t1n"]
    voxels = np.asarray(nib.load(first).dataobj).astype(np.float64) * 0.37
    change(first, voxels)
    made = nib.load(stack(str(subject), output_dir=str(tmp_path))[0])
    assert made.get_data_dtype() == np.float32
    assert np.allclose(np.asarray(made.dataobj)[..., 0], voxels, rtol=1e-6)


def test_free_text_of_the_source_is_left_behind(subject, tmp_path):
    first = paths(subject)["t1n"]
    image = nib.load(first)
    image.header["descrip"], image.header["db_name"] = b"Jane Doe", b"Jane Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, first)
    made = nib.load(stack(str(subject), output_dir=str(tmp_path))[0])
    assert b"Jane" not in made.to_bytes()


def grid(subject: Path) -> None:
    affine = nib.load(paths(subject)["t2w"]).affine.copy()
    affine[0, 3] += 1.0
    change(paths(subject)["t2w"], affine=affine)


def nan(subject: Path) -> None:
    voxels = np.asarray(nib.load(paths(subject)["t1c"]).dataobj).astype(np.float32)
    voxels[3, 3, 3] = np.nan
    change(paths(subject)["t1c"], voxels)


def zero(subject: Path) -> None:
    change(paths(subject)["flair"], np.zeros_like(np.asarray(nib.load(paths(subject)["flair"]).dataobj)))


def truncated(subject: Path) -> None:
    path = Path(paths(subject)["t1n"])
    path.write_bytes(path.read_bytes()[:-500])


def swapped(subject: Path) -> None:
    shutil.copyfile(paths(subject)["t1n"], paths(subject)["t1c"])


FAULTS = {grid: "t2w is on another grid", nan: "NaN", zero: "is empty", truncated: "truncated", swapped: "same voxels"}


@pytest.mark.parametrize(("damage", "reason"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", None))
def test_what_the_cohort_refuses_is_refused_and_nothing_written(subject, tmp_path, damage, reason):
    damage(subject)
    with pytest.raises(StackingError, match=rf"BT0007: .*\.nii\.gz: .*{reason}"):
        stack(paths(subject), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_subject_is_named_after_the_good_ones_are_stacked(subject, tmp_path):
    write_phantom(tmp_path / "data", "BT0008", (16, 18, 14), (9.0, 8.0, 10.0), seed=2)
    nan(subject)
    with pytest.raises(ValueError, match=r"1 subjects were not stacked.*BT0007.*NaN"):
        stack(str(tmp_path / "data"), output_dir=str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["BT0008.nii.gz"]


def test_each_failure_is_named_and_a_file_of_somebody_else_is_left_alone(subject, tmp_path):
    write_phantom(tmp_path / "data", "BT0008", (16, 18, 14), (9.0, 8.0, 10.0), seed=2)
    out = tmp_path / "out"
    stack(str(tmp_path / "data"), out)
    stack(str(tmp_path / "data"), out)  # its own files are replaced
    shutil.copyfile(paths(subject)["t1c"], out / "BT0008.nii.gz")
    theirs = (out / "BT0008.nii.gz").read_bytes()
    (out / "BT0007.nii.gz").unlink()
    nan(subject)
    with pytest.raises(
        StackingError, match=r"2 subjects .*BT0007.*NaN.* \| BT0008: .*another file of this name"
    ) as told:
        stack(str(tmp_path / "data"), out)
    assert told.value.written == [] and (out / "BT0008.nii.gz").read_bytes() == theirs


def test_folders_and_files_at_once_too_few_files_or_nothing_are_refused(subject):
    with pytest.raises(UserError, match="nothing to stack: .* use --t1n"):
        cli.stack()
    with pytest.raises(UserError, match=r"no T1c, T2w, T2-FLAIR: .*Add T1c or T2-FLAIR"):
        cli.stack(t1n="a.nii.gz")
    with pytest.raises(UserError, match="one subject by --t1n .* not both"):
        cli.stack(str(subject), **paths(subject))


def test_an_input_is_never_overwritten_and_a_failed_write_leaves_nothing(subject, tmp_path, monkeypatch):
    images = list(paths(subject).values())
    with pytest.raises(ValueError, match="is one of the images"):
        stack_files(images, images[0])
    with pytest.raises(ValueError, match="3 images, not one each"):
        stack_files(images[:3], tmp_path / "x.nii.gz")

    def stop(image, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nib, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        stack_files(images, tmp_path / "out" / "x.nii.gz")
    assert not list((tmp_path / "out").iterdir())
