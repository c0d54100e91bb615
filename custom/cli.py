"""The command `comnet`: sugar over the bundles; each subcommand prints the `monai.bundle run` that it stands for."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

SPIN_COUNT = "1000"
PHANTOM_NOTE = "DEMO WEIGHTS: trained on synthetic phantoms only, meaningless on patients"
TRUSTED_BACKBONES = ("custom.mednext.", "monai.networks.nets.")


def bundle_root(name: str) -> Path:
    """Return the folder of a bundle: inside the installed package, else beside it in the repository."""
    package = Path(__file__).resolve().parent
    for bundles in (package / "bundles", package.parent / "bundles"):
        if (bundles / name / "configs").is_dir():
            return bundles / name
    raise FileNotFoundError(f"bundle {name} is not installed: run from the repository or install the package again")


def run_bundle(name: str, *configs: str, run_id: str = "run", **overrides: Any) -> None:
    """Print and run ``python -m monai.bundle run`` for a bundle.

    Args:
        name: bundle, e.g. ``"comnet_ensemble"``.
        configs: files of its ``configs`` folder; each is laid over those before it.
        run_id: what to run.
        overrides: config values by name.
    """
    import monai.bundle

    for chatty in ("monai.bundle.scripts", "monai.bundle.workflows"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="parsing config_file", category=UserWarning)  # our own configs

    root = bundle_root(name)
    files = [str(root / "configs" / config) for config in configs]
    _refuse_unknown(overrides, files)
    overrides = {"bundle_root": str(root), **overrides}
    print(_as_command(run_id, files, overrides), file=sys.stderr, flush=True)
    monai.bundle.run(run_id=run_id, config_file=files, workflow_type=None, **overrides)


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


def segment(
    *inputs: str,
    output_dir: str,
    weights: str | None = None,
    t1n: str | None = None,
    t1c: str | None = None,
    t2w: str | None = None,
    flair: str | None = None,
    device: str | None = None,
    sliding_window: bool = False,
    probabilities: bool = False,
    pictures: bool = True,
    **overrides: Any,
) -> None:
    """Segment subjects: label map on each subject's own grid, volumes.csv, pictures and report.html.

    Exit codes: 0 all segmented, 3 some failed or were excluded, 4 none could be segmented, 1 could not start.

    Args:
        inputs: subject folders, or dataset folders, or both.
        output_dir: folder for the results; a stopped run goes on from what is there.
        weights: folder with fold<k>/model.pt or model.pt; by default what `comnet demo` has left.
        t1n: one subject instead of folders: its T1 before contrast.
        t1c: its T1 after contrast.
        t2w: its T2.
        flair: its T2-FLAIR.
        device: "cpu", "cuda", "cuda:1"; by default a GPU if there is one.
        sliding_window: overlapping windows of the training patch, for little memory.
        probabilities: also write the probability maps of ET, TC and WT.
        pictures: draw a picture of each subject and the report.
        overrides: any other value of the bundle's inference.json, by name.
    """
    dataset = _dataset(inputs, {"t1n": t1n, "t1c": t1c, "t2w": t2w, "flair": flair})
    weights = str(weights or bundle_root("comnet_ensemble") / "models")
    settings = _ensemble_settings(weights)
    if device:
        settings["device"] = f"$torch.device('{device}')"
    if sliding_window:
        settings["inferer"] = "@sliding_window"
    run_bundle(
        "comnet_ensemble",
        "inference.json",
        dataset_dir=dataset,
        output_dir=output_dir,
        weights_dir=weights,
        write_probabilities=probabilities,
        write_pictures=pictures,
        **(settings | overrides),
    )


def demo(output_dir: str = "runs/demo", seed: int = 0, num_subjects: int = 10, num_held_out: int = 4) -> None:
    """Show the whole way on synthetic subjects: five folds, their ensemble, masks, scores and pictures.

    Args:
        output_dir: folder for subjects, weights, masks, scores and report.html; a stopped demo goes on from there.
        seed: seed of everything.
        num_subjects: phantoms that the five folds share.
        num_held_out: phantoms that no fold sees; the scores are theirs.
    """
    from .phantom import write_cohort
    from .weights import NUM_FOLDS

    run = Path(output_dir)
    training, held_out, weights = run / "subjects", run / "held_out", run / "weights"
    geometry: dict[str, Any] = {"shape": (64, 72, 56), "spacing": (2.5, 2.5, 2.5)}
    write_cohort(training, num_subjects, seed=seed, progress=True, **geometry)
    write_cohort(held_out, num_held_out, seed=seed + 1, first_id=9001, progress=True, **geometry)
    for fold in range(NUM_FOLDS):
        run_bundle(
            "comnet_mednext",
            "train.json",
            "demo.json",
            dataset_dir=str(training),
            models_dir=str(weights),
            datalist_file=str(run / "datalist.json"),
            fold=fold,
            seed=seed,
            notes=PHANTOM_NOTE,
        )
    run_bundle(
        "comnet_ensemble",
        "inference.json",
        "evaluate.json",
        dataset_dir=str(held_out),
        output_dir=str(run / "results"),
        weights_dir=str(weights),
        **_ensemble_settings(str(weights)),
    )
    _publish_weights(weights, bundle_root("comnet_ensemble") / "models")
    print(f"look at {run / 'results' / 'report.html'} and {run / 'results' / 'scores.html'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `comnet`."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when PyTorch is first imported
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    import fire

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[-1] in ("--help", "-h"):  # Fire alone would complain of missing arguments as well
        arguments[-1:] = ["--", "--help"]
    try:
        fire.Fire({"demo": demo, "segment": segment, "validate": validate}, command=arguments, name="comnet")
    except KeyboardInterrupt:
        sys.exit("comnet: stopped; the same command goes on from here")
    except Exception as error:
        reason = _known_reason(error)
        if reason is None:
            raise
        sys.exit(f"comnet: {reason}")


def _dataset(inputs: Sequence[str], files: dict[str, str | None]) -> Any:
    from .cohort import MODALITIES

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


def _ensemble_settings(weights: str) -> dict[str, Any]:
    """Read from the checkpoints which backbone and spacing they were made with."""
    from .weights import describe_weights

    described = describe_weights(weights)
    settings = {key: described.facts[key] for key in ("backbone", "spacing", "num_folds") if key in described.facts}
    backbone = settings.get("backbone", TRUSTED_BACKBONES[0])
    if not backbone.startswith(TRUSTED_BACKBONES):
        raise ValueError(f"the weights name the backbone {backbone!r}, which is none of CoMNeT's or MONAI's: not used")
    print(f"weights: {described.note}", file=sys.stderr)
    return settings


def _publish_weights(weights: Path, models: Path) -> None:
    """Make the demo's weights the default of `comnet segment`, unless other weights are there already."""
    from .files import whole_file
    from .weights import describe_weights

    if any(models.glob("*.pt")) or (
        any(models.glob("fold*/model.pt")) and describe_weights(models).note != PHANTOM_NOTE
    ):
        print(f"{models} holds other weights: left as they are", file=sys.stderr)
        return
    for checkpoint in sorted(weights.glob("fold*/model.pt")):
        with whole_file(models / checkpoint.parent.name / checkpoint.name) as target:
            shutil.copyfile(checkpoint, target)


def _refuse_unknown(overrides: Mapping[str, Any], files: Sequence[str]) -> None:
    """Refuse options that no config has, which MONAI would take in silence."""
    known = {key.split("#")[0] for file in files for key in json.loads(Path(file).read_text(encoding="utf-8"))}
    unknown = [key for key in overrides if key.split("#")[0] not in known]
    if unknown:
        close = get_close_matches(unknown[0], known, n=3)
        advice = f"did you mean --{' or --'.join(close)}?" if close else f"options are the names in {files[0]}"
        raise ValueError(f"unknown option --{unknown[0]}: {advice}")


def _as_command(run_id: str, files: Sequence[str], overrides: dict[str, Any]) -> str:
    configs = os.path.relpath(files[0]) if len(files) == 1 else str([os.path.relpath(file) for file in files])
    words = ["python", "-m", "monai.bundle", "run", *([] if run_id == "run" else [run_id]), "--config_file", configs]
    for key, value in overrides.items():
        words += [f"--{key}", str(value)]
    return shlex.join(words)


def _known_reason(error: BaseException) -> str | None:
    """Find, in a chain of errors, the one that is about the user's input; ``None`` if it is a fault of ours."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) or type(found) is ValueError or _is_ours(found):
            return str(found)
        found = found.__cause__ or found.__context__
    return None


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.startswith("custom.")


if __name__ == "__main__":
    main()
