from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser

from custom.bundle_run import bundle_command, bundle_root, config_value, known_reason, log_fault, run_bundle
from custom.cohort import SubjectError
from custom.cohort.four_channel import StackingError
from custom.crossval.runner import JobsFailed
from custom.files import FileError, UserError
from custom.release import PackingError, VersionError
from custom.weights import CheckpointError


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
    with pytest.raises(UserError, match="comnet_unheard_of is not installed"):
        bundle_root("comnet_unheard_of")


def test_the_users_mistake_is_found_in_a_chain_of_errors():
    chain = RuntimeError("wrapped")
    chain.__cause__ = FileError(2, "nowhere")
    assert known_reason(chain) == "nowhere"


@pytest.mark.parametrize("fault", [TypeError("ours"), ValueError("ours"), FileNotFoundError(2, "ours")])
def test_what_is_not_meant_for_users_keeps_its_traceback(fault, tmp_path):
    try:
        raise fault
    except Exception as error:
        assert known_reason(error) is None
        told = log_fault(error, tmp_path / "out")
    story = (tmp_path / "out" / "comnet-error.log").read_text()
    assert "Traceback" in story and __file__ in story
    assert "ours" in told and told.splitlines()[-1].endswith(str(tmp_path / "out" / "comnet-error.log"))


def test_a_bug_while_a_users_mistake_is_handled_is_a_bug():
    bug = KeyError("ours")
    bug.__context__ = UserError("theirs")
    assert known_reason(bug) is None


def test_every_error_of_ours_is_meant_for_users():
    for error in (SubjectError, StackingError, CheckpointError, PackingError, VersionError, JobsFailed):
        assert issubclass(error, UserError), error


ODD_NAMES = [
    "2023_01",
    "1e3",
    "12",
    "0042",
    "a,b",
    "#x",
    "run#2",
    "[1]",
    "None",
    "True",
    "0x1F",
    "@fold",
    "$HOME",
    "%x",
]


@pytest.mark.parametrize("name", [*ODD_NAMES, "it's", "a b", "back\\slash", "(1)", "{'a': 1}", '"quoted"', "1.50"])
def test_a_name_stays_text_in_a_config_and_on_monais_command_line(name):
    value = config_value(Path(name))
    assert DefaultParseValue(value) == value
    assert ConfigParser({"name": value}).get_parsed_content("name") == name
    assert ConfigParser({"names": config_value([Path(name)])}).get_parsed_content("names") == [name]
    words = shlex.split(bundle_command("comnet_ensemble", "inference.json", output_dir=Path(name)))
    assert ConfigParser({"name": DefaultParseValue(words[-1])}).get_parsed_content("name") == name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")
def test_a_large_block_that_was_freed_is_used_again():
    script = (
        "import resource, sys, torch\n"
        "from custom.bundle_run import reuse_memory\n"
        "if sys.argv[1] == 'reuse': reuse_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "for _ in range(60): torch.ones(2**24).sum()\n"  # 64 MB, more than glibc would ever keep
        "print(faults() - before)\n"
    )
    usual, reused = (
        int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout)
        for how in ("usual", "reuse")
    )
    assert reused < usual / 4
