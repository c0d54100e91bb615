"""A federated round by MONAI's client: global weights in, local training, differences and metrics out."""

from __future__ import annotations

import pytest
import torch
from bundle_runs import BUNDLES, TINY
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import FlStatistics, WeightType
from monai.fl.utils.exchange_object import ExchangeObject

from custom.mednext import mednext_tiny


@pytest.fixture
def client(phantoms, tmp_path) -> MonaiAlgo:
    root = str(BUNDLES / "comnet_mednext")
    settings = TINY | {"bundle_root": root, "dataset_dir": str(phantoms), "num_folds": 2, "resume": False}
    settings |= {"models_dir": str(tmp_path), "max_epochs": 4, "val_interval": 2}  # a round has one epoch
    algo = MonaiAlgo(
        root,
        config_evaluate_filename="configs/train.json",
        train_kwargs=dict(settings),
        eval_kwargs=settings | {"ckpt_dir": str(tmp_path / "evaluation")},
    )
    algo.initialize({"CLIENT_NAME": "site"})
    return algo


def test_two_rounds_start_from_the_global_weights_and_one_evaluation_scores_them(client):
    torch.manual_seed(1)
    weights = {name: value.numpy() for name, value in mednext_tiny().state_dict().items()}
    for _ in range(2):
        client.train(ExchangeObject(weights=weights))
        sent = client.get_weights()
        assert sent.weight_type == WeightType.WEIGHT_DIFF and sent.weights.keys() == weights.keys()
        assert sent.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == 3
        changes = [abs(value).max() for value in sent.weights.values()]
        assert 0 < max(changes) < 0.1, "not the global weights, a little changed"
    metrics = client.evaluate(ExchangeObject(weights=weights)).metrics
    assert 0 <= metrics["val_mean_dice"] <= 1
