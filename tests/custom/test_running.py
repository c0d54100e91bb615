from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from custom.bundle_run import bundle_command, bundle_root, known_reason, run_bundle


def test_a_command_says_the_same_to_a_shell(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    overlay = tmp_path / "mine.json"
    words = shlex.split(
        bundle_command(
            "comnet_mednext",
            "train.json",
            overlay,
            run_id="check_data",
            spacing=[1.0, 2.0],
            output_dir=tmp_path / "out",
        )
    )
    assert words[:5] == ["python", "-m", "monai.bundle", "run", "check_data"]
    options = dict(zip(words[5::2], words[6::2], strict=True))
    configs = [Path(name) for name in eval(options["--config_file"])]
    assert configs[0].resolve() == bundle_root("comnet_mednext") / "configs" / "train.json"
    assert configs[1] == Path("mine.json") and options["--output_dir"] == "out"
    assert options["--spacing"] == "[1.0, 2.0]"
    assert (tmp_path / options["--bundle_root"]).resolve() == bundle_root("comnet_mednext")


def test_lists_of_configs_are_readable():
    command = bundle_command("comnet_mednext", "train.json", "small.json")
    assert '"[' in command and ']"' in command


@pytest.mark.parametrize("value", ["a 'quoted' $HOME", "back`tick`'", "both ' and \"", "#fold", "exclaim!'", "\\'"])
def test_nothing_in_a_value_means_anything_to_the_shell(value):
    words = shlex.split(bundle_command("comnet_mednext", "train.json", notes=value))
    assert words[-1] == value


def test_an_option_that_no_config_knows_is_refused():
    with pytest.raises(ValueError, match=r"unknown option --max_epoch: did you mean --max_epochs"):
        run_bundle("comnet_mednext", "train.json", max_epoch=3)


def test_a_bundle_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="comnet_unheard_of is not installed"):
        bundle_root("comnet_unheard_of")


def test_the_users_mistake_is_found_in_a_chain_of_errors():
    chain = RuntimeError("wrapped")
    chain.__cause__ = FileNotFoundError("nowhere")
    assert known_reason(chain) == "nowhere"
    assert known_reason(TypeError("ours")) is None
