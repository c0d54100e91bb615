"""The entry point: which subcommands there are, and how their errors are told."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from ..running import known_reason
from .crossval import crossval
from .demo import demo
from .pack import pack
from .report import report
from .segment import segment
from .stack import stack
from .validate import validate

SPIN_COUNT = "1000"
SUBCOMMANDS = {function.__name__: function for function in (demo, segment, validate, crossval, report, stack, pack)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `comnet`."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when PyTorch is first imported
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    import fire

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[-1] in ("--help", "-h"):  # Fire alone would complain of missing arguments as well
        arguments[-1:] = ["--", "--help"]
    try:
        fire.Fire(SUBCOMMANDS, command=arguments, name="comnet")
    except KeyboardInterrupt:
        sys.exit("comnet: stopped; the same command goes on from here")
    except Exception as error:
        reason = known_reason(error)
        if reason is None:
            raise
        sys.exit(f"comnet: {reason}")
