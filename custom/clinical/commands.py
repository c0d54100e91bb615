"""`comnet prepare`, and what `comnet segment --raw` does before and after the bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import UserError

logger = logging.getLogger("comnet")


def prepare(
    *studies: str,
    output_dir: str,
    t1n: str | None = None,
    t1c: str | None = None,
    t2w: str | None = None,
    flair: str | None = None,
    without: str = "",
    study: int | None = None,
    brain_mask: str | None = None,
    brain: str = "deepbet",
    n4: bool = False,
    keep_names: bool = False,
    pictures: bool = True,
) -> None:
    """Prepare studies as they left the scanner: find the series, register them to T1c, skull-strip them.

    Each study becomes a subject folder, `study-<hash>`, for `comnet segment`; the hash names nobody, and studies.csv
    beside it, which only you can read, says whose it is. Needs: pip install 'comnet-glioma[clinical]'.

    Exit codes: 0 all prepared, 3 some could not be, 4 none could be, 1 could not start.

    Args:
        studies: folders of DICOM or NIfTI files, or zip files; one study each. Nothing is written there.
        output_dir: folder for the results; what is prepared already is not done again.
        t1n: the series that is T1n, where the command asks which: its number in series.csv, or a NIfTI file's name.
        t1c: the series that is T1c.
        t2w: the series that is T2w.
        flair: the series that is T2-FLAIR.
        without: modalities that may be missing, such as t1n; to be segmented, a study needs T1c or T2-FLAIR.
        study: which study of a folder that holds several, counted by date from 1.
        brain_mask: a brain mask of one's own, on any grid in T1c's space.
        brain: what finds the brain otherwise, in T1c and in T2-FLAIR: "deepbet", or "hd-bet", four times slower; for
            that, pip install 'comnet-glioma[clinical,hd-bet]'.
        n4: even out the shading of each image by N4, for heads that are brighter at one side; 15 CPU seconds.
        keep_names: name results after the study's folder instead of study-<hash>.
        pictures: draw preparation.png: look at it before you trust what follows.
    """
    from ..batch import EXIT_NONE_SEGMENTED, EXIT_SOME_FAILED
    from .study import prepare_studies

    prepared, failures = prepare_studies(
        [Path(one).expanduser() for one in studies],
        Path(output_dir).expanduser(),
        chosen={"t1n": t1n, "t1c": t1c, "t2w": t2w, "flair": flair},
        without=[word.strip() for word in without.split(",") if word.strip()],
        number=study,
        brain_mask=brain_mask,
        brain=brain,
        n4=n4,
        keep_names=keep_names,
        pictures=pictures,
    )
    for one in prepared:
        print(one.folder)
    if failures:
        raise SystemExit(EXIT_SOME_FAILED if prepared else EXIT_NONE_SEGMENTED)


def segment_raw(
    studies: Sequence[Path],
    output_dir: Path,
    run: Callable[[list[Path]], None],
    preparing: Mapping[str, Any],
    postprocessing: Mapping[str, Any],
    every_series: bool = False,
) -> None:
    """Prepare studies, run the bundle on what is prepared, and bring the masks back to where each was scanned.

    Args:
        studies: as they left the scanner.
        output_dir: for the results; what is prepared lies in its folder `prepared`.
        run: runs the bundle on subject folders.
        preparing: options of `prepare_study`.
        postprocessing: arguments of `PostprocessRegions`.
        every_series: masks on the grids of all series.

    Raises:
        UserError: results would lie among the files of a study.
        SystemExit: with the code of the bundle, with 3 where a study could not be prepared, 4 where none could.
    """
    import nibabel as nib

    from ..batch import EXIT_NONE_SEGMENTED, EXIT_SOME_FAILED, OF_RAW, Records
    from ..inference import PostprocessRegions
    from .masks import deliver
    from .study import prepare_studies

    postprocess = PostprocessRegions(**postprocessing)
    for study in (Path(one).resolve() for one in studies if preparing.get("keep_names")):
        if (output_dir / study.name).resolve() == study:
            raise UserError(f"{study}: results would lie among its own files: choose another output_dir")
    prepared, failures = prepare_studies(studies, output_dir / "prepared", **preparing)
    for failure in failures:
        if (output_dir / "prepared" / failure.subject).is_dir():  # nothing of an earlier run is a result of this one
            Records(output_dir).forget(failure.subject)
    if not prepared:
        raise SystemExit(EXIT_NONE_SEGMENTED)
    code: Any = EXIT_SOME_FAILED if failures else 0
    try:
        run([one.folder for one in prepared])
    except SystemExit as stop:
        code = stop.code or code
    for one in prepared:
        folder = output_dir / one.name
        if (file := folder / f"{one.name}_prob.nii.gz").is_file():  # the report says what became of the others
            try:
                deliver(one, nib.load(file), folder, postprocess, every_series, preparing["pictures"])
            except Exception as error:  # one that cannot be brought back must not cost the others
                for kind in OF_RAW:
                    (folder / f"{one.name}_{kind}").unlink(missing_ok=True)
                logger.error("%s: no mask as scanned: %s", one.name, error)
                code = code or EXIT_SOME_FAILED
    if code:
        raise SystemExit(code)
