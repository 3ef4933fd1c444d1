"""An evaluation's pictures: ROC, precision-recall, score distributions and a contact sheet."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from common.errors import UserError
from common.figures import (
    SheetRow,
    contact_sheet,
    precision_recall_curves,
    roc_curves,
    score_histogram,
)
from common.files import escaped
from common.images import read_image
from common.pooling import curves
from inpainter.evaluation import Evaluation, MetricResult
from inpainter.heatmap_folder import read_heatmap

LOG = logging.getLogger(__name__)
SHEET_ROWS = 6

Points = tuple[np.ndarray, np.ndarray]


def write_plots(evaluation: Evaluation, folder: Path) -> None:
    """Saves the plots of every metric, all metrics in one, and with image_dir a contact sheet."""
    for result in evaluation.results:
        plot_metric(result, folder)
    if len(evaluation.results) > 1:
        plot_together(evaluation.results, folder)
    if evaluation.settings.image_dir is not None:
        try:
            draw_examples(evaluation, folder / "contact_sheet.png")
        except (UserError, OSError, ValueError) as error:
            LOG.warning("no contact sheet: %s", error)


def pixel_lines(result: MetricResult) -> tuple[Points, Points]:
    """ROC and precision-recall curve over all pixels."""
    curve = curves(result.pixels.counts)
    found = curve.tpr > 0
    return (curve.fpr, curve.tpr), (curve.tpr[found], curve.precision[found])


def prevalence(result: MetricResult) -> float:
    """Share of lesion pixels."""
    n_lesion, n_background, _ = result.pixels.counts.totals.sum(axis=0)
    return float(n_lesion / (n_lesion + n_background))


def plot_metric(result: MetricResult, folder: Path) -> None:
    """ROC, precision-recall and score distributions of one metric."""
    roc, precision_recall = pixel_lines(result)
    lines = {f"pixels (AUROC {result.pooled['auroc'].value:.3f})": roc}
    histogram, metric = result.pixels.histogram, result.metric
    counts = {"other pixels": histogram.background, "lesion pixels": histogram.lesion}
    score_histogram(histogram.edges, counts, folder / f"scores_{metric}.png", f"{metric}, pixels",
                    score_name=metric)  # fmt: skip
    if result.image_level is not None:
        labels = np.array([row.has_lesion for row in result.rows])
        maxima = np.array([row.max_score for row in result.rows])
        fpr, tpr, _ = roc_curve(labels, maxima, drop_intermediate=False)
        lines[f"images (AUROC {result.image_level['auroc'].value:.3f})"] = (fpr, tpr)
        edges = np.histogram_bin_edges(maxima, bins=20)
        groups = {"normal images": maxima[~labels], "images with a lesion": maxima[labels]}
        counts = {name: np.histogram(values, edges)[0] for name, values in groups.items()}
        score_histogram(edges, counts, folder / f"image_scores_{metric}.png", f"{metric}, images",
                        score_name=f"largest {metric} of the image")  # fmt: skip
    roc_curves(lines, folder / f"roc_{metric}.png", metric)
    name = f"pixels (AP {result.pooled['ap'].value:.3f})"
    precision_recall_curves({name: precision_recall}, folder / f"pr_{metric}.png", metric,
                            prevalence=prevalence(result))  # fmt: skip


def plot_together(results: Sequence[MetricResult], folder: Path) -> None:
    """All metrics' pixel curves in one ROC and one precision-recall figure."""
    roc, precision_recall = {}, {}
    for result in results:
        values = {name: interval.value for name, interval in result.pooled.items()}
        lines = pixel_lines(result)
        roc[f"{result.metric} ({values['auroc']:.3f})"] = lines[0]
        precision_recall[f"{result.metric} ({values['ap']:.3f})"] = lines[1]
    roc_curves(roc, folder / "roc.png", "pixels of all images (AUROC)")
    precision_recall_curves(precision_recall, folder / "pr.png", "pixels of all images (AP)",
                            prevalence=prevalence(results[0]))  # fmt: skip


def draw_examples(evaluation: Evaluation, path: Path) -> None:
    """Saves a contact sheet of lesion images, from the best to the worst by the first metric.

    Raises ImageError or ValueError where an image is unreadable or its size is not the heatmap's.
    """
    first = evaluation.results[0]
    ranked = sorted((row for row in first.rows if row.auroc is not None), key=lambda r: -r.auroc)
    places = np.linspace(0, len(ranked) - 1, min(SHEET_ROWS, len(ranked))).round().astype(int)
    files = [{entry.image: entry.file for entry in result.entries} for result in evaluation.results]
    rows, settings = [], evaluation.settings
    for row in (ranked[place] for place in places):
        path_of_image = settings.image_dir / row.image
        image = read_image(path_of_image, white_value=settings.white_value)
        heatmaps = [read_heatmap(of[row.image]) if row.image in of else None for of in files]
        truth = evaluation.sources.annotations.labels(row.image, heatmaps[0].shape)
        title = f"{escaped(row.image)} ({row.auroc:.2f})"
        rows.append(SheetRow(title, image.numpy(), truth, heatmaps))
    contact_sheet(
        rows,
        path,
        columns=[result.metric for result in evaluation.results],
        title=f"from best to worst pixel AUROC of {first.metric}",
    )
