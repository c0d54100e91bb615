"""Pictures from files: whatever the orientation, grid and palette they are stored in."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from custom.report import write_qc_picture
from custom.report.pictures import qc_figure

SPACING = (1.0, 1.5, 3.0)


class TestQcPicture:
    def test_stored_orientation_does_not_matter(self, tmp_path, files, brain):
        images, label_map = brain
        write_qc_picture(tmp_path / "file.png", *files, title="name")
        qc_figure(images, label_map, SPACING, "name").savefig(tmp_path / "array.png", facecolor="#0b0d10")
        from_file, from_array = (_pixels(tmp_path / f"{name}.png") for name in ("file", "array"))
        assert from_file.shape == (850, 1200, 3)
        np.testing.assert_array_equal(from_file, from_array)

    def test_four_channel_file_gives_the_same_picture(self, tmp_path, files):
        images, label = files
        nib.concat_images([nib.load(path) for path in images]).to_filename(tmp_path / "four.nii.gz")
        write_qc_picture(tmp_path / "one.png", [tmp_path / "four.nii.gz"], label)
        write_qc_picture(tmp_path / "four.png", images, label)
        np.testing.assert_array_equal(_pixels(tmp_path / "one.png"), _pixels(tmp_path / "four.png"))

    def test_reference_palette_is_translated(self, tmp_path, files, brain):
        images, label = files
        prediction = nib.load(label)
        truth = np.where(np.asarray(prediction.dataobj) == 3, 4, prediction.dataobj).astype(np.uint8)
        nib.Nifti1Image(truth, prediction.affine).to_filename(tmp_path / "truth.nii.gz")
        write_qc_picture(tmp_path / "a.png", images, label, reference_path=tmp_path / "truth.nii.gz")
        write_qc_picture(tmp_path / "b.png", images, label, reference_path=label, reference_palette="brats2023")
        np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png"))

    def test_image_on_another_grid_is_resampled(self, tmp_path, files):
        images, label = files
        shifted = nib.load(images[1]).slicer[2:]
        shifted.to_filename(tmp_path / "shifted.nii.gz")
        write_qc_picture(tmp_path / "a.png", [images[0], tmp_path / "shifted.nii.gz", *images[2:]], label)
        write_qc_picture(tmp_path / "b.png", images, label)
        np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png"))

    @pytest.mark.parametrize("background", [np.nan, -1000.0])
    def test_a_background_that_is_not_zero_changes_nothing(self, tmp_path, files, background):
        images, label = files
        write_qc_picture(tmp_path / "zero.png", images, label)
        for path in images:
            image = nib.load(path)
            voxels = np.where(np.asarray(image.dataobj) == 0, background, np.asarray(image.dataobj))
            nib.Nifti1Image(voxels.astype(np.float32), image.affine).to_filename(path)
        write_qc_picture(tmp_path / "other.png", images, label)
        np.testing.assert_array_equal(_pixels(tmp_path / "other.png"), _pixels(tmp_path / "zero.png"))

    def test_missing_modality_is_refused(self, tmp_path, files):
        with pytest.raises(ValueError, match="expected 4 modalities"):
            write_qc_picture(tmp_path / "a.png", files[0][:3], files[1])

    def test_an_absent_modality_is_an_empty_name(self, tmp_path, files):
        images, label = files
        write_qc_picture(tmp_path / "absent.png", ["", images[1], "", images[3]], label)
        write_qc_picture(tmp_path / "whole.png", images, label)
        np.testing.assert_array_equal(_pixels(tmp_path / "absent.png"), _pixels(tmp_path / "whole.png"))

    def test_nothing_left_after_a_failure(self, tmp_path, files, monkeypatch):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", _fail_half_way)
        (tmp_path / "out").mkdir()
        with pytest.raises(OSError, match="disk full"):
            write_qc_picture(tmp_path / "out" / "a.png", *files)
        assert not list((tmp_path / "out").iterdir())

    def test_real_subject(self, tmp_path, real_data):
        case = real_data / "brats2021" / "BraTS2021_00006"
        images = [case / f"{case.name}_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]
        write_qc_picture(tmp_path / "a.png", images, case / f"{case.name}_seg.nii.gz", palette="brats2021")
        pixels = _pixels(tmp_path / "a.png").astype(int)
        blue = np.argwhere(np.abs(pixels - (0x56, 0xB4, 0xE9)).sum(-1) < 30)
        axial = blue[(blue[:, 1] < 330) & (blue[:, 0] < 400)]
        assert axial.size and axial[:, 1].mean() > 190, "a left frontal tumour is on the right of the axial panel"
        assert axial[:, 0].mean() < 250, "and at its top"


def _pixels(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def _fail_half_way(figure, path, **options):
    path.write_bytes(b"half")
    raise OSError("disk full")
