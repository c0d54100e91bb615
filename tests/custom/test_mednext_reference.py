"""MedNeXt against MONAI's blocks, and against a whole network of them in MIC-DKFZ's names and wiring."""

from __future__ import annotations

import pytest
import torch
from mednext_tensors import assert_close, images, randomise
from monai.networks.blocks.mednext_block import MedNeXtBlock, MedNeXtDownBlock, MedNeXtOutBlock, MedNeXtUpBlock
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
)

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "same": (Block, MedNeXtBlock, 6, 1),
    "down": (Block, MedNeXtDownBlock, 12, 2),
    "up": (UpBlock, MedNeXtUpBlock, 3, 2),
}
TINY_SHAPE = {"filters": 4, "expansions": (2, 3, 2, 1, 2, 1, 3, 2, 1), "blocks": (1, 2, 1, 1, 1, 1, 1, 1, 2)}


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
    randomise(expected.double())
    actual = ours(6, out_channels, 3, kernel_size, stride=stride, grn=grn).double()
    actual.load_state_dict(expected.state_dict())
    x = images(n, 6, (8, 10, 6), offset=2.0).double().requires_grad_()
    x_expected = x.detach().clone().requires_grad_()
    y, y_expected = actual(x), expected(x_expected)
    assert_close(y, y_expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
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
    expected = MedNeXtUpBlock(4, 4, 2, 3, True, global_resp_norm=True).double()
    randomise(expected)
    actual = UpBlock(4, 4, 2, stride=2).double()
    actual.load_state_dict(expected.state_dict())
    x = images(2, 4, (12, 10, 14)).double()  # 23 * 19 * 27 = 11,799 voxels after doubling: three pieces
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
    reference = MicDkfz(**TINY_SHAPE, grn=grn).double()
    randomise(reference)
    network = MedNeXt(**TINY_SHAPE, grn=grn).double()
    state = {f"module.{name}": tensor for name, tensor in reference.mic_state_dict().items()}
    assert any("grn_gamma" in name for name in state) == grn
    network.load_state_dict(from_mic_dkfz(state))
    x = images(2).double()
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
