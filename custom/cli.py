"""The command `comnet`: sugar over the bundles; each subcommand prints the `monai.bundle run` it stands for."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from .bundle_run import (
    bundle_root,
    ensemble_settings,
    import_monai_lean,
    known_reason,
    log_fault,
    reuse_memory,
    run_bundle,
)
from .clinical.commands import prepare, segment_raw
from .files import UserError


def segment(
    *inputs: str,
    output_dir: str,
    weights: str | None = None,
    t1n: str | None = None,
    t1c: str | None = None,
    t2w: str | None = None,
    flair: str | None = None,
    name: str | None = None,
    device: str | None = None,
    runtime: str = "auto",
    sliding_window: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    pictures: bool = True,
    raw: bool = False,
    every_series: bool = False,
    **overrides: Any,
) -> None:
    """Segment subjects: label map on each subject's own grid, volumes.csv, pictures and report.html.

    A subject may lack modalities, but not both T1c and T2-FLAIR; what that costs stands on all results.

    Exit codes: 0 all segmented, 3 some failed or were excluded, 4 none could be segmented, 1 could not start.

    Args:
        inputs: subject folders, or dataset folders, or both.
        output_dir: folder for the results; a stopped run goes on from what is there.
        weights: folder with model.pt (a whole CoMNeT) or fold<k>/model.pt (backbones only); by default the
            released ones.
        t1n: one subject instead of folders, by the modalities there are: its T1 before contrast.
        t1c: its T1 after contrast; this or T2-FLAIR must be there.
        t2w: its T2.
        flair: its T2-FLAIR.
        name: its name; by default what tells its files from those of others, else that of their folder.
        device: "cpu", "cuda", "cuda:1"; by default a GPU if there is one.
        runtime: "auto", "torch" or "openvino", which is several times faster on a CPU; auto takes it where it is
            installed and the device is a CPU.
        sliding_window: the paper's overlapping windows of the training patch, several times slower.
        probabilities: also write the probability maps of ET, TC and WT.
        uncertainty: also write how far folds and samples disagree, as a standard deviation of these probabilities;
            --num_samples 5 samples CorrDiff five times.
        pictures: draw a picture of each subject and the report.
        raw: the inputs are studies as they left the scanner, DICOM or NIfTI, which are prepared first; masks come back
            on the grid of T1c as scanned, and as DICOM-SEG. All options of `comnet prepare` go with it, such as
            --brain_mask, and t1n to flair name series.
        every_series: with raw, masks also on the grids of T1n, T2w and T2-FLAIR as scanned.
        overrides: any other value of the bundle's inference.json, by name; --allow_missing segments subjects that lack
            modalities by weights that were not trained for that.
    """
    files = {"t1n": t1n, "t1c": t1c, "t2w": t2w, "flair": flair}
    of_prepare = inspect.signature(prepare).parameters.keys() - {"studies", *inspect.signature(segment).parameters}
    preparing = {name: overrides.pop(name) for name in of_prepare & overrides.keys()}
    if not raw and (preparing or every_series):
        named = ", ".join(f"--{name}" for name in (*sorted(preparing), *["every_series"] * every_series))
        raise UserError(f"{named}: options of studies as they left the scanner go with --raw")
    dataset = None if raw else _dataset("segment", inputs, files, name)
    import_monai_lean()
    reuse_memory()
    from .weights import Weights

    found = Weights(_path(weights) if weights else bundle_root("comnet_ensemble") / "models")  # so each is read once
    settings = ensemble_settings(found, device)
    print(f"weights: {found.note}", file=sys.stderr)
    if sliding_window:
        settings |= {"inferer": "@sliding_window"}

    for own, option in OWN_NAMES.items():
        if own in overrides:
            raise UserError(f"--{own} is told by {option} here")

    def run(dataset: Any) -> None:
        run_bundle(
            "comnet_ensemble",
            "inference.json",
            dataset_dir=dataset,
            output_dir=_path(output_dir),
            weights_dir=found.path,
            runtime=runtime,
            write_probabilities=probabilities or raw,
            write_uncertainty=uncertainty,
            write_pictures=pictures,
            **(settings | values),
        )

    values = {key: _override(key, value) for key, value in overrides.items()}
    inner = {key: str(value) for key, value in values.items() if "#" in key and not key.startswith("cohort#")}
    if inner:  # the batch knows the names at the top of the config only, and must do again what these change
        settings["batch#settings#inner"] = hashlib.sha256(json.dumps(inner, sort_keys=True).encode()).hexdigest()
    if not raw:
        run(dataset)
        return
    postprocessing = {key: values.get(key, found.tuned[key]) for key in ("thresholds", "min_volume_mm3")}
    config = json.loads((bundle_root("comnet_ensemble") / "configs" / "inference.json").read_text(encoding="utf-8"))
    shared = config | values
    postprocessing |= {"palette": shared["output_palette"], "fill_holes": shared["fill_holes"]}
    preparing |= {"chosen": files, "without": _listed(preparing.get("without")), "pictures": pictures}
    preparing["number"] = preparing.pop("study", None)
    segment_raw([_path(one) for one in inputs], _path(output_dir), run, preparing, postprocessing, every_series)


def _path(name: str | Path) -> Path:
    return Path(name).expanduser()


def _override(name: str, value: Any) -> Any:
    """Read a value of a config that came as text: places stay text, anything else is what Python makes of it."""
    if name.endswith(("_dir", "_file")):
        return _path(value)
    return _parsed(value) if isinstance(value, str) else value


def _parsed(text: str) -> Any:
    """Read a value as the configs do, else as Fire does; a text such as `no` would count as true."""
    from fire.parser import DefaultParseValue

    if text.lower() in ANSWERS:
        return ANSWERS[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return DefaultParseValue(text)


def _dataset(verb: str, inputs: Sequence[str], files: Mapping[str, str | None], name: str | None) -> Any:
    given = {key: _path(path) for key, path in files.items() if path is not None}
    if inputs and (given or name):
        raise UserError("give either folders, or one subject by --t1n --t1c --t2w --flair (and --name), not both")
    if given:
        return given | ({"name": Path(name)} if name else {})
    if not inputs:
        advice = "name subject folders or a dataset folder, or use --t1n --t1c --t2w --flair"
        raise UserError(f"nothing to {verb}: {advice}")
    return [_path(folder) for folder in inputs]


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
    cohort: dict[str, Any] = {"layout": layout, "palette": palette, "unknown_labels": unknown_labels}
    cohort |= {"allow_empty_mask": allow_empty_mask, "rebuild": True}
    run_bundle(
        "comnet_mednext",
        "train.json",
        run_id="check_data",
        dataset_dir=_path(dataset_dir),
        datalist_file=_path(output),
        num_folds=num_folds,
        seed=seed,
        **{f"cohort#{key}": value for key, value in cohort.items()},
    )


def crossval(
    datalist: str,
    output_dir: str,
    models: str | Sequence[str] = "segresnet,mednext,comnet",
    config: str | Sequence[str] | None = None,
    jobs: int | None = None,
    dataset_dir: str | None = None,
    num_folds: int | None = None,
    seed: int = 0,
    selection: str | None = None,
    dry_run: bool = False,
    snakefile: str | None = None,
) -> None:
    """Cross-validate SegResNet, MedNeXt and CoMNeT: train and score each fold, tune the ensemble, write the report.

    Stop it at any moment: the same command goes on from there. What settings or inputs have changed is run again, with
    all that depends on it; the earlier state is moved to OUTPUT_DIR/superseded.

    Args:
        datalist: datalist as `comnet validate` writes it, or a dataset folder, which is then checked first.
        output_dir: folder for checkpoints, masks, scores, logs and report.
        models: which of segresnet, mednext and comnet, with commas; comnet needs mednext, which is added.
        config: files to lay over the bundles' configs, with commas: small.json or release.json of the bundles, or JSON
            files of your own, which are laid over every config.
        jobs: jobs side by side; by default one a GPU, or one.
        dataset_dir: where the dataset is, if the datalist does not know or it was moved.
        num_folds: folds to deal a dataset folder into, by default 5; a datalist has its own.
        seed: seed of everything.
        selection: which epoch's weights a training keeps: "paper" (the best on the held-out fold, by which it is scored
            too, so all models by the same rule too well), "inner" (the best on a split of the training subjects) or
            "last"; by default what the configs say: paper.
        dry_run: only print the commands.
        snakefile: only write this Snakefile, with which Snakemake runs the same on a cluster (or here).
    """
    from .crossval.inputs import prepare_subjects
    from .crossval.plan import choose_models, make_plan, write_snakefile
    from .crossval.runner import run_plan

    chosen = choose_models(_listed(models))
    run_dir = _path(output_dir)
    subjects = prepare_subjects(_path(datalist), run_dir, _path(dataset_dir) if dataset_dir else None, num_folds, seed)
    plan = make_plan(run_dir, subjects, chosen, _listed(config), seed, selection=selection)
    if snakefile:
        write_snakefile(plan, _path(snakefile))
        print(f"snakemake --snakefile {snakefile} --cores all")
    elif dry_run:
        for stage, parts in groupby(plan, lambda job: job.stage):
            print(f"# {stage}", *(job.command() for job in parts), sep="\n")
    else:
        run_plan(plan, run_dir, jobs)
        tell_results(run_dir)


def _listed(names: str | Sequence[str] | None) -> list[str]:
    """Split what Fire hands over: text with commas, or the tuple that it has made of it."""
    words: Any = names.split(",") if isinstance(names, str) else names or ()
    return [str(word).strip() for word in words if str(word).strip()]


def tell_results(run_dir: Path) -> None:
    """Print Table 2 of a finished run, and where its report is."""
    from .report import read_run, table2_text

    print(table2_text(read_run(run_dir).scores))
    print(f"look at {run_dir / 'report' / 'report.html'}")


def report(run_dir: str) -> None:
    """Write the report of a cross-validation anew from what is in its folder.

    Args:
        run_dir: output folder of `comnet crossval`.
    """
    from .report import write_crossval_report

    print(f"look at {write_crossval_report(run_dir)}")


def stack(
    *inputs: str,
    output_dir: str = ".",
    t1n: str | None = None,
    t1c: str | None = None,
    t2w: str | None = None,
    flair: str | None = None,
    name: str | None = None,
) -> None:
    """Make one four-channel file a subject (T1n, T1c, T2w, T2-FLAIR), for tools that take one image, like MONAI Label.

    Every file is read to its last byte and checked as `comnet validate` does. Exit codes: 0 all stacked, 3 some failed,
    4 none, 1 could not start.

    Args:
        inputs: subject folders, or dataset folders, or both.
        output_dir: folder for the files `SUBJECT.nii.gz`, such as the studies folder of a MONAI Label server.
        t1n: one subject instead of folders: its T1 before contrast.
        t1c: its T1 after contrast.
        t2w: its T2.
        flair: its T2-FLAIR.
        name: its name, by default as in `comnet segment`.
    """
    from .batch import EXIT_NONE_SEGMENTED, EXIT_SOME_FAILED
    from .cohort.four_channel import StackingError
    from .cohort.four_channel import stack as write_stacks

    dataset = _dataset("stack", inputs, {"t1n": t1n, "t1c": t1c, "t2w": t2w, "flair": flair}, name)
    try:
        written = write_stacks(dataset, _path(output_dir))
    except StackingError as error:
        print(*error.written, sep="\n", end="\n" * bool(error.written))
        print(f"comnet: {error}", file=sys.stderr)
        raise SystemExit(EXIT_SOME_FAILED if error.written else EXIT_NONE_SEGMENTED) from error
    print(*written, sep="\n")


def pack(output_dir: str = "dist", weights: str | None = None, repo: str = "") -> None:
    """Make a release: each bundle as a zip that works by itself, models/model_info.json and SHA256SUMS.

    Same input, same bytes. Run it from a clone of the repository.

    Args:
        output_dir: folder for the release.
        weights: output folder of `comnet crossval`, whose weights go into the zips; by default the released ones.
        repo: owner/repository/tag of the release on GitHub, for the addresses in model_info.json.
    """
    from .release import pack as write_release

    for name in write_release(str(output_dir), weights, repo):
        print(f"{output_dir}/{name}")


def demo_training(
    output_dir: str = "runs/demo-training", seed: int = 0, num_subjects: int = 10, num_held_out: int = 4
) -> None:
    """Show the whole way on synthetic subjects: three models cross-validated, the ensemble, masks, scores, pictures.

    Args:
        output_dir: folder for subjects, weights, masks, scores and reports; a stopped demo goes on from there.
        seed: seed of everything.
        num_subjects: phantoms that the five folds share.
        num_held_out: phantoms that no fold sees, on which each step from one backbone to the whole is scored.
    """
    from .demo_training import run_demo

    run = Path(output_dir)
    steps = run_demo(run, seed, num_subjects, num_held_out)
    segment(str(run / "held_out"), output_dir=str(run / "segmented"), weights=str(run / "ensemble"))
    tell_results(run)
    print(f"and at {steps}: from one backbone to the whole, on subjects that no fold has seen")
    page = run / "segmented" / "report.html"
    print(f"and at {page}: what `comnet segment --weights {run / 'ensemble'}` makes of them")


def demo(
    data: str | None = None,
    output_dir: str = "runs/demo",
    seed: int = 0,
    num_subjects: int = 3,
    raw: bool = False,
    palette: str | None = None,
) -> None:
    """Segment fresh phantoms, or subjects of yours, with the released weights; score them where there are masks.

    What `comnet segment` without --weights does is done here; its exit codes are the same.

    Args:
        data: folder of subjects, or of one; by default phantoms are made.
        output_dir: folder for phantoms, masks, pictures and report.html; a stopped demo goes on from there.
        seed: of the phantoms: another seed gives other phantoms.
        num_subjects: how many phantoms.
        raw: instead of all that, one phantom's DICOM study as it leaves the scanner, by way of `comnet segment --raw`.
        palette: of your masks, "brats2021" (enhancing tumour is 4) or "brats2023" (it is 3); by default the layout of
            the names tells.
    """
    from .demo import PHANTOM_REMARK, write_demo_report, write_phantoms, write_study

    run = _path(output_dir)
    if raw:
        if data:
            raise UserError("--raw makes a study of its own: for yours, `comnet segment STUDY --raw --output_dir OUT`")
        segment(str(write_study(run / "studies", seed)), output_dir=str(run / "scanned"), raw=True)
        return
    folders = [_path(data)] if data else write_phantoms(run / "phantoms", num_subjects, seed)
    code: Any = 0
    options: dict[str, Any] = {"cohort#show_masks": True} | ({"cohort#palette": palette} if palette else {})
    try:
        segment(*map(str, folders), output_dir=str(run / "segmented"), **options)
    except SystemExit as leave:  # some failed: the report tells of the others
        code = leave.code
    page, table = write_demo_report(run, folders, "" if data else PHANTOM_REMARK, palette)
    print(table, *([] if data else [PHANTOM_REMARK]), f"look at {page}", sep="\n")
    if code:
        raise SystemExit(code)


SPIN_COUNT = "1000"
ANSWERS = {"true": True, "yes": True, "false": False, "no": False}
OWN_NAMES = {
    "dataset_dir": "the folders that are named",
    "weights_dir": "--weights",
    "write_probabilities": "--probabilities",
    "write_uncertainty": "--uncertainty",
    "write_pictures": "--pictures",
}
"""Values of inference.json that `comnet segment` sets itself, and by what."""
SWITCHES_OF_CONFIG = ("allow_missing", "refine_each_fold")
SUBCOMMANDS = {
    function.__name__: function
    for function in (demo, demo_training, prepare, segment, validate, crossval, report, stack, pack)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `comnet`."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when PyTorch is first imported
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    import fire

    fire.decorators.FIRE_METADATA = "_FIRE_METADATA"  # else every help offers a group of that name
    alone, arguments = arguments is None, list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[-1] in ("--help", "-h"):  # Fire alone would complain of missing arguments as well
        arguments[-1:] = ["--", "--help"]
    try:
        arguments = _with_values(arguments)
        fire.Fire({name: as_typed(command) for name, command in SUBCOMMANDS.items()}, command=arguments, name="comnet")
    except fire.core.FireExit as leave:
        sys.exit(1 if leave.code else 0)  # Fire's own 2 is none of the codes that our users know
    except KeyboardInterrupt:
        sys.exit("comnet: stopped; the same command goes on from here")
    except Exception as error:
        sys.exit(f"comnet: {known_reason(error) or log_fault(error, _output_folder(arguments))}")
    finally:
        if alone:  # the process ends: that the collector looks through all of it once more takes half a second
            gc.freeze()


def as_typed(command: Callable[..., None]) -> Callable[..., None]:
    """Have Fire leave names and paths as they were typed: else `2023_01` becomes a number and `a,b` a tuple."""
    from fire import decorators

    parameters = _parameters(command)
    numbers: dict[str, Any] = {
        name: partial(_whole_number, name) if "int" in str(parameter.annotation) else _parsed
        for name, parameter in parameters.items()
        if "str" not in str(parameter.annotation)
    }
    return decorators.SetParseFns(**numbers)(decorators.SetParseFn(str)(command))


def _whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--{name} is {text!r}: give a whole number") from None


def _parameters(command: Callable[..., None]) -> Mapping[str, inspect.Parameter]:
    """All parameters of a subcommand: those of studies are among the overrides of `segment`."""
    own: Mapping[str, inspect.Parameter] = inspect.signature(command).parameters
    return {**inspect.signature(prepare).parameters, **own} if command is segment else own


def _with_values(arguments: Sequence[str]) -> list[str]:
    """Give each switch its value, else Fire takes what follows for it: `--n4 STUDY`, `--nopictures SUBJECT`.

    Raises:
        UserError: an option that wants a text has none: of `--output_dir` at the end Fire makes a folder `True`.
    """
    parameters = _parameters(SUBCOMMANDS[arguments[0]]) if arguments and arguments[0] in SUBCOMMANDS else {}
    switches = {name for name, one in parameters.items() if str(one.annotation) == "bool"} | {*SWITCHES_OF_CONFIG}
    texts = {name for name, one in parameters.items() if str(one.annotation) in ("str", "str | None")}
    found = []
    for word, after in pairwise([*arguments, "--"]):
        option, equals, value = word.removeprefix("--").partition("=")
        name = option.replace("-", "_")
        if not word.startswith("--") or not parameters:
            found.append(word)
        elif name in switches and not equals and after.lower() not in ANSWERS:
            found.append(f"--{name}=true")
        elif name.startswith("no") and name[2:] in switches and not equals:
            found.append(f"--{name[2:]}=false")
        elif name in texts and (not value if equals else not after or after.startswith("--")):
            raise UserError(f"--{option} needs a value")
        else:
            found.append(word)
    return found


def _output_folder(arguments: Sequence[str]) -> str:
    """Where the outputs go, for what has to be written beside them when the command itself failed."""
    for word, after in pairwise([*arguments, "."]):
        if word.split("=")[0] == "--output_dir":
            return word.partition("=")[2] or after
    return "."


if __name__ == "__main__":
    main()
