"""`monai.bundle` with the blocks of MedNeXt compiled: narrow networks train in less than half the time on a CPU core.

    python benchmarks/compiled_blocks run --config_file "['configs/train.json','configs/release.json']" ...

Everything else is the bundle's. It needs a C++ compiler; the kernels are compiled once, for this machine's processor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import fire
import torch
from monai.bundle import run

sys.path.insert(0, str(Path(__file__).parent))
import blocks

if __name__ == "__main__":
    torch.set_num_threads(1)
    blocks.install()
    fire.Fire({"run": run})
