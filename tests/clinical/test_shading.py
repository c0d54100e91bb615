"""N4 evens out a shaded head, and leaves an even one as it is."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest

from custom.clinical.registration import Motion
from custom.clinical.shading import without_shading
from custom.clinical.study import prepare_study
from custom.phantom import simulate

for _library in ("dcm2niix", "highdicom", "SimpleITK"):
    pytest.importorskip(_library, reason="needs the extra clinical: pip install 'comnet-glioma[clinical]'")


@pytest.fixture(scope="module")
def brain():
    """T1n of a phantom of 2 mm, and where its brain is."""
    image = simulate((80, 100, 80), (2.0,) * 3, 0)[0][0]
    return image, image > 0


def unevenness(image, original, inside):
    """Spread of the brightness against that of the original, as a share."""
    ratio = image[inside] / original[inside]
    return ratio.std() / ratio.mean()


def test_shading_is_evened_out(brain):
    image, inside = brain
    x, _, z = np.indices(image.shape)
    shaded = image * 2 ** ((x / 79 - 0.5) + (z / 79 - 0.5))
    assert unevenness(shaded, image, inside) > 0.15
    assert unevenness(without_shading(shaded, inside), image, inside) < 0.08


def test_an_even_image_stays_even(brain):
    image, inside = brain
    assert unevenness(without_shading(image, inside), image, inside) < 0.1  # the tumour draws the field a little


@pytest.mark.parametrize("n4", [True, False])
def test_a_study_is_evened_out_by_choice(study, brain_mask, tmp_path, monkeypatch, n4):
    shutil.rmtree(study / "S002")  # T1n
    still = Motion(np.eye(4), 1.0, 2.0, 0.0, 0.0, 0.0, 1.0)
    monkeypatch.setattr("custom.clinical.study.register", lambda fixed, moving: still)
    monkeypatch.setattr("custom.clinical.study.without_shading", lambda image, brain: image + 10_000)
    found = prepare_study(study, tmp_path / "out", without=("t1n",), brain_mask=brain_mask, n4=n4, pictures=False)
    brain = nib.load(found.folder / "brain_mask.nii.gz").get_fdata() > 0
    assert found.record["n4"] is n4
    for file in found.images.values():
        assert (nib.load(file).get_fdata()[brain].min() >= 10_000) == n4
