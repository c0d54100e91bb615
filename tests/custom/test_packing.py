from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from monai.bundle import scripts
from torch import nn

import custom
from custom.release import BUNDLES, WEIGHTS, PackingError, bundle_files, pack, plain_state_dict
from custom.weights import CheckpointError, Weights, read_checkpoint, save_atomically

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "bundles"
FACTS = {"backbone": "custom.mednext.mednext_tiny", "spacing": [5.0, 5.0, 5.0], "trained_on": ["BT0001"]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_atomically({"model": nn.Linear(3, 2).state_dict(), "provenance": FACTS}, folder / WEIGHTS["comnet_mednext"])
    return folder


@pytest.fixture(scope="module")
def dist(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pack(str(folder), weights=str(weights), repo="owner/comnet/v1")
    return folder


def archive(dist: Path, bundle: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(dist / f"{bundle}_v{custom.__version__}.zip")


def test_two_packings_are_the_same_bytes(dist, weights, tmp_path):
    pack(str(tmp_path / "again"), weights=str(weights), repo="owner/comnet/v1")
    files = sorted(path.relative_to(dist) for path in dist.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {f"{name}_v{custom.__version__}.zip" for name in BUNDLES}
    for file in files:
        assert (dist / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize("bundle", BUNDLES)
def test_custom_in_the_zip_is_the_source_whole(dist, bundle):
    zipped = archive(dist, bundle)
    prefix = f"{bundle}/custom/"
    ours = {name.removeprefix(prefix): zipped.read(name) for name in zipped.namelist() if name.startswith(prefix)}
    source = Path(custom.__file__).parent
    files = [*source.rglob("*.py"), *source.rglob("*.html")]
    assert ours == {path.relative_to(source).as_posix(): path.read_bytes() for path in files}
    assert "report/templates/base.html" in ours, "without templates no report could be written"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_zip_holds_configs_docs_and_licence_under_its_name(dist, bundle):
    names = set(archive(dist, bundle).namelist())
    assert all(name.startswith(f"{bundle}/") and ".." not in name for name in names)
    for file in SOURCES.joinpath(bundle, "configs").iterdir():
        assert f"{bundle}/configs/{file.name}" in names
    assert {f"{bundle}/LICENSE", f"{bundle}/docs/README.md", f"{bundle}/docs/data_license.txt"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(("/", ".pyc"))]
    entry = archive(dist, bundle).getinfo(f"{bundle}/LICENSE")
    assert entry.date_time == (1980, 1, 1, 0, 0, 0) and entry.external_attr >> 16 == 0o100644


def test_weights_are_a_plain_state_dict_that_still_says_what_it_is(dist, tmp_path):
    archive(dist, "comnet_mednext").extract("comnet_mednext/models/model.pt", tmp_path)
    path = tmp_path / "comnet_mednext" / "models" / "model.pt"
    content = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    target.load_state_dict(content, strict=True)
    assert torch.equal(target.weight, source.weight)
    Weights(path).load(target)
    assert read_checkpoint(path)[1] == FACTS


def test_configs_name_what_the_weights_were_made_with(dist):
    config = json.loads(archive(dist, "comnet_mednext").read("comnet_mednext/configs/inference.json"))
    source = json.loads((SOURCES / "comnet_mednext" / "configs" / "inference.json").read_text())
    assert config["backbone"] == FACTS["backbone"] and config["spacing"] == FACTS["spacing"]
    assert config | {key: source[key] for key in ("backbone", "spacing")} == source
    overlay = json.loads(archive(dist, "comnet_mednext").read("comnet_mednext/configs/small.json"))
    assert overlay == json.loads((SOURCES / "comnet_mednext" / "configs" / "small.json").read_text())


def test_a_bundle_without_weights_says_so(dist):
    names = [name for name in archive(dist, "comnet_ensemble").namelist() if "/models/" in name]
    assert names == ["comnet_ensemble/models/README.md"]
    assert b"No weights" in archive(dist, "comnet_ensemble").read(names[0])


def test_checksums_and_model_info_are_those_of_the_files(dist, monkeypatch):
    lines = dict(reversed(line.split("  ")) for line in (dist / "SHA256SUMS").read_text().splitlines())
    assert {*lines, "SHA256SUMS"} == {path.relative_to(dist).as_posix() for path in dist.rglob("*") if path.is_file()}
    for name, digest in lines.items():
        assert hashlib.sha256((dist / name).read_bytes()).hexdigest() == digest

    class Answer:
        text = (dist / "models" / "model_info.json").read_text()

        def raise_for_status(self):
            pass

    asked = []
    monkeypatch.setattr(scripts, "has_requests", True)
    monkeypatch.setattr(scripts, "requests", type("", (), {"get": lambda url: asked.append(url) or Answer()}))
    info = scripts.get_bundle_info("comnet_mednext", repo="owner/comnet", tag="v1")
    zip_name = f"comnet_mednext_v{custom.__version__}.zip"
    assert info["browser_download_url"] == f"https://github.com/owner/comnet/releases/download/v1/{zip_name}"
    assert asked == ["https://raw.githubusercontent.com/owner/comnet/v1/models/model_info.json"]
    assert dict(scripts.get_all_bundles_list("owner/comnet", "v1")) == dict.fromkeys(BUNDLES, custom.__version__)


def test_weights_over_25_mb_are_listed_with_their_digest(tmp_path):
    save_atomically({"model": {"w": torch.zeros(7_000_000)}, "provenance": FACTS}, tmp_path / WEIGHTS["comnet_mednext"])
    pack(str(tmp_path / "dist"), weights=str(tmp_path), repo="owner/comnet/v1")
    asset = tmp_path / "dist" / f"comnet_mednext_v{custom.__version__}_model.pt"
    text = archive(tmp_path / "dist", "comnet_mednext").read("comnet_mednext/large_files.yml").decode()
    assert 'path: "models/model.pt"' in text and f"/v1/{asset.name}" in text and 'hash_type: "sha256"' in text
    assert hashlib.sha256(asset.read_bytes()).hexdigest() in text
    assert asset.read_bytes() == archive(tmp_path / "dist", "comnet_mednext").read("comnet_mednext/models/model.pt")


def copied(tmp_path: Path) -> Path:
    shutil.copytree(SOURCES, tmp_path / "bundles", ignore=shutil.ignore_patterns("models"))
    return tmp_path / "bundles"


def edited(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_versions_that_disagree_are_named_and_nothing_is_written(tmp_path):
    bundles = copied(tmp_path)
    metadata = bundles / "comnet_ensemble" / "configs" / "metadata.json"
    edited(metadata, version="0.0.9")
    with pytest.raises(PackingError, match=r"comnet_ensemble.*metadata.json says version 0\.0\.9"):
        pack(str(tmp_path / "dist"), bundles_dir=str(bundles))
    assert not (tmp_path / "dist").exists()
    edited(metadata, version=custom.__version__, changelog={"0.0.1": "old"})
    with pytest.raises(PackingError, match="no changelog"):
        pack(str(tmp_path / "dist"), bundles_dir=str(bundles))


def test_a_config_with_another_version_in_its_guard_is_refused(tmp_path):
    bundles = copied(tmp_path)
    config = bundles / "comnet_mednext" / "configs" / "train.json"
    edited(config, path_setup={"_target_": "custom.release.check_version", "version": "0.0.9"})
    with pytest.raises(PackingError, match=r"train.json says version 0\.0\.9"):
        pack(str(tmp_path / "dist"), bundles_dir=str(bundles))


@pytest.mark.parametrize("facts", [{"backbone": "os.system"}, {"spacing": "$__import__('os')"}, {"spacing": ["$1"]}])
def test_a_checkpoint_cannot_bring_code_into_a_config(tmp_path, facts):
    path = tmp_path / "model.pt"
    save_atomically({"model": nn.Linear(1, 1).state_dict(), "provenance": FACTS | facts}, path)
    with pytest.raises(CheckpointError, match="not used"):
        bundle_files(SOURCES / "comnet_mednext", path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no folder .*nowhere"):
        pack(str(tmp_path / "dist"), weights=str(tmp_path / "nowhere"))
    with pytest.raises(PackingError, match="clone of the repository"):
        pack(str(tmp_path / "dist"), bundles_dir=str(tmp_path))
    with pytest.raises(PackingError, match="owner/repository/tag"):
        pack(str(tmp_path / "dist"), repo="comnet")


def test_plain_state_dict_keeps_order_and_provenance():
    state = {"b": torch.ones(1), "a": torch.zeros(1)}
    plain = plain_state_dict(state, FACTS)
    assert list(plain) == ["b", "a"] and plain._metadata["provenance"] == FACTS


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_has_the_packages_version_and_the_changelogs_versions(bundle):
    metadata = json.loads((SOURCES / bundle / "configs" / "metadata.json").read_text())
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert metadata["version"] == custom.__version__ == versions[0]
    assert list(metadata["changelog"]) == versions and all(metadata["changelog"].values())
