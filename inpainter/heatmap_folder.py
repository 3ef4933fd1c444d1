"""The folder of one prediction run: tensors, pictures and tables, written image by image.

The tables are explained in heatmap_tables.py.
"""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from common.checkpoint import content_hash, save_atomic, save_text_atomic
from common.figures import heatmap_panel
from common.files import escaped, file_stems, name_limit
from common.volumes import split_slice
from inpainter.heatmap import Heatmaps
from inpainter.heatmap_tables import (
    CONTENTS,
    FAILURES,
    HEATMAP_LIST,
    LEFT_OUT,
    SCORES,
    TABLES,
    TIMES,
    VOLUMES,
    ImageTable,
    Row,
    full_rows,
)
from inpainter.settings import Metric, TestConfig

LOG = logging.getLogger(__name__)
ROOM_FOR_ENDING = 32
"""Bytes kept free behind a file's name for those of a temporary file."""
PLOT_ERRORS = (ValueError, RuntimeError, MemoryError)
"""What matplotlib raises for a picture that it cannot draw."""
Boxes = Sequence[Sequence[float]]
Kind = Literal["plots", "progress", "masks"]
FailureKind = Literal["image", "window", "scores", "memory"]
"""Why an image has no heatmap: its file cannot be read, no window fits into it, a score is NaN or
infinite, or the memory does not suffice."""


class Content(NamedTuple):
    """What an image file held when it was read."""

    sha256: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "Content":
        """What a file holds, or the file of a slice: of a volume all slices change together."""
        file, _ = split_slice(path)
        stat = file.stat()
        return cls(content_hash(file), stat.st_size, stat.st_mtime_ns)


@dataclass
class PastWork:
    """What a folder holds of earlier runs, as names of images."""

    finished: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """The file is not the one that was scored."""
    unrecorded: list[str] = field(default_factory=list)
    """Scored, but the folder does not say from which content."""
    vanished: list[str] = field(default_factory=list)
    """Scored once, and no longer among the images."""


class HeatmapFolder:
    """Writes heatmaps and the tables over them; knows which images are finished.

    images: name of each image of the run (its path below the image folder) -> its file. overwrite:
    no image counts as finished, and what the tables list is forgotten. alone: no other process is
    at work in the folder, so what a killed one left half-written is removed.
    """

    def __init__(
        self,
        folder: Path,
        test: TestConfig,
        images: Mapping[str, Path],
        *,
        overwrite: bool = False,
        alone: bool = True,
    ) -> None:
        self.folder, self.test, self.images = folder, test, images
        endings = [len(self.ending(metric).encode()) for metric in test.heatmap_metrics]
        self.stems = file_stems(images, name_limit(folder) - max(endings) - ROOM_FOR_ENDING)
        self.volume_thresholds: dict[str, float] = {}
        """By metric, the score above which a volume is abnormal: the operating point's."""
        self.not_drawn: dict[str, str] = {}
        """Image -> why it has no plot."""
        self.new_rows: dict[str, list[dict[str, str]]] = {}
        """By table, of the image that is being written: `taken_rows` gives them away."""
        if alone:
            remove_partial_files(folder)
        if overwrite:
            for table in TABLES:
                (folder / table).unlink(missing_ok=True)
        self.tables = {name: ImageTable(folder / name) for name in TABLES}

    def sort_out(self) -> PastWork:
        """Compares the tables with the images and drops the rows of all that is not finished."""
        past = PastWork()
        listed = self.tables[CONTENTS].of_image | self.tables[SCORES].of_image
        past.vanished += [image for image in listed if image not in self.images]
        for image, path in self.images.items():
            if not self.is_complete(image):
                continue
            recorded = self.tables[CONTENTS].rows(image)
            if not recorded:
                past.unrecorded.append(image)
            elif is_unchanged(path, recorded[0]):
                past.finished.append(image)
            else:
                past.changed.append(image)
        finished = set(past.finished)
        for table in self.tables.values():
            table.keep(finished)
        self.tables[SCORES].start()
        return past

    def note(self, table: str, image: str, rows: Iterable[Row]) -> None:
        """Adds rows, without their column `image`, to those of the image that is being written."""
        self.new_rows.setdefault(table, []).extend(full_rows(image, rows))

    def taken_rows(self) -> dict[str, list[dict[str, str]]]:
        """The rows of the image that is now written, by table; they still have to be `put`."""
        rows, self.new_rows = self.new_rows, {}
        return rows

    def put(self, image: str, rows: Mapping[str, list[dict[str, str]]]) -> None:
        """Writes an image's rows into the tables."""
        for table, new in rows.items():
            self.tables[table].put(image, new)

    def catch_up(self) -> None:
        """Reads the tables again where another process has written them."""
        for table in self.tables.values():
            table.catch_up()

    def complete(self) -> None:
        """Puts the tables into the images' order, whoever scored what, and writes volumes.csv."""
        for table in self.tables.values():
            table.sort(self.images)
        self.write_volumes()

    def is_complete(self, image: str) -> bool:
        """Whether every metric of an image is there, from whichever content."""
        scored = {row["metric"] for row in self.tables[SCORES].rows(image)}
        files = {row["metric"]: row["file"] for row in self.tables[HEATMAP_LIST].rows(image)}
        for metric in self.test.heatmap_metrics:
            data, plot = self.data_name(image, metric), self.path("plots", image, metric)
            has_data = files.get(metric) == data and (self.folder / data).is_file()
            if metric not in scored or (self.test.save_heatmap_data and not has_data):
                return False
            if self.test.save_heatmap_plots and not plot.is_file():
                return False
        return True

    def ending(self, metric: Metric) -> str:
        """_<metric>_<M>_<p>_<mask>_<window>_<stride>, as the published files are named."""
        test = self.test
        p, mask, window = test.droprate, test.mask_shape[0], test.patch_shape[0]
        numbers = (test.heatmap_M_inpaint, p, mask, window, test.patch_stride)
        return "_".join(["", metric, *map(str, numbers)])

    def data_name(self, image: str, metric: Metric) -> str:
        """The tensor of a finished heatmap, below the folder."""
        return f"data/{self.stems[image]}{self.ending(metric)}.pt"

    def path(self, kind: Kind, image: str, metric: Metric) -> Path:
        """The picture of a finished heatmap, or of one that is being computed."""
        return self.folder / kind / f"{self.stems[image]}{self.ending(metric)}.png"

    def write(
        self, image: str, pixels: Tensor, content: Content, heatmaps: Heatmaps, boxes: Boxes = ()
    ) -> None:
        """Writes an image's files and notes its rows. pixels: (C, H, W) in [0, 1].

        A picture that cannot be drawn is noted in `not_drawn`; the heatmap is kept.
        """
        for metric, heatmap in heatmaps.heatmaps.items():
            if self.test.save_heatmap_data:
                save_atomic(heatmap.clone(), self.folder / self.data_name(image, metric))
            if self.test.save_heatmap_plots:
                self.draw("plots", image, pixels, metric, heatmap, boxes)
            self.path("progress", image, metric).unlink(missing_ok=True)
        windows = {"windows": heatmaps.n_windows, "completed_windows": heatmaps.n_scored}
        self.note(CONTENTS, image, [content._asdict() | windows])
        rows = [score_row(metric, heat) for metric, heat in heatmaps.heatmaps.items()]
        self.note(SCORES, image, rows)
        if self.test.save_heatmap_data:
            rows = [{"metric": m, "file": self.data_name(image, m)} for m in heatmaps.heatmaps]
            self.note(HEATMAP_LIST, image, rows)

    def draw(
        self, kind: Kind, image: str, pixels: Tensor, metric: Metric, heat: Tensor, boxes: Boxes
    ) -> None:
        """Draws a heatmap (H, W) over its image, (C, H, W) in [0, 1], with the boxes."""
        path = self.path(kind, image, metric)
        title = escaped(image)
        try:
            heatmap_panel(
                pixels.numpy(), heat.numpy(), path, title=title, boxes=boxes, score_name=metric
            )
        except PLOT_ERRORS as error:
            path.unlink(missing_ok=True)  # one of an earlier run
            self.not_drawn[image] = f"{type(error).__name__}: {error}"
            LOG.warning("No plot of %s, %s: %s", title, metric, error)

    def draw_progress(self, image: str, pixels: Tensor, heatmaps: Heatmaps) -> None:
        """Draws the heatmaps as far as they are computed."""
        for metric, heatmap in heatmaps.heatmaps.items():
            self.draw("progress", image, pixels, metric, heatmap, ())

    def write_time(self, image: str, seconds: float, heatmaps: Heatmaps) -> None:
        """Notes a line of compute_times.csv."""
        windows, completed = heatmaps.n_windows, heatmaps.n_scored
        values = (f"{seconds:.3f}", windows, completed, f"{seconds / max(completed, 1):.5f}")
        self.note(TIMES, image, [dict(zip(TABLES[TIMES][1:], values, strict=True))])

    def write_volumes(self) -> None:
        """Writes volumes.csv, a row per volume and metric, where images are slices of volumes."""
        path = self.folder / VOLUMES
        scores, lost = self.tables[SCORES].of_image, self.tables[LEFT_OUT].of_image
        rows = volume_rows(scores, lost, self.volume_thresholds)
        if not rows:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        save_text_atomic(text.getvalue(), path)

    def write_left_out(self, image: str, kind: FailureKind, reason: str) -> None:
        """Notes a line of left_out.csv and one of failures.csv."""
        self.note(LEFT_OUT, image, [{"reason": escaped(reason)}])
        self.note(FAILURES, image, [{"kind": kind, "message": escaped(reason)}])


def volume_rows(
    scores: Mapping[str, Sequence[Mapping[str, str]]],
    left_out: Iterable[str],
    thresholds: Mapping[str, float],
) -> list[dict[str, object]]:
    """Rows of volumes.csv from those of scores.csv by image; whole files are no volumes.

    slices: how many were scored, left_out: how many could not be. max, slice_of_max: the largest of
    the slices' maxima and where it is; mean_of_max: their mean. With thresholds, by metric, also
    threshold and verdict: abnormal is a max above.
    """
    maxima: dict[tuple[str, str], dict[int, float]] = {}
    lost = Counter(split_slice(image)[0] for image in left_out)
    for image, rows in scores.items():
        volume, number = split_slice(image)
        for row in rows if number is not None else ():
            maxima.setdefault((volume, row["metric"]), {})[number] = float(row["max"])
    found = []
    for (volume, metric), of_slice in maxima.items():
        highest = max(of_slice, key=of_slice.__getitem__)
        row = {
            "volume": escaped(volume),
            "metric": metric,
            "slices": len(of_slice),
            "left_out": lost[volume],
            "max": f"{of_slice[highest]:.7g}",
            "slice_of_max": highest,
            "mean_of_max": f"{np.mean([*of_slice.values()]):.7g}",
        }
        if thresholds:
            above = float(f"{thresholds[metric]:.7g}")  # as exact as the scores of the table
            verdict = "abnormal" if of_slice[highest] > above else "normal"
            row |= {"threshold": f"{above:.7g}", "verdict": verdict}
        found.append(row)
    return found


def is_unchanged(path: Path, recorded: Mapping[str, str]) -> bool:
    """Whether a file has the content of its row in images.csv.

    A file of the recorded size and time is taken for the recorded one without reading it.
    """
    try:
        file, _ = split_slice(path)
        stat = file.stat()
        same_date = (str(stat.st_size), str(stat.st_mtime_ns)) == (
            recorded["bytes"],
            recorded["mtime_ns"],
        )
        return same_date or content_hash(file) == recorded["sha256"]
    except OSError:
        return False  # reading it will say why


def remove_partial_files(folder: Path) -> None:
    """Deletes what a killed run left half-written: our own temporary files, pictures of progress.

    Only names that this module writes, for the folder may be one of the user's.
    """
    patterns = (
        *("*.csv.tmp", "data/*.pt.tmp", "plots/*.png.tmp", "masks/*.png.tmp"),
        "progress/*.png*",
    )
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink(missing_ok=True)
    progress = folder / "progress"
    if progress.is_dir() and not any(progress.iterdir()):
        progress.rmdir()


def score_row(metric: Metric, heatmap: Tensor) -> dict[str, str]:
    """An image's row of scores.csv; p99 is the 99th percentile of the heatmap's pixels."""
    values = heatmap.flatten().double()
    p99 = values.kthvalue(max(1, round(0.99 * values.numel()))).values
    numbers = {"max": values.max(), "mean": values.mean(), "p99": p99}
    return {"metric": metric} | {k: f"{v.item():.7g}" for k, v in numbers.items()}
