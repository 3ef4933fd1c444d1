"""An evaluation as tables: CSV files, and text for the terminal."""

import csv
import io
import math
from collections.abc import Mapping, Sequence

from common.files import escaped
from common.froc import MEAN, RATE_NAMES
from common.image_folders import shown
from common.metrics import Interval, format_interval
from inpainter.comparison import NAMES, Comparison
from inpainter.detection import LesionGroup
from inpainter.evaluation import Evaluation, first_names
from inpainter.evaluation_results import ImageRow, MetricResult

LEVELS = {
    "per_image": "mean over images with a lesion",
    "pooled": "pixels of all images together",
    "image_level": "images, by their largest score",
}


def per_image_csv(results: Sequence[MetricResult]) -> str:
    """A line per image and metric; images left out have their reason and no numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ImageRow._fields, "excluded"])
    for result in results:
        for row in result.rows:
            writer.writerow([escaped(row.image), *row[1:], ""])
        for image, reason in result.excluded.items():
            empty = [""] * (len(ImageRow._fields) - 2)
            writer.writerow([escaped(image), result.metric, *empty, escaped(reason)])
    return text.getvalue()


def candidates_csv(results: Sequence[MetricResult]) -> str:
    """A line per local maximum: where it is, its score, and the lesion (of lesions.csv) it hits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "metric", "row", "column", "score", "lesion"))
    for result in results:
        found = result.detection.found
        for _, image, row, column, score, lesion in found.candidates.tolist():
            hit = lesion if lesion >= 0 else ""
            name = escaped(found.images[image])
            writer.writerow((name, result.metric, row, column, f"{score:.7g}", hit))
    return text.getvalue()


def lesions_csv(results: Sequence[MetricResult]) -> str:
    """A line per lesion and metric, with the score at which it is found (empty: at none)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    box = ("top", "left", "height", "width")
    writer.writerow(("lesion", "image", "metric", *box, "label", "area", "score"))
    for result in results:
        for number, each in enumerate(result.detection.found.lesions):
            lesion = each.lesion
            place = [f"{value:g}" for value in lesion[:4]]
            score = f"{each.score:.7g}" if math.isfinite(each.score) else ""
            names = (escaped(each.image), result.metric)
            rest = (*place, escaped(lesion.label), lesion.area, score)
            writer.writerow((number, *names, *rest))
    return text.getvalue()


def result_table(results: Sequence[MetricResult]) -> str:
    """The numbers as text for the terminal."""
    rows = [("metric", "over", "n", "AUROC", "AP", "PRO")]
    for result in results:
        counts = {
            "per_image": sum(row.auroc is not None for row in result.rows),
            "pooled": len(result.rows),
            "image_level": len(result.rows),
        }
        for level, meaning in LEVELS.items():
            intervals = getattr(result, level)
            if intervals is not None:
                cells = [format_interval(intervals.get(name)) for name in ("auroc", "ap", "pro")]
                rows.append((result.metric, meaning, str(counts[level]), *cells))
    lines = aligned(rows)
    excluded = {image for result in results for image in result.excluded}
    if excluded:
        names = first_names(sorted(excluded))
        lines.append(f"Left out: {len(excluded)} images ({names}); reasons in results.json")
    constant = {row.image for result in results for row in result.rows if row.constant}
    if constant:
        names = ", ".join(map(escaped, sorted(constant)))
        lines.append(f"Constant heatmaps (AUROC 0.5 by definition): {names}")
    return "\n".join(lines)


def detection_table(evaluation: Evaluation) -> str:
    """FROC as text for the terminal, by size, class and group, and the best thresholds."""
    lines, settings = [], evaluation.settings
    for result in evaluation.results:
        detection, pixels = result.detection, result.pixels
        rows = [("found at", "lesions", *RATE_NAMES, MEAN)]
        whole = LesionGroup("all", len(detection.found.lesions), detection.sensitivity)
        for group in (whole, *detection.by_size, *detection.by_class):
            rows.append((shown(group.name), str(group.lesions), *rates_of(group.sensitivity)))
        counted = {"all": "", "normal": " without lesion"}[detection.counted_on]
        lines += [
            "",
            f"{result.metric}: share of lesions found (FROC, {detection.hit_rule}) at false "
            f"positives per {detection.unit}{counted}",
            *aligned(rows),
            f"Best on these very images: F1 over all pixels {pixels.best_f1.value:.3f} at "
            f"{pixels.best_f1.threshold:.4g}, mean Dice {pixels.best_dice.value:.3f} at "
            f"{pixels.best_dice.threshold:.4g}",
        ]
        if result.groups:
            lines += ["", *aligned(group_rows(result))]
    unit = evaluation.sources.clusters.unit
    if unit != "image" and settings.n_resamples:
        lines.append(f"Intervals: {intervals_text(evaluation)}")
    return "\n".join(lines)


def intervals_text(evaluation: Evaluation) -> str:
    """How the intervals were made."""
    clusters, n_resamples = evaluation.sources.clusters, evaluation.settings.n_resamples
    over = f"{clusters.unit}s"
    if clusters.of_image is not None:
        over += f" ({len(set(clusters.of_image.values()))})"
    if clusters.unknown:
        over += f", {clusters.unknown} images of unknown patient being drawn by themselves"
    return f"95 % bootstrap over {over}, {n_resamples} draws"


def group_rows(result: MetricResult) -> list[tuple[str, ...]]:
    """A table of the results by group."""
    names = ("pixel AUROC", "pixel AP", "AUPRO", "image AUROC", "FROC mean")
    rows = [(result.metric, "images", "with lesion", *names)]
    for group in result.groups:
        pooled, image_level = group.pooled or {}, group.image_level or {}
        cells = [pooled.get(name) for name in ("auroc", "ap", "pro")]
        cells += [image_level.get("auroc"), (group.sensitivity or {}).get(MEAN)]
        counts = (str(group.images), str(group.images_with_lesion))
        label = shown(f"{group.column} {group.value}")
        rows.append((label, *counts, *map(format_interval, cells)))
    return rows


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A comparison as rows, the first being the heading."""
    rows = [("value", "here", "there", "difference")]
    for name, text in NAMES.items():
        here, there = comparison.values[name], comparison.other_values[name]
        difference = format_interval(comparison.differences[name])
        rows.append((text, f"{here:.3f}", f"{there:.3f}", difference))
    of_images = comparison.image_auroc
    if of_images is not None:
        difference = format_interval(Interval(*of_images[:3]))
        rows.append(("image-level AUROC (DeLong)", "", "", f"{difference}, p = {of_images.p:.2g}"))
    return rows


def comparison_table(comparison: Comparison) -> str:
    """A comparison as text for the terminal."""
    heading = (
        f"{comparison.metric} against {comparison.other_metric} in {comparison.other_folder}, "
        f"{comparison.images} images"
    )
    if comparison.only_one_has:
        heading += f" ({len(comparison.only_one_has)} that only one has are left out)"
    return "\n".join(["", heading, *aligned(comparison_rows(comparison))])


def rates_of(sensitivity: Mapping[str, Interval]) -> list[str]:
    """The sensitivities as cells of a table; the mean with its interval."""
    cells = [f"{sensitivity[name].value:.3f}" for name in RATE_NAMES]
    return [*cells, format_interval(sensitivity[MEAN])]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in columns, the first being its heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
