"""From tissue shares to the intensities of four MRI sequences: contrast, texture, bias field, noise."""

from __future__ import annotations

import numpy as np

from .anatomy import Tissues
from .fields import SmoothField
from .lesion import Lesion

#         T1n   T1c   T2w  T2-FLAIR
CONTRAST = {
    "csf": (0.30, 0.27, 1.05, 0.16),
    "grey": (0.66, 0.58, 0.54, 0.52),
    "white": (0.88, 0.72, 0.40, 0.42),
    "vessel": (0.55, 1.30, 0.25, 0.25),
    "core": (0.46, 0.42, 0.95, 0.70),
    "oedema": (0.64, 0.55, 0.78, 0.95),
    "enhancing": (0.66, 1.45, 0.70, 0.76),
}
TEXTURE = {"csf": 0.02, "grey": 0.025, "white": 0.02, "vessel": 0, "core": 0.09, "oedema": 0.05, "enhancing": 0.14}


def intensities(rng: np.random.Generator, points: np.ndarray, tissues: Tissues, lesion: Lesion) -> np.ndarray:
    """Noise-free intensities [4, n] at `points` [3, n] mm: T1n, T1c, T2w, T2-FLAIR; white matter lies at 0.4 to 0.9."""
    texture = SmoothField(rng, 7)(points)
    healthy = (1 - lesion.core - lesion.oedema - lesion.enhancing) * (1 - tissues.vessel)
    shares = {
        "csf": healthy * tissues.csf,
        "grey": healthy * tissues.grey,
        "white": healthy * tissues.white,
        "vessel": tissues.vessel * (1 - lesion.core - lesion.oedema - lesion.enhancing),
        **vars(lesion),
    }
    images = np.zeros((4, points.shape[1]), np.float32)
    for tissue, share in shares.items():
        contrast = np.array(CONTRAST[tissue]) * rng.uniform(0.95, 1.05, 4)
        images += contrast[:, None].astype(np.float32) * (share * (1 + TEXTURE[tissue] * texture))
    return images * _bias(rng, points)


def rician(rng: np.random.Generator, images: np.ndarray, level: float) -> np.ndarray:
    """Magnitude of `images` with complex Gaussian noise of standard deviation `level` added, same shape."""
    noise = rng.standard_normal((2, *images.shape), dtype=np.float32) * np.float32(level)
    return np.hypot(images + noise[0], noise[1])


def _bias(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    strength = rng.uniform(0.03, 0.09, 4)
    return np.stack([np.exp(s * SmoothField(rng, 110)(points)) for s in strength.astype(np.float32)])
