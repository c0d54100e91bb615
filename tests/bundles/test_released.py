"""The released weights from wherever they come: the clone, a zip that MONAI has downloaded, the wheel; and damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import BUNDLES, monai_bundle, serving

import custom
from custom import cli
from custom.phantom import write_phantom
from custom.release import pack
from custom.weights import Weights

MODEL = BUNDLES / "comnet_ensemble" / "models" / "model.pt"
SEGMENT = "import sys; from custom.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("data"), "BT0001", (64, 72, 60), (2.5, 2.5, 2.5), seed=5)


@pytest.fixture(scope="module")
def expected(subject, tmp_path_factory) -> np.ndarray:
    """What `comnet segment` makes of it in a clone."""
    out = tmp_path_factory.mktemp("out")
    cli.main(["segment", str(subject), "--output_dir", str(out), "--nopictures"])
    return mask(out)


def mask(out: Path) -> np.ndarray:
    record = json.loads((out / "BT0001" / "record.json").read_text())
    assert record["weights"] == Weights(MODEL).note
    return np.asarray(nib.load(out / "BT0001" / "BT0001_seg.nii.gz").dataobj)


@pytest.fixture(scope="module")
def downloaded(bare, tmp_path_factory) -> Path:
    """The ensemble, packed with the released weights and downloaded by MONAI."""
    dist, folder = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("downloaded")
    pack(str(dist))
    with serving(dist) as url:
        address = f"{url}/comnet_ensemble_v{custom.__version__}.zip"
        words = ["--name", "comnet_ensemble", "--url", address, "--bundle_dir", folder]
        monai_bundle(bare, "download", *words)
    return folder / "comnet_ensemble"


def run_words(root: Path, subject: Path, out: Path) -> list[object]:
    words = ["run", "--config_file", root / "configs" / "inference.json", "--bundle_root", root]
    return [*words, "--dataset_dir", subject, "--output_dir", out, "--num_workers", 0, "--write_pictures", False]


def test_a_downloaded_bundle_segments_as_the_clone_does(downloaded, bare, subject, expected, tmp_path):
    assert (downloaded / "models" / "model.pt").read_bytes() == MODEL.read_bytes()
    monai_bundle(bare, *run_words(downloaded, subject, tmp_path))
    found = mask(tmp_path)
    assert expected.any() and (found != expected).mean() < 1e-4


def test_a_flipped_byte_is_told_of_and_makes_no_mask_through_monai(downloaded, bare, subject, tmp_path):
    root = tmp_path / "comnet_ensemble"
    shutil.copytree(downloaded, root)
    flip(root / "models" / "model.pt", 0.5)
    told = monai_bundle(bare, *run_words(root, subject, tmp_path / "out"), fails=True)
    assert f"{root / 'models' / 'model.pt'} is not a readable checkpoint" in told  # MONAI adds a traceback
    assert not list(tmp_path.rglob("*_seg.nii.gz"))


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_byte_is_one_sentence_and_no_mask(place, subject, tmp_path, capsys):
    shutil.copy(MODEL, tmp_path / "model.pt")
    flip(tmp_path / "model.pt", place)
    with pytest.raises(SystemExit) as caught:
        cli.main(["segment", str(subject), "--output_dir", str(tmp_path / "out"), "--weights", str(tmp_path)])
    told = str(caught.value)
    assert told.startswith(f"comnet: {tmp_path / 'model.pt'} is ") and "\n" not in told
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.rglob("*_seg.nii.gz"))


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[round(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this clone, built without the network."""
    pytest.importorskip("hatchling", reason="pip install hatchling, to build the wheel without the network")
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words), str(BUNDLES.parent)], check=True, timeout=300)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_brings_all_released_weights_with_their_terms(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for model in BUNDLES.glob("*/models/model.pt"):
        bundle = f"custom/bundles/{model.parent.parent.name}"
        assert {f"{bundle}/models/model.pt", f"{bundle}/docs/README.md", f"{bundle}/docs/data_license.txt"} <= {*names}


def test_an_installed_wheel_segments_as_the_clone_does(wheel, bare, subject, expected, tmp_path):
    """Unpacked, which is what installing a pure wheel is, where no clone is in reach."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = bare | {"PYTHONPATH": f"{tmp_path / 'site'}:{bare['PYTHONPATH']}"}
    told = monai_bundle(environment, "segment", subject, "--output_dir", tmp_path / "out", "--nopictures", code=SEGMENT)
    assert "site/custom/bundles/comnet_ensemble" in told
    assert (mask(tmp_path / "out") != expected).mean() < 1e-4
