"""How well the lesions of one kind of heatmap are found: FROC, by size, by class and by group."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.candidates import (
    HitRule,
    ImageFindings,
)
from common.cohort import Clusters
from common.froc import (
    CountedOn,
    Detections,
    FrocCurve,
    FrocEvents,
    join_units,
)
from common.image_names import volume_of
from common.metrics import Interval

FEWEST_FOR_TERCILES = 3


class LesionGroup(NamedTuple):
    """Some of the lesions, and how many of them are found at the false positives of all images."""

    name: str
    lesions: int
    sensitivity: dict[str, Interval]
    """By name of the rate (0.125 … 8 false positives per unit) and `mean`."""


@dataclass(frozen=True)
class Detection:
    """FROC of one kind of heatmap; intervals are 95 % bootstrap ones, as all of the evaluation."""

    hit_rule: HitRule
    counted_on: CountedOn
    """Units on which false positives are counted."""
    unit: str
    """Per what they are counted: image or volume."""
    found: Detections
    events: FrocEvents
    curve: FrocCurve
    sensitivity: dict[str, Interval]
    """As in LesionGroup, of all lesions."""
    by_size: list[LesionGroup]
    """By area in pixels that count, of the slice that shows most of a lesion."""
    by_class: list[LesionGroup]
    """By the annotations' label; empty where no lesion has one."""

    def units_of(self, images: Sequence[str]) -> np.ndarray:
        """(m,) numbers of the units that these images are, or belong to."""
        names = set(map(volume_of, images))
        return np.array([n for n, name in enumerate(self.found.units) if name in names], dtype=int)


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    clusters: Clusters
    n_resamples: int
    seed: int

    def of(self, images: Sequence[str]) -> dict[str, object]:
        """The arguments of a function that makes intervals over these images."""
        return {
            "n_resamples": self.n_resamples,
            "seed": self.seed,
            "clusters": self.clusters.numbers(images),
        }


def detect(
    findings: Sequence[ImageFindings],
    resampling: Resampling,
    *,
    hit_rule: HitRule,
    counted_on: CountedOn,
    min_distance: int | None,
    size_bins: Sequence[float],
) -> Detection:
    """FROC of all images' findings. size_bins: bounds in pixels; none = terciles of the areas.

    Raises MetricError where there is no lesion, or no unit to count false positives on.
    """
    found = join_units(findings, hit_rule, min_distance)
    events = FrocEvents(found, counted_on)
    draws = resampling.of(first_images(found))
    labels = np.array([each.lesion.label for each in found.lesions])
    named = [(str(label), labels == label) for label in np.unique(labels)] if any(labels) else []
    areas = np.array([each.lesion.area for each in found.lesions])

    def groups(chosen: list[tuple[str, np.ndarray]]) -> list[LesionGroup]:
        return [
            LesionGroup(name, int(lesions.sum()), events.intervals(lesions, **draws))
            for name, lesions in chosen
        ]

    return Detection(
        hit_rule=hit_rule,
        counted_on=counted_on,
        unit="image" if found.units == found.images else "volume",
        found=found,
        events=events,
        curve=events.curve(),
        sensitivity=events.intervals(**draws),
        by_size=groups(size_groups(areas, size_bins)),
        by_class=groups([(name or "(no label)", lesions) for name, lesions in named]),
    )


def first_images(found: Detections) -> list[str]:
    """An image of each unit, (n,): they tell its patient."""
    of_unit: dict[str, str] = {}
    for image in found.images:
        of_unit.setdefault(volume_of(image), image)
    return [of_unit[unit] for unit in found.units]


def size_groups(areas: np.ndarray, bins: Sequence[float]) -> list[tuple[str, np.ndarray]]:
    """Names and members (L,) bool of the groups of lesions by area (L,) that have any.

    A bound belongs to the smaller lesions. Without bins terciles, of three lesions or more.
    """
    bounds = list(bins)
    if not bounds:
        if areas.size < FEWEST_FOR_TERCILES:
            return []
        bounds = [float(np.floor(bound)) for bound in np.quantile(areas, [1 / 3, 2 / 3])]
    bounds = sorted(set(bounds))
    place = np.searchsorted(bounds, areas, side="left")
    names = [f"up to {bounds[0]:g} px"]
    names += [f"above {low:g} to {high:g} px" for low, high in itertools.pairwise(bounds)]
    names += [f"above {bounds[-1]:g} px"]
    return [(name, place == n) for n, name in enumerate(names) if (place == n).any()]
