"""FROC: how many lesions local maxima of heatmaps hit, at how many false positives.

What is counted is a *unit*: an image, or a volume where images are its slices. Legend: n units, C
candidates, L lesions, E events (a lesion is hit, or a false positive occurs) in falling score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.sparse import csgraph

from common.candidates import (
    DISTANCE_SHARE,
    MOST_CANDIDATES,
    HitRule,
    ImageFindings,
    Lesion,
    near_centre,
    overlap,
)
from common.image_names import volume_of
from common.metrics import Interval, MetricError, bootstrap_intervals

CountedOn = Literal["all", "normal"]
RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""False positives per unit at which sensitivity is given, as LUNA16 does."""
RATE_NAMES = tuple(f"{rate:g}" for rate in RATES)
MEAN = "mean"
SLICE_SHARE = 0.25
"""Slices within which a lesion is hit by the rule of BCS-DBT: of the volume's."""


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
