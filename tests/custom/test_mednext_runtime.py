from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mednext_tensors import assert_close, images, randomise
from monai.data import MetaTensor
from torch import nn

from custom.comnet import CoMNeT, Segmentation
from custom.inference import FewWindowsInferer, WholeVolumeInferer
from custom.mednext import MedNeXt, mednext_base, mednext_tiny
from custom.mednext.openvino import MedNeXtGraph, OpenVINOMedNeXt, Program, core, has_bf16, prune
from custom.mednext.runtime import Runtime

SIZE = (32, 48, 32)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def network(seed=0, **options):
    net = mednext_tiny(**options)
    randomise(net, seed)
    return net.eval()


def ensemble(folds=3):
    comnet = CoMNeT(partial(mednext_tiny, 4, 3), folds).eval()
    for seed, backbone in enumerate(comnet.backbones):
        randomise(backbone, seed)
    return comnet


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kernel_size": 5}, {"kernel_size": 7, "grn": False}, {"deep_supervision": False, "in_channels": 2}]
)
def test_the_graph_is_the_network(options, fixed):
    net = network(**options)
    x = images(channels=options.get("in_channels", 4), size=(32, 48, 64), offset=2.0)
    assert_close(Program(fixed=fixed).run(net, x), net(x), 1e-4)


def test_blocks_of_other_widths_and_numbers():
    net = MedNeXt(filters=16, expansions=(2, 3, 4, 4, 4, 4, 4, 3, 2), blocks=(2, 1, 1, 1, 2, 1, 1, 1, 2))
    randomise(net)
    x = images(size=SIZE)
    assert_close(Program().run(net.eval(), x), net(x), 1e-4)


def test_a_large_offset_costs_no_accuracy():
    """Normalisation takes the mean away; sums of squares of what is left, not differences of large sums."""
    net, x = network(), images(size=SIZE, offset=1000.0)
    reference = net.double()(x.double()).float()
    assert_close(Program().run(net.float(), x), reference, 1e-3)


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bfloat16 arithmetic")
def test_bf16_is_close_and_not_the_same():
    net, x = network(), images(size=SIZE)
    exact, rough = Program().run(net, x), Program("bf16").run(net, x)
    assert 0 < (rough - exact).norm() / exact.norm() < 0.1


def test_a_batch_of_metatensors():
    net, x = network(), images(n=2, size=SIZE)
    out = OpenVINOMedNeXt(net, Program()).eval()(MetaTensor(x))
    assert not isinstance(out, MetaTensor)
    assert_close(out, net(x), 1e-4)


def test_it_says_what_pytorch_says_of_wrong_input():
    fast = OpenVINOMedNeXt(network(), Program()).eval()
    with pytest.raises(ValueError, match=r"expected \(N, 4, D, H, W\)"):
        fast(images(channels=3, size=SIZE))
    with pytest.raises(ValueError, match="not divisible by 16"):
        fast(images(size=(33, 48, 32)))


def test_a_size_too_small_for_the_graph_goes_through_pytorch():
    net, x = network(), images(size=(16, 32, 32))
    assert torch.equal(OpenVINOMedNeXt(net, Program()).eval()(x), net(x))


def test_training_and_gradients_go_through_pytorch():
    fast, x = OpenVINOMedNeXt(network(), Program()), images(size=SIZE)
    assert len(fast.train()(x)) == 5
    with torch.enable_grad():
        assert fast.eval()(x).requires_grad


def test_weights_that_change_are_compiled_anew_and_same_ones_are_not():
    net, x = network(), images(size=SIZE)
    fast = OpenVINOMedNeXt(net, Program()).eval()
    before = fast(x)
    compiled = fast.program.compiled
    fast(x)
    assert fast.program.compiled is compiled
    net.load_state_dict(network(seed=1).state_dict())
    assert not torch.allclose(fast(x), before)
    assert_close(fast(x), net(x), 1e-4)


def test_an_ensemble_is_compiled_once_and_averages_its_own_folds():
    slow = ensemble()
    runtime = Runtime(slow, "openvino")
    programs = {id(backbone.program) for backbone in runtime.network.backbones}
    assert len(programs) == 1 and runtime.label == "openvino fp32"
    x = images(size=SIZE)
    assert_close(runtime.network(x).sigmoid(), slow(x).sigmoid(), 1e-4)
    compiled = runtime.network.backbones[0].program.compiled
    assert compiled is not None
    randomise(slow.backbones[1], 9)  # weights come after the network was made
    assert_close(runtime.network(x).sigmoid(), slow(x).sigmoid(), 1e-4)
    assert runtime.network.backbones[0].program.compiled is compiled


def test_a_network_of_a_server_is_executed_too_whatever_its_size():
    """MONAI Label calls the bundle's inferer with a copy of network_def that it has loaded itself."""
    runtime, served, x = Runtime(ensemble(), "auto"), ensemble(), images(size=SIZE)
    assert runtime.label == "torch", "too small to be compiled for one run"
    executed = runtime(served)
    assert all(isinstance(backbone, OpenVINOMedNeXt) for backbone in executed.backbones)
    assert_close(executed(x).sigmoid(), served(x).sigmoid(), 1e-4)
    assert runtime(served) is executed and runtime(executed) is executed
    assert runtime(runtime.network) is runtime.network
    assert runtime(len) is len and Runtime(served, "torch")(executed) is executed


@pytest.mark.parametrize("inferer", [FewWindowsInferer((48, 48, 48)), WholeVolumeInferer()])
def test_an_inferer_brings_the_runtime_along(inferer):
    inferer.execution, seen = Runtime(ensemble(), "auto"), []
    served = ensemble()
    for backbone in served.backbones:
        backbone.register_forward_hook(lambda *_: seen.append("torch"))
    inferer(images(size=(40, 50, 40)), served)
    assert not seen and inferer.execution.served[0] is served


def test_the_network_given_stays_as_it_is():
    slow = ensemble()
    names = list(slow.state_dict())
    fast = Runtime(slow, "openvino").network
    assert fast is not slow and list(slow.state_dict()) == names
    assert all(isinstance(backbone, MedNeXt) for backbone in slow.backbones)


def test_cached_on_disk_under_weights_and_size(tmp_path):
    x, larger = images(size=SIZE), images(size=(48, 48, 32))
    for seed, image, expected in [(0, x, 1), (0, x, 1), (1, x, 2), (1, larger, 3)]:
        net = network(seed)
        assert_close(Program(cache_dir=tmp_path).run(net, image), net(image), 1e-4)
        assert len(list(tmp_path.glob("*.blob"))) == expected


def test_what_is_cached_is_not_compiled_again(tmp_path, monkeypatch):
    net, x = network(), images(size=SIZE)
    Program(cache_dir=tmp_path).run(net, x)
    real = core()
    without_compiling = SimpleNamespace(import_model=real.import_model, get_property=real.get_property)
    monkeypatch.setattr("custom.mednext.openvino.core", lambda: without_compiling)
    assert_close(Program(cache_dir=tmp_path).run(net, x), net(x), 1e-4)


def test_a_size_that_fails_does_not_spoil_the_next(monkeypatch):
    net, program, x = network(), Program(), images(size=SIZE)
    program.run(net, x)
    real = program.compile
    monkeypatch.setattr(program, "compile", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError):
        program.run(net, images(size=(48, 48, 32)))
    monkeypatch.setattr(program, "compile", real)
    assert_close(program.run(net, x), net(x), 1e-4)


def test_a_damaged_cache_is_made_again(tmp_path):
    net, x = network(), images(size=SIZE)
    Program(cache_dir=tmp_path).run(net, x)
    (blob,) = tmp_path.glob("*.blob")
    blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
    assert_close(Program(cache_dir=tmp_path).run(net, x), net(x), 1e-4)


@pytest.mark.parametrize(("option", "kept"), [(True, True), (False, False), (None, False)])
def test_the_users_cache_folder(tmp_path, monkeypatch, option, kept):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Runtime(network(), "openvino", cache_dir=option).network(images(size=SIZE))
    assert (len(list(tmp_path.glob("comnet/*.blob"))) == 1) is kept


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").touch()
    net, x = network(), images(size=SIZE)
    assert_close(Program(cache_dir=tmp_path / "file" / "cache").run(net, x), net(x), 1e-4)


def test_the_cache_keeps_what_was_used_last(tmp_path):
    import os

    for age, name in enumerate("abc"):
        path = tmp_path / f"{name}.blob"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    prune(tmp_path, 250)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("make", "runtime", "label"),
    [
        (mednext_base, "auto", "openvino fp32"),
        (mednext_base, "torch", "torch"),
        (mednext_tiny, "auto", "torch"),
        (mednext_tiny, "openvino", "openvino fp32"),
        (partial(nn.Conv3d, 4, 3, 1), "auto", "torch"),
    ],
)
def test_choice(make, runtime, label):
    net = make()
    chosen = Runtime(net, runtime)
    assert chosen.label == label
    assert (chosen.network is net) == (label == "torch")


def test_auto_without_openvino_says_so_in_one_line(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "openvino", None)
    net = mednext_base()
    with caplog.at_level(logging.INFO, logger="comnet"):
        assert Runtime(net).network is net
    assert len(caplog.records) == 1 and "openvino cannot be used: it is not installed" in caplog.text
    with pytest.raises(ValueError, match=r'pip install "comnet-glioma\[cpu\]"'):
        Runtime(net, "openvino")


def test_auto_leaves_other_devices_alone_and_openvino_by_name_refuses_them():
    net = mednext_base()
    assert Runtime(net, device="cuda").network is net
    with pytest.raises(ValueError, match="--device cpu"):
        Runtime(net, "openvino", device="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onnx"}, "no runtime 'onnx': choose one of auto, torch, openvino"),
        ({"precision": "int8"}, "no precision 'int8': choose one of fp32, bf16"),
        ({"runtime": "openvino"}, "Conv3d has none: use --runtime torch"),
    ],
)
def test_wrong_choices(options, message):
    with pytest.raises(ValueError, match=message):
        Runtime(nn.Conv3d(4, 3, 1), **options)


def test_where_openvino_fails_pytorch_goes_on_unless_it_was_asked_for(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("some check\nno such instruction")

    monkeypatch.setattr("custom.mednext.openvino.Program.compile", fail)
    net, x = network(), images(size=SIZE)
    fast = OpenVINOMedNeXt(net, Program(), fall_back=True).eval()
    assert torch.equal(fast(x), net(x)) and torch.equal(fast(x), net(x))
    assert caplog.text.count("OpenVINO failed, PyTorch goes on: no such instruction") == 1
    with pytest.raises(RuntimeError):
        OpenVINOMedNeXt(net, Program()).eval()(x)


class Corrector(nn.Module):
    num_samples, seed = 1, 0

    def refine(self, image, coarse, num_samples, seed):
        self.log.append("corrector")
        return Segmentation(coarse, torch.zeros_like(coarse))


@pytest.mark.parametrize("each", [False, True])
def test_activations_are_freed_before_the_corrector(each):
    slow, log = ensemble(2), []
    slow.corrector, slow.refine_each_fold = Corrector(), each
    slow.corrector.log = log
    fast = Runtime(slow, "openvino").network
    program = fast.backbones[0].program
    program.release_memory = lambda: log.append("released")
    fast(images(size=SIZE))
    assert program.compiled is not None and "corrector" in log
    assert all(log[at - 1] == "released" for at, what in enumerate(log) if what == "corrector")


def test_inputs_of_the_graph_are_named():
    graph = MedNeXtGraph(network(), SIZE, fixed=False)
    names = {node.any_name for node in graph.model.inputs}
    assert names == {"image", *graph.weights}


def test_nothing_is_reported_over_the_network():
    script = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import custom.mednext.openvino, openvino.tools.ovc.telemetry_utils as used\n"
        "print(used.tm.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "openvino.tools.ovc.telemetry_stub", done.stderr
