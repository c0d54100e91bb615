from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandGaussianNoised

from custom.training.augmentation import (
    RandBrainMaskd,
    RandDropModalitiesd,
    RandModalityBiasFieldd,
    RandModalityContrastd,
    WithinBrain,
)

SIZE = (14, 16, 12)
BRAIN = (slice(3, 11), slice(3, 13), slice(3, 9))


def image(seed=0):
    """A cuboid brain of standardised noise with background zero."""
    voxels = torch.zeros(4, *SIZE)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 8, 10, 6, generator=generator) + 0.01
    voxels[(slice(None), *BRAIN)] = values
    return voxels


def drawn(transform, count, seed=1):
    transform.set_random_state(seed)
    return [transform({"image": image()})["image"] for _ in range(count)]


def dropped(result):
    return frozenset(channel for channel in range(4) if not result[channel].any())


def test_every_subset_with_t1c_or_flair_occurs_and_no_other():
    subsets = {dropped(result) for result in drawn(RandDropModalitiesd("image", prob=1.0), 400)}
    assert all(1 <= len(subset) <= 3 and not {1, 3} <= subset for subset in subsets)
    # 4 single ones; of 6 pairs all but T1c with FLAIR; of 4 triples those that keep T1c or FLAIR
    assert len(subsets) == 4 + 5 + 2


def test_what_stays_is_untouched_and_the_share_is_as_asked():
    results = drawn(RandDropModalitiesd("image", prob=0.3), 400)
    assert sum(bool(dropped(result)) for result in results) / 400 == pytest.approx(0.3, abs=0.07)
    for result in results[:20]:
        kept = sorted({0, 1, 2, 3} - dropped(result))
        assert torch.equal(result[kept], image()[kept])


def test_the_input_is_left_as_it_was():
    source = image()
    for transform in (
        RandDropModalitiesd("image", 1.0),
        RandBrainMaskd("image", 1.0, 1.0),
        RandModalityContrastd("image", 1.0),
        RandModalityBiasFieldd("image", 1.0),
    ):
        transform.set_random_state(0)
        assert not torch.equal(transform({"image": source})["image"], source)
        assert torch.equal(source, image())


@pytest.mark.parametrize("kind", [RandDropModalitiesd, RandBrainMaskd, RandModalityContrastd, RandModalityBiasFieldd])
def test_off_by_default_and_reproducible(kind):
    assert all(torch.equal(result, image()) for result in drawn(kind("image"), 20))
    ours, theirs = drawn(kind("image", prob=0.5), 8), drawn(kind("image", prob=0.5), 8)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert any(not torch.equal(result, image()) for result in ours)


def test_a_brain_mask_shrinks_or_grows_by_whole_voxels_modality_by_modality():
    sizes = set()
    for result in drawn(RandBrainMaskd("image", prob=1.0, channel_prob=0.7, max_voxels=2), 60):
        for channel, before in zip(result, image(), strict=True):
            sides = [int(channel.any(dim=axes).sum()) for axes in ([1, 2], [0, 2], [0, 1])]
            sizes.add(tuple(sides))
            inner = (slice(5, 9), slice(5, 11), slice(5, 7))
            assert torch.equal(channel[inner], before[inner])
    assert sizes == {(8 + 2 * step, 10 + 2 * step, 6 + 2 * step) for step in (-2, -1, 0, 1, 2)}


def test_contrast_keeps_background_and_order_of_intensities():
    results = drawn(RandModalityContrastd("image", prob=1.0, scale=0.2, shift=0.3), 20)
    inside = image()[0] != 0
    order = image()[0][inside].argsort()
    for result in results:
        assert not result[0][~inside].any()
        assert (result[0][inside][order].diff() >= -1e-5).all()
        assert abs(float(result[0][inside].mean())) <= 0.3 + 1e-4
        assert 0.8 - 1e-3 <= float(result[0][inside].std()) <= 1.2 + 1e-3
    assert not torch.allclose(results[0][0][inside].mean(), results[0][1][inside].mean())


def test_a_bias_field_shades_ordinary_tissue_in_each_modality_and_towards_either_side():
    source = image() * 0.01  # the brain's mean is 0, where a product of normalised intensities changes nothing
    transform = RandModalityBiasFieldd("image", prob=1.0)
    transform.set_random_state(0)
    slopes = []
    for _ in range(10):
        shaded = transform({"image": source})["image"]
        inside = source[0] != 0
        assert torch.equal(shaded == 0, source == 0)
        for channel, before in zip(shaded, source, strict=True):
            assert channel[inside].mean() == pytest.approx(float(before[inside].mean()), abs=1e-4)
            assert channel[inside].std() == pytest.approx(float(before[inside].std()), rel=1e-3)
            brain = channel[BRAIN] / before[inside].std()
            slopes.append(float(brain[:, :, -1].mean() - brain[:, :, 0].mean()))
    assert min(slopes) < -1 and max(slopes) > 1
    assert len({round(slope, 3) for slope in slopes}) == len(slopes)


@pytest.mark.parametrize("kind", [RandModalityContrastd, RandModalityBiasFieldd])
def test_an_absent_modality_stays_absent(kind):
    transform = kind("image", prob=1.0)
    empty = torch.zeros(4, *SIZE)
    assert torch.equal(transform({"image": empty})["image"], empty)


@pytest.mark.parametrize("as_list", [False, True])
def test_background_stays_zero_in_each_modality_whatever_is_done_to_the_brain(as_list):
    source = image()
    source[2, 3:6] = 0  # one modality's mask is smaller
    transform = WithinBrain([RandGaussianNoised("image", prob=1.0, std=1.0)])
    transform.set_random_state(0)
    result = transform([{"image": source}])[0] if as_list else transform({"image": source})
    assert torch.equal(result["image"] == 0, source == 0)
    assert not torch.allclose(result["image"], source)


def test_draws_follow_the_seed_inside_the_brain_too():
    transform = WithinBrain([RandGaussianNoised("image", prob=1.0)])
    first, second = (transform.set_random_state(5)({"image": MetaTensor(image())})["image"] for _ in range(2))
    assert torch.equal(first, second)
