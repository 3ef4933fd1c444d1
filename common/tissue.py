"""Generated tissue without orientation, and changes of it: where a rotation tells nothing.

Images are (H, W) float in [0, 1]. A change returns the changed image and its mask, as those of
`local_changes` do.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from common.local_changes import Change, ChangeFunction, as_change
from common.random_fields import pixel_grid, power_law_field

SLOPE, ROUGH_SLOPE, SMOOTH_SLOPE = 2.2, 1.2, 3.2
"""Exponents of the power spectra of normal texture and of two others."""
CONTRAST = 0.12
CELLS = 8
"""Mean number of cells of an image."""
CELL_DEPTH = 0.3
PATCH_RADIUS, CLUMP_RADIUS, CLUMP_CELLS = 6.0, 4.0, 5


def draw_tissue(
    random: np.random.Generator, side: int, slope: float = SLOPE
) -> NDArray[np.float32]:
    """Random texture with power spectrum 1 / f**slope and dark round cells: (side, side)."""
    image = 0.5 + CONTRAST * power_law_field(random, (side, side), slope)
    centres = random.uniform(0, side, (random.poisson(CELLS), 2))
    return _with_cells(image, centres, random)


def clump(image: NDArray[np.float32], random: np.random.Generator) -> Change | None:
    """Further cells crowded within 4 pixels."""
    centre = _place(image, random)
    angles = random.uniform(0, 2 * np.pi, CLUMP_CELLS)
    radii = CLUMP_RADIUS * np.sqrt(random.uniform(0, 1, CLUMP_CELLS))
    offsets = radii[:, None] * np.column_stack([np.sin(angles), np.cos(angles)])
    return as_change(image, _with_cells(image, centre + offsets, random))


def smooth_patch(image: NDArray[np.float32], random: np.random.Generator) -> Change | None:
    """The fine texture blurred away around a place."""
    centre = _place(image, random)
    rows, columns = pixel_grid(image.shape)
    near = np.hypot(rows - centre[0], columns - centre[1]) / PATCH_RADIUS
    share = np.clip(2 - 2 * near, 0, 1)  # 1 up to half the radius, then fading
    return as_change(image, share * gaussian_filter(image, 2.0) + (1 - share) * image)


def rough_texture(image: NDArray[np.float32], random: np.random.Generator) -> Change | None:
    """A whole image of rougher texture, with as many cells."""
    return as_change(image, draw_tissue(random, len(image), ROUGH_SLOPE))


def smooth_texture(image: NDArray[np.float32], random: np.random.Generator) -> Change | None:
    """A whole image of smoother texture, with as many cells."""
    return as_change(image, draw_tissue(random, len(image), SMOOTH_SLOPE))


TISSUE_CHANGES: dict[str, ChangeFunction] = {
    "rough_texture": rough_texture,
    "smooth_texture": smooth_texture,
    "clump": clump,
    "smooth_patch": smooth_patch,
}


def _place(image: NDArray, random: np.random.Generator) -> NDArray[np.float64]:
    return random.uniform(PATCH_RADIUS, len(image) - PATCH_RADIUS, 2)


def _with_cells(
    image: NDArray, centres: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.float32]:
    """The image with a dark Gaussian disc of 1.2 to 1.8 pixels at each centre (N, 2)."""
    rows, columns = pixel_grid(image.shape)
    for row, column in centres:
        squared = (rows - row) ** 2 + (columns - column) ** 2
        image = image - CELL_DEPTH * np.exp(-0.5 * squared / random.uniform(1.2, 1.8) ** 2)
    return np.clip(image, 0, 1).astype(np.float32)
