"""The QC figure shows the tumour where it is."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from custom.report.pictures import REGION_COLOURS, qc_figure, tumour_slices

SPACING = (1.0, 1.5, 3.0)


def _contours(axes):
    """Outline paths by colour and line style: {(hex, is_dashed): points [n, 2]}."""
    found = {}
    for one in axes.collections:
        paths = [path.vertices for path in one.get_paths() if len(path.vertices)]
        dashed = one.get_linestyle()[0][1] is not None
        found[to_hex(one.get_edgecolor()[0]).upper(), dashed] = np.concatenate(paths)
    return found


def _texts(figure):
    return [text.get_text() for text in (*figure.texts, *figure.legends[0].get_texts())]


class TestQcFigure:
    def test_panels_and_their_letters(self, brain):
        figure = qc_figure(*brain, SPACING, "name")
        letters = ["".join(text.get_text() for text in axes.texts) for axes in figure.axes]
        assert letters == ["RLAP", "RLSI", "APSI"] * 2
        assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["T1c", "T2-FLAIR"]
        np.testing.assert_array_equal(figure.get_size_inches() * figure.dpi, (1200, 850))

    def test_right_is_on_the_left_and_front_is_up(self, brain):
        figure = qc_figure(*brain, SPACING, "name")
        figure.draw_without_rendering()
        for axes in figure.axes[:2]:
            points = axes.transData.transform(_contours(axes)[REGION_COLOURS["WT"], False])
            middle = axes.get_window_extent()
            assert points[:, 0].max() < (middle.x0 + middle.x1) / 2, "a tumour on the right is drawn on the left"
            assert points[:, 1].min() > (middle.y0 + middle.y1) / 2, "a tumour in front or on top is drawn on top"
        sagittal = figure.axes[2]
        points = sagittal.transData.transform(_contours(sagittal)[REGION_COLOURS["WT"], False])
        assert points[:, 0].max() < np.mean(sagittal.get_window_extent().intervalx), "the front is on the left"

    def test_slices_are_those_with_most_tumour(self, brain):
        images, label_map = brain
        assert tumour_slices(label_map > 0, fallback=images[0] > 0)[2] == 13
        figure = qc_figure(images, label_map, SPACING, "name")
        assert figure.axes[0].get_title() == "axial, slice 14 of 20"

    def test_image_is_the_slice_of_its_modality(self, brain):
        images, label_map = brain
        figure = qc_figure(images, label_map, SPACING, "name")
        for row, modality in ((0, 1), (3, 3)):
            drawn = figure.axes[row].images[0].get_array()
            values = np.unique(np.asarray(drawn)[np.asarray(drawn) > 0])
            np.testing.assert_array_equal(values, np.unique(images[modality, ..., 13][images[modality, ..., 13] > 0]))

    def test_outlines_surround_their_masks(self, brain):
        images, label_map = brain
        axes = qc_figure(images, label_map, SPACING, "name").axes[0]
        contours = _contours(axes)
        assert set(contours) == {(colour, False) for colour in REGION_COLOURS.values()}
        for region, (width, height) in {"ET": (3, 3), "TC": (5, 6), "WT": (10, 12)}.items():
            np.testing.assert_allclose(np.ptp(contours[REGION_COLOURS[region], False], axis=0), (width, height))

    def test_reference_is_dashed_with_its_volume(self, brain):
        images, label_map = brain
        reference = np.roll(label_map, -3, axis=0)
        reference[reference == 3] = 1
        figure = qc_figure(images, label_map, SPACING, "name", reference=reference)
        contours = _contours(figure.axes[0])
        shift = contours[REGION_COLOURS["WT"], False].min(0) - contours[REGION_COLOURS["WT"], True].min(0)
        np.testing.assert_allclose(shift, (3, 0))
        assert (REGION_COLOURS["ET"], True) not in contours
        assert any("ET 0.0 ml (reference 0.0 ml)" in text for text in _texts(figure))

    def test_reference_leads_where_nothing_was_predicted(self, brain):
        images, label_map = brain
        figure = qc_figure(images, np.zeros_like(label_map), SPACING, "name", reference=label_map)
        assert figure.axes[0].get_title() == "axial, slice 14 of 20"

    def test_empty_mask(self, brain):
        images, label_map = brain
        figure = qc_figure(images, np.zeros_like(label_map), SPACING, "name")
        assert figure.axes[0].get_title() == "axial, slice 11 of 20"
        assert not any(axes.collections for axes in figure.axes)
        assert "No tumour in the mask" in _texts(figure)

    def test_no_brain_at_all(self):
        figure = qc_figure(np.zeros((4, 8, 8, 8)), np.zeros((8, 8, 8), np.uint8), (1, 1, 1), "name")
        figure.draw_without_rendering()
        assert len(figure.axes) == 6

    @pytest.mark.parametrize(
        ("missing", "rows"),
        [
            ((), ["T1c", "T2-FLAIR"]),
            ((0, 2), ["T1c", "T2-FLAIR"]),
            ((1,), ["no T1c, T1n instead", "T2-FLAIR"]),
            ((3,), ["T1c", "no T2-FLAIR, T2w instead"]),
            ((0, 1, 2), ["no T1c", "T2-FLAIR"]),
            ((0, 2, 3), ["T1c", "no T2-FLAIR"]),
        ],
    )
    def test_the_place_of_a_missing_modality_says_so(self, brain, missing, rows):
        images, label_map = brain
        images[list(missing)] = 0
        figure = qc_figure(images, label_map, SPACING, "name")
        figure.draw_without_rendering()
        assert [figure.axes[row].get_ylabel() for row in (0, 3)] == rows
        for row, (wanted, instead) in zip((0, 3), ((1, 0), (3, 2)), strict=True):
            shown = figure.axes[row].images[0].get_array()
            assert shown.any() == (wanted not in missing or instead not in missing)

    def test_tumour_outside_the_brain_is_not_cropped_away(self, brain):
        images, label_map = brain
        label_map[0:3, 0:3, :] = 2
        label_map[:, :, :11] = label_map[:, :, 16:] = 0
        axes = qc_figure(images, label_map, SPACING, "name").axes[0]
        assert np.ptp(_contours(axes)[REGION_COLOURS["WT"], False][:, 0]) == 34

    def test_anisotropic_voxels_keep_their_proportions(self, brain):
        figure = qc_figure(*brain, SPACING, "name")
        aspects = [axes.get_aspect() for axes in figure.axes[:3]]
        np.testing.assert_allclose(aspects, (1.5 / 1, 3 / 1, 3 / 1.5))

    def test_notes_are_written_as_they_are(self, brain):
        figure = qc_figure(*brain, SPACING, "a_$b$", "two", weights_note="trained on $n$ phantoms")
        figure.draw_without_rendering()
        assert {"a_$b$", "two"} <= set(_texts(figure))
        assert "trained on $n$ phantoms · research use, not a medical device" in _texts(figure)

    def test_warning_is_written_at_the_bottom_and_fits(self, brain):
        images, label_map = brain
        label_map[label_map == 3] = 1
        erased = "ET had only components smaller than min_volume_mm3 and is empty"
        figure = qc_figure(images, label_map, SPACING, "name", warning=erased, weights_note="a note")
        assert erased in _texts(figure)
        figure = qc_figure(images, np.zeros_like(label_map), SPACING, "name", warning=f"{erased} $x$ " + 90 * "w")
        figure.draw_without_rendering()
        (text,) = (one for one in figure.texts if one.get_text().startswith("ET had only"))
        assert text.get_text().endswith("w…") and text.get_window_extent().x1 < 1200

    def test_another_palette(self, brain):
        images, label_map = brain
        label_map[label_map == 3] = 4
        figure = qc_figure(images, label_map, SPACING, "name", palette="brats2021")
        assert (REGION_COLOURS["ET"], False) in _contours(figure.axes[0])

    def test_shapes_that_differ_are_refused(self, brain):
        images, label_map = brain
        with pytest.raises(ValueError, match="name: .*one 3-D grid"):
            qc_figure(images, label_map[1:], SPACING, "name")
