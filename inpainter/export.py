"""Heatmaps in other programs' formats: overlays, 16-bit PNG, NumPy arrays, DICOM.

export/<kind>/ in the heatmap folder, a file per image and metric; export/scales.csv says which
scores the lowest and highest value, or colour, of a picture stand for.
"""

import csv
import io
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.checkpoint import save_text_atomic
from common.config import ConfigError
from common.errors import UserError
from common.figures import overlay
from common.files import escaped, write_atomic
from inpainter.dicom_export import DicomError, DicomWriter, is_dicom
from inpainter.findings import find
from inpainter.heatmap_folder import HeatmapFolder
from inpainter.heatmap_tables import HEATMAP_LIST, read_heatmap
from inpainter.operating_point import LEVELS, OperatingPoint
from inpainter.predictor import Predictor
from inpainter.settings import Metric, TestConfig

LOG = logging.getLogger(__name__)
ExportKind = Literal["overlay", "png16", "npy", "dicom"]
EXPORT_KINDS: tuple[ExportKind, ...] = get_args(ExportKind)
FOLDER, SCALES = "export", "scales.csv"
NO_DICOM = "{} without DICOM output: they are no DICOM files"
FAILED = "{} not exported as DICOM, see the messages above"
UNREADABLE = "{} not exported: the image can no longer be read"


class Scale(NamedTuple):
    """The scores that the lowest and the highest value of a picture stand for; linear between."""

    low: float
    high: float


def require_heatmaps_kept(kinds: Collection[ExportKind], test: TestConfig) -> None:
    """Raises ConfigError where heatmaps are to be exported, but are not kept."""
    if kinds and not test.save_heatmap_data:
        raise ConfigError(
            "--export needs the heatmaps: set test.save_heatmap_data: true",
            key="test.save_heatmap_data",
        )


def colour_scale(heatmap: np.ndarray, metric: Metric, point: OperatingPoint | None) -> Scale:
    """The scale of an overlay: one for all images with an operating point, else the image's own.

    From the median of normal pixels, which is darkest, to the threshold of images, which is as
    bright as it gets: no normal image, or few, has such a colour.
    """
    if point is None:
        low, high = float(heatmap.min()), float(heatmap.max())
        return Scale(low, high if high > low else low + 1)
    normal = point.metrics[metric]
    return Scale(float(normal.normal.pixels[LEVELS // 2]), normal.image_threshold)


def write_png16(path: Path, heatmap: np.ndarray) -> Scale:
    """Writes a heatmap (H, W) as a grey PNG of 16 bits, from its smallest to its largest score.

    The scale is in the file, too: texts score_at_0 and score_at_65535.
    """
    low, high = float(heatmap.min()), float(heatmap.max())
    scale = Scale(low, high if high > low else low + 1)
    unit = (heatmap.astype(np.float64) - scale.low) / (scale.high - scale.low)
    picture = Image.fromarray((unit * 65535).round().astype(np.uint16))
    texts = PngInfo()
    texts.add_text("score_at_0", repr(scale.low))
    texts.add_text("score_at_65535", repr(scale.high))
    write_atomic(path, lambda file: picture.save(file, format="PNG", pnginfo=texts))
    return scale


@dataclass
class Exporter:
    """Writes what is asked for of finished images, from their heatmap files."""

    kinds: Collection[ExportKind]
    predictor: Predictor
    output: HeatmapFolder
    point: OperatingPoint | None
    """Bounds the findings and the colours; None: no findings, colours of each image's own scale."""
    notes: dict[str, list[str]] = field(
        default_factory=lambda: {NO_DICOM: [], FAILED: [], UNREADABLE: []}
    )
    """Sentence -> the images that it is true of."""
    rows: list[tuple[object, ...]] = field(default_factory=list)
    """Of scales.csv."""

    def export_all(self) -> Mapping[str, list[str]]:
        """Exports every finished image of the run; returns what there is to say of which images."""
        writer = DicomWriter(self.predictor.source) if "dicom" in self.kinds else None
        for image, heatmaps in self.finished() if self.kinds else ():
            needs_picture = {"overlay", "dicom"} & set(self.kinds)
            try:
                path = self.output.images[image]
                picture = self.predictor.pixels_of(path).numpy() if needs_picture else None
            except (UserError, OSError) as error:
                LOG.warning("%s is not exported: %s", escaped(image), error)
                self.notes[UNREADABLE].append(image)
                continue
            self.export_pictures(image, heatmaps, picture)
            if writer is not None and picture is not None:
                self.export_dicom(image, heatmaps, picture, writer)
        if self.rows:
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow(("image", "metric", "kind", "file", "low", "high"))
            table.writerows(self.rows)
            save_text_atomic(text.getvalue(), self.output.folder / FOLDER / SCALES)
        return self.notes

    def finished(self) -> Iterator[tuple[str, dict[Metric, np.ndarray]]]:
        """The finished images with their heatmaps by metric, read one at a time."""
        for image in self.output.images:
            rows = self.output.tables[HEATMAP_LIST].rows(image)
            files = {row["metric"]: self.output.folder / row["file"] for row in rows}
            if files:
                metrics = self.output.test.heatmap_metrics
                yield image, {metric: read_heatmap(files[metric]) for metric in metrics}

    def path(self, kind: ExportKind, image: str, metric: Metric, ending: str) -> Path:
        """Where a file goes."""
        name = self.output.stems[image] + self.output.ending(metric) + ending
        return self.output.folder / FOLDER / kind / name

    def export_pictures(
        self, image: str, heatmaps: Mapping[Metric, np.ndarray], picture: np.ndarray | None
    ) -> None:
        """Overlay, 16-bit PNG and array. picture: (C, H, W) in [0, 1], None without overlay."""
        for metric, heatmap in heatmaps.items():
            if "npy" in self.kinds:
                path = self.path("npy", image, metric, ".npy")
                write_atomic(path, lambda file, heatmap=heatmap: np.save(file, heatmap))
            if "png16" in self.kinds:
                path = self.path("png16", image, metric, ".png")
                self.note_scale(image, metric, "png16", path, write_png16(path, heatmap))
            if "overlay" in self.kinds:
                path = self.path("overlay", image, metric, ".png")
                colours, scale = self.overlay_of(metric, heatmap, picture)
                drawn = Image.fromarray(colours)
                write_atomic(path, lambda file, drawn=drawn: drawn.save(file, format="PNG"))
                self.note_scale(image, metric, "overlay", path, scale)

    def overlay_of(
        self, metric: Metric, heatmap: np.ndarray, picture: np.ndarray
    ) -> tuple[np.ndarray, Scale]:
        """The overlay (H, W, 3) uint8 of the image's own size, findings outlined, and its scale."""
        scale = colour_scale(heatmap, metric, self.point)
        outlined = None
        if self.point is not None:
            _, outlined = find(heatmap, self.point.metrics[metric])
        return overlay(picture, heatmap, scale, outlined=outlined), scale

    def export_dicom(
        self,
        image: str,
        heatmaps: Mapping[Metric, np.ndarray],
        picture: np.ndarray,
        writer: DicomWriter,
    ) -> None:
        """A secondary capture of the overlay, a parametric map and, of findings, a segmentation."""
        source = self.output.images[image]
        if not is_dicom(source):
            self.notes[NO_DICOM].append(image)
            return
        for metric, heatmap in heatmaps.items():
            colours, scale = self.overlay_of(metric, heatmap, picture)
            mask = None if self.point is None else find(heatmap, self.point.metrics[metric])[1]
            paths = {
                what: self.path("dicom", image, metric, f"_{what}.dcm")
                for what in ("overlay", "map", "findings")
            }
            for path in paths.values():
                path.unlink(missing_ok=True)  # an earlier run may have had findings
            try:
                writer.write_overlay(paths["overlay"], source, metric, colours)
                writer.write_map(paths["map"], source, metric, heatmap)
                if mask is not None and mask.any():
                    writer.write_findings(paths["findings"], source, metric, mask)
            except DicomError as error:
                LOG.warning("%s", error)
                if image not in self.notes[FAILED]:
                    self.notes[FAILED].append(image)
            if paths["overlay"].is_file():
                self.note_scale(image, metric, "dicom", paths["overlay"], scale)

    def note_scale(
        self, image: str, metric: Metric, kind: ExportKind, path: Path, scale: Scale
    ) -> None:
        """Adds a row to scales.csv."""
        file = path.relative_to(self.output.folder).as_posix()
        numbers = (f"{scale.low:.9g}", f"{scale.high:.9g}")
        self.rows.append((escaped(image), metric, kind, escaped(file), *numbers))
