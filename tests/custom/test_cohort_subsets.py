"""Subjects that lack modalities: told by names, read as channels of zeros, for inference only."""

from __future__ import annotations

import logging
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from cohort_subjects import LPS, STEMS, make_subject, save
from monai.transforms import Compose, NormalizeIntensityd

from custom.cohort import (
    MODALITIES,
    REQUIRED,
    Cohort,
    SubjectError,
    build_datalist,
    check_subject,
    find_subjects,
    read_scan,
    subject_from_files,
    subjects_from_names,
)
from custom.cohort.four_channel import stack
from custom.files import UserError
from custom.training.augmentation import RandDropModalitiesd
from custom.transforms import LoadSubjectd, ResampleToSpacingd

SUBSETS = [set(keys) for count in range(1, 4) for keys in combinations(MODALITIES, count)]
DICE = {"nothing": [0.6, 0.82, 0.87], "t1n+t2w": [0.5, 0.6, 0.7]}


def lose(folder: Path, *keys: str, layout: str = "plain") -> Path:
    for key in keys:
        (folder / f"{STEMS[layout][MODALITIES.index(key)].format(case=folder.name)}.nii.gz").unlink()
    return folder


def inputs(*names: str):
    subjects, exclusions = subjects_from_names(names, require_label=False, subsets=True)
    return subjects, [str(one) for one in exclusions]


class TestNames:
    @pytest.mark.parametrize("layout", STEMS)
    @pytest.mark.parametrize("kept", SUBSETS, ids=lambda kept: "+".join(sorted(kept)))
    def test_any_subset_with_t1c_or_flair_is_a_subject_in_every_layout(self, tmp_path, layout, kept):
        folder = make_subject(tmp_path / "S1", layout)
        lose(folder, *set(MODALITIES) - kept, layout=layout)
        cohort = Cohort(tmp_path)
        if not kept & set(REQUIRED):
            assert cohort.inputs() == []
            (exclusion,) = cohort.exclusions
            assert "t1c image" in exclusion.reason and "not both T1c and T2-FLAIR" in exclusion.remedy
            return
        ((images,),) = ([item["image"] for item in cohort.inputs()],)
        assert {key for key, image in zip(MODALITIES, images, strict=True) if image} == kept
        assert all(Path(image).is_file() for image in images if image)

    @pytest.mark.parametrize(
        "beside",
        ["image5.nii.gz", "brain_t1_ants.nii.gz", "ADC.nii", "T1_to_T2.nii", "T1.json", "T1.nrrd", "T1.nii.gz.part"],
    )
    def test_what_may_be_the_missing_image_under_another_name_leaves_the_subject_out(self, beside):
        subjects, (told,) = inputs("S/T1c.nii.gz", "S/T2.nii.gz", "S/FLAIR.nii.gz", f"S/{beside}")
        assert not subjects and "t1n image (T1, T1n or T1w)" in told
        assert f"take {beside} out of the folder, or name the files that there are by --t1n" in told

    @pytest.mark.parametrize(
        ("files", "kept"),
        [
            (("pre_contrast_T1", "T2", "FLAIR"), ("pre_contrast_T1", "", "T2", "FLAIR")),
            (("no_contrast_T1", "FLAIR"), ("no_contrast_T1", "", "", "FLAIR")),
            (("T1_SE_postcontrast", "T2", "FLAIR"), ("", "T1_SE_postcontrast", "T2", "FLAIR")),
            (("T1_3D_CE", "FLAIR"), ("", "T1_3D_CE", "", "FLAIR")),
        ],
    )
    def test_one_t1_is_what_its_name_says_of_contrast(self, files, kept):
        ((subject,), _) = inputs(*(f"S/{name}.nii" for name in files))
        assert subject.images == tuple(name and f"S/{name}.nii" for name in kept)

    @pytest.mark.parametrize("case", ["post study", "contrast-p-1", "post"])
    def test_a_word_for_contrast_that_may_be_of_the_case_leaves_the_t1_open(self, case):
        names = [f"{case} {key}.nii" for key in ("T1", "T2", "FLAIR")]
        subjects, (told,) = inputs(*(f"S/{name}" for name in names))
        assert not subjects and f"take {names[0]} out of the folder, or name the files that there are by" in told
        assert len(inputs(*(f"S/{name}" for name in [*names, f"{case} T1c.nii"]))[0]) == 1

    def test_masks_and_notes_beside_cast_no_doubt(self):
        beside = ["brain_mask.nii.gz", "T1_brain_mask.nii", "seg.nii.gz", "readme.txt", "FLAIR.json", "._T1.nii.gz"]
        subjects, told = inputs("S/T1c.nii.gz", "S/FLAIR.nii.gz", *(f"S/{name}" for name in beside))
        assert [subject.images for subject in subjects] == [("", "S/T1c.nii.gz", "", "S/FLAIR.nii.gz")] and not told

    def test_series_that_a_prepared_study_keeps_are_known(self):
        names = ["S/t1c.nii.gz", "S/flair.nii.gz", "S/series_3.nii.gz", "S/brain_mask.nii.gz"]
        assert not inputs(*names)[0] and len(inputs(*names, "S/preparation.json")[0]) == 1

    def test_images_of_two_patients_are_no_subset(self):
        subjects, (told,) = inputs("S/P1_T1c.nii.gz", "S/P2_FLAIR.nii.gz")
        assert not subjects and "different cases: P1_T1c.nii.gz, P2_FLAIR.nii.gz" in told
        assert len(inputs("S/P1_T1c.nii.gz", "S/P1_FLAIR.nii.gz")[0]) == 1

    @pytest.mark.parametrize("whole", [True, False])
    def test_a_missing_modality_that_is_a_folder_leaves_the_subject_out(self, whole, tmp_path):
        folder = make_subject(tmp_path / "S1")
        lose(folder, "t1n")
        (folder / "T1").mkdir()
        (folder / "T1" / "IM0001").write_bytes(b"DICM")
        _, (told,) = find_subjects(folder if whole else tmp_path, require_label=False, subsets=True)
        assert "t1n image" in told.reason and "take T1 out of the folder" in told.remedy

    def test_results_among_the_subjects_are_no_subject(self, tmp_path):
        make_subject(tmp_path / "S1")
        out = tmp_path / "out"
        out.mkdir()
        (out / "weights.txt").write_text("of 34 subjects\nsha256 00\n")
        (out / "T1.nii.gz").write_bytes(b"")
        subjects, told = find_subjects(tmp_path, require_label=False, subsets=True)
        assert [subject.name for subject in subjects] == ["S1"] and not told
        (out / "S1").mkdir()
        (out / "S1" / "S1_seg.nii.gz").write_bytes(b"")
        (out / "T1.nii.gz").unlink()
        with pytest.raises(UserError, match="out holds results of CoMNeT: give the folder of the images"):
            find_subjects(out)
        (out / "weights.txt").write_text("a note of somebody's")
        (out / "S1" / "S1_seg.nii.gz").unlink()
        assert len(find_subjects(tmp_path, require_label=False, subsets=True)[1]) == 1

    def test_one_empty_folder_among_several_stops_no_other(self, tmp_path):
        make_subject(tmp_path / "S1")
        (tmp_path / "none").mkdir()
        subjects, (told,) = find_subjects([tmp_path / "S1", tmp_path / "none"], subsets=True)
        assert [subject.name for subject in subjects] == ["S1"]
        assert told.file == str(tmp_path / "none") and "no subject in it" in told.reason

    def test_a_folder_for_each_modality_is_no_folder_of_subjects(self):
        subjects, told = inputs(*(f"{key}/P1_{key}.nii.gz" for key in ("T1", "T1c", "T2", "FLAIR")))
        assert not subjects and sum("put all files of a subject into one folder" in one for one in told) == 4

    def test_four_modalities_need_no_other_name(self):
        assert len(inputs(*(f"S/{key}.nii" for key in ("T1", "T1c", "T2", "FLAIR", "ADC")))[0]) == 1


class TestFiles:
    @pytest.mark.parametrize(
        ("files", "name"),
        [
            ({"flair": "flat/P1_flair"}, "P1"),
            ({"t2w": "flat/P1_t2", "flair": "flat/P1_t2_flair"}, "P1"),
            ({"t1c": "P1/brain_t1ce"}, "P1"),
            ({"t1c": "P1/t1c", "flair": "P1/flair"}, "P1"),
        ],
    )
    def test_few_files_name_a_subject_as_four_do(self, files, name):
        subject = subject_from_files(**{key: f"/data/{file}.nii.gz" for key, file in files.items()})
        assert subject.name == name and {k for k, one in zip(MODALITIES, subject.images, strict=True) if one} == set(
            files
        )

    def test_without_t1c_and_flair_it_is_refused(self):
        with pytest.raises(SubjectError, match=r"Ada: /data/a\.nii: no T1c, T2w, T2-FLAIR: .*Add T1c or T2-FLAIR"):
            subject_from_files(t1n="/data/a.nii", name="Ada")
        with pytest.raises(SubjectError, match="no T1n, T1c, T2w, T2-FLAIR"):
            subject_from_files()


class TestTraining:
    def test_training_wants_all_four(self, tmp_path):
        make_subject(tmp_path / "S1")
        lose(make_subject(tmp_path / "S2"), "t1n")
        datalist, (exclusion,) = build_datalist(tmp_path, num_folds=1)
        assert [item["subject"] for item in datalist["training"]] == ["S1"]
        assert exclusion.subject == "S2" and "t1n image" in exclusion.reason
        assert len(find_subjects(tmp_path)[0]) == 1 and len(Cohort(tmp_path).inputs()) == 2

    def test_a_subset_passes_no_check(self, tmp_path):
        folder = make_subject(tmp_path / "S1")
        with pytest.raises(SubjectError, match="no T1n, T2w. Add it, or use the subject for inference only"):
            check_subject(subject_from_files(t1c=folder / "T1Gd.nii.gz", flair=folder / "T2-FLAIR.nii.gz"))


class TestReading:
    def test_an_absent_modality_is_zero_and_the_rest_as_ever(self, tmp_path):
        make_subject(tmp_path / "S1")
        (item,) = Cohort(tmp_path).inputs()
        full = read_scan("S1", item["image"])
        part = read_scan("S1", ["", item["image"][1], "", item["image"][3]])
        assert part.missing == ("t1n", "t2w") and full.missing == ()
        for channel in (0, 2):
            assert part.images[channel].shape == full.images[0].shape and not part.images[channel].any()
        for channel in (1, 3):
            assert np.array_equal(part.images[channel], full.images[channel])

    def test_brain_and_grid_are_those_of_what_is_there(self, tmp_path):
        folder = make_subject(tmp_path / "S1")
        voxels = np.asarray(nib.load(folder / "T1.nii.gz").dataobj).copy()
        voxels[:2] = 7
        save(folder / "T1.nii.gz", voxels, LPS + 0.02 * np.eye(4, k=3))
        (item,) = Cohort(tmp_path).inputs()
        full, part = read_scan("S1", item["image"]), read_scan("S1", ["", *item["image"][1:]])
        assert full.brain[:2].all() and not part.brain[:2].any()
        assert np.array_equal(part.affine, LPS) and not np.array_equal(full.affine, LPS)

    def test_what_is_there_is_checked_as_ever(self, tmp_path):
        folder = make_subject(tmp_path / "S1")
        save(folder / "T2-FLAIR.nii.gz", np.zeros((16, 14, 12), np.int16))
        (item,) = Cohort(tmp_path).inputs()
        with pytest.raises(SubjectError, match="FLAIR.nii.gz: every voxel of the flair image is 0: the image is empty"):
            read_scan("S1", ["", item["image"][1], "", item["image"][3]])
        with pytest.raises(SubjectError, match="no T1c, T2-FLAIR: without"):
            read_scan("S1", [item["image"][0], "", item["image"][2], ""])
        with pytest.raises(SubjectError, match="no T1n, T1c, T2w, T2-FLAIR: without"):
            read_scan("S1", [""] * 4)

    def test_a_stacked_file_says_the_same_with_a_channel_of_zeros(self, tmp_path, caplog):
        folder = lose(make_subject(tmp_path / "data" / "S1"), "t2w")
        with caplog.at_level(logging.WARNING, "comnet"):
            (file,) = stack(str(folder), output_dir=str(tmp_path))
        assert "S1: no T2w: stacked as zeros" in caplog.text
        (item,) = Cohort(folder).inputs()
        whole, parts = read_scan("S1", file), read_scan("S1", item["image"])
        assert whole.missing == parts.missing == ("t2w",) and np.array_equal(whole.images, parts.images)
        with pytest.raises(SubjectError, match="no T2w, and these weights"):
            LoadSubjectd("image")({"image": file})


class TestLoading:
    @pytest.fixture
    def item(self, tmp_path):
        make_subject(tmp_path / "S1")
        return Cohort(tmp_path).inputs()[0]

    def subset(self, item, *missing):
        pairs = zip(MODALITIES, item["image"], strict=True)
        return item | {"image": ["" if key in missing else image for key, image in pairs]}

    def test_the_network_sees_what_training_has_shown_it(self, item):
        steps = [
            ResampleToSpacingd("image", [0.8, 1.1, 1.7]),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        ]
        drop = RandDropModalitiesd("image", prob=1.0)
        drop.set_random_state(1)
        expected = drop(Compose([LoadSubjectd("image"), *steps])(item))["image"]
        missing = [MODALITIES[channel] for channel in drop.dropped]
        made = Compose([LoadSubjectd("image", allow_missing=True), *steps])(self.subset(item, *missing))["image"]
        assert missing and torch.equal(made.as_tensor(), expected.as_tensor())

    def test_what_it_costs_is_told_in_the_log_and_among_the_warnings(self, item, caplog):
        load = LoadSubjectd("image", allow_missing=True, missing_dice=DICE)
        with caplog.at_level(logging.WARNING, "comnet"):
            made = load(self.subset(item, "t1n", "t2w"))
        told = "without T1n, T2w: held-out Dice ET 0.50, TC 0.60, WT 0.70; with all four 0.60, 0.82, 0.87"
        assert made["warnings"] == [told] and f"S1: {told}" in caplog.text
        assert made["image"].meta["missing"] == "T1n, T2w"
        assert load(item)["warnings"] == [] and load(item)["image"].meta["missing"] == ""

    @pytest.mark.parametrize(
        ("dice", "told"), [({}, "how much was not measured"), (DICE, "not measured"), (None, "cannot be relied on")]
    )
    def test_what_is_not_known_is_told_too(self, item, dice, told):
        (warning,) = LoadSubjectd("image", allow_missing=True, missing_dice=dice)(self.subset(item, "t1n"))["warnings"]
        assert warning.startswith("without T1n: ") and told in warning

    def test_weights_that_were_not_trained_for_it_refuse(self, item):
        with pytest.raises(
            SubjectError, match=r"S1: .*T1Gd\.nii\.gz: no T1n, T2w, and these weights .*--allow_missing"
        ):
            LoadSubjectd("image")(self.subset(item, "t1n", "t2w"))
