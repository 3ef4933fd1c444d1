"""The HTML page of an evaluation of heatmaps: its numbers, its curves, its worst images.

Larger scores are more anomalous. N images.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from sklearn.metrics import roc_curve

from common.config import config_to_yaml
from common.figures import froc_curves, precision_recall_curves, roc_curves, score_histogram
from common.froc import MEAN, RATE_NAMES, RATES
from common.html_report import (
    Chart,
    Page,
    Record,
    Table,
    Tile,
    as_svg,
    common_facts,
    named,
    record,
    value_and_ends,
)
from common.image_folders import shown
from common.metrics import Interval, format_interval
from inpainter.comparison import Comparison
from inpainter.evaluation import Evaluation
from inpainter.evaluation_report import made_by, pixel_lines, prevalence
from inpainter.evaluation_results import MetricResult
from inpainter.evaluation_tables import (
    LEVELS,
    comparison_rows,
    group_rows,
    intervals_text,
    rates_of,
)
from inpainter.report_gallery import gallery
from inpainter.settings import PicardConfig

LOG = logging.getLogger(__name__)
WEIGHTS = ("checkpoint", "gen", "dis", "calibration", "encoder")
"""Lines of run.txt that say which weights made the heatmaps, by SHA-256."""


def picard_page(
    evaluation: Evaluation, config: PicardConfig, command: Sequence[str], *, most_images: int
) -> Page:
    """The page of an evaluation, with the `most_images` images on which scores are most wrong.

    Reads those images and their heatmaps. command: the command line that evaluated.
    """
    first, made = evaluation.results[0], made_by(evaluation.settings.heatmap_dir)
    settings_then = made.get("config.yaml")
    name = settings_then.get("dataset_name") if isinstance(settings_then, dict) else None
    n_lesion = sum(row.has_lesion for row in first.rows)
    normal = len(first.rows) - n_lesion
    return Page(
        title=f"Heatmaps: {name or evaluation.settings.heatmap_dir.resolve().name}",
        lead=(
            f"{len(first.rows)} images: {n_lesion} with a lesion, {normal} normal. "
            f"Larger scores are more anomalous. Intervals: {intervals_text(evaluation)}."
        ),
        tiles_title=first.metric,
        tiles=tiles(first),
        warnings=warnings(evaluation),
        tables=tables(evaluation),
        charts=charts(evaluation.results),
        gallery=gallery(evaluation, most_images),
        facts=facts(evaluation, command),
        records=records(evaluation, config),
    )


def tiles(result: MetricResult) -> list[Tile]:
    """The numbers that papers report, of one metric."""
    levels: list[tuple[str, Interval | None]] = [
        ("pixel AUROC, mean over images", result.per_image["auroc"]),
        ("pixel AP, mean over images", result.per_image["ap"]),
        ("pixel AUROC, all pixels", result.pooled["auroc"]),
        ("AUPRO at 30 %, all pixels", result.pooled["pro"]),
        ("image AUROC", (result.image_level or {}).get("auroc")),
        ("FROC, mean sensitivity", result.detection.sensitivity[MEAN]),
    ]
    return [Tile(name, *value_and_ends(value)) for name, value in levels if value]


def warnings(evaluation: Evaluation) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    excluded = {image for result in evaluation.results for image in result.excluded}
    if excluded:
        found.append(f"{len(excluded)} images could not be evaluated and count nowhere.")
    if evaluation.unscored:
        found.append(f"{len(evaluation.unscored)} annotated images have no heatmap.")
    skipped = evaluation.sources.annotations.skipped
    if skipped:
        found.append(f"{len(skipped)} annotations are of unknown images and were passed over.")
    if evaluation.results[0].image_level is None:
        found.append("There are no normal images, so no image-level numbers.")
    if evaluation.settings.image_dir is None:
        found.append("The images were not given (--image_dir), so heatmaps lie over black.")
    return found


def at_operating_point(evaluation: Evaluation) -> list[Table]:
    """Sensitivity and specificity of the verdicts; no table without verdicts."""
    rows = [
        (
            each.metric,
            ", ".join(f"{threshold:.6g}" for threshold in each.thresholds),
            format_interval(each.sensitivity),
            format_interval(each.specificity),
        )
        for each in evaluation.at_operating_point.values()
    ]
    columns = ("metric", "abnormal above", "sensitivity", "specificity")
    return [Table("Images at the operating point (95 % Wilson)", columns, rows)] if rows else []


def tables(evaluation: Evaluation) -> list[Table]:
    """Every number of the evaluation, as the terminal shows them; details are folded."""
    results = evaluation.results
    found = [numbers(results), lesions_found(results), *at_operating_point(evaluation)]
    found += [compared(comparison) for comparison in evaluation.comparisons]
    for result in results:
        detection = result.detection
        groups = (*detection.by_size, *detection.by_class)
        rows = [[shown(g.name), str(g.lesions), *rates_of(g.sensitivity)] for g in groups]
        title = f"{result.metric}: lesions found by size and class"
        found.append(Table(title, ["lesions", "number", *RATE_NAMES, MEAN], rows, folded=True))
        if result.groups:
            heading, *rows = group_rows(result)
            columns = ["group", *heading[1:]]
            found.append(Table(f"{result.metric}: by group of images", columns, rows, folded=True))
    return found


def lesions_found(results: Sequence[MetricResult]) -> Table:
    """FROC of every metric, and the thresholds that are best on these images."""
    rows, best = [], []
    for result in results:
        detection, pixels = result.detection, result.pixels
        count = str(len(detection.found.lesions))
        rows.append([result.metric, count, *rates_of(detection.sensitivity)])
        best.append(
            f"{result.metric} F1 over all pixels {pixels.best_f1.value:.3f} at "
            f"{pixels.best_f1.threshold:.4g}, mean Dice {pixels.best_dice.value:.3f} at "
            f"{pixels.best_dice.threshold:.4g}"
        )
    detection = results[0].detection
    counted = " without lesion" if detection.counted_on == "normal" else ""
    return Table(
        f"Share of lesions found, by false positives per {detection.unit}{counted} (FROC)",
        ["metric", "lesions", *RATE_NAMES, MEAN],
        rows,
        f"A lesion is found by the rule {detection.hit_rule}. Best thresholds, chosen on these "
        f"very images and so too good: {'; '.join(best)}.",
    )


def compared(comparison: Comparison) -> Table:
    """A comparison with another folder of heatmaps."""
    heading, *rows = comparison_rows(comparison)
    title = f"{comparison.metric} against {comparison.other_metric} in {comparison.other_folder}"
    return Table(title, heading, rows, f"On the {comparison.images} images of both.")


def numbers(results: Sequence[MetricResult]) -> Table:
    """AUROC, AP and PRO of every metric at every level."""
    rows = []
    for result in results:
        for level, meaning in LEVELS.items():
            intervals = getattr(result, level)
            if intervals is not None:
                n = len(result.rows)
                if level == "per_image":
                    n = sum(row.auroc is not None for row in result.rows)
                cells = [format_interval(intervals.get(name)) for name in ("auroc", "ap", "pro")]
                rows.append([result.metric, meaning, str(n), *cells])
    columns = ["metric", "over", "images", "AUROC", "AP", "AUPRO"]
    return Table("Numbers of every kind of heatmap", columns, rows)


def charts(results: Sequence[MetricResult]) -> list[Chart]:
    """Curves of all metrics together, and how each metric's scores are distributed."""
    lines = {result.metric: pixel_lines(result) for result in results}

    def labelled(level: str, name: str, part: int) -> dict[str, Any]:
        values = {r.metric: getattr(r, level)[name].value for r in results}
        return {f"{m} ({values[m]:.3f})": line[part] for m, line in lines.items()}

    found = [
        chart(
            "ROC over the pixels of all images (AUROC)",
            partial(roc_curves, labelled("pooled", "auroc", 0)),
            results,
            "auroc",
        ),
        chart(
            "Precision and recall over the pixels of all images (AP)",
            partial(
                precision_recall_curves,
                labelled("pooled", "ap", 1),
                prevalence=prevalence(results[0]),
            ),
            results,
            "ap",
        ),
    ]
    found.append(froc(results))
    if all(result.image_level is not None for result in results):
        found.append(image_roc(results))
    for result in results:
        found += histograms(result)
    return found


def chart(
    title: str, draw: Callable[..., object], results: Sequence[MetricResult], name: str
) -> Chart:
    """A chart of all metrics, described by their pooled values."""
    values = ", ".join(f"{r.metric} {r.pooled[name].value:.3f}" for r in results)
    return Chart(title, as_svg(lambda file: draw(target=file)), f"{title}: {values}")


def froc(results: Sequence[MetricResult]) -> Chart:
    """FROC of all metrics."""
    lines = {}
    for result in results:
        mean, curve = result.detection.sensitivity[MEAN].value, result.detection.curve
        lines[f"{result.metric} ({mean:.3f})"] = (curve.false_positives, curve.sensitivity)
    per, ends = results[0].detection.unit, (RATES[0], RATES[-1])
    title = "FROC: lesions found (mean sensitivity)"
    svg = as_svg(lambda file: froc_curves(lines, file, per=per, limits=ends))
    return Chart(title, svg, f"{title}: {', '.join(lines)}")


def image_roc(results: Sequence[MetricResult]) -> Chart:
    """ROC of the images by their largest score."""
    lines, values = {}, {}
    for result in results:
        labels = np.array([row.has_lesion for row in result.rows])
        maxima = np.array([row.max_score for row in result.rows])
        values[result.metric] = f"{result.metric} ({result.image_level['auroc'].value:.3f})"
        lines[values[result.metric]] = roc_curve(labels, maxima)[:2]
    title = "ROC over images, by their largest score (AUROC)"
    svg = as_svg(lambda file: roc_curves(lines, file))
    return Chart(title, svg, f"{title}: {', '.join(values.values())}")


def histograms(result: MetricResult) -> list[Chart]:
    """Distributions of the scores of pixels and, where there are normal images, of images."""
    metric, pixels = result.metric, result.pixels.histogram
    distributions = {
        "pixels": (
            pixels.edges,
            {"other pixels": pixels.background, "lesion pixels": pixels.lesion},
        )
    }
    if result.image_level is not None:
        labels = np.array([row.has_lesion for row in result.rows])
        maxima = np.array([row.max_score for row in result.rows])
        edges = np.histogram_bin_edges(maxima, bins=20)
        groups = {"normal images": maxima[~labels], "images with a lesion": maxima[labels]}
        distributions["images"] = (
            edges,
            {name: np.histogram(values, edges)[0] for name, values in groups.items()},
        )
    found = []
    for what, (edges, counts) in distributions.items():
        name = metric if what == "pixels" else f"largest {metric} of the image"
        svg = as_svg(partial(draw_histogram, edges, counts, name))
        title = f"How {metric} is distributed over {what}"
        alt = f"{title}: {' and '.join(counts)} as two histograms from {edges[0]:.3g} to "
        found.append(Chart(title, svg, f"{alt}{edges[-1]:.3g}"))
    return found


def draw_histogram(
    edges: np.ndarray, counts: Mapping[str, np.ndarray], score_name: str, file: BinaryIO
) -> None:
    score_histogram(edges, counts, file, score_name=score_name)


def facts(evaluation: Evaluation, command: Sequence[str]) -> list[tuple[str, str]]:
    """Where the numbers come from: this evaluation, the heatmaps, the checkpoint."""
    settings, made = evaluation.settings, made_by(evaluation.settings.heatmap_dir)
    found = common_facts(command)
    found.append(("heatmaps", str(settings.heatmap_dir)))
    if isinstance(made.get("command.txt"), str):
        found.append(("made by", made["command.txt"]))
    if isinstance(made.get("env.json"), dict):
        found.append(("made with code", str(made["env.json"].get("git_commit"))))
    if isinstance(made.get("run.txt"), str):
        lines = (line.partition(": ") for line in made["run.txt"].splitlines())
        weights = [f"{key} {value}" for key, _, value in lines if key in WEIGHTS]
        found.append(("checkpoint", "\n".join(weights)))
    found.append(("annotations", str(settings.annotations)))
    if settings.image_dir is not None:
        found.append(("images", str(settings.image_dir)))
    return found


def records(evaluation: Evaluation, config: PicardConfig) -> list[Record]:
    """Settings and names that are folded away."""
    made = made_by(evaluation.settings.heatmap_dir)
    found = [record("Settings of this evaluation", config_to_yaml(config))]
    if "run.txt" in made:
        found.append(record("What the heatmaps depend on (run.txt)", made["run.txt"]))
    for result in evaluation.results:
        if result.excluded:
            reasons = [f"{image}: {why}" for image, why in result.excluded.items()]
            found.append(record(f"{result.metric}: images left out", named(reasons)))
    if evaluation.unscored:
        found.append(record("Annotated images without heatmap", named(evaluation.unscored)))
    return found
