"""The settings that the tests of tuning try."""

from __future__ import annotations

from custom.tuning import Grid

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
VOLUMES = (0.0, 50.0, 400.0)
NO_FILL = (False, False, False)
GRID = Grid.of(THRESHOLDS, VOLUMES, NO_FILL)
