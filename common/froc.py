"""FROC: a heatmap's local maxima as findings, and how many lesions they hit at how many false ones.

One image is looked at alone (`find_in_image`); then the slices of a volume are put together, for
what is counted is a *unit*: an image, or a volume where names are those of slices. Legend: n units,
C candidates, L lesions, E events (a lesion is hit, or a false positive occurs) in falling score.
Larger scores are more anomalous. Boxes are (top, left, height, width) in pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.sparse import csgraph

from common.image_names import volume_of
from common.metrics import Interval, MetricError, PixelCase, bootstrap_intervals, counted_pixels

HitRule = Literal["centre_in_mask", "iou", "bcs_dbt"]
CountedOn = Literal["all", "normal"]
RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""False positives per unit at which sensitivity is given, as LUNA16 and CAMELYON16 do."""
RATE_NAMES = tuple(f"{rate:g}" for rate in RATES)
MEAN = "mean"
MOST_CANDIDATES = 100
"""Of a unit, the highest: eight false positives per unit are looked at, so that more are no use."""
DISTANCE_SHARE = 0.02
"""Distance between candidates where none is given: of the image's longer side."""
BCS_DBT_REACH = 100
"""Pixels within which a small lesion's centre is hit by the rule of BCS-DBT."""
SLICE_SHARE = 0.25
"""Slices within which a lesion is hit by the rule of BCS-DBT: of the volume's."""
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


class UnitLesion(NamedTuple):
    """A lesion of a unit: in a volume, of all slices that show it, by the one where it is largest.

    The lesions of neighbouring slices whose boxes overlap are one.
    """

    unit: int
    image: str
    lesion: Lesion
    score: float
    """Of the highest candidate that hits it; -inf where none does."""


@dataclass(frozen=True)
class Detections:
    """The findings of all units."""

    units: list[str]
    images: list[str]
    candidates: np.ndarray
    """Structured (C,): unit, image (numbers of the above), row, column, score, and lesion: the
    number of the first one hit, -1 where none is."""
    lesions: list[UnitLesion]

    @property
    def has_lesion(self) -> np.ndarray:
        """(n,) bool."""
        of_units = np.zeros(len(self.units), dtype=bool)
        of_units[[lesion.unit for lesion in self.lesions]] = True
        return of_units


CANDIDATE = np.dtype(
    {
        "names": ["unit", "image", "row", "column", "score", "lesion"],
        "formats": ["i4", "i4", "i4", "i4", "f8", "i4"],
    }
)


def slice_number(image: str) -> int:
    """The number of a slice, scan.dcm#017, in its volume; 0 for an image that is none."""
    return int(image[len(volume_of(image)) + 1 :] or 0)


def join_units(
    findings: Sequence[ImageFindings], rule: HitRule, min_distance: int | None = None
) -> Detections:
    """Puts the slices of each volume together; an image that is no slice is a unit by itself.

    Of candidates within min_distance pixels and a quarter of the volume's slices of each other the
    highest stays (None: 2 % of the longer side of the area with candidates). By the rule bcs_dbt a
    candidate hits the lesions of slices so near, too.
    """
    by_unit: dict[str, list[tuple[int, ImageFindings]]] = {}
    for number, each in enumerate(findings):
        by_unit.setdefault(volume_of(each.image), []).append((number, each))
    candidates, lesions = [np.zeros(0, CANDIDATE)], []
    for unit, members in enumerate(by_unit.values()):
        members.sort(key=lambda member: slice_number(member[1].image))
        slices = [each for _, each in members]
        found, hits = join_slices(slices, rule, min_distance)
        found["unit"] = unit
        for of_group in linked_lesions(slices):
            hit = hits[:, [column for column, _, _ in of_group]].any(axis=1)
            found["lesion"][hit & (found["lesion"] < 0)] = len(lesions)
            score = float(found["score"][hit].max()) if hit.any() else -np.inf
            _, image, lesion = max(of_group, key=lambda part: part[2].area)
            lesions.append(UnitLesion(unit, image, lesion, score))
        found["image"] = np.array([number for number, _ in members])[found["image"]]
        candidates.append(found)
    images = [each.image for each in findings]
    return Detections(list(by_unit), images, np.concatenate(candidates), lesions)


def join_slices(
    slices: Sequence[ImageFindings], rule: HitRule, min_distance: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of one unit (C,), `image` being a place in `slices`, scores falling, and which
    of the lesions of all its slices they hit, (C, L)."""
    per_slice = [each.candidates for each in slices]
    found = np.zeros(sum(each.scores.size for each in per_slice), CANDIDATE)
    found["lesion"] = -1
    found["image"] = np.repeat(np.arange(len(slices)), [each.scores.size for each in per_slice])
    for name, of_slice in (("row", "rows"), ("column", "columns"), ("score", "scores")):
        found[name] = np.concatenate([getattr(each, of_slice) for each in per_slice])
    hits = block_diagonal([each.hits for each in slices])
    if len(slices) == 1:
        return found, hits
    numbers = np.array([slice_number(each.image) for each in slices])
    said = [each.volume_slices for each in slices if each.volume_slices is not None]
    depth = SLICE_SHARE * (max(said) if said else numbers.max() + 1)
    if rule == "bcs_dbt":
        lesions = [(place, lesion) for place, each in enumerate(slices) for lesion in each.lesions]
        for column, (place, lesion) in enumerate(lesions):
            near = np.abs(numbers[found["image"]] - numbers[place]) <= depth
            hits[:, column] = near & near_centre(found["row"], found["column"], lesion)
    kept = highest_of_neighbours(found, numbers[found["image"]], min_distance, depth)
    return found[kept], hits[kept]


def block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """(C, L) bool from parts (c, l), False outside them."""
    whole = np.zeros(np.sum([block.shape for block in blocks], axis=0), dtype=bool)
    row, column = 0, 0
    for block in blocks:
        height, width = block.shape
        whole[row : row + height, column : column + width] = block
        row, column = row + height, column + width
    return whole


def highest_of_neighbours(
    found: np.ndarray, slices: np.ndarray, min_distance: int | None, depth: float
) -> np.ndarray:
    """Places of the candidates (C,) that stay: from the highest on, each that is not near one."""
    span = [np.ptp(found[name]) for name in ("row", "column") if found.size]
    reach = min_distance or max(1, round(DISTANCE_SHARE * max(span, default=0)))
    left, kept = np.argsort(-found["score"], kind="stable"), []
    while left.size and len(kept) < MOST_CANDIDATES:
        highest, left = left[0], left[1:]
        kept.append(highest)
        near = np.abs(slices[left] - slices[highest]) <= depth
        for name in ("row", "column"):
            near &= np.abs(found[name][left] - found[name][highest]) <= reach
        left = left[~near]
    return np.array(kept, dtype=int)


def linked_lesions(slices: Sequence[ImageFindings]) -> list[list[tuple[int, str, Lesion]]]:
    """The lesions of a unit, each with its parts: (column in its hits, image, Lesion of a slice).

    Lesions of neighbouring slices whose boxes overlap are parts of one.
    """
    parts = [(place, lesion) for place, each in enumerate(slices) for lesion in each.lesions]
    linked = np.eye(len(parts), dtype=bool)
    boxes = np.array([lesion[:4] for _, lesion in parts]).reshape(-1, 4)
    places = np.array([place for place, _ in parts], dtype=int)
    for number, (place, lesion) in enumerate(parts):
        linked[number] |= (places == place + 1) & (overlap(boxes, lesion) > 0)
    groups: dict[int, list[tuple[int, str, Lesion]]] = {}
    if parts:
        _, group_of = csgraph.connected_components(linked, directed=False)
        for column, (place, lesion) in enumerate(parts):
            part = (column, slices[place].image, lesion)
            groups.setdefault(int(group_of[column]), []).append(part)
    return list(groups.values())


class FrocCurve(NamedTuple):
    """Operating points (E + 1,), thresholds falling, from nothing found on."""

    false_positives: np.ndarray
    """Per unit on which they are counted."""
    sensitivity: np.ndarray
    thresholds: np.ndarray
    """Candidates of a score >= it count; infinite for the first point."""

    def at_rates(self) -> dict[str, float]:
        """Sensitivity at RATES, straight between the points, by RATE_NAMES, and their mean.

        Beyond the last point it stays as it is there. NaN where there is no lesion or no unit.
        """
        if np.isnan(self.sensitivity[0] + self.false_positives[0]):
            return dict.fromkeys((*RATE_NAMES, MEAN), np.nan)
        at = np.interp(RATES, self.false_positives, self.sensitivity)
        return dict(zip(RATE_NAMES, map(float, at), strict=True)) | {MEAN: float(at.mean())}


class FrocEvents:
    """What happens as the threshold falls: a lesion is hit for the first time, or a false positive
    occurs, which is a candidate that hits no lesion; further hits of a lesion are neither."""

    def __init__(self, detections: Detections, counted_on: CountedOn = "all") -> None:
        """counted_on: units whose false positives count: all, or those without lesion.

        Raises MetricError where there is no lesion, or no such unit.
        """
        n_lesions = len(detections.lesions)
        unit_of_lesion = np.array([lesion.unit for lesion in detections.lesions], dtype=int)
        has_lesion = detections.has_lesion
        self.counts = np.ones(has_lesion.size) if counted_on == "all" else 1.0 * ~has_lesion
        if n_lesions == 0 or not self.counts.any():
            kind = "lesion" if n_lesions == 0 else "normal image to count false positives on"
            raise MetricError(f"FROC needs a {kind}, there is none")
        scores = np.array([lesion.score for lesion in detections.lesions])
        hit = np.flatnonzero(np.isfinite(scores))
        false = detections.candidates[detections.candidates["lesion"] < 0]
        false = false[self.counts[false["unit"]] > 0]
        score = np.append(scores[hit], false["score"])
        order = np.argsort(-score, kind="stable")
        self.score = score[order]
        self.unit = np.append(unit_of_lesion[hit], false["unit"])[order]
        self.lesion = np.append(hit, np.full(false.size, -1))[order]
        self.last_of_tie = np.flatnonzero(np.append(np.diff(self.score) != 0, True)[: score.size])
        self.unit_of_lesion = unit_of_lesion

    def curve(
        self, weights: np.ndarray | None = None, lesions: np.ndarray | None = None
    ) -> FrocCurve:
        """The curve of all units, or of units that count `weights` (n,) times.

        lesions: (L,) bool, those that are sought; false positives stay those of all. NaN where
        the weights leave no lesion or no unit.
        """
        weights = np.ones(self.counts.size) if weights is None else weights
        sought = np.ones(self.unit_of_lesion.size, bool) if lesions is None else lesions
        of_event, is_hit = weights[self.unit], self.lesion >= 0
        found = np.cumsum(of_event * (is_hit & sought[self.lesion]))[self.last_of_tie]
        false = np.cumsum(of_event * ~is_hit)[self.last_of_tie]
        n_lesions = (weights[self.unit_of_lesion] * sought).sum()
        n_units = (weights * self.counts).sum()
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as promised
            return FrocCurve(
                np.append(0.0, false) / n_units,
                np.append(0.0, found) / n_lesions,
                np.append(np.inf, self.score[self.last_of_tie]),
            )

    def intervals(
        self,
        lesions: np.ndarray | None = None,
        units: np.ndarray | None = None,
        *,
        n_resamples: int,
        seed: int,
        clusters: np.ndarray | None = None,
    ) -> dict[str, Interval]:
        """Sensitivities with 95 % bootstrap intervals over units.

        lesions: (L,) bool, as for `curve`. units: numbers (m,) of those that are looked at, None =
        all. clusters: (m,), of these, as in `common.metrics.bootstrap_draws`.
        """
        chosen = np.arange(self.counts.size) if units is None else units

        def on_draw(draw: np.ndarray) -> Mapping[str, float]:
            return self.at_rates(chosen[draw], lesions)

        settings = {"n_resamples": n_resamples, "seed": seed, "clusters": clusters}
        values = self.at_rates(chosen, lesions)
        return bootstrap_intervals(values, on_draw, chosen.size, **settings)

    def at_rates(
        self, units: np.ndarray | None = None, lesions: np.ndarray | None = None
    ) -> dict[str, float]:
        """`FrocCurve.at_rates` of units by number (m,), which may repeat; None = all."""
        if units is None:
            return self.curve(None, lesions).at_rates()
        weights = np.bincount(units, minlength=self.counts.size).astype(float)
        return self.curve(weights, lesions).at_rates()
