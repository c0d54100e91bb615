"""MedNeXt against MONAI's blocks, and against a whole network of them in MIC-DKFZ's names and wiring."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.blocks.mednext_block import MedNeXtBlock, MedNeXtDownBlock, MedNeXtOutBlock, MedNeXtUpBlock
from monai.networks.utils import convert_to_onnx
from torch import nn

from custom.mednext import (
    Block,
    MedNeXt,
    UpBlock,
    from_mic_dkfz,
    mednext_base,
    mednext_large,
    mednext_medium,
    mednext_small,
    mednext_tiny,
)

KINDS = {
    "same": (Block, MedNeXtBlock, 6, 1),
    "down": (Block, MedNeXtDownBlock, 12, 2),
    "up": (UpBlock, MedNeXtUpBlock, 3, 2),
}
TINY_SHAPE = {"filters": 4, "expansions": (2, 3, 2, 1, 2, 1, 3, 2, 1), "blocks": (1, 2, 1, 1, 1, 1, 1, 1, 2)}


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: a second thread costs more than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def images(n: int = 1, channels: int = 4, size: tuple[int, ...] = (32, 16, 16), offset: float = 0.0) -> torch.Tensor:
    return torch.randn((n, channels, *size), generator=torch.Generator().manual_seed(7)) + offset


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0)


def kept_for_backward(network: nn.Module, x: torch.Tensor) -> tuple[list[int], object]:
    """Sizes of the distinct tensors that autograd keeps, and the output that keeps them."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x)
    return list(kept.values()), output


class MicDkfz(nn.Module):
    """MIC-DKFZ's MedNeXt v1 in its own names, of MONAI's blocks; with GRN its down_0 has none."""

    def __init__(self, filters: int, expansions: tuple[int, ...], blocks: tuple[int, ...], grn: bool):
        super().__init__()
        common = {"kernel_size": 3, "use_residual_connection": True}
        for i, level in enumerate((0, 1, 2, 3, 4, 3, 2, 1, 0)):
            width = filters * 2**level
            name = "bottleneck" if i == 4 else f"enc_block_{level}" if i < 4 else f"dec_block_{level}"
            made = [MedNeXtBlock(width, width, expansions[i], **common, global_resp_norm=grn) for _ in range(blocks[i])]
            self.add_module(name, nn.Sequential(*made))
        for level in range(4):
            width, grn_down = filters * 2**level, grn and level > 0
            down = MedNeXtDownBlock(width, 2 * width, expansions[level + 1], **common, global_resp_norm=grn_down)
            up = MedNeXtUpBlock(2 * width, width, expansions[8 - level], **common, global_resp_norm=grn)
            self.add_module(f"down_{level}", down)
            self.add_module(f"up_{level}", up)
        for level in range(5):
            self.add_module(f"out_{level}", MedNeXtOutBlock(filters * 2**level, 3, "3d"))
        self.stem = nn.Conv3d(4, filters, 1)
        self.dummy_tensor = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        skips, x = [], self.stem(x)
        for level in range(4):
            skips.append(self.get_submodule(f"enc_block_{level}")(x))
            x = self.get_submodule(f"down_{level}")(skips[-1])
        x = self.bottleneck(x)
        outputs = [self.out_4(x)]
        for level in (3, 2, 1, 0):
            x = self.get_submodule(f"dec_block_{level}")(self.get_submodule(f"up_{level}")(x) + skips[level])
            outputs.append(self.get_submodule(f"out_{level}")(x))
        return outputs[::-1]

    def mic_state_dict(self) -> dict[str, torch.Tensor]:
        return {name.replace("global_resp_", "grn_"): tensor for name, tensor in self.state_dict().items()}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("grn", [False, True])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_block_equals_monai(kind: str, kernel_size: int, grn: bool, n: int):
    ours, theirs, out_channels, stride = KINDS[kind]
    expected = theirs(6, out_channels, 3, kernel_size, use_residual_connection=True, global_resp_norm=grn)
    randomise(expected)
    actual = ours(6, out_channels, 3, kernel_size, stride=stride, grn=grn)
    actual.load_state_dict(expected.state_dict())
    x = images(n, 6, (8, 10, 6), offset=2.0).requires_grad_()
    x_expected = x.detach().clone().requires_grad_()
    y, y_expected = actual(x), expected(x_expected)
    assert_close(y, y_expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    (y_expected * weights).sum().backward()
    assert_close(x.grad, x_expected.grad)
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, parameter in actual.named_parameters():
        if name != "conv1.bias":  # removed by the normalisation: zero, up to rounding, in both
            assert_close(parameter.grad, gradients[name])
    with torch.no_grad():
        assert_close(actual(x), y_expected)


def test_inference_in_pieces_equals_monai():
    expected = MedNeXtUpBlock(4, 4, 2, 3, True, global_resp_norm=True)
    randomise(expected)
    actual = UpBlock(4, 4, 2, stride=2)
    actual.load_state_dict(expected.state_dict())
    x = images(2, 4, (12, 10, 14))  # 23 * 19 * 27 = 11,799 voxels after doubling: three pieces
    with torch.no_grad():
        assert_close(actual(x), expected(x))


@pytest.mark.parametrize("kind", KINDS)
def test_variance_survives_a_large_mean(kind: str):
    ours, theirs, out_channels, stride = KINDS[kind]
    actual = ours(6, out_channels, 2, stride=stride)
    expected = theirs(6, out_channels, 2, 3, True, global_resp_norm=True).double()
    actual.load_state_dict(expected.state_dict())
    actual.conv1.bias.data += 300.0
    expected.conv1.bias.data += 300.0
    x = images(1, 6, (16, 16, 16))
    with torch.no_grad():
        assert_close(actual(x).double(), expected(x.double()), 1e-3)


@pytest.mark.parametrize("grn", [False, True])
def test_network_equals_mic_dkfz(grn: bool):
    reference = MicDkfz(**TINY_SHAPE, grn=grn)
    randomise(reference)
    network = MedNeXt(**TINY_SHAPE, grn=grn)
    state = {f"module.{name}": tensor for name, tensor in reference.mic_state_dict().items()}
    assert any("grn_gamma" in name for name in state) == grn
    network.load_state_dict(from_mic_dkfz(state))
    x = images(2)
    for actual, expected in zip(network.train()(x), reference(x), strict=True):
        assert_close(actual, expected)
    with torch.no_grad():
        assert_close(network.eval()(x), reference(x)[0])


def test_mic_dkfz_without_deep_supervision():
    coarse = ("out_1", "out_2", "out_3", "out_4")
    state = MicDkfz(**TINY_SHAPE, grn=False).mic_state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith(coarse)}
    MedNeXt(**TINY_SHAPE, grn=False, deep_supervision=False).load_state_dict(from_mic_dkfz(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"epoch": 3, "state_dict": state}, r"epoch.*checkpoint\['state_dict'\]"),
        (lambda state: {k: v for k, v in state.items() if not k.startswith("up_2")}, "no keys for up_2"),
        (lambda state: state | {"decoder.7.weight": state["stem.weight"]}, "unknown keys decoder.7.weight"),
        (lambda state: from_mic_dkfz(state), "without translation"),
    ],
)
def test_mic_dkfz_keys_that_do_not_fit(change, message: str):
    state = MicDkfz(**TINY_SHAPE, grn=False).mic_state_dict()
    with pytest.raises(ValueError, match=message):
        from_mic_dkfz(change(state))


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("grn", "count"), [(False, 10_529_327), (True, 10_562_799)])
def test_parameter_count_of_base(grn: bool, count: int):
    with torch.device("meta"):
        assert parameter_count(mednext_base(grn=grn)) == count


@pytest.mark.parametrize(
    ("make", "millions"), [(mednext_small, 5.6), (mednext_base, 10.5), (mednext_medium, 17.6), (mednext_large, 61.8)]
)
def test_parameter_counts_of_the_paper(make, millions: float):
    with torch.device("meta"):
        assert parameter_count(make(grn=False, deep_supervision=False)) / 1e6 == pytest.approx(millions, abs=0.06)


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
    plain, saving = mednext_tiny().train(), mednext_tiny(checkpointing=True).train()
    randomise(plain)
    saving.load_state_dict(plain.state_dict())
    sizes = []
    for network in (plain, saving):
        kept, outputs = kept_for_backward(network, images())
        sum(output.square().mean() for output in outputs).backward()
        sizes.append(sum(kept))
    assert sizes[1] < 0.5 * sizes[0]
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert_close(q.grad, p.grad)


def test_block_keeps_half_of_what_monai_keeps():
    x = images(1, 8, (16, 16, 16))
    blocks = (Block(8, 8, 4), MedNeXtBlock(8, 8, 4, 3, True, global_resp_norm=True))
    results = [kept_for_backward(block, x) for block in blocks]
    ours, monais = (sum(size for size in kept if size >= x.nbytes) for kept, _ in results)
    assert ours == (1 + 1 + 4 + 4) * x.nbytes  # x, centred y, hidden layer before GELU and after it
    assert ours < 0.6 * monais


def test_scripted_gives_the_same():
    network = mednext_tiny().eval()
    randomise(network)
    scripted = torch.jit.script(network)
    for x in (images(1), images(2, size=(16, 32, 48))):
        with torch.no_grad():
            assert_close(scripted(x), network(x), 1e-6)
    assert isinstance(torch.jit.script(network.train())(images()), torch.Tensor)


def test_exported_program_gives_the_same():
    network = mednext_tiny().eval()
    randomise(network)
    program = torch.export.export(network, (images(),)).module()
    assert_close(program(images(2)[:1]), network(images(2)[:1]))


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
    network = mednext_tiny().eval()
    randomise(network)
    x = images(2)
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
