"""`comnet pack`: the three bundles as a release."""

from __future__ import annotations


def pack(output_dir: str = "dist", weights: str | None = None, repo: str = "") -> None:
    """Make a release: each bundle as a zip that works by itself, models/model_info.json and SHA256SUMS.

    Same input, same bytes. Run it from a clone of the repository.

    Args:
        output_dir: folder for the release.
        weights: output folder of `comnet crossval`, whose weights go into the zips; by default there are none in them.
        repo: owner/repository/tag of the release on GitHub, for the addresses in model_info.json.
    """
    from ..packing import pack as write_release

    for name in write_release(str(output_dir), weights, repo):
        print(f"{output_dir}/{name}")
