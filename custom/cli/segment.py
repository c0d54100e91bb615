"""`comnet segment`: masks, volumes and pictures of subjects."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..running import bundle_root, run_bundle


def segment(
    *inputs: str,
    output_dir: str,
    weights: str | None = None,
    t1n: str | None = None,
    t1c: str | None = None,
    t2w: str | None = None,
    flair: str | None = None,
    device: str | None = None,
    runtime: str = "auto",
    sliding_window: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    pictures: bool = True,
    **overrides: Any,
) -> None:
    """Segment subjects: label map on each subject's own grid, volumes.csv, pictures and report.html.

    Exit codes: 0 all segmented, 3 some failed or were excluded, 4 none could be segmented, 1 could not start.

    Args:
        inputs: subject folders, or dataset folders, or both.
        output_dir: folder for the results; a stopped run goes on from what is there.
        weights: folder with model.pt (a whole CoMNeT) or fold<k>/model.pt (backbones only); by default what
            `comnet demo` has left.
        t1n: one subject instead of folders: its T1 before contrast.
        t1c: its T1 after contrast.
        t2w: its T2.
        flair: its T2-FLAIR.
        device: "cpu", "cuda", "cuda:1"; by default a GPU if there is one.
        runtime: "auto", "torch" or "openvino", which is several times faster on a CPU; auto takes it where it is
            installed and the device is a CPU.
        sliding_window: the paper's overlapping windows of the training patch, several times slower.
        probabilities: also write the probability maps of ET, TC and WT.
        uncertainty: also write how far folds and samples disagree, as a standard deviation of these probabilities;
            --num_samples 5 samples CorrDiff five times.
        pictures: draw a picture of each subject and the report.
        overrides: any other value of the bundle's inference.json, by name.
    """
    dataset = _dataset(inputs, {"t1n": t1n, "t1c": t1c, "t2w": t2w, "flair": flair})
    weights = str(weights or bundle_root("comnet_ensemble") / "models")
    settings = ensemble_settings(weights)
    if device:
        _check_device(device)
        settings["device"] = f"$torch.device('{device}')"
    if sliding_window:
        settings["inferer"] = "@sliding_window"
    run_bundle(
        "comnet_ensemble",
        "inference.json",
        dataset_dir=dataset,
        output_dir=output_dir,
        weights_dir=weights,
        runtime=runtime,
        write_probabilities=probabilities,
        write_uncertainty=uncertainty,
        write_pictures=pictures,
        **(settings | overrides),
    )


def ensemble_settings(weights: str) -> dict[str, Any]:
    """Read from the checkpoints which backbone, corrector, spacing and patch size they were made with.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
        ValueError: they name a backbone or corrector that is none of CoMNeT's or MONAI's.
    """
    from ..weights import describe_weights, untrusted_parts

    described = describe_weights(weights)
    names = ("backbone", "corrector", "spacing", "patch_size", "num_folds", "refine_each_fold")
    settings = {name: described.facts[name] for name in names if described.facts.get(name) is not None}
    if foreign := untrusted_parts(settings):
        part = foreign[0]
        raise ValueError(f"the weights name the {part} {settings[part]!r}, which is none of CoMNeT's: not used")
    if "corrector" not in settings:  # MONAI drops an override of None
        settings |= {"corrector": "$None", "network_def#corrector": "$None", "ledger#model": "MedNeXt ensemble"}
    print(f"weights: {described.note}", file=sys.stderr)
    return settings


def _check_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch sees no GPU here; use --device cpu")


def _dataset(inputs: Sequence[str], files: dict[str, str | None]) -> Any:
    from ..cohort import MODALITIES

    given = {key: path for key, path in files.items() if path is not None}
    if inputs and given:
        raise ValueError("give either folders, or one subject by --t1n --t1c --t2w --flair, not both")
    if given:
        missing = [f"--{key}" for key in MODALITIES if key not in given]
        if missing:
            raise ValueError(f"one subject needs four files: {', '.join(missing)} missing")
        return given
    if not inputs:
        raise ValueError(
            "nothing to segment: name subject folders or a dataset folder, or use --t1n --t1c --t2w --flair"
        )
    return [str(path) for path in inputs]
