"""The folder that predict_heatmap.py writes and eval.py reads: heatmaps.csv and data/*.pt."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.checkpoint import load_tensors
from common.errors import UserError

HEATMAP_LIST = "heatmaps.csv"
LIST_COLUMNS = ("image", "metric", "file")


class EvaluationError(UserError):
    """Heatmaps, or what they are compared with, cannot be used."""


class HeatmapEntry(NamedTuple):
    """A row of heatmaps.csv."""

    image: str
    """Name relative to the folder of images."""
    metric: str
    file: Path


def read_heatmap(path: Path) -> np.ndarray:
    """Heatmap (H, W) float32 of a data/*.pt file. Raises EvaluationError or CheckpointError."""
    tensor = load_tensors(path)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
        found = f"a tensor {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor)
        raise EvaluationError(f"{path}: expected a tensor (H, W) of floats, found {found}")
    return tensor.float().numpy()


def list_heatmaps(folder: Path) -> dict[str, list[HeatmapEntry]]:
    """Rows of a folder's heatmaps.csv by metric, in the file's order. Raises EvaluationError."""
    path = folder / HEATMAP_LIST
    if not path.is_file():
        state = f"{folder} has no {HEATMAP_LIST}" if folder.is_dir() else f"No folder {folder}"
        below = sorted(str(found.parent) for found in folder.glob(f"**/{HEATMAP_LIST}"))
        remedy = "Pass --heatmap_dir the folder that predict_heatmap.py wrote"
        raise EvaluationError(f"{state}. {remedy}{': ' if below else '.'}{', '.join(below[-5:])}")
    by_metric: dict[str, list[HeatmapEntry]] = {}
    seen: set[tuple[str, str]] = set()
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(LIST_COLUMNS) - set(reader.fieldnames or [])
        if missing:
            raise EvaluationError(f"{path}: columns {sorted(missing)} are missing")
        for row in reader:
            if not all(row[name] for name in LIST_COLUMNS):
                raise EvaluationError(f"{path}, line {reader.line_num}: a value is missing: {row}")
            entry = HeatmapEntry(row["image"], row["metric"], folder / row["file"])
            if entry[:2] in seen:
                raise EvaluationError(f"{path}, line {reader.line_num}: {entry[:2]} is there twice")
            seen.add(entry[:2])
            by_metric.setdefault(entry.metric, []).append(entry)
    if not by_metric:
        raise EvaluationError(f"{path} lists no heatmap. Did predict_heatmap.py find images?")
    return by_metric
