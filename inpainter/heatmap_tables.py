"""The tables of one prediction run's folder: their columns, and how they are read and written.

images.csv (image, the content it was scored with, numbers of windows), scores.csv (image, metric,
max, mean, p99) and heatmaps.csv (image, metric, file) have rows for every finished image; an image
without its rows is not finished. left_out.csv (image, reason) names those that could not be scored,
failures.csv (image, kind, message) also the kind of their fault.
verdicts.csv and findings.csv are explained in findings.py. Names that are no printable UTF-8 are
written as `common.files.escaped` does. eval.py reads the folder of a stranger, too: nothing that it
says leads out of it.
"""

import csv
import io
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import load_tensors, save_text_atomic
from common.errors import UserError
from common.files import escaped, read_regular, require_regular, unescaped

CONTENTS, SCORES, HEATMAP_LIST = "images.csv", "scores.csv", "heatmaps.csv"
TIMES, VOLUMES = "compute_times.csv", "volumes.csv"
LEFT_OUT, FAILURES = "left_out.csv", "failures.csv"
VERDICTS, FINDINGS = "verdicts.csv", "findings.csv"
TABLES = {
    CONTENTS: ("image", "sha256", "bytes", "mtime_ns", "windows", "completed_windows"),
    SCORES: ("image", "metric", "max", "mean", "p99"),
    HEATMAP_LIST: ("image", "metric", "file"),
    TIMES: ("image", "seconds", "windows", "completed_windows", "seconds_per_window"),
    LEFT_OUT: ("image", "reason"),
    FAILURES: ("image", "kind", "message"),
    VERDICTS: ("image", "metric", "score", "threshold", "verdict"),
    FINDINGS: (
        *("image", "metric", "top", "left", "height", "width", "area"),
        *("peak", "peak_x", "peak_y", "z", "p"),
    ),
}
"""Columns of the tables."""
METRIC_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Metrics are parts of file names; those of other programs are welcome."""
Row = Mapping[str, object]
SCORE_ANEW = "Pass another --output_dir, or --overwrite to score all images anew."
REPAIR = "Run predict_heatmap.py again, or save the table as CSV in UTF-8."


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
        what = f"a tensor {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor)
        raise EvaluationError(f"{path}: expected a tensor (H, W) of floats, found {what}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        what = f"layout {tensor.layout}, device {tensor.device}"
        raise EvaluationError(f"{path}: expected an ordinary tensor with its values, found {what}")
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
        below = sorted(str(table.parent) for table in folder.glob(f"**/{HEATMAP_LIST}"))
        remedy = "Pass --heatmap_dir the folder that predict_heatmap.py wrote"
        raise EvaluationError(f"{state}. {remedy}{': ' if below else '.'}{', '.join(below[-5:])}")
    by_metric: dict[str, list[HeatmapEntry]] = {}
    seen: set[tuple[str, str]] = set()
    for where, row in _rows(path, read_regular(path), REPAIR):
        entry = _entry(folder, row, where)
        if entry[:2] in seen:
            raise EvaluationError(f"{where}: {entry[:2]} is there twice")
        seen.add(entry[:2])
        by_metric.setdefault(entry.metric, []).append(entry)
    if not by_metric:
        raise EvaluationError(f"{path} lists no heatmap. Did predict_heatmap.py find images?")
    return by_metric


def read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (file and line, row) of one of TABLES, texts as they stand. Raises EvaluationError."""
    return _rows(path, read_regular(path), REPAIR)


def left_out(folder: Path) -> dict[str, str]:
    """The images that predict_heatmap.py left out, with its reasons. Raises EvaluationError."""
    path = folder / LEFT_OUT
    if not path.is_file():
        return {}
    rows = (row for _, row in _rows(path, read_regular(path), REPAIR))
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


def _rows(path: Path, data: bytes, remedy: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (file and line, row) of one of TABLES. Raises EvaluationError where it is malformed.

    data: the file's bytes, or a part of them.
    """
    columns = TABLES[path.name]
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        missing = sorted(set(columns) - set(reader.fieldnames or []))
        if missing:
            raise EvaluationError(f"{path}: columns {missing} are missing. {remedy}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not all(row[name] for name in columns):
                raise EvaluationError(f"{where}: a value is missing: {row}. {remedy}")
            if None in row:
                raise EvaluationError(f"{where}: more values than columns. {remedy}")
            yield where, row
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}). {remedy}"
        ) from None
    except csv.Error as error:
        raise EvaluationError(
            f"{path}, line {reader.line_num + 1}: no CSV ({error}). {remedy}"
        ) from None


class ImageTable:
    """The rows of one of TABLES by image, to which a run adds image by image.

    Rows of one image are added behind the others and flushed to disk, so that a run takes no longer
    the more images there are; a line that a kill cut short is dropped when the table is next read.
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there. Raises EvaluationError for a file that is no such table."""
        self.path = path
        self.read()

    def read(self) -> None:
        """Reads what is there now. Raises EvaluationError for a file that is no such table."""
        self._state = self._state_now()
        self.of_image: dict[str, list[dict[str, str]]] = {}
        data = read_regular(self.path) if self.path.is_file() else b""
        whole_lines = data[: data.rfind(b"\n") + 1]
        for _, row in _rows(self.path, whole_lines, SCORE_ANEW) if whole_lines else ():
            self.of_image.setdefault(unescaped(row["image"]), []).append(row)

    def catch_up(self) -> None:
        """Reads the file again where another process has written it, and mends a line cut short."""
        if self._state_now() != self._state:
            self.read()
            if self.path.is_file():
                self._rewrite()

    def _state_now(self) -> tuple[int, ...] | None:
        """What tells whether the file has changed; None where there is none."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        return (stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def rows(self, image: str) -> list[dict[str, str]]:
        """The rows of an image, none where it has none."""
        return self.of_image.get(image, [])

    def start(self) -> None:
        """Writes the heading where there is no file yet: a run that scores nothing says so."""
        if not self.path.is_file():
            save_text_atomic(self._lines([], header=True), self.path)
            self._state = self._state_now()

    def keep(self, images: Container[str]) -> None:
        """Drops the rows of all other images, and what a kill left of a line."""
        self.of_image = {name: rows for name, rows in self.of_image.items() if name in images}
        if self.of_image:
            self._rewrite()
        else:
            self.path.unlink(missing_ok=True)
            self._state = None

    def sort(self, images: Iterable[str]) -> None:
        """Puts the rows into the images' order, those of other images behind them."""
        order = {name: self.of_image[name] for name in images if name in self.of_image}
        self.of_image = order | self.of_image
        if self.of_image:
            self._rewrite()

    def put(self, image: str, rows: list[dict[str, str]]) -> None:
        """Makes these, as `full_rows` has them, the rows of an image."""
        if self.rows(image) == rows:
            return
        if image in self.of_image:  # what a kill left of them, among others
            self.keep(self.of_image.keys() - {image})
        self.of_image[image] = rows
        require_regular(self.path)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._lines(rows, header=file.tell() == 0))
            file.flush()
            os.fsync(file.fileno())
        self._state = self._state_now()

    def _rewrite(self) -> None:
        """Makes the file what is known here, if it is not that already."""
        text = self._lines([row for rows in self.of_image.values() for row in rows], header=True)
        if not self.path.is_file() or read_regular(self.path) != text.encode():
            save_text_atomic(text, self.path)
        self._state = self._state_now()

    def _lines(self, rows: Sequence[Row], *, header: bool) -> str:
        text = io.StringIO()
        columns = TABLES[self.path.name]
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def full_rows(image: str, rows: Iterable[Row]) -> list[dict[str, str]]:
    """Rows of an image as its table has them, from those without their column `image`."""
    return [{"image": escaped(image)} | {k: str(v) for k, v in row.items()} for row in rows]
