"""An evaluation's numbers: results.json, per_image.csv and the table for the terminal."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.checkpoint import save_text_atomic
from common.metrics import Interval
from inpainter.evaluation import Evaluation, EvaluationSettings, ImageRow, MetricResult

LEVELS = {
    "per_image": "mean over images with a lesion",
    "pooled": "pixels of all images together",
    "image_level": "images, by their largest score",
}


def write_report(evaluation: Evaluation, folder: Path, *, record: Mapping[str, Any]) -> None:
    """Writes results.json and per_image.csv, over what an earlier evaluation left there.

    record: plain values on how the evaluation was run, put into results.json.
    """
    settings, sources = evaluation.settings, evaluation.sources
    content = {
        **record,
        "settings": plain_settings(settings),
        "skipped_annotations": list(sources.annotations.skipped),
        "heatmaps_made_by": made_by(settings.heatmap_dir),
        "polarity": "larger scores are more anomalous",
        "intervals": f"95 % bootstrap over images, {settings.n_resamples} draws",
        "metrics": {result.metric: plain_result(result) for result in evaluation.results},
    }
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    save_text_atomic(text + "\n", folder / "results.json")
    save_text_atomic(per_image_csv(evaluation.results), folder / "per_image.csv")


def plain_settings(settings: EvaluationSettings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def made_by(heatmap_dir: Path) -> dict[str, Any]:
    """What predict_heatmap.py recorded: command (with the checkpoint), settings, versions."""
    found: dict[str, Any] = {}
    for name in ("run.txt", "command.txt", "config.yaml", "env.json"):
        path = heatmap_dir / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            found[name] = text.strip() if path.suffix == ".txt" else yaml.safe_load(text)
    return found


def plain_result(result: MetricResult) -> dict[str, Any]:
    """One metric's numbers as JSON holds them."""
    n_lesion, n_background, n_regions = (int(n) for n in result.pixels.counts.totals.sum(axis=0))
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
    }


def plain_intervals(intervals: Mapping[str, Interval] | None) -> dict[str, Any] | None:
    if intervals is None:
        return None
    return {name: interval._asdict() for name, interval in intervals.items()}


def per_image_csv(results: Sequence[MetricResult]) -> str:
    """A line per image and metric; images left out have their reason and no numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ImageRow._fields, "excluded"])
    for result in results:
        for row in result.rows:
            writer.writerow(["" if value is None else value for value in row] + [""])
        for image, reason in result.excluded.items():
            empty = [""] * (len(ImageRow._fields) - 2)
            writer.writerow([image, result.metric, *empty, reason])
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
                cells = [shown(intervals.get(name)) for name in ("auroc", "ap", "pro")]
                rows.append((result.metric, meaning, str(counts[level]), *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    excluded = {image for result in results for image in result.excluded}
    if excluded:
        lines.append(f"Left out: {len(excluded)} images ({', '.join(sorted(excluded)[:5])}"
                     f"{', …' if len(excluded) > 5 else ''}); reasons in results.json")  # fmt: skip
    constant = {row.image for result in results for row in result.rows if row.constant}
    if constant:
        lines.append(f"Constant heatmaps (AUROC 0.5 by definition): {', '.join(sorted(constant))}")
    return "\n".join(lines)


def shown(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    if interval.low is None:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
