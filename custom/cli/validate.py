"""`comnet validate`: check a dataset and write its datalist."""

from __future__ import annotations

from pathlib import Path

from ..running import run_bundle


def validate(
    dataset_dir: str,
    output: str = "datalist.json",
    layout: str = "auto",
    palette: str | None = None,
    num_folds: int = 5,
    seed: int = 0,
    unknown_labels: str = "exclude",
    allow_empty_mask: bool = False,
) -> None:
    """Check every file of a dataset; write a datalist with folds and a report of what was excluded.

    Args:
        dataset_dir: folder with one subfolder a subject (UTSW-Glioma, BraTS, or plain names).
        output: datalist JSON to write; the exclusions go to `<output>_exclusions.csv`.
        layout: "auto", or the name of one layout.
        palette: "brats2021" (enhancing tumour is 4) or "brats2023" (it is 3); by default the layout tells.
        num_folds: cross-validation folds.
        seed: seed of the folds.
        unknown_labels: "exclude" subjects with undocumented labels, or take them as "background".
        allow_empty_mask: keep subjects whose mask holds no tumour.
    """
    if Path(output).exists():
        Path(output).unlink()
    cohort = {
        "layout": layout,
        "palette": palette,
        "unknown_labels": unknown_labels,
        "allow_empty_mask": allow_empty_mask,
    }
    run_bundle(
        "comnet_mednext",
        "train.json",
        run_id="check_data",
        dataset_dir=dataset_dir,
        datalist_file=output,
        num_folds=num_folds,
        seed=seed,
        **{f"cohort#{key}": value for key, value in cohort.items()},
    )
