"""A MedNeXt that OpenVINO executes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import openvino
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from ..files import file_sha256, whole_file
from ..mednext import MedNeXt
from ..mednext.network import REDUCTION
from . import graph as graph_module
from .graph import MedNeXtGraph

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
            :class:`custom.runtime.graph.MedNeXtGraph`.
    """

    def __init__(self, precision: str = "fp32", cache_dir: str | Path | None = None, fixed: bool = True) -> None:
        self.precision = precision
        self.cache_dir = cache_dir and Path(cache_dir)
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
        digest.update(file_sha256(graph_module.__file__).encode())
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
