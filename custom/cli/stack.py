"""`comnet stack`: one checked four-channel file a subject."""

from __future__ import annotations

import sys


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
        name: its name; by default that of the folder of `t1n`.
    """
    from ..ledger import EXIT_NONE_SEGMENTED, EXIT_SOME_FAILED
    from ..stack import StackingError
    from ..stack import stack as write_stacks

    files = {"t1n": t1n, "t1c": t1c, "t2w": t2w, "flair": flair}
    try:
        written = write_stacks(*map(str, inputs), output_dir=str(output_dir), name=name, **files)
    except StackingError as error:
        print(*error.written, sep="\n", end="\n" * bool(error.written))
        print(f"comnet: {error}", file=sys.stderr)
        raise SystemExit(EXIT_SOME_FAILED if error.written else EXIT_NONE_SEGMENTED) from error
    print(*written, sep="\n")
