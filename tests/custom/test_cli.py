from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from custom import cli
from custom import weights as module
from custom.mednext import mednext_tiny
from custom.phantom import cohort_seeds, write_absent
from custom.release import release_weights
from custom.weights import NUM_FOLDS, fold_checkpoint, save_atomically

SPACING = [5.0, 5.0, 5.0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_absent(folder, cohort_seeds(5, 1), shape=(32, 36, 32), spacing=SPACING)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for fold in range(NUM_FOLDS):
        torch.manual_seed(fold)
        facts = {
            "backbone": "custom.mednext.mednext_tiny",
            "spacing": SPACING,
            "num_folds": NUM_FOLDS,
            "notes": "untrained",
        }
        save_atomically({"model": mednext_tiny().state_dict(), "provenance": facts}, fold_checkpoint(folder, fold))
    return folder


def comnet(*words, expect=None):
    """Run the command in this process; return its exit code or message."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as leave:
        return leave.code
    return 0


def test_segment_takes_folders_and_says_which_bundle_run_it_is(dataset, weights, tmp_path, capsys):
    assert (
        comnet("segment", dataset / "BT0001", dataset / "BT0003", "--output_dir", tmp_path, "--weights", weights) == 0
    )
    assert {path.parent.name for path in tmp_path.glob("*/*_seg.nii.gz")} == {"BT0001", "BT0003"}
    shown = capsys.readouterr().err
    assert "python -m monai.bundle run --config_file" in shown and "--weights_dir" in shown
    assert "weights: untrained" in shown


def test_segment_takes_one_subject_by_four_files(dataset, weights, tmp_path):
    for source, target in {"t1": "pre", "t1ce": "post", "t2": "wet", "flair": "dark"}.items():
        shutil.copy(dataset / "BT0001" / f"brain_{source}.nii.gz", tmp_path / f"{target}.nii.gz")
    files = {"t1n": "pre", "t1c": "post", "t2w": "wet", "flair": "dark"}
    flags = [word for key, name in files.items() for word in (f"--{key}", tmp_path / f"{name}.nii.gz")]
    assert comnet("segment", *flags, "--output_dir", tmp_path / "out", "--weights", weights, "--nopictures") == 0
    by_files = next((tmp_path / "out").glob("*/*_seg.nii.gz"))
    comnet("segment", dataset / "BT0001", "--output_dir", tmp_path / "folder", "--weights", weights, "--nopictures")
    by_folder = tmp_path / "folder" / "BT0001" / "BT0001_seg.nii.gz"
    assert np.array_equal(nib.load(by_files).dataobj, nib.load(by_folder).dataobj)


def test_segment_takes_what_modalities_there_are(dataset, weights, tmp_path, monkeypatch):
    path = tmp_path / "weights" / "model.pt"
    dice = {"nothing": [0.6, 0.82, 0.87], "t1n+t2w": [0.5, 0.6, 0.7]}
    digest = release_weights(fold_checkpoint(weights, 0), path, missing_modalities=dice)
    monkeypatch.setattr(module, "RELEASED", {"comnet_ensemble": digest})
    folder = tmp_path / "BT0001"
    shutil.copytree(dataset / "BT0001", folder)
    for name in ("t1", "t2"):
        (folder / f"brain_{name}.nii.gz").unlink()
    assert comnet("segment", folder, "--output_dir", tmp_path / "folder", "--weights", path) == 0
    files = ("--t1c", folder / "brain_t1ce.nii.gz", "--flair", folder / "brain_flair.nii.gz")
    assert comnet("segment", *files, "--output_dir", tmp_path / "files", "--weights", path) == 0
    masks = [nib.load(tmp_path / made / "BT0001" / "BT0001_seg.nii.gz") for made in ("folder", "files")]
    assert np.array_equal(masks[0].dataobj, masks[1].dataobj)
    told = "without T1n, T2w: held-out Dice ET 0.50, TC 0.60, WT 0.70; with all four 0.60, 0.82, 0.87"
    record = json.loads((tmp_path / "folder" / "BT0001" / "record.json").read_text())
    assert record["missing"] == "T1n, T2w" and record["warnings"][0] == told
    for text in ((tmp_path / "folder" / name).read_text() for name in ("volumes.csv", "report.html")):
        assert "T1n, T2w" in text and told in text


def test_weights_that_were_not_trained_for_it_segment_a_subset_only_if_told_to(dataset, weights, tmp_path):
    files = ("--flair", dataset / "BT0001" / "brain_flair.nii.gz", "--output_dir", tmp_path, "--weights", weights)
    assert comnet("segment", *files, "--nopictures") == 4
    assert "no T1n, T1c, T2w, and these weights" in (tmp_path / "volumes.csv").read_text()
    assert not list(tmp_path.rglob("*_seg.nii.gz"))
    assert comnet("segment", *files, "--nopictures", "--allow_missing") == 0
    assert "the mask cannot be relied on" in (tmp_path / "volumes.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to segment"),
        (["--t1n", "a.nii.gz", "--t2w", "b.nii.gz"], "no T1c, T2-FLAIR: without T1c and T2-FLAIR there is no tumour"),
        (["folder", "--t1n", "a.nii.gz"], "not both"),
        (["nowhere"], "nowhere does not exist"),
        (["nowhere", "--thresholdz", "[0.4,0.4,0.4]"], "unknown option --thresholdz: did you mean --thresholds"),
    ],
)
def test_wrong_use_is_one_clear_line(words, message, weights, tmp_path):
    told = comnet("segment", *words, "--output_dir", tmp_path / "out", "--weights", weights)
    assert message in told and "\n" not in told


def test_a_wrong_value_is_told_before_an_earlier_result_is_touched(dataset, weights, tmp_path):
    words = ("segment", dataset / "BT0001", "--output_dir", tmp_path, "--weights", weights, "--nopictures")
    assert comnet(*words) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "BT0001").iterdir()}
    for option, value, told in (
        ("inferer", "whole_volume", "a part of the config is named with an @"),
        ("patch_size", "[8,8,8]", "fewer voxels than the smallest window"),
        ("patch_size", "64", "give three lengths in voxels"),
        ("mirror_axes", "[7]", "give axes 0, 1 or 2"),
        ("min_volume_mm3", "abc", "give volumes in mm³, 0 or more"),
        ("thresholds", "2", "give probabilities above 0 and up to 1"),
        ("thresholds", "[0.5,0.5]", "one each for ET, TC, WT"),
        ("fill_holes", "3", "give true or false"),
        ("spacing", "0", "give three lengths in mm"),
        ("refine_regions", "3", "one answer each for ET, TC, WT"),
        ("num_workers", "abc", "give a whole number"),
        ("backbone", "custom.nosuch.backbone", "there is no 'custom.nosuch.backbone': give its whole name"),
    ):
        message = comnet(*words, f"--{option}", value)
        assert told in str(message) and option in message and "\n" not in message
    assert "give three lengths in voxels" in comnet(*words, "--sliding_window", "--patch_size", "[64,64]")
    assert {path: path.read_bytes() for path in (tmp_path / "BT0001").iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["segment", "x", "--output_dir"], "--output_dir needs a value"),
        (["segment", "x", "--output_dir", "--raw"], "--output_dir needs a value"),
        (["segment", "x", "--output_dir", ""], "--output_dir needs a value"),
        (["segment", "x", "--output_dir", "o", "--weights="], "--weights needs a value"),
        (["segment", "x", "--output_dir", "o", "--device", "mps"], "no device 'mps': give cpu, cuda or cuda:1"),
        (["validate", "x", "--num_folds", "many"], "--num_folds is 'many': give a whole number"),
        (["demo", "--num_subjects", "1.5"], "--num_subjects is '1.5': give a whole number"),
    ],
)
def test_an_option_without_a_fitting_value_is_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert comnet(*words) == f"comnet: {message}" and not list(tmp_path.iterdir())


def test_a_folder_is_no_datalist(dataset, tmp_path):
    told = comnet("validate", dataset, "--output", tmp_path)
    assert f"{tmp_path} is a folder: name the datalist's file" in told and "\n" not in told


def test_wrong_usage_leaves_with_1_and_help_with_0(capsys):
    assert (comnet("segment"), comnet("nosuch"), comnet("segment", "--help")) == (1, 1, 0)
    assert "FIRE_METADATA" not in "".join(capsys.readouterr())


def test_a_value_deep_in_the_config_does_the_subject_again(dataset, weights, tmp_path):
    words = ("segment", dataset / "BT0001", "--output_dir", tmp_path, "--weights", weights, "--nopictures")
    record = tmp_path / "BT0001" / "record.json"
    keys = []
    for more in ((), ("--few_windows#overlap", 4), ("--few_windows#overlap", 4), ("--few_windows#overlap", 6)):
        assert comnet(*words, *more) == 0
        keys.append(json.loads(record.read_text())["key"])
    assert keys[1] == keys[2] and len(set(keys)) == 3


def test_missing_weights_are_one_clear_line(dataset, tmp_path):
    told = comnet("segment", dataset, "--output_dir", tmp_path / "out", "--weights", tmp_path / "none")
    assert "no weights at" in told and "name yours by --weights" in told


def test_without_weights_the_released_ones_are_asked_for(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "bundle_root", lambda name: tmp_path / name)
    told = comnet("segment", dataset, "--output_dir", tmp_path / "out")
    assert f"no weights at {tmp_path / 'comnet_ensemble' / 'models'}" in told and "\n" not in told


def test_released_weights_segment_and_a_damaged_file_makes_no_mask(dataset, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "bundle_root", lambda name: tmp_path / name)
    path = tmp_path / "comnet_ensemble" / "models" / "model.pt"
    digest = release_weights(fold_checkpoint(weights, 0), path, notes="trained on 34 subjects, research use")
    monkeypatch.setattr(module, "RELEASED", {"comnet_ensemble": digest})
    words = ("segment", dataset / "BT0001", "--nopictures", "--output_dir")
    assert comnet(*words, tmp_path / "out") == 0
    assert "weights: trained on 34 subjects, research use" in capsys.readouterr().err
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    told = comnet(*words, tmp_path / "damaged")
    assert str(path) in told and "\n" not in told and not list((tmp_path / "damaged").rglob("*_seg.nii.gz"))


opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)


def test_a_segmentation_reads_each_file_of_weights_once(dataset, weights, tmp_path):
    gc.collect()  # what earlier tests have read is else still in use, and not read again
    opened.clear()
    assert comnet("segment", dataset / "BT0001", "--output_dir", tmp_path, "--weights", weights, "--nopictures") == 0
    assert [opened.count(str(fold_checkpoint(weights, fold))) for fold in range(NUM_FOLDS)] == [1] * NUM_FOLDS


def test_weights_cannot_name_any_other_code(dataset, tmp_path):
    facts = {"backbone": "os.system", "spacing": SPACING, "num_folds": 1}
    save_atomically({"model": {}, "provenance": facts}, tmp_path / "model.pt")
    assert "'os.system'" in comnet("segment", dataset, "--output_dir", tmp_path / "out", "--weights", tmp_path)


def test_validate_writes_datalist_and_exclusions(dataset, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    (data / "BT0002" / "brain_t1ce.nii.gz").unlink()
    assert comnet("validate", data, "--output", tmp_path / "datalist.json", "--num_folds", 2) == 0
    datalist = json.loads((tmp_path / "datalist.json").read_text())
    assert [item["subject"] for item in datalist["training"]] == ["BT0001", "BT0003", "BT0004", "BT0005"]
    assert "BT0002" in (tmp_path / "datalist_exclusions.csv").read_text()
    assert "monai.bundle run check_data" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["segment", "crossval"])
def test_help_is_there(subcommand):
    result = subprocess.run([sys.executable, "-m", "custom.cli", subcommand, "--help"], capture_output=True, text=True)
    assert "output_dir" in (result.stdout + result.stderr).lower() and result.returncode == 0


def test_stack_names_what_it_wrote_and_what_failed(dataset, tmp_path, capsys):
    shutil.copytree(dataset / "BT0001", tmp_path / "data" / "BT0001")
    shutil.copytree(dataset / "BT0002", tmp_path / "data" / "BT0002")
    cli.main(["stack", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"BT000{number}.nii.gz") for number in (1, 2)]
    for name in ("t1ce", "flair"):
        (tmp_path / "data" / "BT0002" / f"brain_{name}.nii.gz").unlink()
    with pytest.raises(SystemExit) as caught:
        cli.main(["stack", str(tmp_path / "data"), "--output_dir", str(tmp_path / "new")])
    printed = capsys.readouterr()
    assert caught.value.code == 3 and "BT0002" in printed.err and "BT0001.nii.gz" in printed.out


def test_pack_names_the_files_of_a_release(tmp_path, capsys):
    cli.main(["pack", "--output_dir", str(tmp_path / "dist")])
    names = capsys.readouterr().out.split()
    assert len(names) == 5 and all(tmp_path.joinpath(name).is_file() for name in names)
    assert {name.rsplit("/", 1)[-1].split("_v")[0] for name in names[:3]} == {
        "comnet_mednext",
        "comnet_corrdiff",
        "comnet_ensemble",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(dataset, weights, tmp_path):
    message = comnet("segment", dataset, "--output_dir", tmp_path, "--weights", weights, "--device", "cuda")
    assert "PyTorch sees no GPU here; use --device cpu" in str(message)


@pytest.mark.parametrize("pictures", [False, True])
def test_a_segmentation_imports_only_what_it_needs(pictures, dataset, weights, tmp_path):
    code = """
import sys
from custom import cli
cli.main(sys.argv[1:])
there = sys.modules.__contains__
foreign = "pandas tensorboard torchio panoptica sympy skimage pydicom scipy.signal torch.distributed.fsdp"
print(*map(list, (filter(there, foreign.split()), filter(there, ["matplotlib", "jinja2", "custom.report"]))))
import matplotlib.pyplot, pandas, skimage
from torch.distributed.optim import ZeroRedundancyOptimizer
from ignite.handlers import Checkpoint
assert "add_param_group" in vars(ZeroRedundancyOptimizer)
"""
    words = ["segment", dataset / "BT0001", "--output_dir", tmp_path, "--weights", weights, f"--pictures={pictures}"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawing = ["matplotlib", "jinja2", "custom.report"] if pictures else []
    assert done.stdout.splitlines()[-1] == f"[] {drawing}"


@pytest.mark.parametrize("name", ["2023_01", "1e3", "12", "0042", "a,b", "#x", "run#2", "[1]", "None", "True", "0x1F"])
def test_names_and_paths_stay_text(name, weights, monkeypatch):
    runs = []
    monkeypatch.setattr(cli, "run_bundle", lambda *configs, **values: runs.append(values))
    comnet("segment", name, "--output_dir", name, "--weights", weights, "--patch_size", "[32,32,32]", "--nopictures")
    assert (runs[0]["dataset_dir"], runs[0]["output_dir"]) == ([Path(name)], Path(name))
    assert (runs[0]["patch_size"], runs[0]["write_pictures"]) == ([32, 32, 32], False)
    files = [word for key in ("t1n", "t1c", "t2w", "flair") for word in (f"--{key}", name)]
    comnet("segment", *files, "--name", name, "--output_dir", "~/out", "--weights", weights)
    assert set(runs[1]["dataset_dir"].values()) == {Path(name)} and "name" in runs[1]["dataset_dir"]
    assert runs[1]["output_dir"] == Path.home() / "out"


@pytest.mark.parametrize(
    ("word", "value"), [("false", False), ("False", False), ("no", False), ("true", True), ("Yes", True)]
)
def test_false_is_false(word, value, weights, monkeypatch):
    runs = []
    monkeypatch.setattr(cli, "run_bundle", lambda *configs, **values: runs.append(values))
    comnet("segment", "A", "--output_dir", "o", "--weights", weights, "--pictures", word, f"--allow_missing={word}")
    assert (runs[0]["write_pictures"], runs[0]["allow_missing"]) == (value, value)


def test_a_switch_takes_no_folder_for_its_value(weights, monkeypatch):
    runs = []
    monkeypatch.setattr(cli, "run_bundle", lambda *configs, **values: runs.append(values))
    end = ("--output_dir", "o", "--weights", weights)
    comnet("segment", "--probabilities", "A", "--nopictures", "B", "--allow_missing", "C", *end, "--uncertainty")
    assert runs[0]["dataset_dir"] == [Path("A"), Path("B"), Path("C")] and runs[0]["allow_missing"] is True
    assert [runs[0][f"write_{key}"] for key in ("probabilities", "pictures", "uncertainty")] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "value"),
    [("[true,false,true]", [True, False, True]), ("[True,False]", [True, False]), ("0.5", 0.5), ("@whole", "@whole")],
)
def test_values_are_read_as_the_configs_write_them(text, value, weights, monkeypatch):
    runs = []
    monkeypatch.setattr(cli, "run_bundle", lambda *configs, **values: runs.append(values))
    comnet("segment", "A", "--output_dir", "o", "--weights", weights, "--fill_holes", text)
    assert runs[0]["fill_holes"] == value


@pytest.mark.parametrize(
    ("option", "told"), [("write_pictures", "--pictures"), ("weights_dir", "--weights"), ("dataset_dir", "folders")]
)
def test_names_that_the_command_sets_itself_are_told_by_its_own(option, told, weights):
    message = comnet("segment", "A", "--output_dir", "o", "--weights", weights, f"--{option}", "x")
    assert message == f"comnet: --{option} is told by {cli.OWN_NAMES[option]} here" and told in message


def test_a_fault_of_ours_keeps_its_traceback_beside_the_outputs(dataset, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "run_bundle", lambda *configs, **values: [][0])
    told = comnet("segment", dataset, "--output_dir", tmp_path / "out", "--weights", weights)
    log = tmp_path / "out" / "comnet-error.log"
    assert told.splitlines()[-1].endswith(str(log)) and "IndexError" in told
    assert "Traceback" in log.read_text()
