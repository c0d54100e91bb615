"""A MedNeXt that OpenVINO executes."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import openvino
import torch
from monai.data import MetaTensor
from openvino import opset13 as ops
from torch import Tensor, nn

from ..files import file_sha256, whole_file
from .network import REDUCTION, Block, MedNeXt, UpBlock

logger = logging.getLogger("comnet")

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}
CACHE_LIMIT_BYTES = 2 * 1024**3


class Program:
    """A compiled MedNeXt, the last one that was needed, shared by networks that run one after the other.

    Args:
        precision: "fp32" or "bf16".
        cache_dir: folder for compiled networks, under a key of weights, size, precision, version and processor; those
            not used for longest go when it passes 2 GiB. ``None`` keeps none.
        fixed: whether weights are compiled in, for one network; otherwise for all networks of an architecture: see
            :class:`custom.mednext.openvino.MedNeXtGraph`.
    """

    def __init__(self, precision: str = "fp32", cache_dir: str | Path | None = None, fixed: bool = True) -> None:
        self.precision = precision
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.fixed = fixed
        self.compiled: Any = None
        self.failed = False
        self.key: tuple[Any, ...] = ()
        self.weights: WeakKeyDictionary[MedNeXt, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()

    def run(self, network: MedNeXt, image: Tensor) -> Tensor:
        """Logits of one image `[1, in_channels, D, H, W]`, float32; compiles where that is needed."""
        weights = self.prepare(network, tuple(image.shape[2:]))
        return torch.from_numpy(self.compiled({"image": image.float().contiguous().numpy(), **weights})[0])

    def prepare(self, network: MedNeXt, size: tuple[int, ...]) -> dict[str, Any]:
        """Compile for `network` and images of a spatial size, unless that is what there is; return its inputs."""
        parameters = dict(network.named_parameters())
        shapes = [(name, tuple(parameter.shape)) for name, parameter in parameters.items()]
        versions = [(parameter.data_ptr(), parameter._version) for parameter in parameters.values()]
        key = (size, torch.get_num_threads(), *(versions if self.fixed else shapes))
        known, inputs = self.weights.get(network, ((), {}))
        if key == self.key and known == versions:
            return inputs
        graph = MedNeXtGraph(network, size, self.fixed)
        self.weights[network] = versions, graph.weights
        if key != self.key:
            self.compiled, self.key = None, ()  # frees the one before first
            content = network.state_dict() if self.fixed else {}
            self.compiled = self.compile(graph.model, repr((size, shapes)), content)
            self.key = key
        return graph.weights

    def compile(self, model: openvino.Model, description: str, weights: Mapping[str, Tensor]) -> Any:
        """Compile for the CPU, with as many threads as PyTorch uses, or take what an earlier run has compiled.

        OpenVINO's own cache does not serve: its key counts the nodes that a process has made before.
        """
        properties = {
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[self.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if self.cache_dir is None:
            return core().compile_model(model, "CPU", properties)
        processor = core().get_property("CPU", "FULL_DEVICE_NAME")
        digest = hashlib.sha256(repr((description, properties, processor, openvino.__version__)).encode())
        digest.update(file_sha256(__file__).encode())
        for tensor in weights.values():
            digest.update(tensor.numpy().tobytes())
        path = self.cache_dir / f"{digest.hexdigest()[:32]}.blob"
        with suppress(OSError, RuntimeError):  # none, one that was pruned just now, a damaged one
            return core().import_model(path.read_bytes(), "CPU", properties)
        compiled = core().compile_model(model, "CPU", properties)
        try:
            with whole_file(path) as temporary:
                temporary.write_bytes(compiled.export_model().getvalue())
            prune(self.cache_dir)
        except OSError as error:
            logger.debug("compiled network not kept: %s", error)
        return compiled

    def release_memory(self) -> None:
        """Free the activations, which otherwise stay for the next image."""
        if self.compiled is not None:
            self.compiled.release_memory()

    def give_up(self) -> None:
        """Drop the compiled network, and compile none again."""
        self.compiled, self.key, self.failed = None, (), True


class OpenVINOMedNeXt(nn.Module):
    """Call a MedNeXt in evaluation through OpenVINO; in training, with gradients or off the CPU, through PyTorch.

    Args:
        network: the network and its weights.
        program: what compiles and runs it.
        fall_back: whether PyTorch takes over, with one line of warning, where OpenVINO fails.
    """

    def __init__(self, network: MedNeXt, program: Program, fall_back: bool = False) -> None:
        super().__init__()
        self.network = network
        self.program = program
        self.fall_back = fall_back

    def forward(self, x: Tensor) -> Any:
        """Segment a batch as :meth:`custom.mednext.MedNeXt.forward` does, with the same errors.

        Raises:
            RuntimeError: OpenVINO failed, and PyTorch may not take over.
        """
        x = x.as_tensor() if isinstance(x, MetaTensor) else x
        small = min(x.shape[2:], default=0) < 2 * REDUCTION  # a bottleneck of one voxel leaves parts of the graph empty
        if self.program.failed or small or self.training or torch.is_grad_enabled() or x.device.type != "cpu":
            return self.network(x)
        self.network.check(x)
        try:
            return torch.cat([self.program.run(self.network, image[None]) for image in x])
        except RuntimeError as error:
            if not self.fall_back:
                raise
            logger.warning("OpenVINO failed, PyTorch goes on: %s", str(error).strip().rpartition("\n")[2])
            self.program.give_up()
            return self.network(x)

    def release_memory(self) -> None:
        """Free the activations of the last image."""
        self.program.release_memory()


def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor; if not, it would use float32 and not say so."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def prune(cache_dir: Path, limit: int = CACHE_LIMIT_BYTES) -> None:
    """Delete those compiled networks that were read or written longest ago, until they fit into `limit` bytes."""
    files = sorted(cache_dir.glob("*.blob"), key=lambda path: path.stat().st_atime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > limit:
            path.unlink(missing_ok=True)


@cache
def core() -> openvino.Core:
    """OpenVINO itself, made once."""
    return openvino.Core()


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
        if block.global_resp_gamma is not None and block.global_resp_beta is not None:
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
