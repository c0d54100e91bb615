"""The mean Dice over regions inside engines, evaluators and several processes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import MetricsSaver, from_engine

from custom.metrics import MeanRegionDice, RegionDice

NAN = math.nan


def batch(*dice: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One subject with the given Dice of ET, TC and WT; NaN stands for an empty reference."""
    prediction, reference = torch.zeros(2, 1, 3, 10, 10, 10)
    for region, value in enumerate(dice):
        if not math.isnan(value):
            reference[0, region].view(-1)[:100] = 1
            prediction[0, region].view(-1)[round(100 * (1 - value)) :][:100] = 1
    return prediction, reference


def run(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Engine:
    engine = Engine(lambda _, item: item)
    MeanRegionDice().attach(engine, "val_mean_dice")
    engine.run(batches)
    return engine


def test_key_metric_is_the_mean_over_regions_of_the_means_over_subjects() -> None:
    metrics = run([batch(0.5, 0.25, 1), batch(NAN, 0.75, 0.5), batch(1, 0.8, 0.9)]).state.metrics
    assert metrics["val_dice_et"] == pytest.approx(0.75)
    assert metrics["val_dice_tc"] == pytest.approx(0.6)
    assert metrics["val_dice_wt"] == pytest.approx(0.8)
    assert metrics["val_mean_dice"] == pytest.approx((0.75 + 0.6 + 0.8) / 3)
    assert type(metrics["val_mean_dice"]) is float


def test_region_that_nobody_has_is_left_out_of_the_key_metric() -> None:
    metrics = run([batch(NAN, 0.2, 0.6), batch(NAN, 0.4, 1)]).state.metrics
    assert math.isnan(metrics["val_dice_et"])
    assert metrics["val_mean_dice"] == pytest.approx((0.3 + 0.8) / 2)


def test_key_metric_is_nan_only_where_nothing_can_be_scored() -> None:
    metrics = run([batch(NAN, NAN, NAN)]).state.metrics
    assert math.isnan(metrics["val_mean_dice"])


def test_one_epoch_does_not_leak_into_the_next() -> None:
    engine = Engine(lambda _, item: item)
    MeanRegionDice().attach(engine, "val_mean_dice")
    seen = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(dict(e.state.metrics)))
    engine.run([batch(0.2, 0.2, 0.2)])
    engine.run([batch(0.8, 0.8, NAN)])
    assert seen[1]["val_mean_dice"] == pytest.approx(0.8)
    assert math.isnan(seen[1]["val_dice_wt"])


def test_details_hold_every_subject() -> None:
    engine = run([batch(0.5, 0.25, 1), batch(NAN, 0.75, 0.5)])
    details = engine.state.metric_details["val_mean_dice"]
    assert torch.allclose(details, torch.tensor([[0.5, 0.25, 1], [NAN, 0.75, 0.5]]), equal_nan=True)


def test_nothing_scored_is_an_error_rather_than_a_number() -> None:
    with pytest.raises(ValueError, match="validation list"):
        RegionDice().aggregate()


def test_works_as_key_metric_of_a_monai_evaluator_from_json(tmp_path: Path) -> None:
    config = {"_target_": "custom.metrics.MeanRegionDice", "output_transform": "$from_engine(['pred', 'label'])"}
    parser = ConfigParser({"metric": config}, globals={"from_engine": from_engine})
    subjects = [batch(0.5, 0.25, 1), batch(NAN, 0.75, 0.5)]
    data = Dataset(
        [
            {"image": MetaTensor(p[0], meta={"filename_or_obj": f"s{i}"}), "label": r[0]}
            for i, (p, r) in enumerate(subjects)
        ]
    )
    saver = MetricsSaver(str(tmp_path), "*", "*", batch_transform=lambda items: [item["image"].meta for item in items])
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data, batch_size=2),
        network=torch.nn.Identity(),
        key_val_metric={"val_mean_dice": parser.get_parsed_content("metric")},
        val_handlers=[saver],
    )
    evaluator.run()
    assert evaluator.state.key_metric_name == "val_mean_dice"
    assert evaluator.state.best_metric == pytest.approx((0.5 + 0.5 + 0.75) / 3)
    table = (tmp_path / "metrics.csv").read_text()
    assert all(name in table for name in ("val_mean_dice", "val_dice_et", "val_dice_tc", "val_dice_wt"))
    details = (tmp_path / "val_mean_dice_raw.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in details[1:]] == ["s0", "s1"]


WORKER = """
import json, os, torch, torch.distributed as dist
from ignite.engine import Engine
from custom.metrics import MeanRegionDice

dist.init_process_group("gloo")
rank = dist.get_rank()
engine = Engine(lambda _, item: item)
MeanRegionDice().attach(engine, "val_mean_dice")
subjects = [0.0, 0.5, 0.9][rank::2]


def subject(dice):
    prediction, reference = torch.zeros(2, 1, 3, 10, 10, 10)
    reference[0, 1:].view(2, -1)[:, :100] = 1
    prediction[0, 1:].view(2, -1)[:, round(100 * (1 - dice)):][:, :100] = 1
    return prediction, reference


engine.run([subject(dice) for dice in subjects])
print(json.dumps({**engine.state.metrics, "n": len(engine.state.metric_details["val_mean_dice"])}))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_subjects_of_all_processes_count(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", WORKER]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        metrics = json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
        assert metrics["n"] == 3
        assert math.isnan(metrics["val_dice_et"])
        assert metrics["val_mean_dice"] == pytest.approx((0 + 0.5 + 0.9) / 3)
