"""Which stored values are shown black and white, where an image's type does not say it.

One range serves all slices of a file, so that a lesion is as bright in one as in the next.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from common.config_types import Level, Width, require
from common.volumes import split_slice

Window = Literal["auto", "percentile"] | tuple[Level, Width]
"""auto: what the file says; percentile: PERCENTILES of the file; or level (centre) and width."""
PERCENTILES = (0.1, 99.9)
"""Percentiles of a slice or volume that become black and white."""
SAMPLED_SLICES = 16
"""Slices of a volume, evenly spread, whose percentiles stand for the whole."""
SAMPLED_VALUES = 100_000
"""Values of each of them, evenly spread, at least (and fewer than twice as many)."""
_RANGES: dict[tuple[Path, int, int], tuple[float, float] | None] = {}
"""Of the volumes seen by this process, by file, size and date."""


def check_window(window: Window, white_value: int | None, section: str = "") -> None:
    """ConfigError for a window beside a white_value, which it replaces."""
    alone = window == "auto" or white_value is None
    expected = f"says what is white, and so does {section}white_value: set one of them"
    require(alone, f"{section}window", window, expected)


def range_of(window: tuple[float, float]) -> tuple[float, float]:
    """Lowest and highest value of a window (level, width)."""
    level, width = window
    return level - width / 2, level + width / 2


def in_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values to [0, 1] float64: low and all below is 0, high and all above is 1."""
    return ((values - low) / (high - low)).clip(0, 1)


def percentile_range(values: np.ndarray) -> tuple[float, float]:
    """PERCENTILES of at least one finite value, which must be among them."""
    low = np.percentile(values, PERCENTILES[0], method="lower")
    high = np.percentile(values, PERCENTILES[1], method="higher")
    return float(low), float(high)


def volume_range(
    path: Path, numbers: Sequence[int], read: Callable[[int], np.ndarray], errors: Iterable[type]
) -> tuple[float, float] | None:
    """PERCENTILES of a file of several slices; None where all values are the same, or none counts.

    path: the file, or one of its slices. numbers: of its slices. read: a slice's values that count,
    of any shape. A slice that raises one of `errors` does not count. Measured once per process and
    content.
    """
    file, _ = split_slice(path)
    status = file.stat()
    key = (file.absolute(), status.st_size, status.st_mtime_ns)
    if key not in _RANGES:
        _RANGES[key] = _measured(numbers, read, tuple(errors))
    return _RANGES[key]


def _measured(
    numbers: Sequence[int], read: Callable[[int], np.ndarray], errors: tuple[type, ...]
) -> tuple[float, float] | None:
    count = min(len(numbers), SAMPLED_SLICES)
    places = np.linspace(0, len(numbers) - 1, count).round().astype(int)
    found = []
    for place in places.tolist():
        try:
            values = read(numbers[place]).ravel()
        except errors:
            continue
        values = values[:: max(1, values.size // SAMPLED_VALUES)]
        found.append(values[np.isfinite(values)])
    values = np.concatenate(found) if found else np.empty(0)
    if not values.size:
        return None
    low, high = percentile_range(values)
    if not (math.isfinite(high - low) and low < high):
        low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else None
