"""Regions and label maps after post-processing, against flood fills written here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from numpy.testing import assert_array_equal

from custom.cohort import PALETTES
from custom.inference import (
    PostprocessRegions,
    clean_regions,
    fill_holes,
    nest_regions,
    regions_to_label_map,
    remove_small_components,
)

# --- references -----------------------------------------------------------------------------------------------------


def neighbours(connectivity: int) -> list[tuple[int, int, int]]:
    steps = [(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)]
    return [step for step in steps if 0 < sum(map(abs, step)) <= (1 if connectivity == 6 else 3)]


def flood_fill(mask: np.ndarray, connectivity: int) -> list[set[tuple[int, ...]]]:
    """Connected components as sets of voxels, by walking from voxel to voxel."""
    unseen = {tuple(map(int, voxel)) for voxel in np.argwhere(mask)}
    components = []
    while unseen:
        front = [unseen.pop()]
        component = set(front)
        while front:
            voxel = front.pop()
            for step in neighbours(connectivity):
                other = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if other in unseen:
                    unseen.remove(other)
                    component.add(other)
                    front.append(other)
        components.append(component)
    return components


def holes_in(mask: np.ndarray) -> int:
    """Background voxels that cannot be reached from outside by face neighbours."""
    outside = next(c for c in flood_fill(~np.pad(mask, 1), 6) if (0, 0, 0) in c)
    return int((~np.pad(mask, 1)).sum()) - len(outside)


def random_regions(seed: int, shape: tuple[int, int, int] = (11, 10, 9)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    density = rng.uniform(0.01, 0.1, size=(3, 1, 1, 1)) * (1 + 5 * (seed % 2))
    regions = rng.random((3, *shape)) < density
    for region in regions:
        corner = rng.integers(0, 5, size=3)
        size = rng.integers(2, 6, size=3)
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        region[box] |= rng.random(region[box].shape) < rng.uniform(0.5, 1)
    return regions


def ball(radius: float, size: int = 24) -> np.ndarray:
    grid = np.indices((size,) * 3) - (size - 1) / 2
    return np.sqrt((grid**2).sum(0)) < radius


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_components_are_those_of_a_flood_fill(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 8, 7)) < 0.12
    expected = np.zeros_like(mask)
    for component in flood_fill(mask, 26):
        expected[tuple(np.array(sorted(component)).T)] = len(component) >= 4
    assert 0 < expected.sum() < mask.sum()
    assert_array_equal(remove_small_components(mask, 4), expected)


def test_voxels_touching_by_a_corner_are_one_component() -> None:
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[1, 1, 1] = mask[2, 2, 2] = True
    assert remove_small_components(mask, 2).sum() == 2
    assert remove_small_components(mask, 3).sum() == 0


def test_a_hole_is_background_no_face_path_leads_out_of() -> None:
    mask = np.zeros((5, 5, 5), dtype=bool)
    mask[1:4, 1:4, 1:4] = True
    mask[2, 2, 2] = False
    assert fill_holes(mask)[2, 2, 2]
    mask[1, 1, 1] = False
    assert fill_holes(mask)[2, 2, 2], "a leak through a corner only does not open the hole"
    mask[2, 2, 3] = False
    assert_array_equal(fill_holes(mask), mask)


def test_background_enclosed_only_by_the_edge_of_the_image_is_no_hole() -> None:
    mask = np.ones((4, 4, 4), dtype=bool)
    mask[0, 1:3, 1:3] = False
    assert_array_equal(fill_holes(mask), mask)


def test_nesting_never_loses_a_voxel() -> None:
    regions = random_regions(3)
    nested = nest_regions(regions)
    assert_array_equal(nested[1], regions[0] | regions[1])
    assert_array_equal(nested[2], regions[0] | regions[1] | regions[2])


@pytest.mark.parametrize("holes", [True, (False, True, True), (True, False, True), False])
@pytest.mark.parametrize("min_voxels", [1, 6, (3, 8, 20), (20, 8, 3), (4, 30, 9)])
@pytest.mark.parametrize("seed", range(6))
def test_invariants_hold_together_and_cleaning_is_idempotent(seed: int, min_voxels: object, holes: object) -> None:
    cleaned = clean_regions(random_regions(seed), min_voxels, holes)
    et, tc, wt = cleaned
    assert not (et & ~tc).any() and not (tc & ~wt).any()
    fewest = min_voxels if isinstance(min_voxels, tuple) else (min_voxels,) * 3
    fills = holes if isinstance(holes, tuple) else (holes,) * 3
    for region, size, fill in zip(cleaned, fewest, fills, strict=True):
        assert all(len(component) >= size for component in flood_fill(region, 26))
        assert not fill or holes_in(region) == 0
    assert_array_equal(clean_regions(cleaned, min_voxels, holes), cleaned)


@pytest.mark.parametrize("seed", range(6))
def test_bounding_box_changes_nothing(seed: int) -> None:
    regions = random_regions(seed)
    padded = np.pad(regions, ((0, 0), (5, 3), (0, 7), (2, 0)))
    assert_array_equal(clean_regions(padded, 6)[:, 5:-3, :-7, 2:], clean_regions(regions, 6))


def test_input_is_left_alone() -> None:
    regions = random_regions(1)
    before = regions.copy()
    clean_regions(regions, 6)
    assert_array_equal(regions, before)


def test_enhancing_voxels_outside_the_whole_tumour_are_kept() -> None:
    et, wt = ball(8), ball(10)
    wt[:12] = False
    cleaned = clean_regions(np.stack([et, et, wt]))
    assert_array_equal(cleaned[0], et)
    assert (cleaned[2] >= et).all()


def test_a_stray_enhancing_speck_does_not_enlarge_the_outer_regions() -> None:
    regions = np.zeros((3, 24, 24, 24), dtype=bool)
    regions[2] = ball(6)
    regions[0, 1:3, 1:3, 1:3] = True
    cleaned = clean_regions(regions)
    assert_array_equal(cleaned[2], ball(6))
    assert not cleaned[:2].any()


@pytest.mark.parametrize("min_voxels", [(3, 60, 70), (3, 3, 70), (3, 60, 3)])
def test_a_component_too_small_for_an_outer_region_takes_its_content_along(min_voxels: tuple[int, ...]) -> None:
    regions = np.zeros((3, 16, 16, 16), dtype=bool)
    regions[:, 9:15, 9:15, 9:15] = True
    expected = regions.copy()
    regions[0, 1:3, 1:3, 1:3] = regions[1, 1:3, 1:3, 1:4] = regions[2, 1:4, 1:4, 1:4] = True
    if min_voxels[2] == 3:
        expected[2] = regions[2]
    assert_array_equal(clean_regions(regions, min_voxels), expected)


def test_necrosis_in_a_closed_rim_stays_necrosis_unless_told_otherwise() -> None:
    rim, core = ball(9) & ~ball(7), ball(9)
    regions = np.stack([rim, core, ball(11)])
    assert_array_equal(clean_regions(regions), regions)
    assert_array_equal(clean_regions(regions, holes=True)[0], core)


def test_empty_regions_stay_empty() -> None:
    empty = np.zeros((3, 6, 5, 4), dtype=bool)
    assert_array_equal(clean_regions(empty), empty)


@pytest.mark.parametrize("palette", PALETTES)
def test_label_map_takes_the_values_of_the_palette(palette: str) -> None:
    regions = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool).reshape(3, 4, 1, 1)
    values = PALETTES[palette]
    label_map = regions_to_label_map(regions, palette)
    assert label_map.dtype == np.uint8
    assert label_map.ravel().tolist() == [values["enhancing"], values["core"], values["oedema"], 0]


# --- transform ------------------------------------------------------------------------------------------------------


def probabilities(regions: np.ndarray, spacing: float = 1.0) -> MetaTensor:
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0], dtype=torch.float64))
    noise = np.random.default_rng(0).uniform(0, 0.4, regions.shape)
    return MetaTensor(torch.from_numpy(np.where(regions, 1 - noise, noise).astype(np.float32)), affine=affine)


def test_transform_from_json_gives_one_uint8_channel_and_keeps_metadata() -> None:
    config = {"_target_": "custom.inference.PostprocessRegionsd", "keys": "pred", "thresholds": [0.5, 0.5, 0.5]}
    transform = ConfigParser({"post": config}).get_parsed_content("post")
    image = probabilities(np.stack([ball(4), ball(6), ball(9)]))
    image.meta["filename_or_obj"] = "somewhere.nii.gz"
    label_map = transform({"pred": image, "other": 1})["pred"]
    assert isinstance(label_map, MetaTensor) and label_map.dtype == torch.uint8 and label_map.shape == (1, 24, 24, 24)
    assert label_map.meta["filename_or_obj"] == "somewhere.nii.gz"
    assert_array_equal(label_map.affine.numpy(), image.affine.numpy())
    assert_array_equal(label_map[0].numpy(), np.select([ball(4), ball(6), ball(9)], [3, 1, 2], 0))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_transform_returns_the_kind_of_array_it_was_given(kind: Callable) -> None:
    image = kind(np.stack([ball(4), ball(6), ball(9)]).astype(np.float32))
    label_map = PostprocessRegions(palette="brats2021")(image)
    assert type(label_map) is type(image)
    assert_array_equal(np.asarray(label_map)[0], np.select([ball(4), ball(6), ball(9)], [4, 1, 2], 0))


def test_thresholds_are_per_region_and_inclusive() -> None:
    image = torch.full((3, 6, 6, 6), 0.5)
    label_map = PostprocessRegions(thresholds=[0.6, 0.51, 0.5], min_volume_mm3=0)(image)
    assert (label_map == 2).all()


@pytest.mark.parametrize(("spacing", "kept"), [(1.0, False), (2.0, True), (0.5, False)])
def test_size_limit_is_a_volume(spacing: float, kept: bool) -> None:
    regions = np.zeros((3, 8, 8, 8), dtype=bool)
    regions[:, 2:5, 2:5, 2:5] = True
    assert bool(PostprocessRegions()(probabilities(regions, spacing)).any()) is kept


@pytest.mark.parametrize(("voxels", "kept"), [(49, False), (50, True)])
@pytest.mark.parametrize("spacing", [1.0, 1 - 1e-7, 1 + 1e-7])
def test_fifty_voxels_at_one_millimetre_are_kept(voxels: int, kept: bool, spacing: float) -> None:
    regions = np.zeros((3, 10, 10, 10), dtype=bool)
    regions.reshape(3, -1)[:, :voxels] = True
    assert bool(PostprocessRegions()(probabilities(regions, spacing)).any()) is kept


def test_a_region_lost_to_the_size_limit_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    image = probabilities(np.stack([ball(1.5), ball(6), ball(9)]))
    image.meta["filename_or_obj"] = "BT0001/brain_t1.nii.gz"
    with caplog.at_level(logging.WARNING):
        PostprocessRegions()(image)
    assert [record.getMessage() for record in caplog.records] == [
        "BT0001/brain_t1.nii.gz: ET had only small components and is now empty"
    ]


@pytest.mark.parametrize("value", [float("nan"), -3.0, 7.0])
def test_logits_and_nan_are_refused(value: float) -> None:
    image = torch.zeros(3, 4, 4, 4)
    image[1, 2, 2, 2] = value
    with pytest.raises(ValueError, match="sigmoid"):
        PostprocessRegions()(image)


@pytest.mark.parametrize("shape", [(1, 4, 4, 4), (1, 3, 4, 4, 4), (3, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[3, X, Y, Z\]"):
        PostprocessRegions()(torch.zeros(shape))


def test_unknown_palette_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="brats2021, brats2023"):
        PostprocessRegions(palette="brats")


def test_real_annotations_pass_nearly_unchanged(real_data: Path) -> None:
    truth = np.asarray(nib.load(next(real_data.glob("brats2021/*00006/*_seg.nii.gz"))).dataobj)
    regions = np.stack([truth == 4, (truth == 4) | (truth == 1), truth > 0])
    label_map = PostprocessRegions(palette="brats2021")(regions.astype(np.float32))[0]
    assert np.count_nonzero(label_map != truth) < 10
