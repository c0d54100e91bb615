from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import custom
from custom.release import VersionError, check_version, package_digest, package_files

PACKAGE = Path(custom.__file__).parent


def bundle(folder: Path, version: str = custom.__version__, extra: str = "") -> Path:
    package = folder / "custom"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text(f'__version__ = "{version}"\n{extra}')
    return folder


def test_the_same_version_and_code_pass(tmp_path):
    assert check_version(custom.__version__, str(tmp_path)) == custom.__version__
    shutil.copytree(PACKAGE, tmp_path / "custom", ignore=shutil.ignore_patterns("__pycache__"))
    assert check_version(custom.__version__, str(tmp_path)) == custom.__version__


def test_another_version_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(VersionError) as caught:
        check_version("9.9.9", str(tmp_path))
    sentence = str(caught.value)
    assert "9.9.9" in sentence and custom.__version__ in sentence and str(tmp_path) in sentence
    assert "\n" not in sentence and "separate processes" in sentence


def test_another_build_of_the_same_version_is_refused(tmp_path):
    with pytest.raises(VersionError, match="another build"):
        check_version(custom.__version__, bundle(tmp_path, extra="changed = 1\n"))


def test_digest_sees_names_and_contents_and_no_caches(tmp_path):
    one = bundle(tmp_path / "one") / "custom"
    digest = package_digest(one)
    (one / "__pycache__").mkdir()
    (one / "__pycache__" / "files.cpython-311.pyc").write_bytes(b"cache")
    assert package_digest(one) == digest
    (one / "files.py").rename(one / "renamed.py")
    assert package_digest(one) != digest
    template = one / "report" / "templates" / "base.html"
    digest = package_digest(one)
    template.write_text(template.read_text(encoding="utf-8") + "<!-- changed -->", encoding="utf-8")
    assert package_digest(one) != digest
    assert "cohort/checks.py" in package_files(one) and list(package_files(one)) == sorted(package_files(one))


TWO_BUNDLES = """
import sys
from monai.bundle import ConfigParser
for root in sys.argv[1:]:
    parser = ConfigParser({
        "imports": ["$import os", "$import sys"],
        "path_setup": {
            "_target_": "custom.release.check_version",
            "_requires_": f"$sys.path.insert(0, {root!r})",
            "version": root.rsplit("-", 1)[1],
            "bundle_root": root,
        },
        "network_def": {"_target_": "custom.files.file_sha256", "_requires_": "@path_setup", "path": sys.argv[0]},
    })
    parser.get_parsed_content("network_def")
    print("loaded", root)
"""


def test_two_bundles_of_different_versions_in_one_process_stop(tmp_path):
    (tmp_path / "both.py").write_text(TWO_BUNDLES)
    roots = [str(bundle(tmp_path / f"bundle-{version}", version)) for version in ("7.0.0", "8.0.0")]
    result = subprocess.run([sys.executable, tmp_path / "both.py", *roots], capture_output=True, text=True, timeout=100)
    assert result.stdout.splitlines() == [f"loaded {roots[0]}"]
    assert f"needs `custom` 8.0.0, but 7.0.0 was imported from {roots[0]}" in result.stderr
