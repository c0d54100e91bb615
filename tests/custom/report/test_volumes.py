"""Volumes: in ml, by palette, and in a table that holds what it was given."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from custom.report import region_volumes, write_volumes_csv


class TestVolumes:
    def test_volumes_in_ml(self, brain):
        volumes = region_volumes(brain[1], 4.5)
        expected = {"ET": 9, "TC": 5 * 6 * 3, "WT": 8 * 10 * 5 + 10 * 12 - 8 * 10}
        assert volumes == pytest.approx({name: voxels * 4.5 / 1000 for name, voxels in expected.items()})
        assert list(volumes) == ["ET", "TC", "WT"]

    def test_palette_decides_what_enhances(self):
        label_map = np.array([1, 2, 3, 4], np.uint8)
        assert region_volumes(label_map, 1000, "brats2021") == {"ET": 1, "TC": 2, "WT": 3}
        assert region_volumes(label_map * np.array([1, 1, 1, 0]), 1000) == {"ET": 1, "TC": 2, "WT": 3}

    def test_csv_round_trip(self, tmp_path, rows):
        write_volumes_csv(tmp_path / "new" / "volumes.csv", rows)
        with open(tmp_path / "new" / "volumes.csv", newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        assert list(read[0]) == ["subject", "et_ml", "tc_ml", "wt_ml", "status", "seconds", "warnings", "weights"]
        assert [row["et_ml"] for row in read] == ["1.235", "0.000", ""]
        assert read[1]["warnings"] == "no ET; thin slices" and read[2]["subject"] == "c<script>"
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["volumes.csv"]

    def test_failure_keeps_the_old_table(self, tmp_path, rows):
        path = tmp_path / "volumes.csv"
        write_volumes_csv(path, rows[:1])
        before = path.read_bytes()
        with pytest.raises(TypeError):
            write_volumes_csv(path, [*rows, {"subject": "d", "warnings": object()}])
        assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["volumes.csv"]
