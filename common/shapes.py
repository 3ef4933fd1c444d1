"""Lesions' outlines, and which pixels they mark: boxes, shares of an image, polygons, runs.

Sizes are (height, width) in pixels; coordinates are (row, column), counted from the image's top
left corner, so that pixel (0, 0) reaches from 0 to 1.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.image_names import AnnotationError

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class Box(NamedTuple):
    """A lesion's rectangle; the pixels that it touches are lesion."""

    top: float
    left: float
    height: float
    width: float
    label: str = ""


class ShareBox(NamedTuple):
    """A rectangle in shares of the image's height and width, in [0, 1], as YOLO has it."""

    top: float
    left: float
    height: float
    width: float
    label: str = ""


@dataclass(frozen=True)
class Polygons:
    """A lesion of one or several outlines; the pixels whose centre is inside one are lesion."""

    outlines: tuple[np.ndarray, ...]
    """(corners, 2) each: row, column, in pixels or in shares."""
    label: str = ""
    shares: bool = False
    """Whether rows and columns are shares of the image's height and width."""


@dataclass(frozen=True)
class Pixels:
    """A lesion given pixel by pixel."""

    marked: np.ndarray
    """(h, w) bool."""
    label: str = ""
    top: int = 0
    left: int = 0
    """Where its first row and column lie in the image."""


Shape = Box | ShareBox | Polygons | Pixels


def content(shape: Shape) -> Hashable:
    """The same for two shapes that are equal to the last digit, class included."""
    match shape:
        case Polygons():
            return tuple(outline.tobytes() for outline in shape.outlines), shape.label
        case Pixels():
            marked = (shape.marked.shape, np.packbits(shape.marked).tobytes())
            return marked, shape.label, shape.top, shape.left
        case _:
            return shape


def boxes_to_labels(boxes: Iterable[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) bool, True in the union of the boxes (top, left, height, width).

    Boxes are cut at the border; fractions count as the whole pixel.
    """
    labels = np.zeros(size, dtype=bool)
    for box in boxes:
        labels[pixels_of_box(box, size)] = True
    return labels


def pixels_of_box(box: Sequence[float], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of an image of this size that a box touches; empty where it lies outside.

    Raises AnnotationError for a box that is not a number.
    """
    top, left, height, width = box[:4]
    slices = []
    for start, length, limit in ((top, height, size[0]), (left, width, size[1])):
        if math.isnan(start + length):
            raise AnnotationError(f"box {tuple(box[:4])} (top, left, height, width): not a number")
        first, end = (min(max(edge, 0), limit) for edge in (start, start + length))
        slices.append(slice(math.floor(first), math.ceil(end)))
    return slices[0], slices[1]


def labels_to_boxes(labels: np.ndarray) -> list[Box]:
    """One Box round each 8-connected region of labels (H, W)."""
    regions, _ = ndimage.label(labels, structure=EIGHT_NEIGHBOURS)
    return [
        Box(y.start, x.start, y.stop - y.start, x.stop - x.start)
        for y, x in ndimage.find_objects(regions)
    ]


def box_of(shape: Shape, size: tuple[int, int]) -> Box:
    """The box round a shape in an image of this size, in pixels; it may lie outside."""
    match shape:
        case Box():
            return shape
        case ShareBox():
            # to hundredths of a pixel: shares are rounded, and a touched pixel counts as a whole
            top, left = (round(shape[i] * size[i], 2) for i in (0, 1))
            bottom, right = (round((shape[i] + shape[i + 2]) * size[i], 2) for i in (0, 1))
            return Box(top, left, bottom - top, right - left, shape.label)
        case Polygons():
            corners = np.concatenate(_in_pixels(shape, size))
            low, high = corners.min(axis=0), corners.max(axis=0)
            return Box(*map(float, low), *map(float, high - low), shape.label)
        case Pixels():
            rows, columns = (np.flatnonzero(shape.marked.any(axis=axis)) for axis in (1, 0))
            top, left = shape.top + int(rows[0]), shape.left + int(columns[0])
            return Box(top, left, int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1, shape.label)


def draw(shape: Shape, labels: np.ndarray) -> None:
    """Marks a shape's pixels in labels (H, W) bool; what lies outside is cut.

    A polygon too thin for the centre of any pixel marks the pixels of its corners, so that no
    lesion vanishes.
    """
    match shape:
        case Box() | ShareBox():
            labels[pixels_of_box(box_of(shape, labels.shape), labels.shape)] = True
        case Pixels():
            rows, columns = pixels_of_box(
                (shape.top, shape.left, *shape.marked.shape), labels.shape
            )
            first = (rows.start - shape.top, columns.start - shape.left)
            part = labels[rows, columns]
            part |= shape.marked[
                first[0] : first[0] + part.shape[0], first[1] : first[1] + part.shape[1]
            ]
        case Polygons():
            for outline in _in_pixels(shape, labels.shape):
                if not _fill(outline, labels):
                    inside = ((outline >= 0) & (outline < labels.shape)).all(axis=1)
                    labels[tuple(outline[inside].astype(int).T)] = True


def _in_pixels(shape: Polygons, size: tuple[int, int]) -> list[np.ndarray]:
    return [outline * size if shape.shares else outline for outline in shape.outlines]


def _fill(outline: np.ndarray, labels: np.ndarray) -> bool:
    """Marks the pixels whose centres are inside an outline (corners, 2); says whether any is.

    Row by row, between the first and second, the third and fourth … crossing of the outline with
    the line through the centres. (Pillow's polygons also mark what their border touches.)
    """
    rows, columns = outline.T
    next_rows, next_columns = np.roll(rows, -1), np.roll(columns, -1)
    marked = False
    first, last = math.floor(rows.min()), math.ceil(rows.max())
    for row in range(max(first, 0), min(last, len(labels))):
        centre = row + 0.5
        crossing = (rows <= centre) != (next_rows <= centre)
        share = (centre - rows[crossing]) / (next_rows[crossing] - rows[crossing])
        at = np.sort(columns[crossing] + share * (next_columns - columns)[crossing])
        for start, end in zip(np.ceil(at[::2] - 0.5), np.ceil(at[1::2] - 0.5), strict=True):
            if end > start:
                labels[row, max(int(start), 0) : max(int(end), 0)] = True
                marked = True
    return marked
