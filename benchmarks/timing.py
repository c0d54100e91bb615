"""Shared by all benchmarks: interleaved timing, peak memory in fresh processes, sections of one Markdown report."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch


def interleave(tasks: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median seconds of each task over `runs` rounds A B A B ..., after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(runs + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forget_peak() -> int:
    """Have Linux forget earlier peaks of memory (importing torch makes one); return what is resident now.

    Elsewhere the peak so far is returned, which hides a smaller one that follows.
    """
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")
    return peak_resident_bytes()


def peak_bytes(task: Callable[[], Any]) -> int:
    """How far `task` raises this process's peak resident memory; meaningful once in a fresh process."""
    before = forget_peak()
    task()
    return peak_resident_bytes() - before


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        return status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def status_bytes(entry: str) -> int:
    """A figure of Linux's /proc/self/status: "VmRSS" is resident now, "VmHWM" its peak."""
    return int(re.search(rf"{entry}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `script` with `arguments` in a new interpreter; the last line that it prints is JSON.

    Raises:
        RuntimeError: with the process's own error output, where it fails.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> str:
    """One line: versions, processor and the widest of its vectors that PyTorch uses, threads."""
    return (
        f"torch {torch.__version__}, monai {monai.__version__}, Python {platform.python_version()}, "
        f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    )


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column text, the others figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(report: Path, name: str, text: str) -> None:
    """Put `text` between the marks of section `name` in a Markdown report; other sections stay as they are."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = report.read_text() if report.exists() else "# Benchmarks\n\nWritten by `make bench`.\n"
    section = f"{begin}\n{text.strip()}\n{end}\n"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}\n", re.DOTALL)
    new = pattern.sub(lambda _: section, old) if pattern.search(old) else f"{old.rstrip()}\n\n{section}"
    report.parent.mkdir(parents=True, exist_ok=True)
    temporary = report.with_name(f".{report.name}.{os.getpid()}")
    temporary.write_text(new)
    os.replace(temporary, report)


def publish(text: str, report: Path | None, section: str) -> None:
    """Print `text`, and put it into a section of a Markdown report if there is one."""
    print(text, flush=True)
    if report:
        write_section(report, section, text)
