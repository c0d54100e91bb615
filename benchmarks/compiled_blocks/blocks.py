"""MedNeXt blocks for training on one CPU core: the mathematics of `custom.mednext.network`, in kernels of our own.

PyTorch's depthwise 3D convolutions and its matrix products with 8 or 16 channels leave most of a core idle. Here the
wide levels of a narrow network run in `depthwise.cpp` and `pointwise.cpp`, one sample at a time in float32; whatever
they do not know (other devices, precisions, batches, kernel sizes, evaluation) runs as it always does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from custom.mednext import network

CHANNELS = {8, 16, 32, 64, 128}
"""For which the depthwise kernels are compiled."""
EXPANSIONS = {(8, 16), (8, 32), (16, 16), (16, 32), (16, 48)}
"""Channels in and out for which the expansion is compiled; with more, PyTorch's products are as fast."""
LINEARS = {
    (4, 8),
    (4, 16),
    (8, 3),
    (8, 16),
    (16, 3),
    (16, 8),
    (16, 16),
    (16, 32),
    (32, 8),
    (32, 16),
    (48, 16),
    (48, 32),
}
OPTIONS = ["-O3", "-std=c++17", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-shared", "-fPIC"]

plain_run, plain_upsampling, plain_pointwise = network.Block.run, network.UpBlock.run, network.pointwise
kernels: dict[str, ctypes.CDLL] = {}


def install() -> None:
    """Compile the kernels where that has not been done, and have all MedNeXts of this process train by them.

    Raises:
        CalledProcessError: there is no working `c++`.
    """
    here = Path(__file__).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comnet"
    for name in ("depthwise", "pointwise"):
        content = b"".join((here / file).read_bytes() for file in (f"{name}.cpp", "vectors.h"))
        library = cache / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.so"
        if not library.exists():
            cache.mkdir(parents=True, exist_ok=True)
            unfinished = library.with_suffix(f".{os.getpid()}")
            subprocess.run(["c++", *OPTIONS, "-o", str(unfinished), str(here / f"{name}.cpp")], check=True)
            unfinished.replace(library)
        kernels[name] = ctypes.CDLL(str(library))
    network.Block.run, network.UpBlock.run, network.pointwise = run, upsample, pointwise  # type: ignore[method-assign]


def call(library: str, kernel: str, *arguments: Tensor | int | None) -> None:
    """Run a kernel; tensors are contiguous, None is a null pointer, numbers are C longs."""
    given: list[Any] = []
    for value in arguments:
        given.append(ctypes.c_long(value) if isinstance(value, int) else ctypes.c_void_p(0))
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            given[-1] = ctypes.c_void_p(value.data_ptr())
    getattr(kernels[library], kernel)(*given)


def padded(x: Tensor) -> Tensor:
    """Volume (D, H, W, C) with a zero on each side, flat, and some room behind it that vectors may read."""
    d, h, w, c = x.shape
    p = torch.empty((d + 2) * (h + 2) * (w + 2) * c + 64)
    call("depthwise", "dw_pad", x, p, d, h, w, c)
    return p


def with_moments(gradient: Tensor, y: Tensor, moments: Tensor) -> Tensor:
    """Gradient of y where its sum and sum of squares, (2, C), have gradients too."""
    total = gradient.contiguous()
    total = total.clone() if total.data_ptr() == gradient.data_ptr() else total
    of_sum, of_squares = moments.float().unbind()
    call("depthwise", "moments_bwd", total, y, of_sum, of_squares, y[..., 0].numel(), y.shape[-1])
    return total


class Depthwise(Function):
    """x (D, H, W, C), w (27, C), b (C) to the convolution y, of stride 1 or 2, and its moments (2, C) in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        x, w = x.contiguous(), w.contiguous()
        d, h, width, c = x.shape
        p = padded(x)
        y, moments = torch.empty(d // stride, h // stride, width // stride, c), torch.empty(2, c, dtype=torch.float64)
        if stride == 1:
            call("depthwise", "dw_fwd", p, w, b, y, moments, d, h, width, c, 0)
        else:
            call("depthwise", "dws_fwd", p, w, b, y, moments, *y.shape[:3], h + 2, width + 2, c)
        ctx.save_for_backward(w, y)
        ctx.padded, ctx.stride, ctx.shape = p, stride, x.shape
        return y, moments

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        w, y = ctx.saved_tensors
        d, h, width, c = ctx.shape
        g = with_moments(gradients[0], y, gradients[1])
        of_x, of_w, of_b = torch.empty(ctx.shape), torch.empty(27, c), torch.empty(c)
        if ctx.stride == 1:
            call("depthwise", "dw_wgrad", ctx.padded, g, of_w, of_b, d, h, width, c)
        else:
            call("depthwise", "dws_wg", ctx.padded, g, of_w, of_b, *y.shape[:3], h + 2, width + 2, c)
            apart = torch.zeros(ctx.shape)
            apart[::2, ::2, ::2] = g
            g = apart
        call("depthwise", "dw_fwd", padded(g), w, None, of_x, None, d, h, width, c, 1)
        ctx.padded = None
        return of_x, of_w, of_b, None


class TransposedDepthwise(Function):
    """x (D, H, W, C), w (27, C), b (C) to y (2D-1, 2H-1, 2W-1, C) and its moments (2, C) in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x, w = x.contiguous(), w.contiguous()
        d, h, width, c = x.shape
        y, moments = torch.empty(2 * d - 1, 2 * h - 1, 2 * width - 1, c), torch.empty(2, c, dtype=torch.float64)
        call("depthwise", "dwt_fwd", x, w, b, y, moments, d, h, width, c)
        ctx.save_for_backward(x, w, y)
        return y, moments

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, w, y = ctx.saved_tensors
        d, h, width, c = x.shape
        g = with_moments(gradients[0], y, gradients[1])
        p, size = padded(g), (d, h, width, 2 * h + 1, 2 * width + 1, c)
        of_x, of_w, unused = torch.empty_like(x), torch.empty(27, c), torch.empty(c)
        call("depthwise", "dws_fwd", p, w, None, of_x, None, *size)
        call("depthwise", "dws_wg", p, x, of_w, unused, *size)
        return of_x, of_w, g.sum((0, 1, 2))


class Expansion(Function):
    """y (V, C), w (C, E), b (E) to gelu(y w + b) and its sum of squares over voxels (E) in float64."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        w, b = w.contiguous(), b.contiguous()
        h, squares = torch.empty(len(y), len(b)), torch.empty(len(b), dtype=torch.float64)
        call("pointwise", "expand_fwd", y, w, b, h, squares, len(y), *w.shape)
        ctx.save_for_backward(y, w, b, h)
        return h, squares

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        y, w, b, h = ctx.saved_tensors
        of_h, of_squares = gradients[0].contiguous(), gradients[1].float().contiguous()
        of_y, of_w, of_b = torch.empty_like(y), torch.empty_like(w), torch.empty_like(b)
        call("pointwise", "expand_back", y, w, b, h, of_h, of_squares, of_y, of_w, of_b, len(y), *w.shape)
        return of_y, of_w, of_b


class Linear(Function):
    """h (V, E) w (E, O) + b (O), onto a residual (V, O) or None."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, b: Tensor, residual: Tensor | None) -> Tensor:
        h, w, b = h.contiguous(), w.contiguous(), b.contiguous()
        z = torch.empty(len(h), len(b))
        call(
            "pointwise", "linear_fwd", h, w, b, None if residual is None else residual.contiguous(), z, len(h), *w.shape
        )
        ctx.save_for_backward(h, w)
        ctx.has_residual = residual is not None
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, w = ctx.saved_tensors
        g = gradients[0].contiguous()
        of_h = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        of_w, of_b = torch.empty_like(w), torch.empty(w.shape[1])
        call("pointwise", "linear_back", h, w, g, of_h, of_w, of_b, len(h), *w.shape)
        return of_h, of_w, of_b, g if ctx.has_residual else None


def mix(block: network.Block, y: Tensor, moments: Tensor, residual: Tensor | None, constant: Tensor | None) -> Tensor:
    """`Block.mix` on rows y (V, C) with their moments, onto a residual (V, O) or a constant (O)."""
    mean = moments[0] / len(y)
    var = (moments[1] / len(y) - mean * mean).clamp_min(0)
    scale = block.norm.weight * torch.rsqrt(var + block.norm.eps).float()
    weight = block.conv2.weight.flatten(1).t()
    scaled = weight * scale[:, None]
    bias = block.conv2.bias + block.norm.bias @ weight - mean.float() @ scaled
    if tuple(scaled.shape) in EXPANSIONS:
        h, squares = Expansion.apply(y, scaled, bias)
    else:
        h = F.gelu(torch.addmm(bias, y, scaled))
        squares = (h * h).sum(0)
    weight, bias = block.conv3.weight.flatten(1).t(), block.conv3.bias
    if block.global_resp_gamma is not None and block.global_resp_beta is not None:
        norm = squares.float().clamp_min(1e-30).sqrt()
        bias = bias + block.global_resp_beta.flatten() @ weight
        weight = weight * (1 + block.global_resp_gamma.flatten() * norm / (norm.mean() + 1e-6))[:, None]
    if constant is not None:
        bias = bias + constant
    if tuple(weight.shape) in LINEARS:
        return Linear.apply(h, weight, bias, residual)
    z = torch.addmm(bias, h, weight)
    return z if residual is None else z + residual


def is_known(block: network.Block, x: Tensor) -> bool:
    """Whether the kernels can take this block and input."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] == 1 and x.shape[1] in CHANNELS
    return plain and block.training and torch.is_grad_enabled() and block.conv1.kernel_size == (3, 3, 3)


def run(block: network.Block, x: Tensor) -> Tensor:
    """`Block.run`."""
    if not is_known(block, x):
        return plain_run(block, x)
    rows, stride = x[0].permute(1, 2, 3, 0), block.conv1.stride[0]
    y, moments = Depthwise.apply(rows, block.conv1.weight.flatten(1).t(), block.conv1.bias, stride)
    residual, constant = rows[::stride, ::stride, ::stride].reshape(-1, x.shape[1]), None
    if stride == 2:
        residual, constant = residual @ block.res_conv.weight.flatten(1).t(), block.res_conv.bias
    z = mix(block, y.view(-1, x.shape[1]), moments, residual, constant)
    return z.view(*y.shape[:3], -1).permute(3, 0, 1, 2)[None]


def upsample(block: network.UpBlock, x: Tensor) -> Tensor:
    """`UpBlock.run`."""
    if not is_known(block, x):
        return plain_upsampling(block, x)
    rows = x[0].permute(1, 2, 3, 0)
    d, h, w, c = rows.shape
    y, moments = TransposedDepthwise.apply(rows, block.conv1.weight.flatten(1).t(), block.conv1.bias)
    z = mix(block, y.view(-1, c), moments, None, block.res_conv.bias).view(*y.shape[:3], -1)
    z = F.pad(z, (0, 0, 1, 0, 1, 0, 1, 0))
    residual = (rows.reshape(-1, c) @ block.res_conv.weight.flatten(1)).view(d, h, w, -1)
    z[1::2, 1::2, 1::2] += residual
    return z.permute(3, 0, 1, 2)[None]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`pointwise` of the stem and the heads."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] == 1 and torch.is_grad_enabled()
    if not plain or tuple(weight.shape) not in LINEARS:
        return plain_pointwise(x, weight, bias)
    rows = x[0].permute(1, 2, 3, 0)
    z = Linear.apply(rows.reshape(-1, rows.shape[3]), weight, bias, None)
    return z.view(*rows.shape[:3], -1).permute(3, 0, 1, 2)[None]
