"""What one heatmap finds: its local maxima, and which of the image's lesions they hit.

Larger scores are more anomalous. Boxes are (top, left, height, width) in pixels. Legend: C
candidates, L lesions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

from common.metrics import PixelCase, counted_pixels

HitRule = Literal["centre_in_mask", "iou", "bcs_dbt"]
MOST_CANDIDATES = 100
"""Of an image or volume, the highest: FROC looks at eight false positives of each at most."""
DISTANCE_SHARE = 0.02
"""Distance between candidates where none is given: of the image's longer side."""
BCS_DBT_REACH = 100
"""Pixels within which a small lesion's centre is hit by the rule of BCS-DBT."""
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class Candidates(NamedTuple):
    """Local maxima of one heatmap, scores falling."""

    rows: np.ndarray
    """(C,) pixels, as are columns."""
    columns: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None
    """(C, 4) round each candidate's component, where asked for."""


class Lesion(NamedTuple):
    """One annotated lesion of one image, by its box in pixels."""

    top: float
    left: float
    height: float
    width: float
    label: str
    area: int
    """Pixels that count."""


class Region(NamedTuple):
    """A lesion with its pixels: a part (h, w) of the image that begins at row and column."""

    lesion: Lesion
    row: int
    column: int
    pixels: np.ndarray


@dataclass(frozen=True)
class ImageFindings:
    """What one image holds and what was found in it."""

    image: str
    candidates: Candidates
    lesions: list[Lesion]
    hits: np.ndarray
    """(C, L) bool: which candidates hit which lesions of this image."""
    volume_slices: int | None = None
    """Of its volume, where the annotations say it."""


def regions_of_boxes(boxes: Sequence[Sequence], case: PixelCase) -> list[Region]:
    """A region per box (top, left, height, width, label) that has a pixel that counts."""
    counted, regions = counted_pixels(case), []
    height, width = counted.shape
    for top, left, box_height, box_width, label in boxes:
        first_row, first_column = (max(int(np.floor(edge)), 0) for edge in (top, left))
        end_row = min(int(np.ceil(top + box_height)), height)
        end_column = min(int(np.ceil(left + box_width)), width)
        pixels = counted[first_row:end_row, first_column:end_column]
        lesion = Lesion(top, left, box_height, box_width, label, int(pixels.sum()))
        regions.append(Region(lesion, first_row, first_column, pixels))
    return [region for region in regions if region.lesion.area > 0]


def regions_of_shapes(
    shapes: Iterable[tuple[Sequence, np.ndarray]], case: PixelCase
) -> list[Region]:
    """A region per shape that has a pixel that counts.

    shapes: of each the box (top, left, height, width, label) and the pixels (H, W) bool.
    """
    counted, regions = counted_pixels(case), []
    for box, marked in shapes:
        marked = marked & counted
        if marked.any():
            rows, columns = ndimage.find_objects(marked.astype(np.uint8))[0]
            pixels = marked[rows, columns]
            lesion = Lesion(*box[:5], int(pixels.sum()))
            regions.append(Region(lesion, rows.start, columns.start, pixels))
    return regions


def regions_of_mask(case: PixelCase) -> list[Region]:
    """A region per 8-connected part of the segmentation's pixels that count."""
    lesion = np.asarray(case.segmentation).astype(bool) & counted_pixels(case)
    numbered, _ = ndimage.label(lesion, structure=EIGHT_NEIGHBOURS)
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbered), start=1):
        pixels = numbered[rows, columns] == number
        box = (rows.start, columns.start, *pixels.shape)
        regions.append(Region(Lesion(*box, "", int(pixels.sum())), *box[:2], pixels))
    return regions


def find_candidates(
    case: PixelCase,
    min_distance: int | None = None,
    *,
    with_boxes: bool = False,
    most: int = MOST_CANDIDATES,
) -> Candidates:
    """The heatmap's local maxima: nothing within min_distance of them, rows and columns, is higher.

    A plateau counts once, at its pixel nearest to its centre, and only if the whole of it is a
    maximum; what is as low as the lowest pixel is none. Ignored pixels are passed over.
    min_distance: in pixels, None = 2 % of the image's longer side. with_boxes: also the boxes round
    the pixels about each maximum that lie above the middle between it and the heatmap's median.
    Raises as `counted_pixels` does.
    """
    counted = counted_pixels(case)
    heat = np.where(counted, case.heatmap, -np.inf)
    reach = min_distance or max(1, round(DISTANCE_SHARE * max(heat.shape)))
    above = ndimage.maximum_filter(heat, 2 * reach + 1, mode="constant", cval=-np.inf)
    peak = (heat == above) & (heat > heat[counted].min())
    rest = ndimage.maximum_filter(np.where(peak, -np.inf, heat), 3, mode="constant", cval=-np.inf)
    components, n = ndimage.label(peak, structure=EIGHT_NEIGHBOURS)
    rows, columns = np.nonzero(peak)
    component = components[rows, columns] - 1
    whole = np.ones(n, dtype=bool)
    whole[component[rest[rows, columns] == heat[rows, columns]]] = False
    sizes = np.maximum(np.bincount(component, minlength=n), 1)
    off_centre = sum(
        (place - (np.bincount(component, place, n) / sizes)[component]) ** 2
        for place in (rows, columns)
    )
    order = np.lexsort((off_centre, component))
    first = order[np.diff(component[order], prepend=-1) != 0][whole]  # of each plateau
    scores = heat[rows[first], columns[first]]
    highest = first[np.argsort(-scores, kind="stable")][:most]
    rows, columns = rows[highest], columns[highest]
    boxes = None
    if with_boxes:
        middle = float(np.median(heat[counted]))
        places = zip(rows, columns, strict=True)
        boxes = np.array([component_box(heat, *place, middle) for place in places]).reshape(-1, 4)
    return Candidates(rows, columns, heat[rows, columns], boxes)


def component_box(heat: np.ndarray, row: int, column: int, base: float) -> tuple[int, ...]:
    """(top, left, height, width) of the pixels connected with one that are above half its height.

    The height is measured from `base`. Looks at ever larger parts of the heatmap (H, W).
    """
    level, reach = (float(heat[row, column]) + base) / 2, 16
    while True:
        top, left = max(row - reach, 0), max(column - reach, 0)
        part = heat[top : row + reach + 1, left : column + reach + 1]
        numbered, _ = ndimage.label(part >= level, structure=EIGHT_NEIGHBOURS)
        number = numbered[row - top, column - left]
        rows, columns = ndimage.find_objects((numbered == number).astype(int))[0]
        inside = (
            (rows.start > 0 or top == 0)
            and (columns.start > 0 or left == 0)
            and (rows.stop < part.shape[0] or top + part.shape[0] == heat.shape[0])
            and (columns.stop < part.shape[1] or left + part.shape[1] == heat.shape[1])
        )
        if inside:
            height, width = rows.stop - rows.start, columns.stop - columns.start
            return top + rows.start, left + columns.start, height, width
        reach *= 2


def find_in_image(
    image: str,
    candidates: Candidates,
    regions: Sequence[Region],
    rule: HitRule,
    *,
    min_iou: float = 0.1,
    volume_slices: int | None = None,
) -> ImageFindings:
    """Which of an image's candidates hit which of its lesions.

    rule: centre_in_mask: the maximum is a pixel of the lesion; iou: the boxes of component and
    lesion overlap by at least min_iou of their union; bcs_dbt: the maximum lies within half the
    diagonal of the lesion's box, or 100 pixels if that is more, of the box's centre.
    """
    lesions = [region.lesion for region in regions]
    if rule == "centre_in_mask":
        columns = [_inside(candidates, region) for region in regions]
    elif rule == "iou":
        columns = [overlap(candidates.boxes, lesion) >= min_iou for lesion in lesions]
    else:
        columns = [near_centre(candidates.rows, candidates.columns, each) for each in lesions]
    hits = np.zeros((candidates.rows.size, len(lesions)), dtype=bool)
    for number, column in enumerate(columns):
        hits[:, number] = column
    return ImageFindings(image, candidates, lesions, hits, volume_slices)


def _inside(candidates: Candidates, region: Region) -> np.ndarray:
    """(C,) bool: which maxima are pixels of the region."""
    rows, columns = candidates.rows - region.row, candidates.columns - region.column
    height, width = region.pixels.shape
    within = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    inside = np.zeros(rows.size, dtype=bool)
    inside[within] = region.pixels[rows[within], columns[within]]
    return inside


def overlap(boxes: np.ndarray, lesion: Lesion) -> np.ndarray:
    """(C,) intersection over union of boxes (C, 4) with a lesion's box."""
    top, left, height, width = boxes.T
    rows = np.minimum(top + height, lesion.top + lesion.height) - np.maximum(top, lesion.top)
    columns = np.minimum(left + width, lesion.left + lesion.width) - np.maximum(left, lesion.left)
    shared = rows.clip(min=0) * columns.clip(min=0)
    return shared / (height * width + lesion.height * lesion.width - shared)


def near_centre(rows: np.ndarray, columns: np.ndarray, lesion: Lesion) -> np.ndarray:
    """(C,) bool: which pixels lie near a lesion's centre by the rule of BCS-DBT."""
    down = rows + 0.5 - (lesion.top + lesion.height / 2)
    right = columns + 0.5 - (lesion.left + lesion.width / 2)
    reach = max(np.hypot(lesion.height, lesion.width) / 2, BCS_DBT_REACH)
    return np.hypot(down, right) <= reach
