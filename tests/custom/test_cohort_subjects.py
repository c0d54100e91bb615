"""Names → subjects → facts, on small made-up subjects and on the real listing."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from cohort_subjects import LPS, SHAPE, STEMS, make_mask, make_subject, save
from monai.transforms import Compose, NormalizeIntensityd

from custom import cohort
from custom.cohort import SubjectError, check_subject, find_subjects, subjects_from_names
from custom.transforms import LoadSubjectd, ResampleToSpacingd


def names_of(layout: str, folder: str = "case") -> list[str]:
    return [f"{folder}/{stem.format(case=folder)}.nii.gz" for stem in STEMS[layout]]


def one(names: list[str], **options: object) -> cohort.Subject:
    subjects, exclusions = subjects_from_names(names, **options)
    assert not exclusions, exclusions
    return subjects[0]


class TestNames:
    @pytest.mark.parametrize("layout", STEMS)
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_every_layout_is_recognised_whatever_the_order(self, layout: str, suffix: str) -> None:
        names = [name.replace(".nii.gz", suffix) for name in names_of(layout)]
        subject = one(random.Random(0).sample(names, len(names)))
        assert (subject.name, subject.layout, [*subject.images, subject.label]) == ("case", layout, names)

    @pytest.mark.parametrize(
        ("layout", "palette", "source"),
        [
            ("utsw", "brats2021", "automatic"),
            ("brats2021", "brats2021", "expert"),
            ("brats2023", "brats2023", "expert"),
            ("plain", "brats2021", "unknown"),
        ],
    )
    def test_palette_and_label_source_follow_the_layout(self, layout: str, palette: str, source: str) -> None:
        subject = one(names_of(layout))
        assert (subject.palette, subject.label_source) == (palette, source)
        assert one(names_of(layout), palette="brats2023").palette == "brats2023"

    @pytest.mark.parametrize(
        "stems",
        [
            ("T1", "T1c", "T2", "FLAIR"),
            ("t1w", "t1w_ce", "t2w", "t2flair"),
            ("x T1 pre", "x T1 post", "x T2", "x T2 FLAIR"),
            ("sub-01_T1w", "sub-01_ce-GAD_T1w", "sub-01_T2w", "sub-01_FLAIR"),
            ("UPENN-GBM-00001_11_T1", "UPENN-GBM-00001_11_T1GD", "UPENN-GBM-00001_11_T2", "UPENN-GBM-00001_11_FLAIR"),
            ("p-c_t1", "p-c_t1.contrast", "p-c_t2", "p-c_t2f"),
            ("pre_contrast_T1", "T1_MPRAGE_post", "T2", "FLAIR"),
            ("T1_no_contrast", "T1_axial_Gd", "T2_TSE", "FLAIR"),
            ("T1_3D", "T1_3D_with_contrast", "T2", "FLAIR_3D"),
            ("sub-01_T1w", "sub-01_ce-gadolinium_T1w", "sub-01_T2w", "sub-01_FLAIR"),
            ("t1_nativ", "t1_mprage_km", "t2", "flair"),
            ("precontrast_T1", "postcontrast_T1", "T2", "FLAIR"),
            ("T1_non_enhanced", "T1_enhanced", "T2", "FLAIR"),
            ("T1", "T1C+", "T2", "FLAIR"),
            ("T1_KM-", "T1_KM+", "T2", "FLAIR"),
            ("T1-C-", "T1-C+", "T2", "FLAIR"),
            ("T1_vor_KM", "T1_nach_KM", "T2", "FLAIR"),
            ("T1_avant_gado", "T1_apres_gado", "T2", "FLAIR"),
            ("T1_senza_mdc", "T1_con_mdc", "T2", "FLAIR"),
            ("T1", "CT1", "T2", "FLAIR"),
            ("P1_post_T1", "P1_post_T1c", "P1_post_T2", "P1_post_FLAIR"),
            ("sub-1_ses-post_T1w", "sub-1_ses-post_ce-gd_run-1_T1w", "sub-1_ses-post_T2w", "sub-1_ses-post_FLAIR"),
            ("sub-1_acq-precontrast_T1w", "sub-1_acq-postcontrast_T1w", "sub-1_T2w", "sub-1_FLAIR"),
            ("sub-1_space-T1w_T1w", "sub-1_space-T1w_ce-gd_T1w", "sub-1_space-T1w_T2w", "sub-1_space-T1w_FLAIR"),
            ("post-op_T1", "post-op_T1c", "post-op_T2", "post-op_FLAIR"),
        ],
    )
    def test_plain_names(self, stems: tuple[str, ...]) -> None:
        names = [f"s/{stem}.nii" for stem in stems]
        extra = [
            "s/ADC.nii",
            "s/T2_star.nii",
            "s/T1_brain_mask.nii",
            "s/T2_DWI.nii",
            "s/brain_mask.nii",
            "s/T1_to_T2.nii",
            "s/T1.json",
        ]
        subject = one([*extra, *names[::-1]], require_label=False)
        assert (list(subject.images), subject.label) == (names, None)
        assert one([*extra, *names, "s/Segmentation.nii"]).label == "s/Segmentation.nii"

    def test_an_image_beside_what_is_corrected_for_shading_is_the_one(self) -> None:
        names = [f"s/{key}{bias}.nii" for key in ("T1", "T1c", "T2", "FLAIR") for bias in ("", "_bias")]
        assert list(one(names, require_label=False).images) == names[::2]
        assert list(one(names[1::2], require_label=False).images) == names[1::2]

    def test_the_manual_utsw_mask_is_preferred_and_the_cropped_one_never_used(self) -> None:
        names = [*names_of("utsw"), "case/tumorseg_manual_correction.nii.gz", "case/brain_t1_ants.nii.gz"]
        assert one(names).label == "case/tumorseg_FeTS.nii.gz"
        subject = one([*names, "case/rtumorseg_manual_correction.nii.gz"])
        assert (subject.label, subject.label_source) == ("case/rtumorseg_manual_correction.nii.gz", "manual")

    def test_a_folder_may_mix_layouts_and_may_be_one_subject(self) -> None:
        mixed = [name for layout in STEMS for name in names_of(layout, layout)]
        subjects, exclusions = subjects_from_names(mixed)
        assert [subject.layout for subject in subjects] == sorted(STEMS) and not exclusions
        own = [name.removeprefix("case/") for name in names_of("utsw")]
        subjects, exclusions = subjects_from_names([*own, "results/seg.nii.gz"], root="/data/BT0007")
        assert [subject.name for subject in subjects] == ["BT0007"] and not exclusions
        assert subjects[0].images[0] == os.path.normpath("/data/BT0007/brain_t1.nii.gz")

    @pytest.mark.parametrize("layout", STEMS)
    @pytest.mark.parametrize("gone", range(5))
    def test_a_missing_file_is_named_with_what_was_looked_for(self, layout: str, gone: int) -> None:
        names = names_of(layout) + (["case/brain_t1_ants.nii.gz"] if layout == "utsw" else [])
        lost = names.pop(gone)
        subjects, (exclusion,) = subjects_from_names(names)
        assert not subjects and (exclusion.subject, exclusion.file) == ("case", "case")
        assert ("t1n image", "t1c image", "t2w image", "flair image", "tumour mask")[gone] in exclusion.reason
        assert layout in exclusion.reason and names[0].removeprefix("case/") in exclusion.reason
        assert lost.removeprefix("case/") not in exclusion.reason

    def test_all_missing_files_are_named_at_once(self) -> None:
        _, (exclusion,) = subjects_from_names(names_of("brats2021")[:2])
        assert all(what in exclusion.reason for what in ("t2w image", "flair image", "tumour mask"))

    @pytest.mark.parametrize("twin", ["case/T1_ce.nii.gz", "case/t1gd.nii"])
    def test_two_candidates_are_both_named(self, twin: str) -> None:
        _, (exclusion,) = subjects_from_names([*names_of("plain"), twin])
        assert "t1c" in exclusion.reason
        assert "T1Gd.nii.gz" in exclusion.reason and twin.removeprefix("case/") in exclusion.reason

    def test_files_of_two_cases_in_one_folder_are_not_mixed(self) -> None:
        names = names_of("brats2021")
        names[2] = "case/other_t2.nii.gz"
        _, (exclusion,) = subjects_from_names(names)
        assert "different cases" in exclusion.reason and "other_t2" in exclusion.reason

    def test_a_mask_is_optional_for_inference(self) -> None:
        assert one(names_of("utsw")[:4], require_label=False).label_source is None

    def test_hidden_files_are_not_there(self) -> None:
        assert one([*names_of("plain"), "case/._T1.nii.gz"]).images[0] == "case/T1.nii.gz"

    def test_namesakes_are_refused(self) -> None:
        with pytest.raises(SubjectError, match="two folders hold") as caught:
            subjects_from_names([f"{grade}/{name}" for grade in ("HGG", "LGG") for name in names_of("plain")])
        assert "HGG" in str(caught.value) and "LGG" in str(caught.value)

    def test_scans_of_a_brats_2023_patient_share_a_patient(self) -> None:
        assert one(names_of("brats2023", "BraTS-GLI-00005-001")).patient == "BraTS-GLI-00005"
        assert one(names_of("brats2021", "BraTS-GLI-00005-001")).patient == "BraTS-GLI-00005"
        assert one(names_of("brats2023", "Hosp-001")).patient == "Hosp-001"

    @pytest.mark.parametrize(
        ("name", "patient"),
        [
            ("PatientID_0001_Timepoint_1", "PatientID_0001"),
            ("sub-01_ses-2", "sub-01"),
            ("sub-Jane_ses-postop_run-1", "sub-Jane"),
            ("UPENN-GBM-00001_21", "UPENN-GBM-00001"),
            ("UCSF-PDGM-0433_FU001d", "UCSF-PDGM-0433"),
            ("Patient-001_week-000-1", "Patient-001"),
            ("TCGA-02-0006_1998.08.23", "TCGA-02-0006"),
            ("P01_20180217_064501", "P01"),
            ("P01-visit2", "P01"),
            ("P01_preop", "P01"),
            ("20180217_064501", "20180217_064501"),
            ("glioma_visit_3", "glioma_visit_3"),
            ("site1_s01", "site1_s01"),
            ("BraTS2021_00006", "BraTS2021_00006"),
            ("1.2.826.0.1", "1.2.826.0.1"),
        ],
    )
    def test_time_points_of_a_patient_are_told_by_name_in_any_layout(self, name: str, patient: str) -> None:
        assert [one(names_of(layout, name)).patient for layout in STEMS] == [patient] * len(STEMS)

    @pytest.mark.parametrize("wrong", [{"layout": "bids"}, {"palette": "rainbow"}])
    def test_unknown_choices_are_refused(self, wrong: dict[str, str]) -> None:
        with pytest.raises(ValueError, match=r"unknown .* give one of"):
            subjects_from_names(names_of("plain"), **wrong)

    def test_whole_utsw_listing(self, real_data: Path) -> None:
        with gzip.open(real_data / "utsw_glioma_files.tsv.gz", "rt") as listing:
            names = [row["path"] for row in csv.DictReader(listing, delimiter="\t")]
        subjects, exclusions = subjects_from_names(names)
        assert len(subjects) == 625 and not exclusions
        assert Counter(subject.label_source for subject in subjects) == {"manual": 362, "automatic": 263}
        assert {subject.layout for subject in subjects} == {"utsw"}
        assert {subject.palette for subject in subjects} == {"brats2021"}
        used = [file for subject in subjects for file in (*subject.images, subject.label)]
        assert len(set(used)) == 625 * 5 and set(used) <= set(names)
        assert not any("_ants" in file or "/tumorseg_manual" in file for file in used)


class TestDiscovery:
    def test_several_folders_of_either_kind(self, tmp_path: Path) -> None:
        make_subject(tmp_path / "a" / "S2", "brats2021")
        make_subject(tmp_path / "a" / "S1", "utsw")
        single = make_subject(tmp_path / "b" / "S3", "brats2023")
        subjects, _ = find_subjects([tmp_path / "a", str(single)])
        assert [subject.name for subject in subjects] == ["S1", "S2", "S3"]
        assert all(os.path.isabs(file) and os.path.isfile(file) for s in subjects for file in (*s.images, s.label))

    def test_one_name_in_two_folders(self, tmp_path: Path) -> None:
        folders = [make_subject(tmp_path / parent / "S1") for parent in "ab"]
        with pytest.raises(SubjectError, match="Rename one") as caught:
            find_subjects(folders)
        assert all(str(folder) in str(caught.value) for folder in folders)

    def test_four_files_make_a_subject(self, tmp_path: Path) -> None:
        folder = make_subject(tmp_path / "S1")
        files = [folder / f"{stem}.nii.gz" for stem in STEMS["plain"]]
        subject = cohort.subject_from_files(*files[:4], label=files[4])
        assert (subject.name, subject.label_source) == ("S1", "unknown")
        assert check_subject(subject)["voxels"]["ET"] == 3
        assert cohort.subject_from_files(*files[:4], name="Ada").name == "Ada"
        with pytest.raises(ValueError, match="palette"):
            cohort.subject_from_files(*files[:4], palette="rainbow")

    @pytest.mark.parametrize(
        ("pattern", "name"),
        [
            ("P1/{}/image", "P1"),
            ("flat/P1_{}", "P1"),
            ("flat/1.2.840.{}", "1.2.840"),
            ("{}/P1", "P1"),
            ("P1/brain_{}", "P1"),
            ("P1/{}", "P1"),
            ("sub-01/anat/sub-01_ses-1_{}", "sub-01_ses-1"),
            ("Dr. House/x/{}/y/scan", "x"),
        ],
    )
    def test_four_files_are_named_by_what_tells_them_from_others(self, pattern: str, name: str) -> None:
        files = [f"/data/{pattern.format(key)}.nii.gz" for key in ("t1", "t1ce", "t2", "tirm")]
        assert cohort.subject_from_files(*files).name == name

    def test_a_name_without_a_number_serves_where_others_lie_beside(self, tmp_path: Path) -> None:
        files = [tmp_path / f"{name}_{key}.nii" for name in ("Ada", "Bob") for key in ("t1", "t1ce", "t2", "flair")]
        for file in files:
            file.touch()
        assert [cohort.subject_from_files(*files[n : n + 4]).name for n in (0, 4)] == ["Ada", "Bob"]

    @pytest.mark.parametrize("name", ["a/b", "..", ".a", "x" * 181, "ä" * 91, "a\nb", "a\\b", " ", "\udcff"])
    def test_a_name_that_no_output_can_have_is_refused(self, name: str) -> None:
        with pytest.raises(SubjectError, match="can name no output files"):
            cohort.subject_from_files("a", "b", "c", "d", name=name)
        _, exclusions = subjects_from_names([f"{name}/{file}" for file in ("T1.nii", "T1c.nii", "T2.nii", "FLAIR.nii")])
        assert len(exclusions) == 1

    @pytest.mark.parametrize(
        "name", ["20180217_064501", "1e5", "0042", "Doe,Jane", "None", "Müller 3", "scan#2", "0x1F"]
    )
    def test_names_stay_text(self, tmp_path: Path, name: str) -> None:
        make_subject(tmp_path / "data" / name)
        (item,) = cohort.Cohort(tmp_path / "data", tmp_path / "d.json", num_folds=1).subjects()
        assert item["subject"] == name and cohort.Cohort(tmp_path / "data").inputs()[0]["subject"] == name


class TestFacts:
    @pytest.mark.parametrize("layout", STEMS)
    def test_facts(self, tmp_path: Path, layout: str) -> None:
        make_subject(tmp_path / "S1", layout, make_mask(3 if layout == "brats2023" else 4))
        facts = check_subject(find_subjects(tmp_path)[0][0])
        assert facts == {
            "shape": list(SHAPE),
            "spacing": [1.0, 1.5, 2.0],
            "orientation": "LPS",
            "voxels": {"ET": 3, "TC": 27, "WT": 125},
            "has_et": True,
            "warnings": [],
        }
        assert json.loads(json.dumps(facts)) == facts

    def test_without_a_mask(self, tmp_path: Path) -> None:
        (make_subject(tmp_path / "S1") / "mask.nii.gz").unlink()
        subject = find_subjects(tmp_path, require_label=False)[0][0]
        facts = check_subject(subject)
        assert (facts["voxels"], facts["has_et"], facts["shape"]) == ({}, None, list(SHAPE))
        with pytest.raises(SubjectError, match="no tumour mask"):
            check_subject(subject, require_label=True)

    def test_tolerated_oddities_are_warnings(self, tmp_path: Path) -> None:
        folder = make_subject(tmp_path / "S1", mask=(make_mask() > 0).astype(np.uint8))
        save(folder / "T1.nii.gz", np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.int16))
        warnings = " ".join(check_subject(find_subjects(tmp_path)[0][0])["warnings"])
        assert "t1n: only 0.0 %" in warnings and "skull" in warnings
        assert "only label 1" in warnings

    def test_a_header_without_orientation_is_a_warning(self, tmp_path: Path) -> None:
        folder = make_subject(tmp_path / "S1")
        for file in folder.iterdir():
            image = nib.load(file)
            bare = nib.Nifti1Image(np.asarray(image.dataobj), None)
            bare.header.set_zooms((1, 1, 1))
            nib.save(bare, file)
        warnings = check_subject(find_subjects(tmp_path)[0][0])["warnings"]
        assert len(warnings) == 4 and all("left and right" in warning for warning in warnings)

    @pytest.mark.parametrize("file_class", [nib.Nifti1Image, nib.Nifti2Image])
    def test_scaled_uncompressed_and_nifti2_files(self, tmp_path: Path, file_class: type) -> None:
        folder = make_subject(tmp_path / "S1")
        packed = nib.load(folder / "T1.nii.gz")
        image = file_class(packed.get_fdata() / 7, LPS)
        image.header.set_data_dtype(np.int16)
        nib.save(image, folder / "T1.nii")
        (folder / "T1.nii.gz").unlink()
        assert check_subject(find_subjects(tmp_path)[0][0])["shape"] == list(SHAPE)

    def test_forms_that_disagree_are_a_warning(self, tmp_path: Path) -> None:
        file = make_subject(tmp_path / "S1") / "T1.nii.gz"
        image = nib.load(file)
        image.set_qform(LPS + 5 * np.eye(4, k=3), code=1)
        image.set_sform(LPS, code=1)
        nib.save(image, file)
        assert check_subject(find_subjects(tmp_path)[0][0])["warnings"] == [
            "t1n: sform and qform differ by up to 5 mm: the sform is used"
        ]

    def test_a_mask_of_another_brain_is_a_warning(self, tmp_path: Path) -> None:
        file = make_subject(tmp_path / "S1") / "T2w.nii.gz"
        voxels = np.asarray(nib.load(file).dataobj).copy()
        voxels[5:] = 0
        save(file, voxels)
        (warning,) = check_subject(find_subjects(tmp_path)[0][0])["warnings"]
        assert warning == "t2w: is 0 in 75 % of the brain that the others show: check its brain mask"

    def test_affines_within_tolerance_are_one_grid(self, tmp_path: Path) -> None:
        folder = make_subject(tmp_path / "S1")
        save(folder / "mask.nii.gz", make_mask(), LPS + 5e-4 * np.eye(4, k=3))
        assert check_subject(find_subjects(tmp_path)[0][0])["has_et"]

    def test_affines_that_differ_by_rounding_give_the_grid_of_the_first(self, tmp_path: Path) -> None:
        folder = make_subject(tmp_path / "S1")
        for number, stem in enumerate(STEMS["plain"][1:4]):
            drift = np.random.default_rng(number).choice([-1, 1], (4, 4)) * [4e-4, 4e-4, 4e-4, 0.02]
            drift[3] = 0
            save(folder / f"{stem}.nii.gz", np.asarray(nib.load(folder / f"{stem}.nii.gz").dataobj), LPS + drift)
        (item,) = cohort.Cohort(tmp_path).inputs()
        image = LoadSubjectd("image")(item)["image"]
        np.testing.assert_array_equal(image.affine, LPS)


BACKGROUNDS = {
    "of one value": lambda v: np.where(v == 0, -1024, v),
    "of one value in floats": lambda v: np.where(v == 0, -1000.5, v).astype(np.float32),
    "of the lowest number": lambda v: np.where(v == 0, np.finfo(np.float32).min, v).astype(np.float32),
    "of z-scores": lambda v: ((v - v.mean()) / v.std()).astype(np.float32),
    "of ringing": lambda v: np.where(v == 0, np.random.default_rng(0).normal(0, 1e-5, v.shape), v),
    "of noise around a value": lambda v: np.where(v == 0, np.random.default_rng(0).normal(-7, 1e-3, v.shape), v),
    "of NaN": lambda v: np.where(v == 0, np.nan, v),
    "of infinity": lambda v: np.where(v == 0, -np.inf, v).astype(np.float32),
}


class TestPutRight:
    @pytest.mark.parametrize("kind", BACKGROUNDS)
    @pytest.mark.parametrize("which", [slice(0, 4), slice(2, 3)], ids=["in all", "in one"])
    def test_a_background_that_is_not_zero(self, tmp_path: Path, kind: str, which: slice) -> None:
        folder = make_subject(tmp_path / "S1")
        (item,) = cohort.Cohort(tmp_path).inputs()
        finer = ResampleToSpacingd("image", [0.8, 1.1, 1.7])
        normalise = Compose(
            [LoadSubjectd("image"), finer, NormalizeIntensityd("image", nonzero=True, channel_wise=True)]
        )
        expected = normalise(item)
        for file in item["image"][which]:
            save(Path(file), BACKGROUNDS[kind](np.asarray(nib.load(file).dataobj)))
        made = normalise(item)
        assert torch.equal(made["brain"], expected["brain"])
        assert torch.equal(made["image"] == 0, expected["image"] == 0)
        np.testing.assert_allclose(made["image"], expected["image"], atol=2e-3)
        assert len(made["warnings"]) == len(item["image"][which]) and folder.exists()
        assert all("the background is not 0 but" in warning for warning in made["warnings"])

    def test_zeros_of_a_brain_before_another_background_stay_brain(self, tmp_path: Path) -> None:
        make_subject(tmp_path / "S1")
        (item,) = cohort.Cohort(tmp_path).inputs()
        for file in item["image"]:
            voxels = np.asarray(nib.load(file).dataobj) - 1
            voxels[8, 7, 6] = 0
            save(Path(file), voxels)
        assert LoadSubjectd("image")(item)["brain"].sum() == 12 * 10 * 8

    def test_a_head_with_its_skull_is_left_alone(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0)
        make_subject(tmp_path / "S1")
        (item,) = cohort.Cohort(tmp_path).inputs()
        for file in item["image"]:
            save(Path(file), np.asarray(nib.load(file).dataobj) + noise.rayleigh(9, SHAPE))
        made = LoadSubjectd("image")(item)
        assert (made["image"] != 0).all() and all("skull" in warning for warning in made["warnings"])

    @pytest.mark.parametrize("codes", ["RAS", "PIR", "SLA"])
    def test_a_modality_along_other_axes_of_the_grid(self, tmp_path: Path, codes: str) -> None:
        make_subject(tmp_path / "S1")
        (item,) = cohort.Cohort(tmp_path).inputs()
        expected = LoadSubjectd("image")(item)["image"]
        for file in item["image"][1:3]:
            image = nib.load(file)
            turn = nib.orientations.ornt_transform(
                nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
            )
            nib.save(image.as_reoriented(turn), file)
        made = LoadSubjectd("image")(item)
        assert torch.equal(made["image"].as_tensor(), expected.as_tensor())
        assert made["warnings"] == [
            f"{key}: stored in another orientation of the same grid ({codes}): brought into line (LPS)"
            for key in ("t1c", "t2w")
        ]

    def test_an_axis_of_length_one(self, tmp_path: Path) -> None:
        folder = make_subject(tmp_path / "S1")
        (item,) = cohort.Cohort(tmp_path).inputs()
        expected = LoadSubjectd("image")(item)["image"]
        for file in folder.iterdir():
            save(file, np.asarray(nib.load(file).dataobj)[..., None, None])
        made = LoadSubjectd("image")(item)
        assert torch.equal(made["image"].as_tensor(), expected.as_tensor())
        assert len(made["warnings"]) == 4 and "(16 x 14 x 12 x 1 x 1)" in made["warnings"][0]
        facts = check_subject(find_subjects(tmp_path)[0][0])
        assert facts["voxels"]["WT"] == 125 and facts["shape"] == list(SHAPE)
