"""How often verdicts at the operating point are right: sensitivity and specificity over images.

The threshold comes from other, normal images (operating_point.py), so that nothing here was chosen
on the images that it is measured on. Images count as independent of each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import unescaped
from common.metrics import Interval, format_interval, share_interval
from inpainter.evaluation_results import MetricResult
from inpainter.evaluation_tables import aligned
from inpainter.heatmap_tables import VERDICTS, EvaluationError, read_table

ABNORMAL = {"abnormal": True, "normal": False}


@dataclass(frozen=True)
class OperatingStatistics:
    """One metric's verdicts against the annotations."""

    metric: str
    thresholds: tuple[float, ...]
    """Of the images' largest scores: one, unless verdicts were put together by hand."""
    true_positives: int
    """Images with a lesion that are called abnormal."""
    false_negatives: int
    true_negatives: int
    """Images without lesion that are called normal."""
    false_positives: int
    without_verdict: tuple[str, ...]
    """Evaluated images that verdicts.csv does not have: they do not count."""

    @property
    def sensitivity(self) -> Interval | None:
        """Share of images with a lesion that are called abnormal; None without such images."""
        return share_interval(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> Interval | None:
        """Share of images without lesion that are called normal; None without such images."""
        return share_interval(self.true_negatives, self.true_negatives + self.false_positives)

    def plain(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        shares = {"sensitivity": self.sensitivity, "specificity": self.specificity}
        return {
            **vars(self),
            **{name: share and share._asdict() for name, share in shares.items()},
            "intervals": "95 % Wilson intervals over images",
        }


def read_verdicts(folder: Path) -> dict[str, dict[str, tuple[bool, float]]]:
    """Metric -> image -> whether it is called abnormal, and the threshold; {} without verdicts.csv.

    Raises EvaluationError where the table is malformed.
    """
    path = folder / VERDICTS
    found: dict[str, dict[str, tuple[bool, float]]] = {}
    for where, row in read_table(path) if path.is_file() else ():
        of_metric = found.setdefault(row["metric"], {})
        image = unescaped(row["image"])
        if image in of_metric:
            raise EvaluationError(f"{where}: {row['image']}, {row['metric']} is there twice")
        try:
            of_metric[image] = (ABNORMAL[row["verdict"]], float(row["threshold"]))
        except (KeyError, ValueError):
            raise EvaluationError(
                f"{where}: expected a verdict, abnormal or normal, and a threshold, got "
                f"{row['verdict'][:40]!r} and {row['threshold'][:40]!r}"
            ) from None
    return found


def operating_statistics(
    results: Sequence[MetricResult], folder: Path
) -> dict[str, OperatingStatistics]:
    """By metric, for those that the heatmap folder has verdicts of. Raises EvaluationError."""
    by_metric = read_verdicts(folder)
    return {
        result.metric: statistics_of(result, by_metric[result.metric])
        for result in results
        if result.metric in by_metric
    }


def statistics_of(
    result: MetricResult, verdicts: Mapping[str, tuple[bool, float]]
) -> OperatingStatistics:
    """One metric's. verdicts: image -> whether it is called abnormal, and the threshold."""
    rows = [row for row in result.rows if row.image in verdicts]
    pairs = [(row.has_lesion, verdicts[row.image][0]) for row in rows]
    return OperatingStatistics(
        metric=result.metric,
        thresholds=tuple(sorted({verdicts[row.image][1] for row in rows})),
        true_positives=pairs.count((True, True)),
        false_negatives=pairs.count((True, False)),
        true_negatives=pairs.count((False, False)),
        false_positives=pairs.count((False, True)),
        without_verdict=tuple(row.image for row in result.rows if row.image not in verdicts),
    )


def operating_table(statistics: Mapping[str, OperatingStatistics]) -> str:
    """The statistics as text for the terminal; "" where there are none."""
    if not statistics:
        return ""
    rows = [("metric", "abnormal above", "sensitivity", "of", "specificity", "of")]
    for each in statistics.values():
        lesion = each.true_positives + each.false_negatives
        normal = each.true_negatives + each.false_positives
        above = ", ".join(f"{threshold:.6g}" for threshold in each.thresholds)
        shares = (format_interval(each.sensitivity), str(lesion))
        rows.append((each.metric, above, *shares, format_interval(each.specificity), str(normal)))
    lines = ["", "Images at the operating point (95 % Wilson intervals)", *aligned(rows)]
    lost = sorted({image for each in statistics.values() for image in each.without_verdict})
    if lost:
        lines.append(f"{len(lost)} images have no verdict and do not count")
    return "\n".join(lines)
