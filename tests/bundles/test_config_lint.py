"""What a config may do and repeat: a short list of targets, names and differences, read from the files themselves."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from monai.bundle.config_item import ComponentLocator

import custom
from custom.release import config_text

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in REPOSITORY.glob("bundles/*/configs/*.json") if path.name != "metadata.json")
COMPLETE = [path for path in CONFIGS if path.name in ("train.json", "inference.json")]
OVERLAYS = [path for path in CONFIGS if path not in COMPLETE]

IMPORTS = {"import os", "import sys", "import torch.distributed as dist"}
BUILTINS = {"str", "type"}
CALLS = {
    *("os.environ", "os.path.abspath", "os.path.dirname", "os.path.join", "sys.path.insert"),
    *("torch.device", "torch.cuda.is_available", "torch.cuda.set_device", "torch.bfloat16"),
    *("torch.float32", "torch.uint8"),
    *("monai.handlers.from_engine", "monai.utils.set_determinism"),
    *("dist.destroy_process_group", "dist.get_rank", "dist.init_process_group", "dist.is_initialized"),
}

# A key in two complete configs of one kind has one value, but for these: what makes each bundle itself.
OWN = {
    *("network_def", "weights", "batch", "handlers", "refine_regions", "thresholds", "min_volume_mm3"),
    *("probability_transforms", "mask_transforms", "datalist_file", "max_epochs", "warmup_epochs", "patience"),
    *("coarse", "loss", "optimizer", "provenance", "early_stop", "run"),
    *("saver", "resumed", "settings"),
    *("few_windows", "whole_volume", "sliding_window"),  # an ensemble mirrors in itself; compared in test_configs
    *("train#preprocessing_transforms", "train#random_transforms", "train#preprocessing"),
    *("train#dataset", "train#inferer", "train#handlers", "train#trainer"),
    *("validate#dataset", "validate#inferer", "validate#evaluator", "validate#handlers", "validate#label_transforms"),
}
# And in a training and an inference config too, but for these.
OWN_OF_A_KIND = {
    *("num_workers", "cohort", "initialize", "preprocessing", "checkpoint", "seed"),
    "image_preprocessing",  # see test_configs
}
# Overlays of one name, such as small.json, agree in all but these.
OWN_OF_AN_OVERLAY = {
    *("max_epochs", "warmup_epochs", "patience", "val_interval", "learning_rate", "train#dataset#data"),
    *("network", "step", "dataset#data", "datalist_file", "cohort#datalist_file"),
}


def name_of(path: Path) -> str:
    return f"{path.parts[-3]}/{path.name}"


def base_of(overlay: Path) -> str:
    return "inference.json" if overlay.name.endswith(("evaluate.json", "openvino.json")) else "train.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(child)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Top-level keys, with the parts of `train` and `validate` as keys of their own."""
    parts = {key: config[key] for key in ("train", "validate") if isinstance(config.get(key), dict)}
    rest = {key: value for key, value in config.items() if key not in parts}
    return rest | {f"{key}#{inner}": value for key, part in parts.items() for inner, value in part.items()}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_targets_are_monais_torchs_ours_or_what_such_a_key_names(path):
    base = read(path.with_name(base_of(path)))
    settings = base | read(path)
    locator = ComponentLocator()
    for target in [node["_target_"] for node in nodes(read(path)) if isinstance(node, dict) and "_target_" in node]:
        named = settings[target[1:]] if target.startswith("@") else target
        named = named["_target_"] if isinstance(named, dict) else named
        assert named.startswith(("monai.", "torch.", "custom.")) or locator.get_component_module_name(named), target


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_expressions_parse_and_use_few_names(path):
    expressions = [node for node in nodes(read(path)) if isinstance(node, str) and node.startswith("$")]
    for expression in expressions:
        tree = ast.parse(re.sub(r"@[\w#:]+", "_reference", expression[1:]))
        if isinstance(tree.body[0], (ast.Import, ast.ImportFrom)):
            assert expression[1:] in IMPORTS
            continue
        assert len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr), expression
        found = set(dotted_names(tree))
        assert found <= CALLS | BUILTINS | {"_reference"}, (expression, found)
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not {name for name in attributes if name.startswith("_")} - {"__name__"}, expression


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """Every name that is not bound in the expression itself, with what is read off it where it is a module."""
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"(os|sys|torch|monai|dist)(\.\w+)+", ast.unparse(node)):
            if node not in inner:
                yield ast.unparse(node)
            inner |= set(ast.walk(node))
        elif isinstance(node, ast.Name) and node.id not in bound and node not in inner:
            yield node.id


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_no_absolute_path_and_no_address(path):
    for node in nodes(read(path)):
        for text in literals(node) if isinstance(node, str) else ():
            assert not re.match(r"/|~|[A-Za-z]:\\|\w+://", text), node


def literals(text: str) -> list[str]:
    """The text itself, or an expression's strings, less those that are added to another."""
    if not text.startswith("$"):
        return [text]
    tree = ast.parse(re.sub(r"@[\w#:]+", "_reference", text[1:]))
    added = {node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in added]
    return [node.value for node in constants if isinstance(node.value, str)]


@pytest.mark.parametrize("path", COMPLETE, ids=name_of)
def test_every_complete_config_checks_the_packages_version(path):
    assert read(path)["path_setup"] == {
        "_target_": "custom.release.check_version",
        "_requires_": "$sys.path.insert(0, os.path.abspath(@bundle_root))",
        "version": custom.__version__,
        "bundle_root": "@bundle_root",
    }


@pytest.mark.parametrize("path", [path for path in COMPLETE if path.name == "train.json"], ids=name_of)
def test_handlers_are_literal_and_nobody_counts_them(path):
    """MONAI Label inserts a handler at the front, MLflow appends one: an index would name another handler."""
    config = read(path)
    if "handlers" in config.get("train", {}):
        assert all(isinstance(handler, dict) and "_target_" in handler for handler in config["train"]["handlers"])
    assert "@train#handlers#" not in path.read_text()


PAIRS = [*combinations(COMPLETE, 2)]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda path: name_of(path))
def test_what_two_complete_configs_share_is_the_same(one, other):
    ours, theirs = flat(read(one)), flat(read(other))
    differing = OWN if one.name == other.name else OWN | OWN_OF_A_KIND
    for key in (ours.keys() & theirs.keys()) - differing:
        assert ours[key] == theirs[key], key


def without_uncertainty(steps: list[Any]) -> list[Any]:
    plain = [json.loads(json.dumps(step).replace('"@map_keys"', '"pred"')) for step in steps]
    return [step for step in plain if "uncertainty" not in json.dumps(step)]


def test_output_steps_are_the_same_but_for_the_uncertainty_map():
    for key in ("probability_transforms", "mask_transforms"):
        lists = [without_uncertainty(read(path)[key]) for path in COMPLETE if path.name == "inference.json"]
        assert len(lists) == 3 and lists[0] and all(steps == lists[0] for steps in lists), key


@pytest.mark.parametrize(
    ("one", "other"), [pair for pair in combinations(OVERLAYS, 2) if pair[0].name == pair[1].name], ids=name_of
)
def test_overlays_of_one_name_agree(one, other):
    ours, theirs = read(one), read(other)
    for key in (ours.keys() & theirs.keys()) - OWN_OF_AN_OVERLAY:
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_repeats_nothing(path):
    base = flat(read(path.with_name(base_of(path))))
    assert not {key for key, value in read(path).items() if key in base and base[key] == value}


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("bundles/*/configs/*.json")), ids=name_of)
def test_what_is_set_aside_for_choosing_an_epoch_is_trained_on_by_no_config(path):
    config = read(path)
    trained_on = config.get("train#dataset#data", config.get("train", {}).get("dataset", {}).get("data", ""))
    assert "@chosen.training(@cohort.training(@fold))" in trained_on or "@cohort.training(" not in trained_on


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("bundles/*/configs/*.json")), ids=name_of)
def test_every_config_is_laid_out_the_same_way(path):
    """One line for whatever fits into one; `custom.release.config_text` writes it so."""
    assert path.read_text(encoding="utf-8") == config_text(read(path))


REPEATED = ["LICENSE", "configs/logging.conf", "configs/multi_gpu_evaluate.json", "docs/data_license.txt"]


@pytest.mark.parametrize("name", REPEATED)
def test_files_that_every_bundle_repeats_are_equal(name):
    copies = {path.read_bytes() for path in REPOSITORY.glob(f"bundles/*/{name}")}
    assert len(list(REPOSITORY.glob(f"bundles/*/{name}"))) == 3 and len(copies) == 1
    assert name != "LICENSE" or copies == {(REPOSITORY / "LICENSE").read_bytes()}


def test_metadata_differ_only_in_what_they_describe():
    texts = {"name", "task", "description", "references", "eval_metrics"}
    contents = [read(path) for path in REPOSITORY.glob("bundles/*/configs/metadata.json")]
    shared = [{key: value for key, value in content.items() if key not in texts} for content in contents]
    assert len(shared) == 3 and all(content == shared[0] for content in shared)
    assert len({content["name"] for content in contents}) == 3
    assert shared[0]["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "1": "non-enhancing core",
        "2": "oedema",
        "3": "enhancing tumour",
    }
