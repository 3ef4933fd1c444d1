"""The folder that predict_heatmap.py writes and eval.py reads: heatmaps.csv and data/*.pt.

The folder may be a stranger's: nothing that it says leads out of it.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import load_tensors
from common.errors import UserError
from common.files import unescaped

HEATMAP_LIST = "heatmaps.csv"
LIST_COLUMNS = ("image", "metric", "file")
LEFT_OUT = "left_out.csv"
"""Images that could not be scored: image, reason."""
METRIC_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Metrics are parts of file names; those of other programs are welcome."""


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
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        found = f"layout {tensor.layout}, device {tensor.device}"
        raise EvaluationError(f"{path}: expected an ordinary tensor with its values, found {found}")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise EvaluationError(
            f"{path}: a tensor {tuple(tensor.shape)} of fewer values than pixels, repeated; "
            "save a heatmap with a value per pixel"
        )
    return tensor.detach().float().numpy()


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
    for where, row in _rows(path, LIST_COLUMNS):
        entry = _entry(folder, row, where)
        if entry[:2] in seen:
            raise EvaluationError(f"{where}: {entry[:2]} is there twice")
        seen.add(entry[:2])
        by_metric.setdefault(entry.metric, []).append(entry)
    if not by_metric:
        raise EvaluationError(f"{path} lists no heatmap. Did predict_heatmap.py find images?")
    return by_metric


def left_out(folder: Path) -> dict[str, str]:
    """The images that predict_heatmap.py left out, with its reasons. Raises EvaluationError."""
    path = folder / LEFT_OUT
    if not path.is_file():
        return {}
    rows = (row for _, row in _rows(path, ("image", "reason")))
    return {unescaped(row["image"]): unescaped(row["reason"]) for row in rows}


def _entry(folder: Path, row: dict[str, str], where: str) -> HeatmapEntry:
    """A row whose metric is a plain name and whose image and file stay below their folders."""
    image, file = unescaped(row["image"]), unescaped(row["file"])
    if not METRIC_NAME.fullmatch(row["metric"]):
        expected = "a metric is named with up to 64 letters, digits, _ . -"
        raise EvaluationError(f"{where}: {expected}, got {row['metric'][:80]!r}")
    for name, value in {"image": image, "file": file}.items():
        parts = PurePosixPath(value)
        if parts.is_absolute() or ".." in parts.parts or "\0" in value:
            raise EvaluationError(
                f"{where}: {name} must be a path below its folder, got {value[:80]!r}"
            )
    return HeatmapEntry(image, row["metric"], folder / file)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (file and line, row) of a CSV file. Raises EvaluationError where it is malformed."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = sorted(set(columns) - set(reader.fieldnames or []))
            if missing:
                raise EvaluationError(f"{path}: columns {missing} are missing")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not all(row[name] for name in columns):
                    raise EvaluationError(f"{where}: a value is missing: {row}")
                if None in row:
                    raise EvaluationError(f"{where}: more values than columns")
                yield where, row
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}). Run "
            "predict_heatmap.py again, or save the table as UTF-8."
        ) from None
    except csv.Error as error:
        raise EvaluationError(f"{path}, line {reader.line_num + 1}: no CSV ({error})") from None
