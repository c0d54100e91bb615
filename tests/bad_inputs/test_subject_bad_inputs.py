"""Every way a subject is known to go wrong: the subject, the file and the fault are named, and the others survive."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from cohort_to_spoil import BAD, GOOD, make_mask, noise, save
from monai.transforms import LoadImage

from custom.cohort import Cohort, SubjectError, build_datalist, check_subject, checks, find_subjects
from custom.transforms import LoadSubjectd, label_map_to_regions


def edit(name: str, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> Callable:
    def spoil(folder: Path) -> None:
        save(folder / name, change(np.asarray(nib.load(folder / name).dataobj)), affine)

    return spoil


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def with_value(value: float, count: int = 3) -> Callable[[np.ndarray], np.ndarray]:
    def change(voxels: np.ndarray) -> np.ndarray:
        voxels = voxels.astype(np.float32)
        voxels[8, 8, :count] = value
        return voxels

    return change


def flip_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def flip_stored_voxel(data: bytes) -> bytes:
    """A stream that unpacks without complaint into wrong voxels: only its checksum tells."""
    stored = bytearray(gzip.compress(gzip.decompress(data), compresslevel=0))
    stored[len(stored) // 2] ^= 0x01
    return bytes(stored)


def flatten_sform(data: bytes) -> bytes:
    """Zeros for the third row of the sform, bytes 312 to 327 of a NIfTI-1 header."""
    header = bytearray(gzip.decompress(data))
    header[312:328] = bytes(16)
    return gzip.compress(header)


def claim(*size: int) -> Callable[[bytes], bytes]:
    """Write other sizes into a NIfTI-1 header (bytes 40 to 55), in front of the same voxels."""

    def change(data: bytes) -> bytes:
        header = bytearray(gzip.decompress(data))
        header[40:56] = struct.pack("<8h", len(size), *size, *[1] * (7 - len(size)))
        return gzip.compress(header)

    return change


def endless(data: bytes) -> bytes:
    """A stream that goes on for 64 MiB of zeros after its voxels; packed these are a few kB."""
    return data + gzip.compress(bytes(2**26))


def coloured(name: str) -> Callable:
    def spoil(folder: Path) -> None:
        colours = np.zeros((16, 16, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])
        save(folder / name, colours)

    return spoil


def pipe(name: str) -> Callable:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def swap(first: str, second: str) -> Callable:
    def spoil(folder: Path) -> None:
        (folder / first).rename(folder / "aside")
        (folder / second).rename(folder / first)
        (folder / "aside").rename(folder / second)

    return spoil


def link(name: str, target: str) -> Callable:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / target)

    return spoil


FAULTS = {
    "truncated": ("T2.nii.gz", rewrite("T2.nii.gz", lambda data: data[:-9]), ["truncated"]),
    "truncated in its checksum": ("T2.nii.gz", rewrite("T2.nii.gz", lambda data: data[:-1]), ["truncated"]),
    "half a file": ("T2.nii.gz", rewrite("T2.nii.gz", lambda data: data[: len(data) // 2]), ["truncated"]),
    "damaged in the middle": ("T2.nii.gz", rewrite("T2.nii.gz", flip_middle), ["damaged"]),
    "wrong checksum": ("T1.nii.gz", rewrite("T1.nii.gz", flip_stored_voxel), ["damaged", "CRC"]),
    "truncated mask": ("seg.nii.gz", rewrite("seg.nii.gz", lambda data: data[:-5]), ["truncated"]),
    "no bytes": ("T1.nii.gz", rewrite("T1.nii.gz", lambda _: b""), ["not a whole NIfTI"]),
    "not gzipped": ("T1.nii.gz", rewrite("T1.nii.gz", gzip.decompress), ["damaged", "gzip"]),
    "a pointer left by git": ("T1.nii.gz", rewrite("T1.nii.gz", lambda _: b"version https://git-lfs"), ["gzip"]),
    "no NIfTI inside": ("T1.nii.gz", rewrite("T1.nii.gz", lambda _: gzip.compress(b"x" * 999)), ["not a whole NIfTI"]),
    "voxels cut before packing": (
        "T1.nii.gz",
        rewrite("T1.nii.gz", lambda data: gzip.compress(gzip.decompress(data)[:-100])),
        ["not a whole NIfTI", "Expected"],
    ),
    "a header of 32767 cubed": (
        "T2.nii.gz",
        rewrite("T2.nii.gz", claim(32767, 32767, 32767)),
        ["32767 x", "too short"],
    ),
    "a header of twice the voxels": ("T2.nii.gz", rewrite("T2.nii.gz", claim(16, 16, 32)), ["not a whole NIfTI"]),
    "a header of no voxels": ("T2.nii.gz", rewrite("T2.nii.gz", claim(16, -16, 16)), ["not a whole NIfTI"]),
    "a stream without end": ("T2.nii.gz", rewrite("T2.nii.gz", endless), ["goes on after", "16 x 16 x 16"]),
    "colours": ("T2.nii.gz", coloured("T2.nii.gz"), ["not plain numbers"]),
    "a pipe": ("T2.nii.gz", pipe("T2.nii.gz"), ["no file"]),
    "values beyond single precision": ("T2.nii.gz", edit("T2.nii.gz", with_value(1e34)), ["1e+34", "single precision"]),
    "values below single precision": ("T2.nii.gz", edit("T2.nii.gz", lambda v: v * 1e-30), ["single precision"]),
    "voxels in metres": ("T1.nii.gz", edit("T1.nii.gz", lambda v: v, np.diag([0.001] * 3 + [1])), ["0.001 x", "mm"]),
    "voxels of a metre": ("T1.nii.gz", edit("T1.nii.gz", lambda v: v, np.diag([1e3] * 3 + [1])), ["no head"]),
    "other shape": ("T1c.nii.gz", edit("T1c.nii.gz", lambda v: v[:15]), ["t1c", "15 x 16 x 16", "16 x 16 x 16"]),
    "other shape of the first": ("T1.nii.gz", edit("T1.nii.gz", lambda v: v[:15]), ["t1n", "15 x 16 x 16"]),
    "other shape of the mask": ("seg.nii.gz", edit("seg.nii.gz", lambda v: v[:, :9]), ["mask", "16 x 9 x 16"]),
    "other affine": ("T2.nii.gz", edit("T2.nii.gz", lambda v: v, np.diag([1, 1, 1.01, 1])), ["t2w", "0.01", "affine"]),
    "shifted mask": ("seg.nii.gz", edit("seg.nii.gz", lambda v: v, np.eye(4) + 2 * np.eye(4, k=3)), ["mask", "2"]),
    "singular affine": ("T1.nii.gz", rewrite("T1.nii.gz", flatten_sform), ["cannot be inverted"]),
    "NaN": ("FLAIR.nii.gz", edit("FLAIR.nii.gz", with_value(np.nan)), ["3 voxels are NaN", "0 infinite"]),
    "infinite": ("FLAIR.nii.gz", edit("FLAIR.nii.gz", with_value(-np.inf, 2)), ["0 voxels are NaN", "2 infinite"]),
    "NaN in the mask": ("seg.nii.gz", edit("seg.nii.gz", with_value(np.nan)), ["3 voxels are NaN"]),
    "all zero": ("T1.nii.gz", edit("T1.nii.gz", np.zeros_like), ["t1n", "empty"]),
    "constant": ("T1.nii.gz", edit("T1.nii.gz", lambda v: np.full_like(v, 7)), ["t1n", "every voxel", "7"]),
    "four dimensions": ("T1.nii.gz", edit("T1.nii.gz", lambda v: np.stack([v, v], -1)), ["4 dim", "16 x 16 x 16 x 2"]),
    "two dimensions": ("T1.nii.gz", edit("T1.nii.gz", lambda v: v[8]), ["2 dimensions"]),
    "four-dimensional mask": ("seg.nii.gz", edit("seg.nii.gz", lambda v: np.stack([v, v], -1)), ["4 dimensions"]),
    "complex numbers": ("T2.nii.gz", edit("T2.nii.gz", lambda v: v.astype(np.complex64)), ["complex"]),
    "swapped T1c and mask": ("T1c.nii.gz", swap("T1c.nii.gz", "seg.nii.gz"), ["t1c", "0, 1, 2, 4", "as a mask does"]),
    "an image for a mask": ("seg.nii.gz", edit("seg.nii.gz", lambda _: noise(99)), ["mask", "as an image does"]),
    "a resampled mask": ("seg.nii.gz", edit("seg.nii.gz", lambda v: v * 0.9), ["whole numbers", "0.9, 1.8, 3.6"]),
    "a smoothed mask": ("seg.nii.gz", edit("seg.nii.gz", with_value(0.5)), ["whole numbers", "0.5"]),
    "T1 copied to T1c": ("T1c.nii.gz", edit("T1c.nii.gz", lambda _: noise(20)), ["t1c", "t1n", "the very same voxels"]),
    "T1 copied in another type": ("T1c.nii.gz", edit("T1c.nii.gz", lambda _: noise(20, np.float64)), ["very same"]),
    "T1c a link to T1": ("T1c.nii.gz", link("T1c.nii.gz", "T1.nii.gz"), ["t1n and t1c", "the same file"]),
    "a dead link": ("T1c.nii.gz", link("T1c.nii.gz", "gone.nii.gz"), ["does not exist"]),
    "undocumented labels": ("seg.nii.gz", edit("seg.nii.gz", lambda _: make_mask(1, 3, 5, 4)), ["3 (25", "5 (25"]),
    "a negative label": ("seg.nii.gz", edit("seg.nii.gz", lambda v: v.astype(np.int16) - 1), ["-1 ("]),
    "no tumour": ("seg.nii.gz", edit("seg.nii.gz", np.zeros_like), ["holds no tumour"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_the_others_survive(dataset: Path, fault: str) -> None:
    file, spoil, gist = FAULTS[fault]
    assert len(build_datalist(dataset)[0]["training"]) == 3
    spoil(dataset / BAD)

    datalist, (exclusion,) = build_datalist(dataset)
    assert tuple(item["subject"] for item in datalist["training"]) == GOOD
    assert datalist["counts"]["excluded"] == 1
    assert (exclusion.subject, exclusion.file) == (BAD, f"{BAD}/{file}")
    assert all(word in exclusion.reason for word in gist), exclusion.reason
    assert exclusion.remedy and "\n" not in str(exclusion)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "seg" not in FAULTS[fault][0]])
def test_fault_of_an_image_is_named_when_its_turn_comes(dataset: Path, fault: str) -> None:
    file, spoil, gist = FAULTS[fault]
    spoil(dataset / BAD)
    data = Cohort(dataset)
    load, items = LoadSubjectd("image"), {item["subject"]: item for item in data.inputs()}
    assert [tuple(load(items[name])["image"].shape) for name in GOOD] == [(4, 16, 16, 16)] * 2
    with pytest.raises(SubjectError) as caught:
        load(items[BAD])
    assert (caught.value.subject, caught.value.file) == (BAD, str(dataset / BAD / file))
    assert all(word in caught.value.reason for word in gist) and not data.exclusions


def test_a_mask_outside_the_brain_is_told(dataset: Path) -> None:
    for name in ("T1.nii.gz", "T1c.nii.gz", "T2.nii.gz", "FLAIR.nii.gz"):
        edit(name, lambda v: np.where(np.indices(v.shape)[0] < 8, 0, v))(dataset / BAD)
    edit("seg.nii.gz", lambda v: np.where(np.indices(v.shape)[0] < 12, 2, 0).astype(v.dtype))(dataset / BAD)
    facts = build_datalist(dataset)[0]["facts"][BAD]
    assert any(one.endswith("of its 3072 voxels lie outside the brain") for one in facts["warnings"])


@pytest.mark.parametrize(("value", "told"), [(1e6, True), (300.0, False)])
def test_a_damaged_voxel_that_outshines_all_others_is_told(dataset: Path, value: float, told: bool) -> None:
    edit("FLAIR.nii.gz", with_value(value, 1))(dataset / BAD)
    (item,) = (item for item in Cohort(dataset).inputs() if item["subject"] == BAD)
    warnings = LoadSubjectd("image")(item)["warnings"]
    assert any("flair: its brightest voxel is 1e+06" in one for one in warnings) == told


@pytest.mark.parametrize("size", [(16, 16, 1), (5, 5, 5), (16, 7, 16)])
def test_slices_and_corners_are_no_brain(dataset: Path, size: tuple[int, int, int]) -> None:
    for file in (dataset / BAD).iterdir():
        edit(file.name, lambda v: v[tuple(slice(n) for n in size)] if size[2] > 1 else v[:, :, 8:9])(dataset / BAD)
    with pytest.raises(SubjectError, match=rf"T1.nii.gz: t1n has {' x '.join(map(str, size))} voxels; fewer than 8"):
        LoadSubjectd("image")(Cohort(dataset).inputs()[1])


def test_the_size_is_checked_before_anything_is_unpacked(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = dataset / BAD / "T2.nii.gz"
    file.write_bytes(claim(2000, 2000, 2000)(file.read_bytes()) + bytes(2**24))  # long enough, if it were well packed
    with pytest.raises(SubjectError, match="2000 x 2000 x 2000 voxels, more than any scan"):
        check_subject(find_subjects(dataset / BAD)[0][0])


def test_a_bare_file_under_a_packed_name_and_the_reverse(dataset: Path) -> None:
    packed = dataset / BAD / "T1.nii.gz"
    packed.rename(dataset / BAD / "T1.nii")
    with pytest.raises(SubjectError, match=r"T1.nii: it is compressed, but .* Add .gz to it"):
        check_subject(find_subjects(dataset / BAD)[0][0])
    packed.write_bytes(gzip.decompress((dataset / BAD / "T1.nii").read_bytes()))
    (dataset / BAD / "T1.nii").unlink()
    with pytest.raises(SubjectError, match=r"misnamed: it holds no gzip stream.* take .gz off"):
        check_subject(find_subjects(dataset / BAD)[0][0])


@pytest.mark.parametrize("error", [MemoryError("8 TiB"), ZeroDivisionError("ours")])
def test_one_subject_that_breaks_the_check_costs_no_other(
    dataset: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = checks.read_scan

    def read(subject: str, images: object) -> object:
        if subject == BAD:
            raise error
        return genuine(subject, images)

    monkeypatch.setattr(checks, "read_scan", read)
    datalist, (exclusion,) = build_datalist(dataset)
    assert tuple(item["subject"] for item in datalist["training"]) == GOOD
    assert (exclusion.subject, exclusion.file) == (BAD, BAD) and type(error).__name__ in exclusion.reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(dataset: Path) -> None:
    (dataset / BAD / "T2.nii.gz").chmod(0)
    with pytest.raises(SubjectError, match=r"T2.nii.gz: cannot be read .*permissions"):
        check_subject(find_subjects(dataset / BAD)[0][0])


def test_error_is_one_line_with_subject_file_reason_and_remedy(dataset: Path) -> None:
    (dataset / BAD / "T2.nii.gz").write_bytes(b"")
    (subject,) = find_subjects(dataset / BAD)[0]
    with pytest.raises(SubjectError) as caught:
        check_subject(subject)
    error = caught.value
    assert (error.subject, error.file) == (BAD, str(dataset / BAD / "T2.nii.gz"))
    assert str(error).startswith(f"{BAD}: {error.file}: {error.reason}. {error.remedy}") and "\n" not in str(error)


def test_truncated_file_without_gzip(dataset: Path) -> None:
    packed = dataset / BAD / "T1.nii.gz"
    (dataset / BAD / "T1.nii").write_bytes(gzip.decompress(packed.read_bytes())[:-1])
    packed.unlink()
    _, (exclusion,) = build_datalist(dataset)
    assert exclusion.file == f"{BAD}/T1.nii" and "not a whole NIfTI" in exclusion.reason


@pytest.mark.parametrize(("name", "what"), [("T1c", "t1c image"), ("FLAIR", "flair image"), ("seg", "tumour mask")])
def test_missing_file(dataset: Path, name: str, what: str) -> None:
    (dataset / BAD / f"{name}.nii.gz").unlink()
    datalist, (exclusion,) = build_datalist(dataset)
    assert tuple(item["subject"] for item in datalist["training"]) == GOOD
    assert (exclusion.subject, exclusion.file) == (BAD, BAD)
    assert what in exclusion.reason and name in exclusion.reason and "T2.nii.gz" in exclusion.reason


def test_two_candidates_for_one_modality(dataset: Path) -> None:
    shutil.copy(dataset / BAD / "T1c.nii.gz", dataset / BAD / "T1_Gd.nii.gz")
    datalist, (exclusion,) = build_datalist(dataset)
    assert tuple(item["subject"] for item in datalist["training"]) == GOOD
    assert (exclusion.subject, exclusion.file) == (BAD, BAD)
    assert all(word in exclusion.reason for word in ("t1c", "T1_Gd.nii.gz", "T1c.nii.gz"))


def test_subfolders_that_are_no_subjects_are_not_passed_over_in_silence(dataset: Path) -> None:
    (dataset / "empty").mkdir()
    (dataset / "notes").mkdir()
    (dataset / "notes" / "read.me").write_text("hello")
    datalist, exclusions = build_datalist(dataset)
    assert len(datalist["training"]) == 3
    assert [(e.subject, e.file, "no .nii" in e.reason) for e in exclusions] == [
        ("empty", "empty", True),
        ("notes", "notes", True),
    ]


class TestLabels:
    def test_undocumented_labels_may_count_as_background(self, dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
        save(dataset / BAD / "seg.nii.gz", make_mask(1, 3, 5, 4))
        datalist, exclusions = build_datalist(dataset, unknown_labels="background")
        assert not exclusions and len(datalist["training"]) == 3
        assert datalist["facts"][BAD]["voxels"] == {"ET": 25, "TC": 50, "WT": 50}
        assert "3 (25 voxels), 5 (25 voxels)" in datalist["facts"][BAD]["warnings"][0]
        assert BAD in caplog.text and "3 (25 voxels)" in caplog.text

    def test_a_mask_of_nothing_but_undocumented_labels_is_empty(self, dataset: Path) -> None:
        save(dataset / BAD / "seg.nii.gz", make_mask(3))
        _, (exclusion,) = build_datalist(dataset, unknown_labels="background")
        assert "no tumour" in exclusion.reason

    def test_an_empty_mask_may_stay(self, dataset: Path) -> None:
        save(dataset / BAD / "seg.nii.gz", make_mask())
        datalist, exclusions = build_datalist(dataset, allow_empty_mask=True)
        assert not exclusions and datalist["facts"][BAD]["warnings"] == ["mask: holds no tumour"]
        assert datalist["facts"][BAD]["has_et"] is False

    def test_the_palette_is_told_and_never_guessed(self, dataset: Path) -> None:
        for name in (*GOOD, BAD):
            save(dataset / name / "seg.nii.gz", make_mask(1, 2, 3))
        with pytest.raises(ValueError, match=r"palette brats2021 .* does not know: 3"):
            build_datalist(dataset)
        datalist, exclusions = build_datalist(dataset, palette="brats2023")
        assert not exclusions and {item["palette"] for item in datalist["training"]} == {"brats2023"}

    @pytest.mark.parametrize("slope", [4 / 255, 4 / 65535, 1 / 3])
    def test_labels_that_a_tool_has_scaled_are_rounded(self, dataset: Path, slope: float) -> None:
        mask = nib.Nifti1Image(np.rint(make_mask(1, 2, 4) / slope).astype(np.uint16), np.eye(4))
        mask.header.set_slope_inter(slope, 0)
        header = bytearray(mask.to_bytes())
        header[112:120] = struct.pack("<ff", slope, 0)
        (dataset / BAD / "seg.nii.gz").write_bytes(gzip.compress(header))
        stored = LoadImage(image_only=True)(dataset / BAD / "seg.nii.gz")
        assert not torch.equal(stored.unique(), torch.tensor([0.0, 1, 2, 4])) or slope == 1 / 3
        datalist, exclusions = build_datalist(dataset)
        assert not exclusions and datalist["facts"][BAD]["voxels"] == {"ET": 25, "TC": 50, "WT": 75}
        assert label_map_to_regions(stored).sum(dim=(1, 2, 3)).tolist() == [25, 50, 75]

    def test_labels_of_slight_noise_are_rounded(self, dataset: Path) -> None:
        labels = make_mask(1, 2, 4) + np.random.default_rng(0).normal(0, 1e-4, (16, 16, 16))
        save(dataset / BAD / "seg.nii.gz", labels.astype(np.float32))
        datalist, exclusions = build_datalist(dataset)
        assert not exclusions and datalist["facts"][BAD]["voxels"] == {"ET": 25, "TC": 50, "WT": 75}

    def test_unknown_labels_takes_two_words(self, dataset: Path) -> None:
        with pytest.raises(ValueError, match="unknown_labels is 'ignore'"):
            build_datalist(dataset, unknown_labels="ignore")
