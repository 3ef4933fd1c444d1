"""What an evaluation writes: results.json, CSV tables, plots, and the tables for the terminal."""

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from common.checkpoint import save_text_atomic
from common.config import ConfigError, config_to_dict, read_yaml
from common.errors import Outcome, UserError
from common.figures import (
    SheetRow,
    contact_sheet,
    froc_curves,
    precision_recall_curves,
    roc_curves,
    score_histogram,
)
from common.files import escaped, read_regular
from common.froc import MEAN, RATES
from common.html_report import REPORT, write_page
from common.images import read_image
from common.metrics import Interval
from common.pooled_metrics import curves
from inpainter.comparison import Comparison, compare
from inpainter.detection import Detection
from inpainter.evaluation import Evaluation, evaluate_heatmaps
from inpainter.evaluation_results import MetricResult
from inpainter.evaluation_settings import as_scored, evaluation_settings
from inpainter.evaluation_tables import (
    LEVELS,
    candidates_csv,
    comparison_table,
    detection_table,
    intervals_text,
    lesions_csv,
    per_image_csv,
    result_table,
)
from inpainter.heatmap_tables import EvaluationError, read_heatmap
from inpainter.operating_statistics import operating_statistics, operating_table
from inpainter.settings import PicardConfig

LOG = logging.getLogger(__name__)
SHEET_ROWS = 6
GROUP_FACTS = ("column", "value", "images", "images_with_lesion")
GROUP_LEVELS = ("pooled", "image_level", "sensitivity")
Points = tuple[np.ndarray, np.ndarray]
RECORD_ERRORS = (OSError, ValueError, RecursionError, ConfigError)
"""What reading a damaged record raises; RecursionError by the JSON reader."""
LARGEST_RECORD = 200_000  # bytes


def evaluate(
    config: PicardConfig, arguments: argparse.Namespace, command: Sequence[str]
) -> Outcome:
    """--mode heatmap: writes report and plots; returns the text to print and how many failed.

    arguments: the flags of `add_evaluation_flags`. Raises EvaluationError and AnnotationError.
    """
    folder = arguments.output_dir or arguments.heatmap_dir / "evaluation"
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"--output_dir {folder} is a file. Pass a folder, or a new name.")
    if arguments.report_images < 1:
        raise ConfigError(f"--report_images must be 1 or more, got {arguments.report_images}")
    config = as_scored(config, arguments)
    settings = evaluation_settings(config, arguments)
    evaluation = evaluate_heatmaps(settings)
    if settings.compare is not None:
        evaluation = replace(evaluation, comparisons=compare(evaluation, settings.compare))
    found = operating_statistics(evaluation.results, settings.heatmap_dir)
    evaluation = replace(evaluation, at_operating_point=found)
    write_report(evaluation, folder, record={"command": command, "config": config_to_dict(config)})
    write_plots(evaluation, folder / "plots")
    if arguments.report:
        from inpainter.report_page import picard_page  # here, for it builds on this module

        page = picard_page(evaluation, config, command, most_images=arguments.report_images)
        write_page(page, folder / REPORT)
    tables = [result_table(evaluation.results), detection_table(evaluation)]
    tables += filter(None, [operating_table(evaluation.at_operating_point)])
    tables += [comparison_table(each) for each in evaluation.comparisons]
    failed = set(evaluation.unscored).union(*(each.excluded for each in evaluation.results))
    return Outcome("\n".join([*tables, f"Numbers and plots are in {folder}"]), len(failed))


def write_report(evaluation: Evaluation, folder: Path, *, record: Mapping[str, Any] = {}) -> None:
    """Writes results.json, per_image.csv, candidates.csv and lesions.csv, over what an earlier
    evaluation left there.

    record: values on how the evaluation was run, put into results.json.
    """
    settings, sources = evaluation.settings, evaluation.sources
    content = {
        **record,
        "settings": dataclasses.asdict(settings),
        "skipped_annotations": list(sources.annotations.skipped),
        "annotated_images_without_heatmap": evaluation.unscored,
        "heatmaps_made_by": made_by(settings.heatmap_dir),
        "polarity": "larger scores are more anomalous",
        "intervals": intervals_text(evaluation),
        "metrics": {result.metric: plain_result(result) for result in evaluation.results},
    }
    if evaluation.at_operating_point:
        content["at_operating_point"] = {
            metric: each.plain() for metric, each in evaluation.at_operating_point.items()
        }
    if evaluation.comparisons:
        content["comparison"] = {
            "other_heatmaps_made_by": made_by(settings.compare),
            "difference": "heatmap_dir less the other folder, on the images of both",
            "metrics": {each.metric: plain_comparison(each) for each in evaluation.comparisons},
        }
    text = json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False)
    # Names that are no UTF-8 are written as \udcNN, which JSON readers know.
    text = text.encode("utf-8", "backslashreplace").decode()
    save_text_atomic(text + "\n", folder / "results.json")
    save_text_atomic(per_image_csv(evaluation.results), folder / "per_image.csv")
    save_text_atomic(candidates_csv(evaluation.results), folder / "candidates.csv")
    save_text_atomic(lesions_csv(evaluation.results), folder / "lesions.csv")


def made_by(heatmap_dir: Path) -> dict[str, Any]:
    """What predict_heatmap.py recorded: command (with the checkpoint), settings, versions.

    A record that cannot be read is replaced by {"unreadable": reason}: numbers do not need it.
    """
    found: dict[str, Any] = {}
    for name in ("run.txt", "command.txt", "config.yaml", "env.json"):
        path = heatmap_dir / name
        if path.is_file():
            try:
                found[name] = read_record(path)
            except RECORD_ERRORS as error:
                found[name] = {"unreadable": " ".join(str(error).split())[:200]}
    return found


def read_record(path: Path) -> Any:
    """A small file's text, or what it holds as YAML or JSON. Raises one of RECORD_ERRORS."""
    if path.stat().st_size > LARGEST_RECORD:
        raise ValueError(f"{path.stat().st_size} bytes, {LARGEST_RECORD} at most expected")
    text = read_regular(path).decode()
    if path.suffix == ".txt":
        return text.strip()
    if path.suffix == ".json":
        return json.loads(text)
    return read_yaml(path)


def plain(value: Any) -> Any:
    """The same in JSON's types; what has none of them, and numbers that are not finite, as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def plain_result(result: MetricResult) -> dict[str, Any]:
    """One metric's numbers as JSON holds them."""
    n_lesion, n_background, n_regions = result.pixels.totals
    has_lesion = [row.has_lesion for row in result.rows]
    return {
        "images": len(result.rows),
        "images_with_lesion": sum(has_lesion),
        "images_normal": len(has_lesion) - sum(has_lesion),
        "images_in_per_image_mean": sum(row.auroc is not None for row in result.rows),
        "images_excluded": result.excluded,
        "images_with_constant_heatmap": [row.image for row in result.rows if row.constant],
        "pixels": n_lesion + n_background,
        "lesion_pixels": n_lesion,
        "lesion_regions": n_regions,
        **{level: plain_intervals(getattr(result, level)) for level in LEVELS},
        "pooled_is_exact": result.pixels.exact,
        "best_on_the_test_set": {
            "note": "largest of all thresholds on these very images; on others expect less",
            "f1_over_all_pixels": result.pixels.best_f1._asdict(),
            "dice_mean_over_images_with_lesion": result.pixels.best_dice._asdict(),
        },
        "froc": plain_detection(result.detection),
        "groups": [
            {
                **{name: getattr(group, name) for name in GROUP_FACTS},
                **{name: plain_intervals(getattr(group, name)) for name in GROUP_LEVELS},
            }
            for group in result.groups
        ],
    }


def plain_detection(detection: Detection) -> dict[str, Any]:
    """FROC as JSON holds it."""
    found = detection.found
    return {
        "hit_rule": detection.hit_rule,
        "false_positives_per": detection.unit,
        "false_positives_counted_on": detection.counted_on,
        "units": len(found.units),
        "units_counted_on": int(detection.events.counts.sum()),
        "lesions": len(found.lesions),
        "candidates": len(found.candidates),
        "sensitivity": plain_intervals(detection.sensitivity),
        **{
            name: [
                {**group._asdict(), "sensitivity": plain_intervals(group.sensitivity)}
                for group in getattr(detection, name)
            ]
            for name in ("by_size", "by_class")
        },
    }


def plain_comparison(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON holds it."""
    image_auroc = comparison.image_auroc
    return {
        **dataclasses.asdict(comparison),
        "differences": plain_intervals(comparison.differences),
        "image_auroc": image_auroc and image_auroc._asdict(),
    }


def plain_intervals(intervals: Mapping[str, Interval] | None) -> dict[str, Any] | None:
    return intervals and {name: interval._asdict() for name, interval in intervals.items()}


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
    curve = curves(result.pixels.found)
    found = curve.tpr > 0
    return (curve.fpr, curve.tpr), (curve.tpr[found], curve.precision[found])


def prevalence(result: MetricResult) -> float:
    """Share of lesion pixels."""
    n_lesion, n_background, _ = result.pixels.totals
    return n_lesion / (n_lesion + n_background)


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
    detection = result.detection
    name = f"lesions (mean {detection.sensitivity[MEAN].value:.3f})"
    froc_curves({name: (detection.curve.false_positives, detection.curve.sensitivity)},
                folder / f"froc_{metric}.png", metric, per=detection.unit,
                limits=(RATES[0], RATES[-1]))  # fmt: skip
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
        shown = {"white_value": settings.white_value, "window": settings.window}
        image = read_image(path_of_image, **shown)
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
