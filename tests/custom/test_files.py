from __future__ import annotations

import errno
import hashlib
import os

import numpy as np
import pytest
import torch

from custom.files import FileError, file_sha256, option_values, whole_file, write_table, write_text


def test_whole_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "mask.nii.gz"
    with whole_file(target) as temporary:
        temporary.write_bytes(b"half")
        assert temporary.name.endswith(".nii.gz")
        assert not target.exists()
    assert target.read_bytes() == b"half"
    assert target.stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_whole_file_leaves_the_old_content_when_interrupted(tmp_path, stop):
    target = tmp_path / "volumes.csv"
    write_text(target, "old")
    with pytest.raises(stop), whole_file(target) as temporary:
        temporary.write_text("new, but")
        raise stop
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["volumes.csv"]


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write to .*file.*choose another folder"):
        write_text(tmp_path / "file" / "volumes.csv", "text")
    with pytest.raises(FileError, match="is a folder: choose another name"):
        write_text(tmp_path, "text")


def test_a_full_disk_is_said(tmp_path):
    with pytest.raises(FileError, match=rf"no space is left in {tmp_path}: make room"), whole_file(tmp_path / "a.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), whole_file(tmp_path / "a.csv"):
        raise PermissionError
    assert not list(tmp_path.iterdir())


def test_file_sha256(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc" * 1_000_000)
    assert file_sha256(tmp_path / "weights") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


@pytest.mark.parametrize("given", [[0.5, 0.4], (0.5, 0.4), np.array([0.5, 0.4]), torch.tensor([0.5, 0.25])])
def test_values_may_be_a_list_a_tuple_or_an_array(given):
    found = option_values("thresholds", given, "two numbers", lambda one: type(one) is float, (2,))
    assert found == tuple(float(one) for one in given)
    assert option_values("thresholds", 0.5, "a number", lambda one: type(one) is float, (1,)) == (0.5,)


def test_table_quotes_what_needs_it_and_writes_a_header_without_rows(tmp_path):
    write_table(tmp_path / "a.csv", ["subject", "reason"], [{"subject": "BT0001", "reason": "a, b"}])
    write_table(tmp_path / "b.csv", ["subject", "reason"], [])
    assert (tmp_path / "a.csv").read_text() == 'subject,reason\nBT0001,"a, b"\n'
    assert (tmp_path / "b.csv").read_text() == "subject,reason\n"


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path):
    write_table(tmp_path / "table.csv", ["subject"], [{"subject": os.fsdecode(b"caf\xe9")}])
    assert (tmp_path / "table.csv").read_text() == "subject\ncaf\\udce9\n"
