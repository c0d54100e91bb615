"""MedNeXt as an OpenVINO graph.

The same function as :class:`custom.mednext.MedNeXt` in evaluation, wired for what an inference library is good at:

- Both normalisations become a change of the weights of the pointwise convolution that follows, as in
  :mod:`custom.mednext.blocks`, here weights that the graph computes. OpenVINO's own MVN loses three digits in a sum
  over a whole brain, and scaling the hidden layer of GRN is one more trip through memory for its widest tensor.
- An up block's transposed convolution becomes eight plain ones, one for each parity of the output voxel, with 27 taps
  in all instead of 27 each. Everything between it and the sum with the skip connection runs on these eight parts.
- Sums over voxels have two stages, planes first: one stage adds millions of numbers to one float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import Tensor

from ..mednext import Block, MedNeXt, UpBlock

Node = Any
PARITIES = tuple(itertools.product((0, 1), repeat=3))
PLANE, DEPTH = [3, 4], [2]


class MedNeXtGraph:
    """Build the graph of a MedNeXt for one image.

    Args:
        network: kernels of any odd size, with or without GRN.
        size: spatial size (D, H, W), multiples of 16 from 32.
        fixed: whether the weights are constants. Otherwise they are inputs, the same ones for all networks of an
            architecture, so that one compiled graph serves them all. That is a sixth slower, as OpenVINO fuses only
            biases that are constants.

    Attributes:
        model: from ``image`` `[1, in_channels, D, H, W]`, and the weights that are not fixed, to full-resolution logits
            `[1, out_channels, D, H, W]`, float32.
        weights: values of the inputs beside the image, by name.
    """

    def __init__(self, network: MedNeXt, size: Sequence[int], fixed: bool = True) -> None:
        self.fixed = fixed
        self.weights: dict[str, np.ndarray] = {}
        image = ops.parameter([1, network.in_channels, *size], np.float32, name="image")
        self.inputs = [image]
        with torch.no_grad():
            self.model = openvino.Model([self.run(image, network)], self.inputs, "mednext")
        for node in self.model.inputs:
            node.get_tensor().set_names({node.get_node().get_friendly_name()})

    def run(self, image: Node, network: MedNeXt) -> Node:
        """The whole network."""
        x = self.pointwise(image, network.stem.weight.flatten(1), network.stem.bias)
        skips = []
        for stage, down_block in zip(network.enc_stages, network.down_blocks, strict=True):
            x = self.stage(x, stage)
            skips.append(x)
            x = self.down(x, down_block)
        x = self.stage(x, network.bottleneck)
        for up_block, stage in zip(network.up_blocks, network.dec_stages, strict=True):
            x = self.stage(self.up(x, up_block, skips.pop()), stage)
        head = network.out_0.conv_out
        return self.pointwise(x, head.weight.flatten(1).t(), head.bias)

    def stage(self, x: Node, blocks: Sequence[Block]) -> Node:
        """Residual blocks that keep the resolution."""
        for block in blocks:
            x = ops.add(self.mix([self.depthwise(x, block.conv1.weight)], block)[0], x)
        return x

    def down(self, x: Node, block: Block) -> Node:
        """A block that halves the resolution."""
        residual = self.pointwise(x, block.res_conv.weight.flatten(1), block.res_conv.bias, stride=2)
        return ops.add(self.mix([self.depthwise(x, block.conv1.weight, stride=2)], block)[0], residual)

    def up(self, x: Node, block: UpBlock, skip: Node) -> Node:
        """A block that doubles the resolution, and the sum with the skip connection.

        A transposed convolution of n voxels makes 2n - 1, before which goes a zero. Voxel 2m + 1 of the 2n reads input
        m (parity 0), voxel 2m inputs m - 1 and m (parity 1), and the residual reaches only voxels of parity 0 on all
        axes.
        """
        weight, size = block.conv1.weight, block.conv1.weight.shape[2]
        taps = [[k for k in reversed(range(size)) if (k - size // 2 - parity) % 2 == 0] for parity in (0, 1)]
        kernels = [weight[:, :, taps[a]][:, :, :, taps[b]][..., taps[c]] for a, b, c in PARITIES]
        parts = self.mix([self.depthwise(x, kernel) for kernel in kernels], block, block.res_conv.bias)
        parts[0] = ops.add(parts[0], self.pointwise(x, block.res_conv.weight.flatten(1).t()))
        parts = [pad_front(part, parity) if any(parity) else part for part, parity in zip(parts, PARITIES, strict=True)]
        return ops.add(ops.depth_to_space(ops.concat(parts[::-1], 1), "blocks_first", 2), skip)

    def mix(self, parts: list[Node], block: Block, extra: Tensor | None = None) -> list[Node]:
        """Normalise, expand, activate, respond, compress; `parts` together are one feature map.

        Args:
            parts: outputs of the depthwise convolution, without its bias, which the normalisation takes away again.
            block: the block they belong to.
            extra: (out_channels,), a bias to add.
        """
        count = sum(math.prod(spatial_size(part)) for part in parts)
        mean = mean_over_voxels(parts, count)
        parts = [ops.subtract(part, mean) for part in parts]
        variance = ops.multiply(squared(norm_over_voxels(parts)), number(1 / count))
        scale = ops.divide(number(1.0), ops.sqrt(ops.add(variance, number(block.norm.eps))))
        weight, bias = block.conv2.weight.flatten(1), block.conv2.bias
        expansion = ops.multiply(self.kernel(weight * block.norm.weight), scale)
        bias = bias + weight @ block.norm.bias
        hidden = [ops.gelu(self.pointwise(part, expansion, bias), "erf") for part in parts]

        weight, bias = block.conv3.weight.flatten(1), block.conv3.bias
        compression = self.kernel(weight)
        if block.global_resp_gamma is not None:
            norm = norm_over_voxels(hidden)
            response = ops.divide(norm, ops.add(ops.reduce_mean(norm, [1], True), number(1e-6)))
            gamma = self.leaf(block.global_resp_gamma)
            compression = ops.multiply(compression, ops.add(ops.multiply(response, gamma), number(1.0)))
            bias = bias + weight @ block.global_resp_beta.flatten()
        bias = bias if extra is None else bias + extra
        return [self.pointwise(part, compression, bias) for part in hidden]

    def depthwise(self, x: Node, weight: Tensor, stride: int = 1) -> Node:
        """Depthwise convolution, weight (C, 1, k, k, k), with half the kernel (rounded down) of zeros around."""
        padding = [(length - 1) // 2 for length in weight.shape[2:]]
        return ops.group_convolution(x, self.leaf(weight[:, None]), [stride] * 3, padding, padding, [1] * 3)

    def pointwise(self, x: Node, weight: Node | Tensor, bias: Tensor | None = None, stride: int = 1) -> Node:
        """1x1x1 convolution, weight (O, C) or a node [O, C, 1, 1, 1], bias (O,)."""
        weight = self.kernel(weight) if isinstance(weight, Tensor) else weight
        y = ops.convolution(x, weight, [stride] * 3, [0] * 3, [0] * 3, [1] * 3)
        return y if bias is None else ops.add(y, self.leaf(bias.view(1, -1, 1, 1, 1)))

    def kernel(self, weight: Tensor) -> Node:
        """Weights (O, C) of a pointwise convolution as [O, C, 1, 1, 1]."""
        return self.leaf(weight[:, :, None, None, None])

    def leaf(self, value: Tensor) -> Node:
        """A constant, or an input. A node for each use: OpenVINO fuses only what nothing else reads."""
        array = np.ascontiguousarray(value.detach().numpy(), np.float32)
        if self.fixed:
            return ops.constant(array, shared_memory=True)
        name = f"weight{len(self.weights)}"
        self.weights[name] = array
        self.inputs.append(ops.parameter(list(array.shape), np.float32, name=name))
        return self.inputs[-1]


def mean_over_voxels(parts: list[Node], count: int) -> Node:
    """Mean [1, C, 1, 1, 1] over the `count` voxels of all parts."""
    planes = [
        ops.multiply(ops.reduce_mean(part, PLANE, True), number(math.prod(spatial_size(part)[1:]) / count))
        for part in parts
    ]
    return ops.reduce_sum(joined(planes), DEPTH, True)


def norm_over_voxels(parts: list[Node]) -> Node:
    """Euclidean norm [1, C, 1, 1, 1] over the voxels of all parts."""
    planes = joined([ops.reduce_l2(part, PLANE, True) for part in parts])
    return ops.sqrt(ops.reduce_sum(squared(planes), DEPTH, True))  # not a second reduce_l2: both would become one


def joined(planes: list[Node]) -> Node:
    """Figures [1, C, D, 1, 1] of the planes of all parts, one part after the other."""
    return planes[0] if len(planes) == 1 else ops.concat(planes, 2)


def pad_front(x: Node, planes: Sequence[int]) -> Node:
    """Zeros before each spatial axis."""
    return ops.pad(x, np.array([0, 0, *planes]), np.zeros(5, np.int64), "constant", number(0.0))


def squared(x: Node) -> Node:
    """X times x."""
    return ops.multiply(x, x)


def spatial_size(x: Node) -> list[int]:
    """(D, H, W) of a node's output."""
    return list(x.get_output_shape(0))[2:]


def number(value: float) -> Node:
    """A float32 number."""
    return ops.constant(np.float32(value))
