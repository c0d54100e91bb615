"""Names → subjects → facts → folds → datalist, on small made-up subjects and on the real cases and listing."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import random
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.data import load_decathlon_datalist

import custom
from custom import cohort
from custom.cohort import (
    MODALITIES,
    Cohort,
    SubjectError,
    assign_folds,
    check_subject,
    find_subjects,
    subjects_from_names,
)

SHAPE = (16, 14, 12)
LPS = np.diag([-1.0, -1.5, 2.0, 1.0])
STEMS = {
    "utsw": ("brain_t1", "brain_t1ce", "brain_t2", "brain_flair", "tumorseg_FeTS"),
    "brats2021": ("{case}_t1", "{case}_t1ce", "{case}_t2", "{case}_flair", "{case}_seg"),
    "brats2023": ("{case}-t1n", "{case}-t1c", "{case}-t2w", "{case}-t2f", "{case}-seg"),
    "plain": ("T1", "T1Gd", "T2w", "T2-FLAIR", "mask"),
}


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = LPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def make_mask(enhancing: int | None = 4) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:9, 4:9, 4:9] = 2
    mask[5:8, 5:8, 5:8] = 1
    if enhancing:
        mask[6, 6, 5:8] = enhancing
    return mask


def make_subject(folder: Path, layout: str = "plain", mask: np.ndarray | None = None, seed: int = 0) -> Path:
    noise = np.random.default_rng([seed, *folder.name.encode()])
    *images, label = (stem.format(case=folder.name) + ".nii.gz" for stem in STEMS[layout])
    for name in images:
        voxels = np.zeros(SHAPE, np.int16)
        voxels[2:14, 2:12, 2:10] = noise.integers(1, 900, (12, 10, 8))
        save(folder / name, voxels)
    save(folder / label, make_mask() if mask is None else mask)
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Eight plain subjects, three of them without enhancing tumour."""
    for number in range(8):
        make_subject(tmp_path / "data" / f"S{number}", mask=make_mask(None if number < 3 else 4))
    return tmp_path / "data"


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
        ],
    )
    def test_plain_names(self, stems: tuple[str, ...]) -> None:
        names = [f"s/{stem}.nii" for stem in stems]
        extra = ["s/ADC.nii", "s/T2_star.nii", "s/T1_brain_mask.nii", "s/brain_mask.nii", "s/T1_to_T2.nii", "s/T1.json"]
        subject = one([*extra, *names[::-1]], require_label=False)
        assert (list(subject.images), subject.label) == (names, None)
        assert one([*extra, *names, "s/Segmentation.nii"]).label == "s/Segmentation.nii"

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
        assert one(names_of("brats2021", "BraTS-GLI-00005-001")).patient == "BraTS-GLI-00005-001"

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

    def test_affines_within_tolerance_are_one_grid(self, tmp_path: Path) -> None:
        folder = make_subject(tmp_path / "S1")
        save(folder / "mask.nii.gz", make_mask(), LPS + 5e-4 * np.eye(4, k=3))
        assert check_subject(find_subjects(tmp_path)[0][0])["has_et"]


def make_items(count: int = 53) -> list[dict]:
    return [
        {"subject": f"BT{n:04d}", "label_source": "manual" if n % 5 < 3 else "automatic", "has_et": n % 4 != 0}
        for n in range(count)
    ]


class TestFolds:
    @pytest.mark.parametrize(("count", "num_folds"), [(53, 5), (11, 5), (7, 3), (3, 5), (40, 4)])
    def test_balanced_within_and_over_strata(self, count: int, num_folds: int) -> None:
        items = make_items(count)
        folds = assign_folds(items, num_folds)
        assert set(folds) == {item["subject"] for item in items}
        strata = {(item["label_source"], item["has_et"]) for item in items}
        members = [
            [i["subject"] for i in items if (i["label_source"], i["has_et"]) == stratum] for stratum in strata
        ] + [list(folds)]
        for subjects in members:
            sizes = Counter(folds[subject] for subject in subjects)
            counts = [sizes[fold] for fold in range(num_folds)]
            assert sum(counts) == len(subjects) and max(counts) - min(counts) <= 1

    def test_order_of_listing_does_not_matter_but_the_seed_does(self) -> None:
        items = make_items()
        shuffled = random.Random(1).sample(items, len(items))
        assert assign_folds(shuffled) == assign_folds(items)
        assert list(assign_folds(shuffled)) == sorted(assign_folds(items))
        assert assign_folds(items, seed=1) != assign_folds(items, seed=0)

    def test_one_stratum_is_dealt_in_order_of_its_hashes(self) -> None:
        items = [item | {"label_source": "manual", "has_et": True} for item in make_items(12)]
        names = sorted((item["subject"] for item in items), key=lambda name: sha256(f"7:{name}".encode()).hexdigest())
        assert assign_folds(items, 5, seed=7) == {name: position % 5 for position, name in enumerate(names)}

    def test_golden(self) -> None:
        folds = assign_folds(make_items(12), num_folds=5, seed=0)
        assert "".join(map(str, folds.values())) == "413300201241"

    def test_scans_of_one_patient_stay_together(self) -> None:
        items = [item | {"patient": item["subject"][:5]} for item in make_items(60)]
        folds = assign_folds(items, 3)
        assert all(len({folds[i["subject"]] for i in items if i["patient"] == p}) == 1 for p in {"BT000", "BT003"})
        assert Counter(folds.values()) == {0: 20, 1: 20, 2: 20}

    def test_a_patient_with_many_scans_does_not_unbalance_other_strata(self) -> None:
        scans = [{"subject": f"A{n}", "patient": "A", "label_source": "expert", "has_et": n > 0} for n in range(3)]
        others = [{"subject": f"B{n}", "label_source": "expert", "has_et": True} for n in range(2)]
        folds = assign_folds([*scans, *others], 2)
        assert folds["B0"] != folds["B1"]
        assert assign_folds([*others, *scans[::-1]], 2) == folds

    def test_no_folds(self) -> None:
        with pytest.raises(ValueError, match="num_folds is 0"):
            assign_folds(make_items(), 0)


class TestDatalist:
    def test_monai_reads_it(self, dataset: Path, tmp_path: Path) -> None:
        datalist, exclusions = cohort.build_datalist(dataset, num_folds=4)
        cohort.write_datalist(datalist, exclusions, tmp_path / "lists" / "datalist.json")
        items = load_decathlon_datalist(tmp_path / "lists" / "datalist.json", True, "training", base_dir=dataset)
        assert [Path(item["subject"]).name for item in items] == [f"S{n}" for n in range(8)]
        for item in items:
            assert [Path(file).name for file in item["image"]] == [f"{stem}.nii.gz" for stem in STEMS["plain"][:4]]
            assert all(os.path.isfile(file) for file in (*item["image"], item["label"]))
            assert (item["palette"], item["label_source"]) == ("brats2021", "unknown")

    def test_contents(self, dataset: Path) -> None:
        datalist, exclusions = cohort.build_datalist(dataset, num_folds=4, seed=3)
        assert not exclusions and json.loads(json.dumps(datalist)) == datalist
        assert datalist["comnet_version"] == custom.__version__
        assert (datalist["layout"], datalist["num_folds"], datalist["seed"]) == ("plain", 4, 3)
        assert datalist["modalities"] == ["t1n", "t1c", "t2w", "flair"] and datalist["regions"] == ["ET", "TC", "WT"]
        counts = datalist["counts"]
        assert (counts["subjects"], counts["with_et"], counts["excluded"]) == (8, 5, 0)
        assert counts["by_fold"] == [2, 2, 2, 2]
        assert [item["has_et"] for item in datalist["training"]] == [False] * 3 + [True] * 5
        assert datalist["training"][0]["image"][1] == "S0/T1Gd.nii.gz"
        assert datalist["facts"]["S7"]["voxels"]["WT"] == 125

    def test_the_same_whatever_the_workers_and_wherever_it_lies(self, dataset: Path, tmp_path: Path) -> None:
        shutil.copytree(dataset, tmp_path / "moved")
        lists = [
            cohort.build_datalist(folder, num_workers=workers)
            for folder in (dataset, tmp_path / "moved")
            for workers in (1, 3)
        ]
        assert all(other == lists[0] for other in lists)

    def test_paths_of_several_folders_are_relative_to_what_they_share(self, tmp_path: Path) -> None:
        folders = [make_subject(tmp_path / "a" / "S1"), make_subject(tmp_path / "b" / "c" / "S2").parent]
        datalist, _ = cohort.build_datalist(folders, num_folds=2)
        assert [item["label"] for item in datalist["training"]] == ["a/S1/mask.nii.gz", "b/c/S2/mask.nii.gz"]
        assert all(os.path.isfile(item["label"]) for item in Cohort(folders, num_folds=2).subjects())

    def test_an_interrupted_write_leaves_the_old_file(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "lists" / "datalist.json"
        datalist, _ = cohort.build_datalist(dataset)
        cohort.write_datalist(datalist, [], path)
        before = [file.read_text() for file in (path, cohort.exclusions_file(path))]
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            cohort.write_datalist(datalist, [cohort.Exclusion("S9", "S9", "late", "none")], path)
        assert [file.read_text() for file in (path, cohort.exclusions_file(path))] == before
        assert sorted(file.name for file in path.parent.iterdir()) == ["datalist.json", "datalist_exclusions.csv"]

    def test_exclusion_report_is_written_even_without_exclusions(self, dataset: Path, tmp_path: Path) -> None:
        Cohort(dataset, tmp_path / "d.json").subjects()
        assert (tmp_path / "d_exclusions.csv").read_text() == "subject,file,reason,remedy\n"

    def test_real_cases(self, real_data: Path) -> None:
        datalist, exclusions = cohort.build_datalist(real_data / "brats2021")
        assert not exclusions and len(datalist["training"]) == 11
        assert {item["palette"] for item in datalist["training"]} == {"brats2021"}
        without = [item["subject"][-5:] for item in datalist["training"] if not item["has_et"]]
        assert without == ["01477", "01480", "01483", "01484"]
        facts = datalist["facts"]["BraTS2021_01481"]
        assert facts["voxels"] == {"ET": 2575, "TC": 4076, "WT": 56512}
        assert (facts["shape"], facts["spacing"]) == ([240, 240, 155], [1.0, 1.0, 1.0])
        assert {facts["orientation"] for facts in datalist["facts"].values()} == {"LPS"}
        assert sorted(datalist["counts"]["by_fold"]) == [2, 2, 2, 2, 3]


class TestCohort:
    def test_training_and_validation_share_no_subject(self, dataset: Path) -> None:
        data = Cohort(dataset, num_folds=4)
        everyone = {item["subject"] for item in data.subjects()}
        assert len(everyone) == 8
        validated = [item["subject"] for fold in range(4) for item in data.validation(fold)]
        assert sorted(validated) == sorted(everyone)
        for fold in range(4):
            held_out = {item["subject"] for item in data.validation(fold)}
            assert {item["subject"] for item in data.training(fold)} == everyone - held_out
            assert {item["fold"] for item in data.validation(fold)} == {fold}
        assert data.training() == data.training("all") == data.subjects()

    def test_items_have_absolute_paths_and_are_the_callers_own(self, dataset: Path) -> None:
        data = Cohort(dataset)
        item = data.subjects()[0]
        assert item["image"] == [str(dataset / "S0" / f"{stem}.nii.gz") for stem in STEMS["plain"][:4]]
        assert item["label"] == str(dataset / "S0" / "mask.nii.gz")
        item["image"].clear()
        assert len(data.subjects()[0]["image"]) == 4

    def test_nothing_is_read_before_it_is_needed(self, tmp_path: Path) -> None:
        data = Cohort(tmp_path / "later")
        make_subject(tmp_path / "later" / "S1")
        assert len(data.subjects()) == 1

    def test_a_written_datalist_is_loaded_and_not_built_again(
        self, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "datalist.json"
        with caplog.at_level(logging.INFO, logger="comnet"):
            first = Cohort(dataset, path).subjects()
        assert "8 subjects kept, none excluded" in caplog.text and f"wrote {path}" in caplog.text
        for file in dataset.glob("*/*"):
            file.write_bytes(b"no longer readable")
        assert Cohort(dataset, str(path)).subjects() == first

    def test_a_datalist_moves_with_its_dataset(self, dataset: Path, tmp_path: Path) -> None:
        path = tmp_path / "datalist.json"
        Cohort(dataset, path).subjects()
        moved = Path(shutil.move(dataset, tmp_path / "elsewhere"))
        assert Cohort(moved, path).subjects()[0]["label"] == str(moved / "S0" / "mask.nii.gz")

    def test_a_setting_that_the_datalist_overrules_is_logged(
        self, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        Cohort(dataset, tmp_path / "d.json").subjects()
        assert not caplog.records
        Cohort(dataset, tmp_path / "d.json", seed=5).subjects()
        assert "seed=0" in caplog.text and "5 was asked for" in caplog.text

    def test_inputs_need_no_mask(self, dataset: Path) -> None:
        for mask in dataset.glob("*/mask.nii.gz"):
            mask.write_bytes(b"rubbish")
        (dataset / "S3" / "mask.nii.gz").unlink()
        data = Cohort(str(dataset))
        assert [item["subject"] for item in data.inputs()] == [f"S{n}" for n in range(8)]
        assert data.inputs()[0] == {
            "subject": "S0",
            "image": [str(dataset / "S0" / f"{stem}.nii.gz") for stem in STEMS["plain"][:4]],
            "warnings": [],
        }
        assert data.exclusions == []

    def test_one_subject_by_four_files(self, dataset: Path) -> None:
        files = dict(zip(MODALITIES, (str(dataset / "S0" / f"{stem}.nii.gz") for stem in STEMS["plain"]), strict=False))
        assert [item["image"] for item in Cohort(files).inputs()] == [list(files.values())]

    def test_one_subjects_own_folder(self, dataset: Path) -> None:
        assert [item["subject"] for item in Cohort(dataset / "S5").inputs()] == ["S5"]
        assert [item["subject"] for item in Cohort([dataset / "S5", dataset / "S1"]).inputs()] == ["S1", "S5"]

    def test_a_bundle_configuration_builds_it(self, dataset: Path) -> None:
        config = {
            "fold": 1,
            "cohort": {"_target_": "custom.cohort.Cohort", "dataset_dir": str(dataset), "num_folds": 4},
            "training": "$@cohort.training(@fold)",
        }
        parser = ConfigParser(config)
        assert len(parser.get_parsed_content("training")) == 6
