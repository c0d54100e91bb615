"""Depthwise 3D convolutions for training on a GPU, in Triton: PyTorch's own take most of a MedNeXt's step there."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from custom.mednext import network

TILE = 1024
"""Elements of a feature map that one program holds: as many voxels as there is room for, of at most 64 channels."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs in Python, on a CPU, as tests do."""
PROGRAMS = 512
"""Pieces into which voxels are divided where a gradient is summed over all of them."""


plain_run, plain_upsampling = network.Block.run, network.UpBlock.upsample


def install() -> None:
    """Have all MedNeXts of this process run their depthwise convolutions of 3x3x3 here."""
    network.Block.run, network.UpBlock.upsample = run, upsample  # type: ignore[method-assign]


def is_known(block: network.Block, x: Tensor) -> bool:
    """Whether the kernels can take this block and input."""
    return block.conv1.kernel_size == (3, 3, 3) and x.dtype != torch.float64 and (x.is_cuda or INTERPRETED)


def run(block: network.Block, x: Tensor) -> Tensor:
    """`Block.run`."""
    if not is_known(block, x):
        return plain_run(block, x)
    y = depthwise(x, block.conv1.weight, block.conv1.bias, block.conv1.stride[0])
    return block.mix(y, network.to_rows(block.res_conv(x)))


def upsample(block: network.UpBlock, x: Tensor) -> Tensor:
    """`UpBlock.upsample`: a plain convolution over zeros between voxels."""
    if not is_known(block, x):
        return plain_upsampling(block, x)
    return depthwise(network.between_zeros(x), block.conv1.weight.flip([2, 3, 4]), block.conv1.bias, 1)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Convolve x (N, C, D, H, W) with weight (C, 1, 3, 3, 3) and bias (C), padded by 1; stride 1 or 2."""
    if torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    rows = Depthwise.apply(x.permute(0, 2, 3, 4, 1), weight.flatten(1).t(), bias, stride)
    return rows.permute(0, 4, 1, 2, 3)


class Depthwise(Function):
    """x (N, D, H, W, C), w (27, C), b (C) to their convolution, sizes divided by the stride and rounded up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, stride: int) -> Tensor:
        x, w = x.contiguous(), w.float().contiguous()
        ctx.save_for_backward(x, w)
        ctx.stride = stride
        return convolve(x, w, b.float(), stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        g = gradients[0].contiguous()
        of_w, of_b = sum_products(x, g, ctx.stride), g.flatten(0, 3).sum(0, dtype=torch.float32)
        if ctx.stride == 2:
            apart = g.new_zeros(x.shape)
            apart[:, ::2, ::2, ::2] = g
            g = apart
        return convolve(g, w.flip(0).contiguous(), None, 1), of_w, of_b, None


def convolve(x: Tensor, w: Tensor, b: Tensor | None, stride: int) -> Tensor:
    """Convolve x (N, D, H, W, C) with w (27, C), padded by 1, and add b (C)."""
    n, d, h, width, c = x.shape
    size = [-(-length // stride) for length in (d, h, width)]
    y = x.new_empty(n, *size, c)
    voxels, channels = tile(c)
    count = y.numel() // c
    grid = (triton.cdiv(count, voxels), triton.cdiv(c, channels))
    constants = stride, b is not None, voxels, channels
    convolution[grid](x, w, w if b is None else b, y, count, d, h, width, *size, c, *constants)
    return y


def sum_products(x: Tensor, g: Tensor, stride: int) -> Tensor:
    """Gradient (27, C) of the weights, of x (N, D, H, W, C) and the gradient g of their convolution."""
    _, d, h, width, c = x.shape
    voxels, channels = tile(c)
    count = g.numel() // c
    pieces = min(PROGRAMS, triton.cdiv(count, voxels))
    each = triton.cdiv(triton.cdiv(count, pieces), voxels) * voxels
    total = torch.empty(pieces, 27, c, device=x.device)
    grid = (pieces, 9, triton.cdiv(c, channels))
    products[grid](x, g, total, count, each, d, h, width, *g.shape[1:4], c, stride, voxels, channels)
    return total.sum(0)


def tile(channels: int) -> tuple[int, int]:
    """Voxels and channels that one program holds."""
    block = min(64, triton.next_power_of_2(channels))
    return TILE // block, block


@triton.jit
def convolution(
    x, w, b, y, count, D, H, W, out_d, out_h, out_w, C,
    stride: tl.constexpr, has_bias: tl.constexpr, voxels: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """One tile of the convolution."""
    v = tl.program_id(0) * voxels + tl.arange(0, voxels)
    c = tl.program_id(1) * channels + tl.arange(0, channels)
    k, j, i, n = v % out_w, v // out_w % out_h, v // (out_w * out_h) % out_d, v // (out_w * out_h * out_d)
    of_c = c < C
    acc = tl.zeros((voxels, channels), tl.float32)
    for tap in tl.static_range(27):
        dd, hh, ww = i * stride + (tap // 9 - 1), j * stride + (tap // 3 % 3 - 1), k * stride + (tap % 3 - 1)
        inside = (v < count) & (dd >= 0) & (dd < D) & (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
        at = ((n * D + dd) * H + hh) * W + ww
        values = tl.load(x + at[:, None] * C + c[None, :], inside[:, None] & of_c[None, :], 0.0)
        acc += values.to(tl.float32) * tl.load(w + tap * C + c, of_c, 0.0)[None, :]
    if has_bias:
        acc += tl.load(b + c, of_c, 0.0)[None, :]
    tl.store(y + v[:, None] * C + c[None, :], acc.to(y.dtype.element_ty), (v < count)[:, None] & of_c[None, :])


@triton.jit
def products(
    x, g, total, count, each, D, H, W, out_d, out_h, out_w, C,
    stride: tl.constexpr, voxels: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """Gradients of three neighbouring taps, summed over one piece of the voxels."""
    piece, row = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * channels + tl.arange(0, channels)
    of_c = c < C
    first = tl.zeros((voxels, channels), tl.float32)
    second = tl.zeros((voxels, channels), tl.float32)
    third = tl.zeros((voxels, channels), tl.float32)
    for start in range(0, each, voxels):
        v = piece * each + start + tl.arange(0, voxels)
        k, j, i, n = v % out_w, v // out_w % out_h, v // (out_w * out_h) % out_d, v // (out_w * out_h * out_d)
        of_g = tl.load(g + v[:, None] * C + c[None, :], (v < count)[:, None] & of_c[None, :], 0.0).to(tl.float32)
        dd, hh, ww = i * stride + (row // 3 - 1), j * stride + (row % 3 - 1), k * stride
        inside = (v < count) & (dd >= 0) & (dd < D) & (hh >= 0) & (hh < H)
        at = ((n * D + dd) * H + hh) * W + ww
        left = (inside & (ww >= 1))[:, None] & of_c[None, :]
        first += of_g * tl.load(x + (at - 1)[:, None] * C + c[None, :], left, 0.0).to(tl.float32)
        second += of_g * tl.load(x + at[:, None] * C + c[None, :], inside[:, None] & of_c[None, :], 0.0).to(tl.float32)
        right = (inside & (ww + 1 < W))[:, None] & of_c[None, :]
        third += of_g * tl.load(x + (at + 1)[:, None] * C + c[None, :], right, 0.0).to(tl.float32)
    to = total + (piece * 27 + row * 3) * C + c
    tl.store(to, tl.sum(first, 0), of_c)
    tl.store(to + C, tl.sum(second, 0), of_c)
    tl.store(to + 2 * C, tl.sum(third, 0), of_c)
