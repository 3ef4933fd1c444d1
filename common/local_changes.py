"""Small local changes of images of single objects on black: the fine-grained anomalies of a demo.

Images are (H, W) float in [0, 1]. Every function returns the changed image and its mask (H, W)
bool, True where a pixel differs, or None where the image offers no place for the change.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

OBJECT_LEVEL = 0.1
"""Pixels brighter than this belong to the object."""
BODY_SHARE = 0.75
"""The body of an object starts at the first row that is this full, compared with the fullest."""
LEAST_PIXELS = 12
"""A change of fewer pixels is none."""

Change = tuple[NDArray[np.float32], NDArray[np.bool_]]
ChangeFunction = Callable[[NDArray[np.float32], np.random.Generator], Change | None]


def as_change(image: NDArray[np.float32], changed: NDArray) -> Change | None:
    """An image with its mask, as every change returns them; None where hardly a pixel differs."""
    mask = np.abs(changed - image) > 0.05
    if mask.sum() < LEAST_PIXELS:
        return None
    return changed.astype(np.float32), mask


def cut_hole(image: NDArray[np.float32], random: np.random.Generator) -> Change | None:
    """A black disc of radius 2.2 to 3.2 pixels inside the object."""
    radius = random.uniform(2.2, 3.2)
    centre = _place_inside(image, radius, random)
    if centre is None:
        return None
    return as_change(image, np.where(_disc(image, centre, radius), 0, image))


def stain(image: NDArray[np.float32], random: np.random.Generator) -> Change | None:
    """An irregular blotch, 0.35 to 0.55 darker where the object is bright and brighter else."""
    centre = _place_inside(image, 2.0, random)
    if centre is None:
        return None
    rough = gaussian_filter(random.standard_normal(image.shape), 1.5)
    near = _disc(image, centre, random.uniform(3.0, 4.5) * (1 + 2 * rough))
    sign = -1 if image[near].mean() > 0.5 else 1
    changed = np.clip(image + sign * random.uniform(0.35, 0.55), 0, 1)
    return as_change(image, np.where(near & (image > OBJECT_LEVEL), changed, image))


def remove_strap(image: NDArray[np.float32], random: np.random.Generator) -> Change | None:
    """Everything above the body made black: a bag's strap or handle, where it has one."""
    filled = (image > OBJECT_LEVEL).sum(axis=1)
    body = int(np.argmax(filled >= BODY_SHARE * filled.max()))
    return as_change(image, np.where(np.arange(len(image))[:, None] < body, 0, image))


CHANGES: dict[str, ChangeFunction] = {
    "hole": cut_hole,
    "stain": stain,
    "missing_strap": remove_strap,
}


def _place_inside(
    image: NDArray[np.float32], margin: float, random: np.random.Generator
) -> tuple[int, int] | None:
    """A random pixel of the object at least `margin` pixels from its border."""
    inside = np.argwhere(distance_transform_edt(image > OBJECT_LEVEL) > margin)
    return None if len(inside) == 0 else tuple(map(int, random.choice(inside)))


def _disc(
    image: NDArray[np.float32], centre: tuple[int, int], radius: float | NDArray[np.float64]
) -> NDArray[np.bool_]:
    rows, columns = np.indices(image.shape)
    return np.hypot(rows - centre[0], columns - centre[1]) <= radius
