"""`monai.bundle` with blocks of MedNeXt compiled: narrow networks on one CPU core, all of them on a GPU, train faster.

    python benchmarks/compiled_blocks run --config_file "['configs/train.json','configs/release.json']" ...
    python benchmarks/compiled_blocks steps --backbone custom.mednext.mednext_base --size "[128,160,112]"

Everything else is the bundle's. On a CPU it needs a C++ compiler; the kernels are compiled once, for this machine's
processor. On a GPU it needs Triton, which PyTorch's builds for CUDA bring along.
"""

from __future__ import annotations

import pydoc
import sys
from collections.abc import Sequence
from pathlib import Path

import fire
import monai.bundle
import torch
from monai.networks.nets import SegResNet
from torch import Tensor

from custom.training import DeepSupervisionLoss

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from timing import interleave  # noqa: E402

plain_forward = SegResNet.forward
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    import triton_depthwise as kernels
else:
    import blocks as kernels  # type: ignore[no-redef]


def run(segresnet_bf16: bool = False, **options: object) -> None:
    """`monai.bundle run`, with the kernels.

    Args:
        segresnet_bf16: have MONAI's SegResNet train in bfloat16 on a CPU too, where MONAI's `amp` does nothing: with
            AVX512-BF16 a step takes a quarter of the time.
        options: those of `monai.bundle run`.
    """
    kernels.install()
    if segresnet_bf16:
        SegResNet.forward = in_bfloat16  # type: ignore[method-assign]
    monai.bundle.run(**options)


def in_bfloat16(network: SegResNet, image: Tensor) -> Tensor:
    """`SegResNet.forward`, but for evaluation in bfloat16."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=network.training):
        return plain_forward(network, image).float()


def steps(backbone: str, size: Sequence[int], runs: int = 5) -> None:
    """Print the median time of a training step, batch 1, by PyTorch alone and with the kernels; on a GPU in bfloat16.

    Args:
        backbone: such as ``custom.mednext.mednext_base``.
        size: of the crop.
        runs: steps that are timed, after one that is not.
    """
    image, regions = torch.randn(1, 4, *size, device=DEVICE), (torch.rand(1, 3, *size, device=DEVICE) > 0.9).float()
    network = pydoc.locate(backbone)(in_channels=4, out_channels=3).to(DEVICE).train()  # type: ignore[operator]
    optimizer, loss = torch.optim.AdamW(network.parameters(), 1e-4, fused=True), DeepSupervisionLoss()

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss(network(image), regions).backward()
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    plain = interleave({"step": step}, runs)["step"]
    kernels.install()
    fast = interleave({"step": step}, runs)["step"]
    print(f"{backbone} {tuple(size)}: PyTorch {plain:.3f} s a step, kernels {fast:.3f} s, {plain / fast:.2f} times")


if __name__ == "__main__":
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    fire.Fire({"run": run, "steps": steps})
