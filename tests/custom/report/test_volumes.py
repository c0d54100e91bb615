"""Volumes: in ml, and by palette."""

from __future__ import annotations

import numpy as np
import pytest

from custom.report import region_volumes


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
