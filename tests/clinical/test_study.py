"""From the scanner to prepared images and back to DICOM-SEG."""

from __future__ import annotations

import stat
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from custom.clinical.masks import deliver, reference_headers, to_scanned, write_dicom_seg
from custom.clinical.study import load_prepared, prepare_study
from custom.cohort import MODALITIES, find_subjects
from custom.inference import PostprocessRegions

for _library in ("dcm2niix", "highdicom", "SimpleITK"):
    pytest.importorskip(_library, reason="needs the extra clinical: pip install 'comnet-glioma[clinical]'")


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def regions_of(label):
    return np.stack([label == 4, (label == 1) | (label == 4), label > 0])


@pytest.fixture(scope="module")
def perfect(prepared):
    """The tumour's regions on the prepared grid: what a perfect network would say, [x, y, z, 3]."""
    from scipy import ndimage

    from custom.clinical.scanner import head

    image = nib.load(prepared.images["t1c"])
    _, label, affine = head(2, 4.0)
    to_head = np.linalg.inv(affine) @ image.affine
    channels = [
        ndimage.affine_transform(region.astype(np.float32), to_head, output_shape=image.shape, order=1)
        for region in regions_of(label)
    ]
    return nib.Nifti1Image(np.stack(channels, -1), image.affine)


def test_prepared_images_share_one_grid_of_1_mm_and_are_a_subject(prepared):
    images = [nib.load(path) for path in prepared.images.values()]

    assert tuple(prepared.images) == MODALITIES
    assert len({image.shape for image in images}) == 1
    np.testing.assert_allclose(np.linalg.norm(images[0].affine[:3, :3], axis=0), 1, atol=1e-5)
    brain = nib.load(prepared.folder / "brain_mask.nii.gz").get_fdata() > 0
    assert all(((image.get_fdata() > 0) == brain).all() for image in images)
    subjects, excluded = find_subjects(prepared.folder, require_label=False)
    assert [subject.name for subject in subjects] == [prepared.name] and not excluded


def test_registration_finds_the_motions_of_the_patient(scan, prepared):
    middle = np.array([[0, 0, 0], [60, 0, 0], [0, 70, 0], [0, 0, 60], [-60, -70, 0]])
    for modality in ("t1n", "t2w", "flair"):
        found = np.array(prepared.record["registration"][modality]["matrix_ras"])
        apart = nib.affines.apply_affine(found, middle) - nib.affines.apply_affine(scan.poses[modality], middle)
        assert np.linalg.norm(apart, axis=1).mean() < 0.8  # the head has voxels of 4 mm, the slices 5


def test_registered_images_agree_with_the_head(prepared):
    from scipy import ndimage

    from custom.clinical.scanner import head

    images, _, affine = head(2, 4.0)
    for channel, path in enumerate(prepared.images.values()):
        image = nib.load(path)
        to_head = np.linalg.inv(affine) @ image.affine
        truth = ndimage.affine_transform(images[channel], to_head, output_shape=image.shape, order=1)
        brain = ndimage.binary_erosion(image.get_fdata() > 0, iterations=6)
        assert np.corrcoef(truth[brain], image.get_fdata()[brain])[0, 1] > 0.85


def test_masks_come_back_on_the_grid_of_the_scanned_t1c(scan, prepared, perfect):
    probabilities, scanned = to_scanned(perfect, prepared)

    np.testing.assert_allclose(np.sort(np.linalg.norm(scanned.affine[:3, :3], axis=0)), [4, 4, 5], atol=1e-3)
    truth = nib.as_closest_canonical(nib.Nifti1Image(scan.truth, scan.affine)).get_fdata()
    for channel, region in enumerate(regions_of(truth)):
        back = nib.as_closest_canonical(
            nib.Nifti1Image((probabilities[channel] >= 0.5).astype(np.uint8), scanned.affine)
        )
        assert (
            dice(back.get_fdata() > 0, region) > (0.7, 0.85, 0.9)[channel]
        )  # ET is a rim thinner than a voxel of 4 x 4 x 5 mm


def test_a_mask_on_another_series_moves_with_the_patient(scan, prepared, perfect):
    on_t1c, t1c = to_scanned(perfect, prepared)
    on_flair, flair = to_scanned(perfect, prepared, "flair")

    def middle(probabilities, image):
        return nib.affines.apply_affine(image.affine, np.argwhere(probabilities[2] >= 0.5).mean(0))

    expected = nib.affines.apply_affine(scan.poses["flair"], middle(on_t1c, t1c))
    assert np.linalg.norm(middle(on_flair, flair) - expected) < 2
    assert np.linalg.norm(middle(on_flair, flair) - middle(on_t1c, t1c)) > 3


def test_dicom_seg_reads_back_equal(scan, prepared, perfect, tmp_path, caplog):
    import highdicom as hd

    headers = reference_headers(prepared)
    probabilities, scanned = to_scanned(perfect, prepared)
    et, tc, wt = probabilities >= 0.5
    label_map = np.where(et, 3, np.where(tc, 1, np.where(wt, 2, 0))).astype(np.uint8)
    path = tmp_path / "seg.dcm"
    with caplog.at_level("INFO"):
        assert write_dicom_seg(path, label_map, scanned, headers) == []
    assert str(headers[0].SOPInstanceUID)[:20] not in caplog.text

    read = hd.seg.segread(path)
    assert read.SegmentationType == "BINARY"
    assert str(read.PatientID) == "PHANTOM-2"
    assert read.ReferencedSeriesSequence[0].SeriesInstanceUID == headers[0].SeriesInstanceUID
    meanings = [read.get_segment_description(n).segmented_property_type.meaning for n in read.segment_numbers]
    assert meanings == ["Necrosis", "Edema", "Enhancing Lesion"]
    assert all(read.get_segment_description(n).tracking_uid for n in read.segment_numbers)
    volume = read.get_volume(combine_segments=True)
    to_index = np.linalg.inv(scanned.affine) @ np.diag([-1, -1, 1, 1]) @ volume.affine
    index = np.argwhere(volume.array > 0)
    back = np.zeros_like(label_map)
    at = np.rint(nib.affines.apply_affine(to_index, index)).astype(int)
    back[tuple(at.T)] = np.array([0, 1, 2, 3])[volume.array[tuple(index.T)]]
    np.testing.assert_array_equal(back, label_map)


def test_dicom_seg_of_a_deidentified_series_says_what_it_left_blank(scan, prepared, tmp_path):
    headers = reference_headers(prepared)
    for header in headers:
        header.PatientSex = "0000"
    scanned = nib.load(prepared.scanned("t1c"))
    label_map = np.zeros(scanned.shape, np.uint8)
    label_map[10:20, 10:20, 10:20] = 2
    (warning,) = write_dicom_seg(tmp_path / "seg.dcm", label_map, scanned, headers)
    assert "PatientSex" in warning


def test_an_empty_mask_is_no_dicom_seg(scan, prepared, tmp_path):
    scanned = nib.load(prepared.scanned("t1c"))
    with pytest.raises(ValueError, match="no tumour"):
        write_dicom_seg(tmp_path / "s.dcm", np.zeros(scanned.shape, np.uint8), scanned, reference_headers(prepared))
    assert not list(tmp_path.iterdir())


def test_a_study_without_tumour_is_said_to_have_none(prepared, tmp_path):
    grid = nib.load(prepared.images["t1c"])
    nothing = nib.Nifti1Image(np.zeros((*grid.shape, 3), np.float32), grid.affine)
    mask, warnings = deliver(prepared, nothing, tmp_path, PostprocessRegions(), pictures=False)
    assert not np.asanyarray(mask.dataobj).any() and not (tmp_path / f"{prepared.name}_seg.dcm").exists()
    assert "no tumour was found: there is no DICOM-SEG" in warnings
    as_nifti = replace(prepared, record=prepared.record | {"kind": "nifti"})
    assert "no tumour was found" in deliver(as_nifti, nothing, tmp_path, PostprocessRegions(), pictures=False)[1]


def test_nothing_written_names_the_patient(scan, prepared):
    assert prepared.name.startswith("study-")
    for file in prepared.folder.iterdir():
        content = file.read_bytes()
        if file.name.endswith(".gz"):
            import gzip

            content = gzip.decompress(content)
        for secret in (b"Mueller", b"Phantom", b"PHANTOM-2", b"20260102", b"1.2.826", b"2.25."):
            assert secret not in content, (file.name, secret)


def test_the_table_that_maps_back_is_its_owners_alone(scan, prepared):
    table = prepared.folder.parent / "studies.csv"
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    assert "Phantom^Paula" in table.read_text() and prepared.name in table.read_text()


def test_what_is_prepared_is_taken_up_again(scan, prepared, brain_mask):
    record = prepared.folder / "preparation.json"
    before = record.stat().st_mtime_ns
    again = prepare_study(scan.folder, prepared.folder.parent, brain_mask=brain_mask)
    assert record.stat().st_mtime_ns == before and again.record == prepared.record
    assert load_prepared(prepared.folder).record["reference"] == "t1c"


def test_series_csv_says_why(prepared):
    text = (prepared.folder / "series.csv").read_text()
    assert (
        "it is a localizer" in text and "derived map (ADC" in text and "contrast agent Gadobutrol is recorded" in text
    )


def test_the_picture_is_drawn_and_shows_no_face(prepared):
    from matplotlib.image import imread

    picture = imread(prepared.folder / "preparation.png")
    assert picture.shape[0] > 800 and picture[..., :3].std() > 0.1
