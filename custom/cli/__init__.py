"""The command `comnet`: sugar over the bundles; each subcommand prints the `monai.bundle run` that it stands for."""

from .entry import main

__all__ = ["main"]
