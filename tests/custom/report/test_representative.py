"""Figure 2: the truth on top, the prediction below, on the same slices."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from custom.report.pictures import REGION_COLOURS, truth_figure, write_qc_picture

SPACING = (1.0, 1.5, 3.0)


@pytest.fixture
def shifted(brain):
    """Prediction three voxels to the left of the truth, without ET."""
    prediction = np.roll(brain[1], -3, axis=0)
    prediction[prediction == 3] = 1
    return prediction


def _outlines(axes):
    found = {}
    for one in axes.collections:
        points = np.concatenate([path.vertices for path in one.get_paths() if len(path.vertices)])
        found[to_hex(one.get_edgecolor()[0]).upper()] = points
    return found


def test_truth_above_prediction_below(brain, shifted):
    images, truth = brain
    figure = truth_figure(images, shifted, truth, SPACING, "name")
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["ground truth", "prediction"]
    above, below = (_outlines(figure.axes[i]) for i in (0, 3))
    assert set(above) == set(REGION_COLOURS.values()) and REGION_COLOURS["ET"] not in below
    np.testing.assert_allclose(above[REGION_COLOURS["WT"]].min(0) - below[REGION_COLOURS["WT"]].min(0), (3, 0))


def test_both_rows_show_the_same_t1c_slices(brain, shifted):
    images, truth = brain
    figure = truth_figure(images, shifted, truth, SPACING, "name")
    assert figure.axes[0].get_title() == "axial, slice 14 of 20"
    for column in range(3):
        above, below = (np.asarray(figure.axes[row + column].images[0].get_array()) for row in (0, 3))
        np.testing.assert_array_equal(above, below)
    values = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(np.unique(values[values > 0]), np.unique(images[1, ..., 13][images[1, ..., 13] > 0]))


def test_the_smaller_region_is_painted_on_the_larger(brain):
    images, truth = brain
    figure = truth_figure(images, truth, truth, SPACING, "name")
    overlay = np.asarray(figure.axes[0].images[1].get_array())
    painted = {region: (overlay[..., :3] == to_rgb(REGION_COLOURS[region])).all(-1).sum() for region in REGION_COLOURS}
    assert painted == {"ET": 3 * 3, "TC": 5 * 6 - 3 * 3, "WT": 10 * 12 - 5 * 6}


def test_right_stays_on_the_left_under_the_overlay(brain):
    figure = truth_figure(*brain, brain[1], SPACING, "name")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    points = axes.transData.transform(_outlines(axes)[REGION_COLOURS["WT"]])
    assert points[:, 0].max() < np.mean(axes.get_window_extent().intervalx)
    assert axes.get_aspect() == pytest.approx(1.5)


def test_volumes_of_both_fit_into_the_picture(brain, shifted):
    images, truth = brain
    figure = truth_figure(images, shifted, truth, (9.0, 9.0, 9.0), "name")
    figure.draw_without_rendering()
    legend = figure.legends[0]
    assert legend.get_texts()[0].get_text() == "ET enhancing tumour\n6.6 ml, predicted 0.0 ml"
    box = legend.get_window_extent()
    assert box.x0 > 0 and box.x1 < 1200 and box.y0 > 0


def test_empty_prediction_is_said(brain):
    images, truth = brain
    figure = truth_figure(images, np.zeros_like(truth), truth, SPACING, "name", weights_note="a note")
    texts = [text.get_text() for text in figure.texts]
    assert "No tumour in the prediction" in texts
    assert "a note · research use, not a medical device" in texts


def test_shapes_that_differ_are_refused(brain):
    with pytest.raises(ValueError, match="name: .*one 3-D grid"):
        truth_figure(brain[0], brain[1][1:], brain[1], SPACING, "name")


def test_picture_from_files_is_the_figure(tmp_path, files, brain):
    from PIL import Image

    truth = {"reference_path": files[1], "reference_palette": "brats2023", "draw": truth_figure}
    write_qc_picture(tmp_path / "file.png", *files, title="name", **truth)
    truth_figure(*brain, brain[1], SPACING, "name").savefig(tmp_path / "array.png", facecolor="#0b0d10")
    from_file, from_array = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("file", "array"))
    assert from_file.shape[:2] == (850, 1200)
    np.testing.assert_array_equal(from_file[..., :3], from_array[..., :3])
