"""CoMNeT as one module: fold backbones, their averaged probabilities, and the corrector (paper, 3.2 and Figure 1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import NetworkLoader, load_network
from .weights import NUM_FOLDS, weight_files

PROBABILITY_MARGIN = 1e-6


class CoMNeT(nn.Module):
    """Average the folds' probability maps voxel by voxel, then refine them.

    The folds run one after the other, so that only one backbone's activations are in memory at a time.

    Args:
        backbone: builds one backbone, image ``[B, 4, *spatial]`` to logits ``[B, 3, *spatial]``.
        num_folds: number of backbones in the ensemble.
        corrector: refines the ensemble's coarse logits given the image, ``(image, coarse) -> refined``;
            ``None`` passes the coarse logits through.
    """

    def __init__(
        self, backbone: Callable[[], nn.Module], num_folds: int = NUM_FOLDS, corrector: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(backbone() for _ in range(num_folds))
        self.corrector = corrector
        self.margin = PROBABILITY_MARGIN

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment.

        Args:
            image: ``[B, 4, *spatial]``, normalised modalities T1n, T1c, T2w, T2-FLAIR.

        Returns:
            Logits ``[B, 3, *spatial]`` of ET, TC, WT; their sigmoid is the mean probability S of the folds where there
            is no corrector.
        """
        total = torch.zeros(1, dtype=torch.float32, device=image.device)
        for backbone in self.backbones:
            total = total + torch.sigmoid(backbone(image).float())
        coarse = torch.logit(total / len(self.backbones), eps=self.margin)
        if self.corrector is not None:
            return self.corrector(image, coarse)
        return coarse


def load_ensemble(network: CoMNeT, weights_dir: str | Path) -> list[dict[str, Any]]:
    """Load an ensemble's weights strictly.

    Args:
        network: an ensemble as configured.
        weights_dir: see :func:`custom.weights.weight_files`.

    Returns:
        The provenance of each file that was loaded.

    Raises:
        CheckpointError: a file is missing, unreadable or made for another network.
    """
    files = weight_files(weights_dir, len(network.backbones))
    if len(files) == 1 and files[0].parent == Path(weights_dir):
        return [load_network(network, files[0])]
    return [load_network(backbone, path) for backbone, path in zip(network.backbones, files, strict=True)]


class EnsembleLoader(NetworkLoader):
    """Ignite handler that loads an ensemble's weights when the engine starts.

    Args:
        network: the ensemble.
        weights_dir: see :func:`custom.weights.weight_files`.
    """

    def __init__(self, network: CoMNeT, weights_dir: str) -> None:
        super().__init__(network, weights_dir)

    def load(self) -> None:
        """Load all folds now."""
        load_ensemble(self.network, self.path)
