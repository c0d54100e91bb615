"""Kinds of study that are wrong: each is refused, or put right, with a sentence that says what is."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest

from custom.clinical import study as module
from custom.clinical.commands import segment_raw
from custom.clinical.conversion import check_slices, convert, read_headers
from custom.clinical.reading import read_study
from custom.clinical.series import choose, weighting
from custom.clinical.study import Prepared, prepare_studies, prepare_study, study_folder
from custom.cohort import SubjectError
from custom.files import UserError

for _library in ("dcm2niix", "highdicom", "SimpleITK"):
    pytest.importorskip(_library, reason="needs the extra clinical: pip install 'comnet-glioma[clinical]'")


def edit(folder: Path, **attributes) -> None:
    """Change attributes of every image in a folder; None takes one away, a function is given the image's number."""
    from pydicom import dcmread

    for k, path in enumerate(sorted(folder.iterdir())):
        image = dcmread(path)
        for name, value in attributes.items():
            if value is None:
                if name in image:
                    delattr(image, name)
            else:
                setattr(image, name, value(k, image) if callable(value) else value)
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.save_as(path)


def copy_series(study: Path, source: str, number: int, **attributes) -> Path:
    """A second series like another one, with UIDs of its own."""
    folder = shutil.copytree(study / source, study / f"S{number:03d}")
    new = {"SeriesInstanceUID": f"1.2.3.{number}", "SeriesNumber": number} | attributes
    edit(folder, SOPInstanceUID=lambda k, _: f"1.2.3.{number}.{k + 1}", **new)
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def two_patients(study):
    edit(study / "S003", PatientID="OTHER")


def two_studies(study):
    edit(study / "S003", StudyInstanceUID="1.2.3", StudyDate="20250101")


def no_flair(study):
    shutil.rmtree(study / "S004")


def ct(study):
    edit(study / "S004", Modality="CT")


def spine(study):
    edit(study / "S004", BodyPartExamined="LSPINE")


def screenshot(study):
    edit(study / "S004", SOPClassUID="1.2.840.10008.5.1.4.1.1.7")


def burnt_in(study):
    edit(study / "S004", BurnedInAnnotation="YES")


def derived_map(study):
    edit(study / "S004", ImageType=["DERIVED", "PRIMARY", "CBV"])


def rgb(study):
    edit(study / "S004", SamplesPerPixel=3)


def localizer_only(study):
    for folder in study.iterdir():
        if folder.name != "S001":
            shutil.rmtree(folder)


def no_image(study):
    edit(study / "S004", Rows=None, Columns=None, PixelData=None)


def perfusion(study):
    edit(study / "S004", ImagePositionPatient=lambda k, image: [0, 0, k % 5], SeriesDescription="x", ProtocolName="x")


def mixed_orientations(study):
    edit(study / "S004", ImageOrientationPatient=lambda k, _: [1, 0, 0, 0, 1, 0] if k % 2 else [0, 1, 0, 0, 0, -1])


def no_contrast(study):
    edit(study / "S005", ContrastBolusAgent=None)


def one_t1_of_unknown_contrast(study):
    no_contrast(study)
    shutil.rmtree(study / "S002")


def contradiction(study):
    edit(study / "S004", SeriesDescription="t1_se", ProtocolName="t1_se")


def private_tags_only(study):
    edit(study / "S004", SeriesDescription=None, ProtocolName=None, RepetitionTime=None, EchoTime=None)


def equal_rivals(study):
    copy_series(study, "S004", 14)


def empty(study):
    for folder in study.iterdir():
        shutil.rmtree(folder)


def other_files(study):
    empty(study)
    (study / "report.pdf").write_text("no DICOM")


REFUSED = {
    two_patients: "images of 2 patients. Give the folder of one patient",
    two_studies: "2 studies of one patient. Say which: --study 1",
    no_flair: "no T2-FLAIR among its 5 series.*--flair SERIES.*--without flair",
    ct: "its modality is CT",
    spine: "it shows lspine, not the brain",
    screenshot: "a screenshot",
    burnt_in: "annotations are burnt into its pixels",
    derived_map: "derived map .CBV",
    rgb: "it is in colour",
    localizer_only: "no T1n and T1c and T2w and T2-FLAIR among its 1 series: 1 .not used: it is a localizer",
    no_image: "it holds no image",
    perfusion: "each place was imaged several times .50 images at 5 places",
    mixed_orientations: "its slices lie in 2 orientations",
    no_contrast: "cannot be told of 2 T1 series.*taken as number.*--t1n SERIES --t1c SERIES",
    one_t1_of_unknown_contrast: "of 1 T1 series.*say --t1n 5 --without t1c, else --t1c 5 --without t1n",
    contradiction: "its name says T1, but TR 9000, TE 120, TI 2500 ms is FLAIR",
    private_tags_only: "neither TR, TE and TI nor the name say what it is",
    equal_rivals: "2 series could be the T2-FLAIR and cannot be told apart.*Say which: --flair 4 or --flair 14",
    empty: "it is empty",
    other_files: "none of its 1 files is a DICOM or a NIfTI file",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_study_that_cannot_be_told_is_refused_with_its_reason(study, spoil):
    spoil(study)
    with pytest.raises(SubjectError, match=REFUSED[spoil]) as told:
        choose(read_study(study), {})
    for secret in ("Mueller", "Paula", "PHANTOM", "20260102"):
        assert secret not in str(told.value)


def one_slice_missing(folder):
    files(folder)[20].unlink()


def slice_doubled(folder):
    shutil.copy(files(folder)[10], folder / "again")
    from pydicom import dcmread

    image = dcmread(folder / "again")
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    image.save_as(folder / "again")


def uneven(folder):
    edit(
        folder, ImagePositionPatient=lambda k, i: [*i.ImagePositionPatient[:2], i.ImagePositionPatient[2] + k * k / 40]
    )


def gantry_tilt(folder):
    edit(folder, ImagePositionPatient=lambda k, i: [i.ImagePositionPatient[0] + k, *i.ImagePositionPatient[1:]])


def other_size(folder):
    edit(folder, PixelSpacing=lambda k, image: [3, 3] if k == 4 else image.PixelSpacing)


def truncated(folder):
    path = files(folder)[5]
    path.write_bytes(path.read_bytes()[:-3000])


def no_position(folder):
    edit(folder, ImagePositionPatient=None)


def no_decoder(folder):
    from pydicom import dcmread
    from pydicom.encaps import encapsulate
    from pydicom.uid import HTJ2KLossless

    for path in files(folder):
        image = dcmread(path)
        image.file_meta.TransferSyntaxUID = HTJ2KLossless
        image.PixelData = encapsulate([b"\xff\x4f" + b"\0" * 62])
        image["PixelData"].is_undefined_length = True
        image.save_as(path)


UNCONVERTED = {
    one_slice_missing: "1 slice is missing, the first after slice 25 of 45",
    slice_doubled: "1 of its slices doubled: the first lies",
    uneven: "the distance of its slices varies from",
    gantry_tilt: "stacked askew .gantry tilt",
    other_size: "different sizes or pixel spacings",
    truncated: "image 6 of 46 is truncated",
    no_position: "its headers do not give ImagePositionPatient",
    no_decoder: "dcm2niix cannot read its pixels .High-Throughput JPEG 2000",
}


@pytest.mark.parametrize("spoil", UNCONVERTED, ids=lambda spoil: spoil.__name__)
def test_a_series_that_is_no_whole_volume_is_refused_by_name(study, tmp_path, spoil):
    spoil(study / "S002")
    series = {one.label: one for one in read_study(study).series}["2"]
    with pytest.raises(SubjectError, match=UNCONVERTED[spoil]) as told:
        convert(series, tmp_path / "out" / "t1n.nii.gz", "study-1", "t1n")
    assert str(told.value).startswith("study-1: T1n (series 2): ")
    assert not list((tmp_path / "out").glob("*") if (tmp_path / "out").exists() else [])


def test_slices_out_of_order_and_a_series_twice_are_put_right(study, tmp_path):
    before = read_study(study)
    shutil.copytree(study / "S002", study / "copy")
    for k, path in enumerate(reversed(files(study / "S002"))):
        path.rename(path.with_name(f"{k * 37 % 46:04d}.ima"))
    after = read_study(study)
    assert [one.label for one in after.series] == [one.label for one in before.series]
    assert len(choose(after, {})) == 4
    chosen = {one.label: one for one in after.series}["2"]
    assert convert(chosen, tmp_path / "t1n.nii.gz", "study-1", "t1n") == []
    assert nib.load(tmp_path / "t1n.nii.gz").shape[2] == 46


def test_numbers_with_gaps_are_no_missing_slices(study):
    edit(study / "S002", InstanceNumber=lambda k, _: 2 * k + 1)
    (warning,) = check_slices(read_headers(files(study / "S002")), "s", "T1n")
    assert "numbers of its images have gaps" in warning


def test_the_better_of_two_series_is_taken_and_the_other_told_why(study):
    copy_series(study, "S004", 14, MRAcquisitionType="3D")
    found = read_study(study)
    assert choose(found, {})["flair"].label == "14"
    assert "series 14 is better (3D)" in {one.label: one for one in found.series}["4"].reason


def test_the_users_answer_ends_the_question(study):
    no_contrast(study)
    chosen = choose(read_study(study), {"t1n": "2", "t1c": "5"})
    assert (chosen["t1n"].label, chosen["t1c"].label) == ("2", "5")
    with pytest.raises(SubjectError, match="there is no such series. Choose one of 1, 2, 3, 4, 5, 9"):
        choose(read_study(study), {"t1c": "77"})


def test_a_study_is_chosen_by_number(study):
    two_studies(study)
    assert [one.label for one in read_study(study, 1).series] == ["3"]
    assert len(read_study(study, 2).series) == 5


def test_different_frames_of_reference_are_warned_of(study):
    edit(study / "S003", FrameOfReferenceUID="1.2.3")
    assert "2 frames of reference" in read_study(study).warnings[0]


def test_a_zip_file_is_taken_and_leaves_nothing(study, tmp_path):
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in study.rglob("IM*"):
            target.write(path, path.relative_to(study))
    with study_folder(archive, tmp_path / "out") as folder:
        assert len(choose(read_study(folder), {})) == 4
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "report.pdf").write_text("no zip")
    with (
        pytest.raises(SubjectError, match="neither a folder nor a zip file"),
        study_folder(tmp_path / "report.pdf", tmp_path),
    ):
        pass


@pytest.mark.parametrize("fault", ["flipped", "encrypted"])
def test_a_zip_file_that_cannot_be_unpacked_stops_no_other_study(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "require_clinical", lambda brain: None)
    archive = tmp_path / "Mueller.zip"
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("IM1", bytes(1000))
    content = bytearray(archive.read_bytes())
    for place in [500] if fault == "flipped" else [6, content.index(b"PK\x01\x02") + 8]:  # the flags of encryption
        content[place] ^= 1
    archive.write_bytes(content)
    (tmp_path / "empty").mkdir()
    _, failures = prepare_studies([archive, tmp_path / "empty"], tmp_path / "out")
    assert "damaged, encrypted or packed" in failures[0].reason and failures[1].reason == "it is empty"
    assert not list((tmp_path / "out").iterdir())


def test_a_fault_of_ours_stops_no_other_study(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "require_clinical", lambda brain: None)
    monkeypatch.setattr(module, "read_study", Mock(side_effect=[KeyError("x"), SubjectError("s", "f", "is odd", "do")]))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    _, failures = prepare_studies([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "KeyError" in failures[0].reason and failures[1].reason == "is odd"
    monkeypatch.setattr(module, "read_study", Mock(side_effect=KeyError("x")))
    with pytest.raises(KeyError):
        prepare_studies([tmp_path / "a"], tmp_path / "out")


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_a_kept_name_is_of_one_study(kind, scan, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "require_clinical", lambda brain: None)
    monkeypatch.setattr(module, "_prepare", lambda found, target, *_: Prepared(target.name, target, {}))
    out, places = tmp_path / "out", [tmp_path / place / "scan" for place in ("first", "second")]
    for place in places:
        shutil.copytree(scan.folder, place) if kind == "dicom" else place.mkdir(parents=True)
        if kind == "nifti":
            nifti(place, "T1.nii.gz")
    assert prepare_study(places[0], out, keep_names=True).folder == out / "scan"
    monkeypatch.chdir(places[0])
    assert prepare_study(".", out, keep_names=True).name == "scan", "the same study, by another name of its folder"
    if kind == "dicom":
        assert prepare_study(places[1], out, keep_names=True).name == "scan", "a copy is the same study"
        for folder in places[1].iterdir():
            edit(folder, StudyInstanceUID="1.2.3")
    with pytest.raises(SubjectError, match=r"scan is of another study of this name, from .*first.*choose another"):
        prepare_study(places[1], out, keep_names=True)
    assert prepare_study(places[1], out).name.startswith("study-")
    with pytest.raises(SubjectError, match="its results would lie among its own files"):
        prepare_study(places[1], places[1].parent, keep_names=True)
    (tmp_path / "else" / "scan").mkdir(parents=True)
    (tmp_path / "else" / "scan" / "t1c.nii.gz").write_text("somebody's")
    with pytest.raises(SubjectError, match="holds what no preparation has made"):
        prepare_study(places[1], tmp_path / "else", keep_names=True)
    before = sorted(path.name for path in places[1].iterdir())
    with pytest.raises(UserError, match="results would lie among its own files: choose another output_dir"):
        segment_raw([places[1]], places[1].parent, Mock(), {"keep_names": True}, {})
    assert sorted(path.name for path in places[1].iterdir()) == before


def test_studies_of_two_patients_with_one_uid_are_two(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "require_clinical", lambda brain: None)
    monkeypatch.setattr(module, "_prepare", lambda found, target, *_: Prepared(target.name, target, {}))
    other = shutil.copytree(scan.folder, tmp_path / "other")
    for folder in other.iterdir():
        edit(folder, PatientID="OTHER")
    names = [prepare_study(place, tmp_path / "out").name for place in (scan.folder, other)]
    assert len(set(names)) == 2


def test_no_such_modality_to_go_without(tmp_path):
    with pytest.raises(UserError, match="--without t9: give some of t1n, t1c, t2w, flair"):
        prepare_study(tmp_path, tmp_path / "out", without=["t9", "t1n"])


def test_results_inside_the_study_are_no_series(tmp_path):
    for name in ("T1.nii.gz", "T2.nii.gz"):
        nifti(tmp_path, name)
    before = [one.files for one in read_study(tmp_path).series]
    for folder, mark, text in (
        ("prepared", "studies.csv", "study,folder,patient_name,patient_id,study_date,study_uid\n"),
        ("study-1", "preparation.json", "{}"),
        ("out", "weights.txt", "of 34 subjects\nsha256 00\n"),
    ):
        (tmp_path / folder / "deeper").mkdir(parents=True)
        nifti(tmp_path / folder / "deeper", "FLAIR.nii.gz")
        (tmp_path / folder / mark).write_text(text)
    assert [one.files for one in read_study(tmp_path).series] == before
    (tmp_path / "prepared" / "studies.csv").write_text("a list of the hospital's\n")
    assert len(read_study(tmp_path).series) == 3
    with pytest.raises(SubjectError, match="there is no study 2"):
        read_study(tmp_path, 2)


def test_read_only_input_stays_as_it_is(study, tmp_path):
    before = {path: path.read_bytes() for path in study.rglob("IM*")}
    for path in [*before, *study.iterdir(), study]:
        path.chmod(0o500)
    series = choose(read_study(study), {})["t1c"]
    convert(series, tmp_path / "out" / "t1c.nii.gz", "study-1", "t1c")
    study.chmod(0o700)
    assert {path: path.read_bytes() for path in study.rglob("IM*")} == before


def test_no_space_is_said_and_leaves_no_part(study, tmp_path, monkeypatch, brain_mask):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "convert", full)
    with pytest.raises(SubjectError, match="no space is left"):
        prepare_study(study, tmp_path / "out", brain_mask=brain_mask)
    assert not list((tmp_path / "out").rglob("*.nii.gz")) and not list((tmp_path / "out").rglob(".partial*"))


def test_swapped_t1n_and_t1c_are_noticed():
    from custom.clinical.registration import enhancement

    rng = np.random.default_rng(0)
    t1n = rng.normal(500, 20, (40, 40, 40))
    t1c = t1n * 1.1 + rng.normal(0, 20, t1n.shape)
    t1c[18:24, 18:24, 18:24] *= 2
    brain = np.ones(t1n.shape, bool)
    assert enhancement(t1n, t1c, brain) > 2 and enhancement(t1c, t1n, brain) < 0.5


def test_two_different_heads_do_not_register(prepared):
    import SimpleITK as sitk

    from custom.clinical.registration import check, one_mm_grid, register, resample

    image = sitk.ReadImage(str(prepared.scanned("t1n")), sitk.sitkFloat32)
    noise = sitk.GetImageFromArray(np.random.default_rng(0).random((20, 40, 40)).astype(np.float32))
    noise.SetSpacing((5, 5, 8))
    grid = one_mm_grid(image)
    with pytest.raises(SubjectError, match="registration"):
        check(register(resample(image, grid), noise), "study-1", "t2w")


# ---- NIfTI with the scanner's own names ------------------------------------------------------------------------------


def nifti(folder, name, shape=(30, 30, 20), spacing=(2, 2, 5), dtype=np.int16):
    path = folder / name
    voxels = np.random.default_rng(0).integers(0, 500, shape).astype(dtype)
    nib.save(nib.Nifti1Image(voxels, np.diag([*spacing, 1])), path)
    return path


def test_nifti_files_are_told_by_the_scanners_names(tmp_path):
    names = (
        "301_Ax_T1_SE.nii.gz",
        "401_Ax_T2_TSE.nii",
        "501_3D_FLAIR.nii.gz",
        "801_Ax_T1_SE_Gd.nii.gz",
        "7_ADC.nii.gz",
    )
    for name in names:
        nifti(tmp_path, name)
    nifti(tmp_path, "600_DWI_FLAIR.nii.gz", (30, 30, 20, 4))
    chosen = choose(read_study(tmp_path), {})
    assert {modality: one.files[0].name for modality, one in chosen.items()} == {
        "t1n": names[0],
        "t1c": names[3],
        "t2w": names[1],
        "flair": names[2],
    }


def test_names_of_bids_are_told(tmp_path):
    for name in ("sub-01_T1w", "sub-01_ce-gadolinium_T1w", "sub-01_T2w", "sub-01_FLAIR", "sub-01_dir-AP_dwi"):
        nifti(tmp_path, f"{name}.nii.gz")
    chosen = choose(read_study(tmp_path), {})
    assert chosen["t1c"].files[0].name == "sub-01_ce-gadolinium_T1w.nii.gz"
    assert chosen["t1n"].files[0].name == "sub-01_T1w.nii.gz"


@pytest.mark.parametrize(
    ("tr", "te", "ti", "sequence", "told"),
    [
        (2300, 3, 900, "GR", "t1"),  # MPRAGE
        (8, 3.7, None, "GR", "t1"),
        (550, 9, None, "SE", "t1"),
        (2500, 12, 850, "SE", "t1"),  # T1-FLAIR
        (5000, 390, 1800, "SE", "flair"),
        (9000, 120, 2500, "SE", "flair"),
        (3200, 400, None, "SE", "t2"),  # SPACE
        (4500, 90, None, "SE", "t2"),
        (3000, 15, None, "SE", "pd"),
        (28, 20, None, "GR", None),  # susceptibility
        (600, 25, None, "GR", None),
        (None, None, None, "", None),
    ],
)
def test_timing_tells_the_weighting(tr, te, ti, sequence, told):
    assert weighting({"tr": tr, "te": te, "ti": ti, "sequence": sequence}) == told


def test_the_json_beside_a_nifti_file_counts(tmp_path):
    nifti(tmp_path, "a.nii.gz")
    (tmp_path / "a.json").write_text(
        '{"RepetitionTime": 0.5, "EchoTime": 0.01, "ContrastBolusIngredient": "GADOLINIUM"}'
    )
    (one,) = choose(read_study(tmp_path), {}, ("t1n", "t2w", "flair")).values()
    assert one.modality == "t1c" and "TR 500, TE 10 ms" in one.reason


@pytest.mark.parametrize("text", ["[1, 2]", '"text"', "{", '{"RepetitionTime": "slow", "MRAcquisitionType": null}'])
def test_an_odd_json_beside_a_nifti_file_says_nothing(text, tmp_path):
    nifti(tmp_path, "T1_Gd.nii.gz")
    (tmp_path / "T1_Gd.json").write_text(text)
    assert list(choose(read_study(tmp_path), {}, ("t1n", "t2w", "flair"))) == ["t1c"]


def test_a_sheared_nifti_file_is_refused_and_a_rotated_one_is_not(tmp_path):
    angle = np.radians(20)
    turn, shear = np.eye(4), np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    shear[0, 2] = 0.1
    for affine, refused in ((turn, False), (shear, True), (shear @ turn, True)):
        voxels = np.random.default_rng(0).integers(1, 99, (20, 20, 20)).astype(np.int16)
        image = nib.Nifti1Image(voxels, affine @ np.diag([1, 1, 3, 1]))
        (tmp_path / "study").mkdir(exist_ok=True)
        nib.save(image, tmp_path / "study" / "FLAIR.nii.gz")
        (series,) = read_study(tmp_path / "study").series
        if refused:
            with pytest.raises(SubjectError, match="its axes are not at right angles"):
                convert(series, tmp_path / "out" / "x.nii.gz", "study-1", "flair")
        else:
            convert(series, tmp_path / "out" / "x.nii.gz", "study-1", "flair")


def test_a_damaged_nifti_file_is_told_of_without_its_name(tmp_path):
    path = nifti(tmp_path, "Mueller_Hans_FLAIR.nii.gz", (60, 60, 20))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:9000]))
    series = choose(read_study(tmp_path), {}, ("t1n", "t1c", "t2w"))["flair"]
    with pytest.raises(SubjectError, match="truncated or damaged") as told:
        convert(series, tmp_path / "out.nii.gz", "study-1", "flair")
    assert "Mueller" not in str(told.value)
    assert "Mueller" not in str(series.row()) and "mueller" not in str(series.row())


def test_a_brain_mask_that_cannot_be_read_is_told_before_the_work_begins(study, tmp_path):
    with pytest.raises(SubjectError, match=r"--brain_mask: cannot be read.*Give a NIfTI file"):
        prepare_study(study, tmp_path / "out", brain_mask=tmp_path / "nowhere.nii.gz")
    assert not (tmp_path / "out").exists()
