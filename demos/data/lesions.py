"""Lesions of generated images: soft masses, architectural distortions, microcalcifications.

Every `draw_*` takes a random generator, the tissue (H, W) in grey values, the lesion's centre (row,
column) in pixels and its strength, and returns the changed tissue and the lesion's mask (H, W)
bool, at most MAX_LESION_PX high and wide.
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from demos.data.random_fields import FloatImage, pixel_grid

MAX_LESION_PX = (
    16  # the hole of configs/demo_phantom.yaml: a lesion must fit into what is completed
)

Point = tuple[float, float]
Drawn = tuple[FloatImage, NDArray[np.bool_]]


def _polar(shape: tuple[int, int], centre: Point) -> tuple[FloatImage, FloatImage]:
    rows, columns = pixel_grid(shape)
    rows, columns = rows - centre[0], columns - centre[1]
    return np.hypot(rows, columns), np.arctan2(rows, columns)


def draw_mass(
    rng: Generator, tissue: FloatImage, centre: Point, contrast: float, radius: tuple[float, float]
) -> Drawn:
    """A soft, slightly lobed blob of either sign, through which the tissue stays visible.

    contrast: its largest height in grey values. radius: smallest and largest mean radius in pixels.
    """
    distance, angle = _polar(tissue.shape, centre)
    lobes = sum(
        rng.uniform(0, 0.1) * np.cos(order * (angle - rng.uniform(0, 2 * np.pi)))
        for order in (2, 3)
    )
    outline = np.minimum(rng.uniform(*radius) * (1 + lobes), MAX_LESION_PX / 2 - 0.5)
    height = contrast * rng.uniform(0.8, 1.0) * rng.choice([-1, 1])
    softness = 0.5 * (1 - np.tanh((distance - 0.7 * outline) / (0.4 * outline)))
    return tissue + height * softness, distance < outline


def draw_distortion(rng: Generator, tissue: FloatImage, centre: Point, swirl: float) -> Drawn:
    """Architectural distortion: tissue turned around the centre, nothing added or taken away.

    swirl: mean angle at the centre in radians; either sense.
    """
    distance, angle = _polar(tissue.shape, centre)
    reach = MAX_LESION_PX / 2 - 0.5
    window = np.clip(1 - (distance / reach) ** 2, 0, 1) ** 2
    turned = angle + swirl * rng.uniform(0.8, 1.2) * rng.choice([-1, 1]) * window
    rows = centre[0] + distance * np.sin(turned)
    columns = centre[1] + distance * np.cos(turned)
    return bilinear(tissue, rows, columns), distance < reach


def draw_calcifications(
    rng: Generator, tissue: FloatImage, centre: Point, contrast: float
) -> Drawn:
    """A cluster of 5 to 9 bright specks, 1.5 to 2 pixels wide at half height.

    contrast: mean height of a speck in grey values.
    """
    cluster, _ = _polar(tissue.shape, centre)
    added = np.zeros_like(tissue)
    reach = MAX_LESION_PX / 2 - 2.5
    for _ in range(rng.integers(5, 10)):
        away, direction = reach * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        speck = (centre[0] + away * np.sin(direction), centre[1] + away * np.cos(direction))
        distance, _ = _polar(tissue.shape, speck)
        height = contrast * rng.uniform(0.6, 1.4)
        added += height * np.exp(-0.5 * (distance / rng.uniform(0.6, 0.9)) ** 2)
    inside = cluster < MAX_LESION_PX / 2 - 0.5
    return tissue + added * inside, (added > 0.1 * contrast) & inside


def bilinear(image: FloatImage, rows: FloatImage, columns: FloatImage) -> FloatImage:
    """Values of `image` at fractional positions inside it."""
    top = np.clip(np.floor(rows).astype(int), 0, image.shape[0] - 2)
    left = np.clip(np.floor(columns).astype(int), 0, image.shape[1] - 2)
    down, right = rows - top, columns - left
    upper = (1 - right) * image[top, left] + right * image[top, left + 1]
    lower = (1 - right) * image[top + 1, left] + right * image[top + 1, left + 1]
    return (1 - down) * upper + down * lower
