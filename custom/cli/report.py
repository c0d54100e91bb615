"""`comnet report`: tables and figures of a cross-validation."""

from __future__ import annotations


def report(run_dir: str) -> None:
    """Write the report of a cross-validation anew from what is in its folder.

    Args:
        run_dir: output folder of `comnet crossval`.
    """
    from ..report import write_crossval_report

    print(f"look at {write_crossval_report(run_dir)}")
