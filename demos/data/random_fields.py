"""Gaussian random fields and small helpers on pixel grids, for generated images."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

FloatImage = NDArray[np.float64]


def smooth_field(rng: Generator, shape: tuple[int, int], length: float) -> FloatImage:
    """Gaussian random field (H, W) of mean 0 and variance 1 that changes over `length` pixels."""
    frequency = _frequencies(shape)
    return _random_field(rng, shape, np.exp(-0.5 * (np.pi * length * frequency / 2) ** 2))


def power_law_field(rng: Generator, shape: tuple[int, int], slope: float) -> FloatImage:
    """Gaussian random field (H, W) of mean 0, variance 1 with power spectrum 1 / f**slope."""
    frequency = _frequencies(shape)
    floor = 1 / (2 * max(shape))
    return _random_field(rng, shape, np.maximum(frequency, floor) ** (-slope / 2))


def _frequencies(shape: tuple[int, int]) -> FloatImage:
    """Frequencies (2H, 2W) in cycles per pixel; fields drawn twice too large do not wrap around."""
    rows, columns = np.fft.fftfreq(2 * shape[0]), np.fft.fftfreq(2 * shape[1])
    return np.hypot(rows[:, None], columns[None, :])


def _random_field(rng: Generator, shape: tuple[int, int], amplitude: FloatImage) -> FloatImage:
    amplitude = amplitude.copy()
    amplitude[0, 0] = 0
    white = rng.standard_normal(amplitude.shape)
    field = np.fft.ifft2(np.fft.fft2(white) * amplitude).real[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def pixel_grid(shape: tuple[int, int]) -> tuple[FloatImage, FloatImage]:
    """Row and column numbers (H, W) of every pixel."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    return rows, columns
