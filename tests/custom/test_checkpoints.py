from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch import nn

from custom.weights import CheckpointError, Provenance, load_network, read_checkpoint, save_atomically


def saved(tmp_path, network, **facts):
    path = tmp_path / "model.pt"
    save_atomically({"model": network.state_dict(), "provenance": Provenance(**facts).state_dict()}, path)
    return path


def test_weights_and_provenance_come_back(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    path = saved(tmp_path, source, backbone="custom.mednext.mednext_tiny", trained_on=["BT0001"])
    assert load_network(target, path) == {"backbone": "custom.mednext.mednext_tiny", "trained_on": ["BT0001"]}
    assert torch.equal(source.weight, target.weight)


def test_plain_state_dict_is_a_checkpoint_without_provenance(tmp_path):
    save_atomically(nn.Linear(3, 2).state_dict(), tmp_path / "model.pt")
    state, provenance = read_checkpoint(tmp_path / "model.pt")
    assert set(state) == {"weight", "bias"} and provenance == {}


def test_another_size_is_refused_with_both_sizes_and_untouched_weights(tmp_path):
    network = nn.Linear(4, 2)
    before = network.weight.clone()
    path = saved(tmp_path, nn.Linear(3, 2), backbone="custom.mednext.mednext_small")
    with pytest.raises(CheckpointError, match=r"model.pt does not fit Linear .*mednext_small.*\(2, 3\).*\(2, 4\)"):
        load_network(network, path)
    assert torch.equal(network.weight, before)


def test_other_keys_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"1 missing \(first: bias\)"):
        load_network(nn.Linear(3, 2), saved(tmp_path, nn.Linear(3, 2, bias=False)))


def test_missing_truncated_and_unsafe_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent.pt"):
        read_checkpoint(tmp_path / "absent.pt")
    path = saved(tmp_path, nn.Linear(30, 20))
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(os.system))
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "evil.pt")


def test_interrupted_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = saved(tmp_path, nn.Linear(3, 2))
    before = path.read_bytes()

    def stop_half_way(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.pt"]
