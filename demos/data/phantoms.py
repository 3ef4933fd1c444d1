"""Tomosynthesis-like phantoms, normal or with lesions whose place is known, as folders of images.

A phantom is a smooth power-law density with glandular tissue, crossed by layers of curved fibres,
inside a breast-shaped support that gets darker towards the skin, plus noise. Fibres of a layer have
one width and run nearly parallel, so what a hole hides follows from what surrounds it, yet no fixed
filter predicts it. On the smooth part alone linear interpolation is already the best completion,
and a network has nothing to add; without it, patches repeat and nearest neighbours know them all.
Masses are about as bright or dark as glands and fibres are.

Arrays are (height, width); lengths are in pixels; grey values are in [0, 1]. Equal seeds give equal
phantoms.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from torch import from_numpy

from common.checkpoint import save_text_atomic
from common.images import write_image
from demos.data.lesions import (
    MAX_LESION_PX,
    Drawn,
    Point,
    draw_calcifications,
    draw_distortion,
    draw_mass,
)
from demos.data.random_fields import FloatImage, pixel_grid, power_law_field, smooth_field

LesionKind = Literal["mass", "distortion", "calcifications"]
LESION_KINDS: tuple[LesionKind, ...] = get_args(LesionKind)
_ANATOMY, _NOISE, _LESIONS = range(3)  # independent random streams of one seed
SEEDS_PER_DATA_SET = 1_000_000
"""Phantoms of different data sets, and of training and test, never share a seed."""
DEFAULT_TEST: Mapping[LesionKind, int] = {"mass": 12, "distortion": 4, "calcifications": 4}


@dataclass(frozen=True)
class PhantomStyle:
    """What the phantoms of a data set share; lengths in pixels, contrasts in grey values."""

    height: int = 152
    width: int = 96
    base: float = 0.5
    """Mean grey value deep inside the body."""
    density_sd: float = 0.02
    """Standard deviation of the smooth density."""
    density_slope: float = 4.2
    """Exponent b of the density's power spectrum 1 / f**b; larger = smoother."""
    gland_sd: float = 0.09
    """Standard deviation of the glandular tissue."""
    gland_length: float = 24.0
    """Distance over which the glandular tissue changes."""
    fibre_layers: int = 2
    """Sheets of fibres on top of each other, each with its own direction."""
    fibre_width: float = 5.0
    """Standard deviation of a fibre's Gaussian cross-section."""
    fibre_spacing: float = 40.0
    """Mean distance between neighbouring fibres of a layer."""
    fibre_contrast: float = 0.09
    """Largest deviation of a fibre from its surroundings; either sign."""
    bend_length: float = 60.0
    """Distance over which fibres change direction."""
    bend_px: float = 5.0
    """Standard deviation of a fibre's displacement from a straight line."""
    noise_sd: float = 0.0075
    """Standard deviation of the pixel noise."""
    mass_contrast: float = 0.175
    """Largest deviation of a mass from the tissue that it replaces; either sign."""
    mass_radius: tuple[float, float] = (5.5, 7.0)
    """Smallest and largest mean radius of a mass."""
    swirl: float = 3.0
    """Angle by which a distortion turns the tissue at its centre, in radians."""
    calcification_contrast: float = 0.10
    """Mean height of a microcalcification."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if np.any(np.asarray(getattr(self, item.name)) < 0):
                raise ValueError(f"{item.name} must be >= 0, got {getattr(self, item.name)}")
        if min(self.height, self.width) < 64:
            raise ValueError(f"phantoms are at least 64x64, got {self.height}x{self.width}")
        if not 2 <= self.mass_radius[0] <= self.mass_radius[1] <= MAX_LESION_PX / 2 - 1:
            raise ValueError(
                f"mass_radius must rise within [2, {MAX_LESION_PX / 2 - 1:g}] pixels, so that a "
                f"mass fits the {MAX_LESION_PX}-pixel hole, got {self.mass_radius}"
            )


@dataclass(frozen=True)
class Lesion:
    """A lesion's kind and bounding box: top, left (first row, column), height, width in pixels."""

    kind: LesionKind
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Phantom:
    """A drawn phantom; every array is (height, width)."""

    image: NDArray[np.float32]
    """Grey values in [0, 1], exactly 0 outside the body."""
    body: NDArray[np.bool_]
    """True inside the body."""
    lesion_mask: NDArray[np.bool_]
    """True on lesions."""
    lesions: tuple[Lesion, ...]


def draw_phantom(
    seed: int, *, lesions: tuple[LesionKind, ...] = (), style: PhantomStyle | None = None
) -> Phantom:
    """Draws one phantom; its tissue depends on the seed alone, not on the lesions put into it.

    seed: >= 0. lesions: kinds to draw, in this order, without overlap. Raises ValueError for an
    unknown kind or where there is no room left for a lesion.
    """
    style = style or PhantomStyle()
    shape = (style.height, style.width)
    body, depth = _body(np.random.default_rng([seed, _ANATOMY]), shape)
    tissue = _tissue(np.random.default_rng([seed, _ANATOMY, 1]), shape, style)
    rng = np.random.default_rng([seed, _LESIONS])
    mask = np.zeros(shape, bool)
    placed: list[Lesion] = []
    for kind in lesions:
        if kind not in LESION_KINDS:
            raise ValueError(f"unknown lesion kind {kind!r}; known: {', '.join(LESION_KINDS)}")
        centre = _free_place(rng, depth, mask, seed)
        tissue, lesion_mask = _draw_lesion(kind, rng, tissue, centre, style)
        lesion_mask &= body
        mask |= lesion_mask
        placed.append(Lesion(kind, *_bounding_box(lesion_mask)))
    falloff = 1 - 0.9 * np.exp(-np.maximum(depth, 0) / 9)  # less tissue is traversed near the skin
    skin = 0.03 * np.exp(-0.5 * ((depth - 2) / 1.5) ** 2)
    noise = style.noise_sd * np.random.default_rng([seed, _NOISE]).standard_normal(shape)
    image = np.where(body, np.clip(tissue * falloff + skin + noise, 0.01, 1), 0)
    return Phantom(image.astype(np.float32), body, mask, tuple(placed))


def _body(rng: Generator, shape: tuple[int, int]) -> tuple[NDArray[np.bool_], FloatImage]:
    """Breast-shaped support with the chest wall at the left edge, and the depth under the skin."""
    rows, columns = pixel_grid(shape)
    across = shape[1] * rng.uniform(0.82, 0.90)
    half_height = shape[0] * rng.uniform(0.37, 0.40)
    middle = shape[0] * rng.uniform(0.48, 0.52)
    power = rng.uniform(2.0, 2.5)
    radius = (columns / across) ** power + np.abs((rows - middle) / half_height) ** power
    radius = radius ** (1 / power)
    slope = np.hypot(*np.gradient(radius))
    depth = (1 - radius) / np.maximum(slope, 0.5 / max(shape))
    return radius < 1, depth


def _tissue(rng: Generator, shape: tuple[int, int], style: PhantomStyle) -> FloatImage:
    tissue = style.base + style.density_sd * power_law_field(rng, shape, style.density_slope)
    tissue += style.gland_sd * smooth_field(rng, shape, style.gland_length)
    first = rng.uniform(0, np.pi)
    fibres = np.zeros(shape)
    for layer in range(style.fibre_layers):
        angle = first + np.pi * (layer + rng.uniform(-0.25, 0.25)) / style.fibre_layers
        fibres += _fibre_layer(rng, shape, angle, style)
    limit = 1.2 * style.fibre_contrast  # crossings hardly stand out from fibres
    return tissue + limit * np.tanh(fibres / limit)


def _fibre_layer(
    rng: Generator, shape: tuple[int, int], angle: float, style: PhantomStyle
) -> FloatImage:
    """Fibres (H, W) along the level lines of a bent plane wave; angle in radians is the wave's."""
    rows, columns = pixel_grid(shape)
    phase = rows * np.sin(angle) + columns * np.cos(angle)
    phase += style.bend_px * smooth_field(rng, shape, style.bend_length)
    steepness = np.maximum(np.hypot(*np.gradient(phase)), 0.25)
    layer = np.zeros(shape)
    position = phase.min() - style.fibre_spacing
    while position < phase.max() + style.fibre_spacing:
        position += style.fibre_spacing * rng.uniform(0.6, 1.4)
        contrast = style.fibre_contrast * rng.uniform(0.6, 1) * rng.choice([-1, 1])
        distance = (phase - position) / steepness  # pixels; steepness keeps the width uniform
        layer += contrast * np.exp(-0.5 * (distance / style.fibre_width) ** 2)
    return layer


def _free_place(rng: Generator, depth: FloatImage, taken: NDArray[np.bool_], seed: int) -> Point:
    """A centre (row, column) away from skin, image border and lesions already there."""
    reach = MAX_LESION_PX // 2
    allowed = depth > reach + 2
    for axis in (0, 1):
        edge = np.moveaxis(allowed, axis, 0)
        edge[: reach + 1] = False
        edge[-reach - 1 :] = False
    for row, column in np.argwhere(taken):
        top, left = max(row - 2 * reach, 0), max(column - 2 * reach, 0)
        allowed[top : row + 2 * reach, left : column + 2 * reach] = False
    places = np.argwhere(allowed)
    if not len(places):
        raise ValueError(
            f"no room for another lesion in phantom {seed}; draw fewer, or larger ones"
        )
    row, column = places[rng.integers(len(places))]
    return float(row), float(column)


def _draw_lesion(
    kind: LesionKind, rng: Generator, tissue: FloatImage, centre: Point, style: PhantomStyle
) -> Drawn:
    match kind:
        case "mass":
            return draw_mass(rng, tissue, centre, style.mass_contrast, style.mass_radius)
        case "distortion":
            return draw_distortion(rng, tissue, centre, style.swirl)
        case "calcifications":
            return draw_calcifications(rng, tissue, centre, style.calcification_contrast)


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left


@dataclass(frozen=True)
class PhantomData:
    """Phantoms by file name."""

    train: dict[str, Phantom]
    """Normal ones."""
    test: dict[str, Phantom]
    """Each with lesions of one kind."""


def write_phantoms(
    folder: Path,
    seed: int,
    *,
    n_train: int = 200,
    n_held_out: int = 0,
    n_test: Mapping[LesionKind, int] = DEFAULT_TEST,
    lesions_per_image: int = 2,
    style: PhantomStyle | None = None,
) -> PhantomData:
    """Draws a data set and writes it below `folder`.

    train/*.png, held_out/*.png (normal, too) and test/*.png are 8-bit images, masks/*.png (0 or
    255) and boxes.csv (image, top, left, height, width, label) say where the test images' lesions
    are, bodies/*.png (0 or 255) which pixels are inside the body. The phantoms returned are not
    rounded to 8 bits.
    n_test: images by kind of lesion. Raises ValueError as `draw_phantom` does.
    """
    first = seed * SEEDS_PER_DATA_SET
    train = {f"normal_{i:03d}.png": draw_phantom(first + i, style=style) for i in range(n_train)}
    test = {}
    for kind, n in n_test.items():
        for i in range(n):
            number = first + SEEDS_PER_DATA_SET // 2 + len(test)
            kinds = (kind,) * lesions_per_image
            test[f"{kind}_{i:03d}.png"] = draw_phantom(number, lesions=kinds, style=style)
    for part in ("train", "held_out", "test", "masks", "bodies"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(n_held_out):
        phantom = draw_phantom(first + SEEDS_PER_DATA_SET // 4 + i, style=style)
        write_image(folder / "held_out" / f"normal_{i:03d}.png", from_numpy(phantom.image))
    for name, phantom in train.items():
        write_image(folder / "train" / name, from_numpy(phantom.image))
    for name, phantom in test.items():
        write_image(folder / "test" / name, from_numpy(phantom.image))
        write_image(folder / "masks" / name, from_numpy(phantom.lesion_mask).float())
        write_image(folder / "bodies" / name, from_numpy(phantom.body).float())
    save_text_atomic(_boxes_csv(test), folder / "boxes.csv")
    return PhantomData(train, test)


def _boxes_csv(phantoms: Mapping[str, Phantom]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("image", "top", "left", "height", "width", "label"))
    for name, phantom in phantoms.items():
        for lesion in phantom.lesions:
            table.writerow(
                (name, lesion.top, lesion.left, lesion.height, lesion.width, lesion.kind)
            )
    return text.getvalue()
