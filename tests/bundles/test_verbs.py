"""Every verb of `monai.bundle` on the released zips, from an unrelated folder, with nothing of ours installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import TINY, monai_bundle, serving
from torch import nn

import custom
from custom.cohort.four_channel import stack
from custom.comnet import CoMNeT
from custom.corrdiff import corrdiff_tiny
from custom.mednext import mednext_tiny
from custom.release import BUNDLES, WEIGHTS, pack
from custom.weights import save_atomically

FACTS = {name: TINY[name] for name in ("backbone", "spacing")}
FACTS |= {"num_folds": 2, "mirror_axes": [0], "notes": "untrained"}
NETWORKS = {
    "comnet_mednext": mednext_tiny,
    "comnet_corrdiff": lambda: CoMNeT(mednext_tiny, 1, corrdiff_tiny()),
    "comnet_ensemble": lambda: CoMNeT(mednext_tiny, 2, corrdiff_tiny()),
}
ONNX_TOLERANCE = 1e-3


def awake(network: nn.Module) -> nn.Module:
    """Weights for which every part of the network, the corrector too, changes the output."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Folder of a release with small untrained weights."""
    run, folder = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("dist")
    torch.manual_seed(0)
    for bundle, build in NETWORKS.items():
        facts = FACTS if bundle == "comnet_mednext" else FACTS | {"corrector": "custom.corrdiff.corrdiff_tiny"}
        save_atomically({"model": awake(build()).state_dict(), "provenance": facts}, run / WEIGHTS[bundle])
    pack(str(folder), weights=str(run))
    return folder


@pytest.fixture(scope="module")
def url(dist) -> Iterator[str]:
    """Address of a server on loopback that serves the release."""
    with serving(dist) as address:
        yield address


@pytest.fixture(scope="module")
def downloaded(dist, url, bare, tmp_path_factory) -> Path:
    """Folder into which each bundle was downloaded by MONAI."""
    folder = tmp_path_factory.mktemp("downloaded")
    for bundle in BUNDLES:
        address = f"{url}/{bundle}_v{custom.__version__}.zip"
        monai_bundle(bare, "download", "--name", bundle, "--url", address, "--bundle_dir", folder)
    return folder


FIRST = {
    "inference.json": [
        *("weights", "network_def", "network", "preprocessing", "postprocessing", "cohort"),
        *("inferer", "few_windows", "whole_volume", "sliding_window"),
    ],
    "train.json": [
        *("network_def", "network", "cohort", "loss", "optimizer", "coarse_inferer"),
        *("train#preprocessing", "train#inferer", "train#postprocessing"),
        *("validate#preprocessing", "validate#postprocessing", "validate#inferer", "validate#key_metric"),
    ],
}
ASK_FOR_EACH = """
import os, sys
from monai.bundle import ConfigParser
config, root, *entries = sys.argv[1:]
for entry in entries:  # each in a process where nothing of ours has been imported
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{entry} of {config} does not find the package by itself")
        continue
    parser = ConfigParser()
    parser.read_config(config)
    parser.update({"bundle_root": root})
    if parser.get(entry) is not None:
        parser.get_parsed_content(entry)
    os._exit(0)
"""


@pytest.mark.parametrize("config", FIRST)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_whatever_is_asked_for_first_finds_the_package(downloaded, bare, bundle, config):
    """Servers, exporters and clients ask for parts of a config, not for a run; `_requires_` stands where it must."""
    root = downloaded / bundle
    arguments = ["-S", "-c", ASK_FOR_EACH, str(root / "configs" / config), str(root), *FIRST[config]]
    result = subprocess.run(
        [sys.executable, *arguments], cwd="/", env=bare, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def test_custom_is_not_there_by_itself(bare):
    probe = "import importlib.util, monai; print(importlib.util.find_spec('custom'))"
    assert monai_bundle(bare, code=probe).split()[-1] == "None"


WITH_WITNESS = """
import atexit, runpy, sys
atexit.register(lambda: print("imported", sys.modules["custom"].__file__))
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_downloaded_bundle_segments_with_its_own_copy(bundle, downloaded, phantoms, bare, tmp_path):
    root = downloaded / bundle
    shutil.copytree(phantoms / "BT0001", tmp_path / "data" / "BT0001")
    words = ["run", "--config_file", root / "configs" / "inference.json", "--bundle_root", root, "--num_workers", 0]
    words += ["--dataset_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--write_pictures", False]
    printed = monai_bundle(bare, *words, code=WITH_WITNESS)
    assert f"imported {root / 'custom' / '__init__.py'}" in printed
    mask = nib.load(tmp_path / "out" / "BT0001" / "BT0001_seg.nii.gz")
    image = nib.load(phantoms / "BT0001" / "brain_t1.nii.gz")
    assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_one_four_channel_file_given_as_data_is_segmented(bundle, downloaded, phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    root = downloaded / bundle
    (case,) = stack(str(phantoms / "BT0002"), output_dir=str(tmp_path / "studies"))
    settings = {"dataset#data": [{"image": case}], "output_dir": str(tmp_path / "out"), "num_workers": 0}
    config = str(root / "configs" / "inference.json")
    monai.bundle.run(config_file=config, bundle_root=str(root), workflow_type=None, write_pictures=False, **settings)
    mask = nib.load(tmp_path / "out" / "BT0002" / "BT0002_seg.nii.gz")
    assert mask.shape == nib.load(case).shape[:3] and np.array_equal(mask.affine, nib.load(case).affine)


def arguments(root: Path) -> dict[str, str]:
    return {
        "config_file": str(root / "configs" / "inference.json"),
        "meta_file": str(root / "configs" / "metadata.json"),
        "bundle_root": str(root),
    }


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_follow_the_schema(bundle, downloaded, real_data, tmp_path):
    metadata = downloaded / bundle / "configs" / "metadata.json"
    schema = real_data / "schema" / json.loads(metadata.read_text())["schema"].rsplit("/", 1)[-1]
    shutil.copyfile(schema, tmp_path / "schema.json")  # what is there is not downloaded
    monai.bundle.verify_metadata(meta_file=str(metadata), filepath=str(tmp_path / "schema.json"))


def loaded(root: Path) -> nn.Module:
    folder = {"bundle_root": str(root)}
    return monai.bundle.load(
        root.name, bundle_dir=root.parent, workflow_type="inference", args_file=folder, device="cpu"
    ).eval()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_network_fits_the_metadata_and_torchscript_gives_its_output(bundle, downloaded, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    root = downloaded / bundle
    monai.bundle.verify_net_in_out(net_id="network_def", device="cpu", n=2, **arguments(root))
    monai.bundle.ckpt_export(filepath=str(tmp_path / "model.ts"), **arguments(root))
    network, script = loaded(root), torch.jit.load(tmp_path / "model.ts").eval()
    image = torch.rand(1, 4, 32, 48, 32)
    with torch.no_grad():
        expected = network(image)
        assert torch.allclose(script(image), expected, atol=1e-5)
        weights = torch.load(root / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


@pytest.mark.no_cover  # tracing makes an export three times as long
@pytest.mark.parametrize("bundle", ["comnet_mednext", "comnet_corrdiff"])  # the ensemble: docs/results.md, Exports
def test_onnx_gives_the_networks_output(bundle, downloaded, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir("/")
    root = downloaded / bundle
    file, checkpoint = str(tmp_path / "model.onnx"), str(root / "models" / "model.pt")
    shape = [1, 4, 16, 32, 16]
    monai.bundle.onnx_export(
        net_id="network_def", filepath=file, ckpt_file=checkpoint, input_shape=shape, **arguments(root)
    )
    session, image = onnxruntime.InferenceSession(file), torch.rand(shape)
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        assert np.abs(found - loaded(root)(image).numpy()).max() < ONNX_TOLERANCE


@pytest.mark.parametrize("bundle", BUNDLES)
def test_workflow_has_every_property(bundle, downloaded, monkeypatch):
    monkeypatch.chdir("/")
    root = downloaded / bundle
    settings = {"config_file": arguments(root)["config_file"], "bundle_root": str(root)}
    data = {"dataset#data": [{"image": "x.nii.gz"}]}
    workflow = monai.bundle.create_workflow(workflow_type="infer", logging_file=False, **settings, **data)
    assert workflow.check_properties() == []
    assert workflow.version == custom.__version__
