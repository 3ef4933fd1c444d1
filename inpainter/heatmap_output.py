"""The folder of one prediction run: tensors, pictures and tables, written image by image.

images.csv (image, the content it was scored with, numbers of windows), scores.csv (image, metric,
max, mean, p99) and heatmaps.csv (image, metric, file) have rows for every finished image; an image
without its rows is not finished. left_out.csv (image, reason) names those that could not be scored.
Names that are no printable UTF-8 are written as `common.files.escaped` does.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.checkpoint import content_hash, save_atomic
from common.figures import heatmap_panel
from common.files import escaped, file_stems, name_limit
from inpainter.heatmap import Heatmaps
from inpainter.heatmap_files import LEFT_OUT
from inpainter.image_table import ImageTable
from inpainter.settings import Metric, TestConfig

LOG = logging.getLogger(__name__)
TABLES = {
    "images.csv": ("image", "sha256", "bytes", "mtime_ns", "windows", "completed_windows"),
    "scores.csv": ("image", "metric", "max", "mean", "p99"),
    "heatmaps.csv": ("image", "metric", "file"),
    "compute_times.csv": (
        *("image", "seconds", "windows", "completed_windows", "seconds_per_window"),
    ),
    LEFT_OUT: ("image", "reason"),
}
ROOM_FOR_ENDING = 32
"""Bytes kept free behind a file's name for those of a temporary file."""
PLOT_ERRORS = (ValueError, RuntimeError, MemoryError)
"""What matplotlib raises for a picture that it cannot draw."""


class Content(NamedTuple):
    """What an image file held when it was read."""

    sha256: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "Content":
        stat = path.stat()
        return cls(content_hash(path), stat.st_size, stat.st_mtime_ns)


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
    no image counts as finished, and what the tables list is forgotten.
    """

    def __init__(
        self, folder: Path, test: TestConfig, images: Mapping[str, Path], *, overwrite: bool = False
    ) -> None:
        self.folder, self.test, self.images = folder, test, images
        endings = [len(self.ending(metric).encode()) for metric in test.heatmap_metrics]
        self.stems = file_stems(images, name_limit(folder) - max(endings) - ROOM_FOR_ENDING)
        self.not_drawn: dict[str, str] = {}
        """Image -> why it has no plot."""
        remove_partial_files(folder)
        if overwrite:
            for table in TABLES:
                (folder / table).unlink(missing_ok=True)
        tables = [ImageTable(folder / name, columns) for name, columns in TABLES.items()]
        self.contents, self.scores, self.files, self.times, self.left_out = tables

    def sort_out(self) -> PastWork:
        """Compares the tables with the images and drops the rows of all that is not finished."""
        past = PastWork()
        known = dict.fromkeys([*self.contents.of_image, *self.scores.of_image])
        past.vanished += [image for image in known if image not in self.images]
        for image, path in self.images.items():
            if not self.is_complete(image):
                continue
            state = self.content_state(image, path)
            getattr(past, state).append(image)
        finished = set(past.finished)
        for table in (self.contents, self.scores, self.files, self.times, self.left_out):
            table.keep(finished)
        self.scores.start()
        return past

    def content_state(self, image: str, path: Path) -> str:
        """`finished`, or `changed` or `unrecorded` where the scores may be those of another file.

        A file of the recorded size and time is taken for the recorded one without reading it.
        """
        rows = self.contents.rows(image)
        if not rows:
            return "unrecorded"
        recorded = rows[0]
        try:
            stat = path.stat()
            if [str(stat.st_size), str(stat.st_mtime_ns)] == [
                recorded["bytes"],
                recorded["mtime_ns"],
            ]:
                return "finished"
            return "finished" if content_hash(path) == recorded["sha256"] else "changed"
        except OSError:
            return "changed"  # reading it will say why

    def is_complete(self, image: str) -> bool:
        """Whether every metric of an image is there, from whichever content."""
        rows = {row["metric"] for row in self.scores.rows(image)}
        files = {row["metric"]: row["file"] for row in self.files.rows(image)}
        return all(
            metric in rows
            and (
                not self.test.save_heatmap_data
                or (
                    files.get(metric) == self.data_name(image, metric)
                    and (self.folder / files[metric]).is_file()
                )
            )
            and (not self.test.save_heatmap_plots or self.plot_path(image, metric).is_file())
            for metric in self.test.heatmap_metrics
        )

    def ending(self, metric: Metric) -> str:
        """_<metric>_<M>_<p>_<mask>_<window>_<stride>, as the published files are named."""
        test = self.test
        p, mask, window = test.droprate, test.mask_shape[0], test.patch_shape[0]
        numbers = (test.heatmap_M_inpaint, p, mask, window, test.patch_stride)
        return "_".join(["", metric, *map(str, numbers)])

    def stem(self, image: str, metric: Metric) -> str:
        """The name of an image's files without their suffix."""
        return self.stems[image] + self.ending(metric)

    def data_name(self, image: str, metric: Metric) -> str:
        """The tensor of a finished heatmap, below the folder."""
        return f"data/{self.stem(image, metric)}.pt"

    def plot_path(self, image: str, metric: Metric) -> Path:
        """The picture of a finished heatmap."""
        return self.folder / "plots" / f"{self.stem(image, metric)}.png"

    def progress_path(self, image: str, metric: Metric) -> Path:
        """The picture of a heatmap that is being computed."""
        return self.folder / "progress" / f"{self.stem(image, metric)}.png"

    def write(
        self,
        image: str,
        pixels: Tensor,
        content: Content,
        scored: Heatmaps,
        boxes: Sequence[Sequence[float]] = (),
    ) -> None:
        """Writes an image's files and then its rows. pixels: (C, H, W) in [0, 1].

        A picture that cannot be drawn is noted in `not_drawn`; the heatmap is kept.
        """
        for metric, heatmap in scored.heatmaps.items():
            if self.test.save_heatmap_data:
                save_atomic(heatmap.clone(), self.folder / self.data_name(image, metric))
            if self.test.save_heatmap_plots:
                self.draw(self.plot_path(image, metric), image, pixels, metric, heatmap, boxes)
            self.progress_path(image, metric).unlink(missing_ok=True)
        windows = {"windows": scored.n_windows, "completed_windows": scored.n_scored}
        self.contents.add(image, [content._asdict() | windows])
        self.scores.add(image, [score_row(m, heat) for m, heat in scored.heatmaps.items()])
        if self.test.save_heatmap_data:
            rows = [{"metric": m, "file": self.data_name(image, m)} for m in scored.heatmaps]
            self.files.add(image, rows)

    def draw(
        self,
        path: Path,
        image: str,
        pixels: Tensor,
        metric: Metric,
        heatmap: Tensor,
        boxes: Sequence[Sequence[float]] = (),
    ) -> None:
        """Draws a heatmap (H, W) over its image, (C, H, W) in [0, 1], with boxes where given."""
        try:
            heatmap_panel(
                pixels.numpy(),
                heatmap.numpy(),
                path,
                title=escaped(image),
                boxes=boxes,
                score_name=metric,
            )
        except PLOT_ERRORS as error:
            path.unlink(missing_ok=True)  # one of an earlier run
            self.not_drawn[image] = f"{type(error).__name__}: {error}"
            LOG.warning("No plot of %s, %s: %s", escaped(image), metric, error)

    def write_time(self, image: str, seconds: float, scored: Heatmaps) -> None:
        """Adds a line to compute_times.csv."""
        windows, completed = scored.n_windows, scored.n_scored
        values = (f"{seconds:.3f}", windows, completed, f"{seconds / max(completed, 1):.5f}")
        self.times.add(image, [dict(zip(self.times.columns[1:], values, strict=True))])

    def write_left_out(self, image: str, reason: str) -> None:
        """Adds a line to left_out.csv."""
        self.left_out.add(image, [{"reason": escaped(reason)}])


def remove_partial_files(folder: Path) -> None:
    """Deletes what a killed run left half-written: our own temporary files, pictures of progress.

    Only names that this module writes, for the folder may be one of the user's.
    """
    patterns = ("*.csv.tmp", "data/*.pt.tmp", "plots/*.png.tmp", "progress/*.png*")
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
