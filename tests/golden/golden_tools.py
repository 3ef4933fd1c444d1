"""Reading recorded answers: groups of arrays, tolerances as the manifest words them."""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
NUMBER = r"([0-9.]+(?:e[+-]?[0-9]+)?)"


def group(arrays: Arrays, name: str) -> dict[str, Tensor]:
    """The entries of dictionary `name`: keys "name|entry" without their prefix, as tensors."""
    prefix = f"{name}|"
    return {k.removeprefix(prefix): as_tensor(v) for k, v in arrays.items() if k.startswith(prefix)}


def as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def assert_close(actual: Any, expected: Any, tolerance: float | str, what: str) -> None:
    """Asserts equality within the manifest's tolerance: a bare number is an absolute one."""
    actual = np.asarray(actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, recorded {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    allowed = allowed_error(expected, tolerance)
    excess = np.abs(actual - expected) - allowed
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else ()
    assert (excess <= 0).all(), (
        f"{what}: {actual[worst]} at {tuple(map(int, worst))}, recorded {expected[worst]}, "
        f"tolerance {tolerance}"
    )


def allowed_error(expected: np.ndarray, tolerance: float | str) -> np.ndarray:
    """Largest allowed absolute error of each element, from a number or the manifest's words."""
    if isinstance(tolerance, int | float):
        return np.full(expected.shape, float(tolerance))
    if match := re.search(rf"<= {NUMBER} \* max", tolerance):
        return np.full(expected.shape, float(match[1]) * np.abs(expected).max(initial=0))
    rtol, atol = re.search(rf"rtol {NUMBER}", tolerance), re.search(rf"atol {NUMBER}", tolerance)
    if rtol is None and atol is None:
        raise ValueError(f"the tolerance {tolerance!r} is not understood")
    relative = float(rtol[1]) * np.abs(expected) if rtol else np.zeros(expected.shape)
    return relative + (float(atol[1]) if atol else 0.0)


def assert_mostly_equal(actual: Any, expected: Any, tolerance: str, what: str) -> None:
    """Asserts that the share of equal elements that the tolerance names is reached."""
    share = float(re.search(rf">= {NUMBER}%", tolerance)[1]) / 100
    equal = float(np.mean(np.asarray(actual) == np.asarray(expected)))
    assert equal >= share, f"{what}: equal on {equal:.1%}, wanted {share:.0%}"
