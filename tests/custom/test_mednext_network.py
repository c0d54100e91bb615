"""MedNeXt's outputs, gradients, memory, exports and precision, and what it refuses."""

from __future__ import annotations

import gc
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mednext_tensors import assert_close, images, randomise
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.utils import convert_to_onnx
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from custom.mednext import Block, MedNeXt, mednext_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def kept_for_backward(network: nn.Module, x: torch.Tensor) -> tuple[list[int], object]:
    """Sizes of the distinct tensors that autograd keeps, and the output that keeps them."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x)
    return list(kept.values()), output


def test_deep_supervision_shapes():
    network = mednext_tiny().train()
    shapes = [tuple(output.shape) for output in network(images(2))]
    assert shapes == [(2, 3, 32 // 2**i, 16 // 2**i, 16 // 2**i) for i in range(5)]
    assert network.eval()(images(2)).shape == (2, 3, 32, 16, 16)
    assert mednext_tiny(deep_supervision=False).train()(images(2)).shape == (2, 3, 32, 16, 16)


def test_every_parameter_gets_a_gradient():
    network = mednext_tiny().train()
    randomise(network)
    sum(output.square().mean() for output in network(images())).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("seed", [None, 0])
def test_gradients_finite_for_zero_input(seed: int | None):
    network = mednext_tiny().train()
    for module in network.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    if seed is not None:
        randomise(network, seed)
    x = torch.zeros(1, 4, 16, 16, 16, requires_grad=True)
    sum(output.mean() for output in network(x)).backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_checkpointing_changes_nothing_but_memory():
    plain, saving = mednext_tiny().double().train(), mednext_tiny(checkpointing=True).double().train()
    randomise(plain)
    saving.load_state_dict(plain.state_dict())
    sizes = []
    for network in (plain, saving):
        kept, outputs = kept_for_backward(network, images().double())
        sum(output.square().mean() for output in outputs).backward()
        sizes.append(sum(kept))
    assert sizes[1] < 0.5 * sizes[0]
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert_close(q.grad, p.grad)


@pytest.fixture
def around_gelu(monkeypatch):
    """Weak references to what goes into each GELU and what comes out."""
    seen, gelu = [], F.gelu

    def watched(x):
        h = gelu(x)
        seen.append((StorageWeakRef(x.untyped_storage()), StorageWeakRef(h.untyped_storage())))
        return h

    monkeypatch.setattr(F, "gelu", watched)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_in_training_does_not_keep_its_hidden_layer(checkpointing, around_gelu):
    block = Block(8, 8, 4, checkpointing=checkpointing).train()
    z = block(images(1, 8, (16, 16, 16)).requires_grad_())
    ((before, hidden),) = around_gelu
    assert hidden.expired()
    assert before.expired() == checkpointing
    z.sum().backward()
    assert len(around_gelu) > 1  # computed anew


def test_a_forward_without_a_backward_leaves_nothing_behind(around_gelu):
    block = Block(8, 8, 4).train()
    z = block(images(1, 8, (16, 16, 16)).requires_grad_())
    ((before, _),) = around_gelu
    assert not before.expired()
    del z
    gc.collect()
    assert before.expired()


def test_scripted_gives_the_same():
    network = mednext_tiny().double().eval()
    randomise(network)
    scripted = torch.jit.script(network)
    for x in (images(1).double(), images(2, size=(16, 32, 48)).double()):
        with torch.no_grad():
            assert_close(scripted(x), network(x))
    assert isinstance(torch.jit.script(network.train())(images().double()), torch.Tensor)


def test_exported_program_gives_the_same():
    network, x = mednext_tiny().double().eval(), images(2)[:1].double()
    randomise(network)
    program = torch.export.export(network, (images().double(),)).module()
    assert_close(program(x), network(x))


def test_onnx_with_dynamic_shapes(tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    network = mednext_tiny().eval()
    randomise(network)
    axes = {"image": {0: "n", 2: "d", 3: "h", 4: "w"}}
    path = str(tmp_path / "mednext.onnx")
    options = {"opset_version": 17, "input_names": ["image"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(network, (images(),), path, dynamo=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (images(1), images(2, size=(16, 48, 32))):
        with torch.no_grad():
            expected = network(x)
        assert_close(torch.from_numpy(session.run(None, {"image": x.numpy()})[0]), expected, 1e-4)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch's default ONNX exporter: onnxscript")
def test_onnx_through_monai():
    pytest.importorskip("onnxruntime")
    network = mednext_tiny().eval()
    convert_to_onnx(network, [images()], opset_version=18, verify=True, use_ort=True, rtol=1e-3, atol=1e-4)


def test_bfloat16_autocast_is_close():
    network = mednext_tiny()
    randomise(network)
    network = network.eval()
    with torch.no_grad():
        expected = network(images())
        with torch.autocast("cpu", torch.bfloat16):
            actual = network(images())
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() < 0.03 * expected.norm()


def test_bfloat16_autocast_trains():
    network = mednext_tiny().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(output.float().square().mean() for output in network(images()))
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


def test_statistics_are_fp32_under_autocast():
    block = Block(4, 4, 2)
    x = images(1, 4, (16, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.conv3d(x, block.conv1.weight, padding=1, groups=4).flatten(2).transpose(1, 2)
        weight, _ = block.expansion(y)
        hidden = block.compression(y.repeat(1, 1, 2))[0]
    assert weight.dtype == hidden.dtype == torch.float32


def test_samples_do_not_mix():
    network = mednext_tiny().double().eval()
    randomise(network)
    x = images(2).double()
    x[1] *= 5
    with torch.no_grad():
        together = network(x)
        for i in range(2):
            assert_close(together[i : i + 1], network(x[i : i + 1]))


def test_same_seed_same_network_same_output():
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(mednext_tiny().eval()(images()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("grad", [False, True])
def test_input_is_left_alone(grad: bool):
    x, network = images(), mednext_tiny().eval()
    with torch.set_grad_enabled(grad):
        network(x)
    assert torch.equal(x, images())


def test_meta_tensor_in_plain_tensor_out():
    network = mednext_tiny().eval()
    with torch.no_grad():
        y = network(MetaTensor(images(), affine=np.diag([2.0, 2.0, 2.0, 1.0])))
        assert type(y) is torch.Tensor
        assert torch.equal(y, network(images()))
        window = SlidingWindowInferer(roi_size=(16, 16, 16), overlap=0.25)(MetaTensor(images()), network)
    assert window.shape == (1, 3, 32, 16, 16)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 16, 20, 16), r"\(16, 20, 16\).*not divisible by 16.*SlidingWindowInferer"),
        ((1, 3, 16, 16, 16), r"\(1, 3, 16, 16, 16\).*4 channels in the order T1n, T1c, T2w, T2-FLAIR"),
        ((4, 16, 16, 16), r"expected \(N, 4, D, H, W\)"),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        mednext_tiny()(torch.zeros(shape))


def test_wrong_configuration():
    with pytest.raises(ValueError, match="odd kernel_size"):
        MedNeXt(kernel_size=4)
    with pytest.raises(ValueError, match="nine blocks"):
        MedNeXt(blocks=(2, 2))
