"""The folder of one prediction run: tensors, pictures and tables, written image by image.

scores.csv (image, metric, max, mean, p99) and heatmaps.csv (image, metric, file) have a row for
every finished image and metric; an image without its rows is not finished.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from torch import Tensor

from common.checkpoint import save_atomic, save_text_atomic
from common.figures import heatmap_panel
from inpainter.settings import Metric, TestConfig

SCORE_COLUMNS = ("image", "metric", "max", "mean", "p99")
FILE_COLUMNS = ("image", "metric", "file")
TIME_COLUMNS = ("image", "seconds", "windows", "completed_windows", "seconds_per_window")
Row = dict[str, str]


TABLES = ("scores.csv", "heatmaps.csv", "compute_times.csv")


class HeatmapFolder:
    """Writes heatmaps and the tables over them; knows which images are finished.

    images: names of all images of the run, their paths below the image folder. overwrite: no image
    counts as finished, and what the tables list is forgotten.
    """

    def __init__(
        self, folder: Path, test: TestConfig, images: Iterable[str], *, overwrite: bool = False
    ) -> None:
        self.folder = folder
        self.test = test
        self.stems = file_stems(images)
        remove_partial_files(folder)
        if overwrite:
            for table in TABLES:
                (folder / table).unlink(missing_ok=True)
        self.scores, self.files, self.times = (read_rows(folder / table) for table in TABLES)

    def is_finished(self, image: str) -> bool:
        """Whether every metric of an image (its path below the image folder) is there."""
        rows = {row["metric"]: row for row in self.scores if row["image"] == image}
        files = {row["metric"]: row for row in self.files if row["image"] == image}
        return all(
            metric in rows
            and (
                not self.test.save_heatmap_data
                or (metric in files and (self.folder / files[metric]["file"]).is_file())
            )
            and (not self.test.save_heatmap_plots or self.plot_path(image, metric).is_file())
            for metric in self.test.heatmap_metrics
        )

    def stem(self, image: str, metric: Metric) -> str:
        """<image>_<metric>_<M>_<p>_<mask>_<window>_<stride>, as the published files are named."""
        test = self.test
        p, mask, window = test.droprate, test.mask_shape[0], test.patch_shape[0]
        numbers = (test.heatmap_M_inpaint, p, mask, window, test.patch_stride)
        return "_".join([self.stems[image], metric, *map(str, numbers)])

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
        heatmaps: dict[Metric, Tensor],
        boxes: Sequence[Sequence[float]] = (),
    ) -> None:
        """Writes an image's files and then its rows. pixels: (C, H, W) in [0, 1]."""
        for metric, heatmap in heatmaps.items():
            if self.test.save_heatmap_data:
                save_atomic(
                    heatmap.clone(), self.folder / "data" / f"{self.stem(image, metric)}.pt"
                )
            if self.test.save_heatmap_plots:
                plot_heatmap(self.plot_path(image, metric), image, pixels, metric, heatmap, boxes)
            self.progress_path(image, metric).unlink(missing_ok=True)
        self.scores = [row for row in self.scores if row["image"] != image]
        self.scores += [score_row(image, metric, heat) for metric, heat in heatmaps.items()]
        write_rows(self.folder / "scores.csv", SCORE_COLUMNS, self.scores)
        if self.test.save_heatmap_data:
            self.files = [row for row in self.files if row["image"] != image]
            self.files += [
                {"image": image, "metric": metric, "file": f"data/{self.stem(image, metric)}.pt"}
                for metric in heatmaps
            ]
            write_rows(self.folder / "heatmaps.csv", FILE_COLUMNS, self.files)

    def write_time(self, image: str, seconds: float, windows: int, completed: int) -> None:
        """Adds a line to compute_times.csv."""
        values = (image, f"{seconds:.3f}", windows, completed, f"{seconds / max(completed, 1):.5f}")
        row = dict(zip(TIME_COLUMNS, map(str, values), strict=True))
        self.times = [old for old in self.times if old["image"] != image] + [row]
        write_rows(self.folder / "compute_times.csv", TIME_COLUMNS, self.times)


def file_stems(images: Iterable[str]) -> dict[str, str]:
    """Image name -> start of its files' names: the name without its suffix and with __ for /.

    Where two images would share it (scan.png and scan.tif), theirs keep the suffix.
    """
    whole = {image: image.replace("/", "__") for image in images}
    short = {image: PurePosixPath(name).with_suffix("").name for image, name in whole.items()}
    count = Counter(short.values())
    return {image: short[image] if count[short[image]] == 1 else whole[image] for image in whole}


def plot_heatmap(
    path: Path,
    image: str,
    pixels: Tensor,
    metric: Metric,
    heatmap: Tensor,
    boxes: Sequence[Sequence[float]] = (),
) -> None:
    """Draws a heatmap (H, W) over its image, (C, H, W) in [0, 1], with boxes where given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels.permute(1, 2, 0).squeeze(2).numpy()
    heatmap_panel(picture, heatmap.numpy(), path, title=image, boxes=boxes, score_name=metric)


def remove_partial_files(folder: Path) -> None:
    """Deletes what a killed run left half-written: our own temporary files, pictures of progress.

    Only names that this module writes, for the folder may be one of the user's.
    """
    patterns = ("*.csv.tmp", "data/*.pt.tmp", "plots/*.png.tmp", "progress/*.png*")
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()
    progress = folder / "progress"
    if progress.is_dir() and not any(progress.iterdir()):
        progress.rmdir()


def score_row(image: str, metric: Metric, heatmap: Tensor) -> Row:
    """One line of scores.csv; p99 is the 99th percentile of the heatmap's pixels."""
    values = heatmap.flatten().double()
    p99 = values.kthvalue(max(1, round(0.99 * values.numel()))).values
    numbers = {"max": values.max(), "mean": values.mean(), "p99": p99}
    return {"image": image, "metric": metric} | {k: f"{v.item():.7g}" for k, v in numbers.items()}


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, none where it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Sequence[str], rows: list[Row]) -> None:
    """Writes a CSV file; it appears whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save_text_atomic(text.getvalue(), path)
