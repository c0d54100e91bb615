"""Speed and memory of MedNeXt-B with GRN against MONAI's MedNeXt of the same sizes: one forward, one training step.

Both networks see the same input in the same run, turn by turn; each memory figure comes from a process of its own.
MONAI's network keeps its own wiring (other expansion ratios in its down blocks, and no GRN there).

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
from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt
from timing import environment, in_fresh_process, interleave, markdown_table, peak_bytes, saved_bytes, write_section
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.mednext import mednext_base

QUICK, FULL = (64, 80, 64), (128, 160, 112)


def ours() -> nn.Module:
    """MedNeXt-B with GRN, five outputs."""
    return mednext_base()


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


NETWORKS = {"ours": ours, "MONAI": monais}


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


TASKS = {"forward": forward_task, "training": training_task}


def image(size: tuple[int, ...]) -> Tensor:
    """A batch of one random four-modality image."""
    return torch.randn((1, 4, *size), generator=torch.Generator().manual_seed(0))


def seconds(task: str, size: tuple[int, ...], runs: int, bfloat16: bool) -> dict[str, float]:
    """Median seconds of both networks."""
    x = image(size)
    return interleave({name: TASKS[task](make(), x, bfloat16) for name, make in NETWORKS.items()}, runs)


def memory(name: str, task: str, size: tuple[int, ...], bfloat16: bool) -> dict[str, int]:
    """Peak bytes of one task in this process, and for training the bytes that autograd keeps."""
    network, x = NETWORKS[name](), image(size)
    result = {"peak": peak_bytes(TASKS[task](network, x, bfloat16))}
    if task == "training":
        result["saved"] = saved_bytes(loss_task(network, x, bfloat16), list(network.parameters()))
    return result


def memory_elsewhere(name: str, task: str, size: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, int]:
    """`memory` in a fresh process."""
    options = ["--measure", name, task, "--size", *map(str, size), "--threads", str(arguments.threads)]
    return in_fresh_process(__file__, options + ["--bfloat16"] * arguments.bfloat16)


def rows(task: str, size: tuple[int, ...], arguments: argparse.Namespace) -> list[list[str]]:
    """Table rows of one task: seconds, peak memory and, for training, saved activations."""
    label = f"{'one forward' if task == 'forward' else 'one training step'}, {'×'.join(map(str, size))}"
    figures = seconds(task, size, arguments.runs, arguments.bfloat16)
    used = {name: memory_elsewhere(name, task, size, arguments) for name in NETWORKS}
    table = [[f"{label}: seconds", *compared({name: figures[name] for name in NETWORKS}, 1.0, "{:.2f}")]]
    kinds = {"peak": "peak memory, GB"} | ({"saved": "kept for backward, GB"} if task == "training" else {})
    for kind, title in kinds.items():
        table.append([f"{label}: {title}", *compared({name: used[name][kind] for name in NETWORKS}, 1e9, "{:.2f}")])
    return table


def compared(values: dict[str, float], unit: float, form: str) -> list[str]:
    """MONAI's figure, ours, and how many times smaller ours is."""
    cells = [form.format(values[name] / unit) for name in ("MONAI", "ours")]
    return [*cells, f"{values['MONAI'] / values['ours']:.2f}" if values["ours"] else "-"]


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
    table = [row for task, size in sizes.items() for row in rows(task, size, arguments)]
    command = "python " + shlex.join(["benchmarks/bench_mednext.py", *sys.argv[1:]])
    dtype = "bfloat16 autocast" if arguments.bfloat16 else "float32"
    text = (
        f"## MedNeXt-B with GRN, {dtype}\n\n`{command}`\n\n{environment()}, batch 1. Median of {arguments.runs} rounds "
        "after one warm-up, the two networks turn by turn; memory in a process of its own each.\n\n"
        + markdown_table(["", "MONAI", "ours", "MONAI / ours"], table)
    )
    print(text)
    if arguments.output:
        write_section(arguments.output, f"mednext {dtype}{' full' if arguments.full else ''}", text)


if __name__ == "__main__":
    main()
