"""`comnet segment` with a clock on its stages: takes the same words, and prints one line of JSON at the end."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom.bundle_run import import_monai_lean

import_monai_lean()  # first, as the command does: the clock's own helpers import MONAI whole

from timing import peak_resident_bytes  # noqa: E402

from custom import cli, comnet  # noqa: E402
from custom.batch import Batch  # noqa: E402
from custom.inference import SubjectDataset, SubjectEvaluator  # noqa: E402
from custom.mednext.openvino import OpenVINOMedNeXt  # noqa: E402

seconds: defaultdict[str, float] = defaultdict(float)


def clock(owner: Any, method: str, stage: str) -> None:
    """Add the time of a method to a stage, less that of stages within it."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start, within = time.perf_counter(), sum(seconds.values())
        try:
            return original(*args, **kwargs)
        finally:
            seconds[stage] += time.perf_counter() - start - (sum(seconds.values()) - within)

    setattr(owner, method, timed)


def main() -> None:
    """Run, and print the seconds of each stage and the peak memory in bytes."""
    clock(SubjectDataset, "_transform", "reading and preprocessing")
    clock(OpenVINOMedNeXt, "forward", "backbones")
    clock(comnet.CoMNeT, "refine", "CorrDiff")
    clock(comnet.CoMNeT, "segment", "averaging the folds")
    clock(Batch, "_draw", "picture")
    clock(Batch, "close", "tables and report")
    clock(SubjectEvaluator, "_iteration", "post-processing and writing")
    try:
        cli.main(["segment", *sys.argv[1:]])
    except SystemExit as leave:
        if leave.code:
            raise
    print(json.dumps({**seconds, "peak": peak_resident_bytes()}))


if __name__ == "__main__":
    main()
