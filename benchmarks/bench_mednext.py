"""Speed and memory of MedNeXt-B with GRN against its peers: one forward, one training step.

All networks see the same input in the same run, turn by turn; each memory figure comes from a process of its own.
MONAI's MedNeXt keeps its own wiring (other expansion ratios in its down blocks, and no GRN there).

    python benchmarks/bench_mednext.py --runs 5 --output docs/benchmarks.md
    python benchmarks/bench_mednext.py --full --runs 1 --skip training
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from monai.networks.nets import SegResNet
from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt
from timing import (
    environment,
    forget_peak,
    in_fresh_process,
    interleave,
    markdown_table,
    peak_bytes,
    peak_resident_bytes,
    publish,
    status_bytes,
)
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.mednext import mednext_base
from custom.mednext.runtime import Runtime

QUICK, FULL = (64, 80, 64), (128, 160, 112)


def ours() -> nn.Module:
    """MedNeXt-B with GRN, five outputs."""
    return mednext_base()


def ours_in_openvino(precision: str = "fp32") -> nn.Module:
    """The same as `comnet segment` runs it on a CPU; compiled in the round that does not count."""
    return Runtime(mednext_base().eval(), "openvino", precision).network


def monais() -> nn.Module:
    """MONAI's MedNeXt with the sizes of B and its GRN."""
    return MonaiMedNeXt(
        in_channels=4,
        out_channels=3,
        encoder_expansion_ratio=(2, 3, 4, 4),
        decoder_expansion_ratio=(4, 4, 3, 2),
        bottleneck_expansion_ratio=4,
        kernel_size=3,
        deep_supervision=True,
        use_residual_connection=True,
        global_resp_norm=True,
    )


class OutOfTheBox(nn.Module):
    """A network that OpenVINO converts and compiles in float32, for the size of the first image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.compiled = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        if self.compiled is None:
            import openvino

            model = openvino.convert_model(self.network.eval(), example_input=x, input=[tuple(x.shape)])
            options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self.compiled = openvino.compile_model(model, "CPU", options)
        return torch.from_numpy(self.compiled(x.numpy())[0])


PEER = "MONAI MedNeXt, PyTorch"
FORWARD = {
    PEER: monais,
    "MONAI SegResNet (32 filters), PyTorch": lambda: SegResNet(init_filters=32, in_channels=4, out_channels=3),
    "MONAI MedNeXt, OpenVINO": lambda: OutOfTheBox(monais()),
    "ours, PyTorch": ours,
    "ours, OpenVINO": ours_in_openvino,
    "ours, OpenVINO bf16": lambda: ours_in_openvino("bf16"),
}
TRAINING = {PEER: monais, "ours": ours, "ours, checkpointing": lambda: mednext_base(checkpointing=True)}


def forward_task(network: nn.Module, x: Tensor, bfloat16: bool) -> Callable[[], Tensor]:
    """One forward in evaluation, nothing kept for gradients."""

    def task() -> Tensor:
        network.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return network(x)

    return task


def loss_task(network: nn.Module, x: Tensor, bfloat16: bool) -> Callable[[], Tensor]:
    """Forward in training and a loss over all five outputs."""

    def task() -> Tensor:
        network.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            outputs = network(x)
        return torch.stack([output.float().square().mean() for output in outputs]).mean()

    return task


def training_task(network: nn.Module, x: Tensor, bfloat16: bool) -> Callable[[], None]:
    """Forward, loss, backward, AdamW step."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    loss = loss_task(network, x, bfloat16)

    def task() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return task


TASKS = {"forward": (forward_task, FORWARD), "training": (training_task, TRAINING)}


def image(size: tuple[int, ...]) -> Tensor:
    """A batch of one random four-modality image."""
    return torch.randn((1, 4, *size), generator=torch.Generator().manual_seed(0))


def memory(name: str, task: str, size: tuple[int, ...], bfloat16: bool) -> dict[str, int]:
    """Peak bytes of one task in this process, and for training the bytes that are kept between forward and backward."""
    make_task, networks = TASKS[task]
    network, x = networks[name](), image(size)
    if task == "forward":
        return {"peak": peak_bytes(make_task(network, x, bfloat16))}
    before = forget_peak()
    loss = loss_task(network, x, bfloat16)()
    kept = status_bytes("VmRSS") - before
    loss.backward()
    torch.optim.AdamW(network.parameters(), lr=1e-4).step()
    return {"peak": peak_resident_bytes() - before, "saved": kept}


def memory_elsewhere(name: str, task: str, size: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, int]:
    """`memory` in a fresh process."""
    options = ["--measure", name, task, "--size", *map(str, size), "--threads", str(arguments.threads)]
    return in_fresh_process(__file__, options + ["--bfloat16"] * arguments.bfloat16)


def table(task: str, size: tuple[int, ...], arguments: argparse.Namespace) -> str:
    """One task: for each network its seconds and memory, and how many times smaller they are than the peer's."""
    make_task, networks = TASKS[task]
    x = image(size)
    seconds = interleave({name: make_task(make(), x, arguments.bfloat16) for name, make in networks.items()},
                         arguments.runs)  # fmt: skip
    used = {name: memory_elsewhere(name, task, size, arguments) for name in networks}
    kinds = {"peak": "peak memory, GB"} | ({"saved": "kept for backward, GB"} if task == "training" else {})
    rows = []
    for name in networks:
        row = [name, f"{seconds[name]:.2f}", f"{seconds[PEER] / seconds[name]:.2f}"]
        for kind in kinds:
            row += [f"{used[name][kind] / 1e9:.2f}", f"{used[PEER][kind] / used[name][kind]:.2f}"]
        rows.append(row)
    label = f"{'One forward' if task == 'forward' else 'One training step'}, {'×'.join(map(str, size))}"
    return markdown_table([label, *(cell for title in ("seconds", *kinds.values()) for cell in (title, "times"))], rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds that count; the median is reported")
    parser.add_argument("--output", type=Path, help="Markdown report, such as docs/benchmarks.md; else printed only")
    parser.add_argument("--size", type=int, nargs=3, default=QUICK, help="spatial size of the forward")
    parser.add_argument("--full", action="store_true", help=f"forward at {FULL}, the paper's training crop")
    parser.add_argument("--training-size", type=int, nargs=3, default=QUICK, help="spatial size of the training step")
    parser.add_argument("--skip", choices=tuple(TASKS), help="leave one of the two tasks out")
    parser.add_argument("--bfloat16", action="store_true", help="bfloat16 autocast instead of float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", nargs=2, metavar=("NETWORK", "TASK"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print and write the table."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(memory(*arguments.measure, tuple(arguments.size), arguments.bfloat16)))
        return
    sizes = {"forward": FULL if arguments.full else tuple(arguments.size), "training": tuple(arguments.training_size)}
    sizes.pop(arguments.skip, None)
    tables = [table(task, size, arguments) for task, size in sizes.items()]
    command = "python " + shlex.join(["benchmarks/bench_mednext.py", *sys.argv[1:]])
    dtype = "bfloat16 autocast" if arguments.bfloat16 else "float32"
    text = (
        f"## MedNeXt-B with GRN, {dtype}\n\n`{command}`\n\n{environment()}, batch 1. Median of {arguments.runs} rounds "
        "after one warm-up, all networks turn by turn; memory in a process of its own, without what imports take. "
        f"“times” is how many times less than {PEER}.\n\n" + "\n\n".join(tables)
    )
    publish(text, arguments.output, f"mednext {' '.join(sizes)} {dtype}")


if __name__ == "__main__":
    main()
