"""Inference under torchrun: two processes share the subjects."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_runs import BUNDLES, TINY


@pytest.fixture
def torchrun(phantoms, weights, tmp_path):
    """Run the ensemble's evaluation in two processes; return the finished process and its output folder."""

    def run(dataset_dir: Path, **settings) -> tuple[subprocess.CompletedProcess, Path]:
        root, output = BUNDLES / "comnet_ensemble", tmp_path / "out"
        names = ("inference.json", "evaluate.json", "multi_gpu_evaluate.json")
        settings |= {"dataset_dir": dataset_dir, "weights_dir": weights, "output_dir": output, "bundle_root": root}
        settings |= {"network_def#corrector": "$None", "write_pictures": False}
        settings |= {key: TINY[key] for key in ("backbone", "spacing", "num_workers")}
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        files = str([str(root / "configs" / name) for name in names])
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*start, "-m", "monai.bundle", "run", "--config_file", files, *words],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        return done, output

    return run


def names(output: Path) -> list[str]:
    return [row["subject"] for row in csv.DictReader((output / "scores.csv").open())]


def test_each_subject_is_segmented_once_and_one_table_has_them_all(torchrun, phantoms, tmp_path):
    data = tmp_path / "data"
    for number in (1, 2, 3):
        shutil.copytree(phantoms / f"BT000{number}", data / f"BT000{number}")
    (data / "BT0002" / "brain_t2.nii.gz").write_bytes(b"broken")
    done, output = torchrun(data)
    assert done.returncode != 0, "one subject is broken"
    assert "BT0002" in done.stderr
    assert names(output) == ["BT0001", "BT0003"]
    records = {path.parent.name: json.loads(path.read_text()) for path in output.glob("*/record.json")}
    assert set(records) == {"BT0001", "BT0003"}
    shutil.copyfile(phantoms / "BT0002" / "brain_t2.nii.gz", data / "BT0002" / "brain_t2.nii.gz")
    done, output = torchrun(data)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 of 3 subjects are done already" in done.stderr and names(output) == ["BT0001", "BT0002", "BT0003"]
