"""The kernels of benchmarks/compiled_blocks train what custom.mednext trains."""

from __future__ import annotations

import copy
import importlib.util
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from monai.networks.nets import SegResNet
from torch.nn import functional

from custom.mednext import mednext_light, network

SOURCE = Path(__file__).parents[2] / "benchmarks" / "compiled_blocks" / "blocks.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def compiled(monkeypatch, cache):
    """The kernels, compiled anew for this file, and in use until the test ends."""
    if not (shutil.which("c++") and SOURCE.exists()):
        pytest.skip("there is no C++ compiler, or this is no checkout of the repository")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for owner, name in ((network.Block, "run"), (network.UpBlock, "run"), (network, "pointwise")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    spec = importlib.util.spec_from_file_location("compiled_blocks", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
    return module


def gradients(model, image):
    outputs = model(image)
    sum((output * output).mean() + output.sigmoid().mean() for output in outputs).backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_outputs_and_gradients_are_those_of_the_plain_network_in_double_precision(compiled):
    torch.manual_seed(0)
    model = mednext_light().train()
    for name, parameter in model.named_parameters():
        if "resp" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    image = torch.randn(1, 4, 32, 48, 16) + 0.5
    expected, of_plain = gradients(copy.deepcopy(model).double(), image.double())
    found, of_compiled = gradients(model, image)
    for output, reference in zip(found, expected, strict=True):
        assert (output - reference).abs().max() < 1e-4 * reference.abs().max()
    for name, reference in of_plain.items():
        if not name.endswith("conv1.bias"):  # the normalisation takes it away again: its gradient is zero
            assert (of_compiled[name] - reference).norm() < 1e-4 * reference.norm(), name


def test_the_kernels_are_what_runs(compiled, monkeypatch):
    used = set()
    call = compiled.call
    monkeypatch.setattr(
        compiled, "call", lambda library, kernel, *rest: (used.add(kernel), call(library, kernel, *rest))
    )
    gradients(mednext_light().train(), torch.randn(1, 4, 16, 16, 16))
    assert used >= {"dw_fwd", "dws_fwd", "dwt_fwd", "dw_wgrad", "dws_wg", "expand_fwd", "expand_back", "linear_back"}


def test_triton_depthwise_convolutions_and_gradients_are_pytorchs(monkeypatch):
    pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("triton_depthwise", SOURCE.with_name("triton_depthwise.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    for channels, stride, size in ((16, 1, (5, 6, 7)), (16, 2, (6, 8, 4)), (72, 1, (3, 4, 5)), (8, 2, (5, 7, 3))):
        inputs = [torch.randn(2, channels, *size), torch.randn(channels, 1, 3, 3, 3), torch.randn(channels)]
        found, expected = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
        reference = functional.conv3d(*expected, stride, 1, groups=channels)
        output, gradient = module.depthwise(*found, stride), torch.randn_like(reference)
        assert torch.allclose(output, reference, atol=1e-4)
        for ours, theirs in zip(
            torch.autograd.grad(output, found, gradient),
            torch.autograd.grad(reference, expected, gradient),
            strict=True,
        ):
            assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.skipif(not SOURCE.exists(), reason="this is no checkout of the repository")
def test_segresnet_trains_in_bfloat16_and_is_evaluated_as_ever(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    in_bfloat16 = runpy.run_path(str(SOURCE.with_name("__main__.py")), run_name="compiled_blocks")["in_bfloat16"]
    torch.manual_seed(0)
    model, image = SegResNet(3, 8, 4, 3), torch.randn(1, 4, 16, 16, 16)
    plain = model(image)
    found = in_bfloat16(model.train(), image)
    assert found.dtype == torch.float32 and found.grad_fn is not None
    assert 1e-5 < (found - plain).norm() / plain.norm() < 0.05
    assert torch.equal(in_bfloat16(model.eval(), image), plain)
