"""The images of the DIA demo: clothes or tissue, normal ones and ones that are not.

Images are (H, W) float in [0, 1], written as files of a train/<class>, test/<class> tree; N images.
A change returns the changed image and its mask (H, W) bool, True where a pixel differs, or None
where the image offers no place for it. Clothes are single objects on black; tissue is generated,
without orientation, so that a rotation tells nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

from common.images import write_image
from demos.data.random_fields import pixel_grid, power_law_field

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
    centre = _any_place(image, random)
    angles = random.uniform(0, 2 * np.pi, CLUMP_CELLS)
    radii = CLUMP_RADIUS * np.sqrt(random.uniform(0, 1, CLUMP_CELLS))
    offsets = radii[:, None] * np.column_stack([np.sin(angles), np.cos(angles)])
    return as_change(image, _with_cells(image, centre + offsets, random))


def smooth_patch(image: NDArray[np.float32], random: np.random.Generator) -> Change | None:
    """The fine texture blurred away around a place."""
    centre = _any_place(image, random)
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


def _any_place(image: NDArray, random: np.random.Generator) -> NDArray[np.float64]:
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


CLASSES = ("t_shirt", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle_boot")  # fmt: skip
TISSUE = "tissue"
OTHER_CLASSES = "other_classes"
GROUPS = (OTHER_CLASSES, *CHANGES, *TISSUE_CHANGES)
"""Groups of anomalies in tables; a demo has those of its own images."""
RIM = 2
"""Black pixels added around the 28² clothes, so that they halve well."""
SIDE = 32
"""Pixels of a side, with the rim."""

Images = Sequence[NDArray[np.float32]]


class Counts(NamedTuple):
    """How many images are written."""

    train: int = 400
    test: int = 120
    """Normal test images; the changed ones are made of the same ones."""
    per_other_class: int = 40


class DemoImages(NamedTuple):
    """What a demo is about."""

    normal: str
    """Name of the normal class."""
    train: Images
    test: Images
    others: Mapping[str, Images]
    """Test images of other classes."""
    changes: Mapping[str, ChangeFunction]
    """What is done to the normal test images, by the name of the anomaly."""


def clothes(archive: Path, normal: str, counts: Counts) -> DemoImages:
    """Fashion-MNIST from fashion_mnist.npz with one of CLASSES as the normal one."""
    with np.load(archive, allow_pickle=False) as arrays:
        data = {name: np.asarray(values) for name, values in arrays.items()}

    def of_class(split: str, name: str, count: int) -> NDArray[np.float32]:
        chosen = data[f"{split}_images"][data[f"{split}_labels"] == CLASSES.index(name)][:count]
        return np.pad(chosen, ((0, 0), (RIM, RIM), (RIM, RIM))).astype(np.float32) / 255

    return DemoImages(
        normal,
        of_class("train", normal, counts.train),
        of_class("test", normal, counts.test),
        {n: of_class("test", n, counts.per_other_class) for n in CLASSES if n != normal},
        CHANGES,
    )


def tissue(counts: Counts) -> DemoImages:
    """Generated tissue, which looks the same from every side."""
    random = np.random.default_rng(1)
    drawn = [draw_tissue(random, SIDE) for _ in range(counts.train + counts.test)]
    return DemoImages(TISSUE, drawn[: counts.train], drawn[counts.train :], {}, TISSUE_CHANGES)


def write_images(images: DemoImages, folder: Path) -> dict[str, int]:
    """Writes train/<normal>, test/<normal>, test/<other class>, test/<change>, masks/<change>.

    Images that offer no place for a change are left out of its folder, so a change may have none.
    Returns the number of test images by folder.
    """
    random = np.random.default_rng(0)
    written: dict[str, int] = {}

    def write(split: str, name: str, number: int, image: NDArray) -> None:
        write_image(folder / split / name / f"{number:03d}.png", torch.from_numpy(image))
        if split == "test":
            written[name] = written.get(name, 0) + 1

    for number, image in enumerate(images.train):
        write("train", images.normal, number, image)
    for name, chosen in {images.normal: images.test, **images.others}.items():
        for number, image in enumerate(chosen):
            write("test", name, number, image)
    for number, image in enumerate(images.test):
        for name, change in images.changes.items():
            changed = change(image, random)
            if changed is not None:
                write("test", name, number, changed[0])
                write("masks", name, number, changed[1].astype(np.float32))
    return written
