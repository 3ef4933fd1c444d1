"""What a prediction makes of heatmaps at an operating point: findings, masks, verdicts.

findings.csv: image, metric, box (top, left, height, width in pixels), area (pixels), peak (the
largest score) with its place, z (how far the peak is above the mean of normal images' largest
scores, in their standard deviations) and p (the chance that a normal image reaches the peak).
verdicts.csv: image, metric, score (the heatmap's largest), threshold, verdict. An image is abnormal
if and only if it has a finding. masks/*.png: white where there is a finding.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from common.checkpoint import CheckpointError, save_text_atomic
from common.files import read_regular
from common.images import write_image
from inpainter.heatmap_folder import HeatmapFolder
from inpainter.heatmap_tables import FINDINGS, HEATMAP_LIST, VERDICTS, read_heatmap
from inpainter.operating_point import MetricPoint, OperatingPoint, load_operating_point, unfit
from inpainter.predictor import Predictor
from inpainter.settings import Metric

LOG = logging.getLogger(__name__)
COPY_NAME = "operating_point.json"
"""The operating point that a folder's verdicts were made at."""
WITH_CORNERS = np.ones((3, 3), dtype=int)
"""Pixels that touch at a corner belong together."""
MOST_REASONS = 3


class Finding(NamedTuple):
    """A region of a heatmap that no normal image explains."""

    top: int
    left: int
    height: int
    width: int
    """Its bounding box, in pixels."""
    area: int
    """Its pixels."""
    peak: float
    """Its largest score."""
    peak_x: int
    peak_y: int
    """Column and row of that score, the first in reading order."""
    z: float
    """How far the peak is above the mean of normal images' largest scores, in their deviations."""
    p: float
    """The chance that a normal image's largest score is as large, in (0, 1]."""


def find(heatmap: np.ndarray, point: MetricPoint) -> tuple[list[Finding], np.ndarray]:
    """The findings of a heatmap (H, W), the highest peak first, and their mask (H, W) bool.

    A finding is a connected region above the pixels' threshold whose peak is above the image's.
    """
    labels, _ = ndimage.label(heatmap > point.pixel_threshold, WITH_CORNERS)
    found, mask = [], np.zeros(heatmap.shape, dtype=bool)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[box] == number
        scores = np.where(region, heatmap[box], -np.inf)
        peak = float(scores.max())
        if not peak > point.image_threshold:
            continue
        mask[box] |= region
        (top, left), (height, width) = (box[0].start, box[1].start), region.shape
        y, x = np.unravel_index(int(scores.argmax()), region.shape)
        place = (left + int(x), top + int(y))
        rank = (point.normal.deviations(peak), point.normal.chance(peak))
        found.append(Finding(top, left, height, width, int(region.sum()), peak, *place, *rank))
    return sorted(found, key=lambda finding: -finding.peak), mask


class Verdicts:
    """Writes findings, masks and verdicts into a heatmap folder, image by image."""

    def __init__(
        self, output: HeatmapFolder, point: OperatingPoint | None, *, alone: bool = True
    ) -> None:
        """Drops what the folder has of another operating point; None: of any.

        alone: no other process is at work there; else raises CheckpointError for another one.
        """
        self.output, self.point = output, point
        if point is not None:
            output.volume_thresholds = {
                metric: each.volume_threshold
                for metric, each in point.metrics.items()
                if each.volume_threshold is not None
            }
        path = output.folder / COPY_NAME
        text = None if point is None else point.text()
        before = read_regular(path).decode() if path.is_file() else None
        if not alone:
            if before != text:
                raise CheckpointError(
                    f"{output.folder} is in use by a process with another operating point than "
                    "the checkpoint has now. Wait until it ends, and run again."
                )
            return
        if before != text:
            for image in output.tables[VERDICTS].of_image:
                for metric in output.test.heatmap_metrics:
                    output.path("masks", image, metric).unlink(missing_ok=True)
            for table in (VERDICTS, FINDINGS):
                output.tables[table].keep(())
            path.unlink(missing_ok=True)
        if point is not None:
            save_text_atomic(text, path)
            whole = [image for image in output.images if self.has(image)]
            for table in (VERDICTS, FINDINGS):  # of a run that was killed, only what is whole
                output.tables[table].keep(whole)
                output.tables[table].start()

    def has(self, image: str) -> bool:
        """Whether an image has a verdict by every metric."""
        rows = self.output.tables[VERDICTS].rows(image)
        return {row["metric"] for row in rows} >= set(self.output.test.heatmap_metrics)

    def write(self, image: str, heatmaps: Mapping[Metric, np.ndarray]) -> None:
        """Writes an image's masks and notes the rows of what its heatmaps (H, W) come to."""
        if self.point is None:
            return
        findings, verdicts = [], []
        for metric, heatmap in heatmaps.items():
            point = self.point.metrics[metric]
            found, mask = find(heatmap, point)
            path = self.output.path("masks", image, metric)
            write_image(path, torch.from_numpy(mask).float())
            rows = (finding._asdict() for finding in found)
            findings += [{"metric": metric} | {k: plain(v) for k, v in row.items()} for row in rows]
            score = float(heatmap.max())
            verdicts.append({
                "metric": metric,
                "score": plain(score),
                "threshold": plain(point.image_threshold),
                "verdict": "abnormal" if score > point.image_threshold else "normal",
            })  # fmt: skip
        if findings:
            self.output.note(FINDINGS, image, findings)
        self.output.note(VERDICTS, image, verdicts)

    def catch_up(self, finished: Iterable[str]) -> list[str]:
        """Writes those of finished images that have none yet, from their files.

        Returns the images whose heatmaps were not kept, which stay without.
        """
        if self.point is None:
            return []
        output, lost = self.output, []
        for image in finished:
            if self.has(image):
                continue
            files = {row["metric"]: row["file"] for row in output.tables[HEATMAP_LIST].rows(image)}
            metrics = output.test.heatmap_metrics
            if any(metric not in files for metric in metrics):
                lost.append(image)
                continue
            self.write(image, {m: read_heatmap(output.folder / files[m]) for m in metrics})
            output.put(image, output.taken_rows())
        return lost

    def summary(self) -> list[str]:
        """How many images are abnormal, a sentence per metric; none without verdicts."""
        rows = [row for of in self.output.tables[VERDICTS].of_image.values() for row in of]
        sentences = []
        for metric in dict.fromkeys(row["metric"] for row in rows):
            verdicts = [row["verdict"] for row in rows if row["metric"] == metric]
            share = f"{verdicts.count('abnormal')} of {len(verdicts)} images are abnormal"
            sentences.append(f"{metric}: {share} (verdicts.csv, findings.csv, masks/)")
        return sentences


def plain(value: float) -> str:
    """A number as the tables have it: float32 exactly."""
    return f"{value:.9g}"


def operating_point_for(predictor: Predictor) -> tuple[OperatingPoint | None, list[str]]:
    """The checkpoint's operating point, if it has one of these scores, and what there is to say.

    Raises CheckpointError for a damaged file.
    """
    path = predictor.operating_point
    if path is None or not path.is_file():
        return None, []
    point = load_operating_point(path)
    reasons = unfit(point, predictor)
    if not reasons:
        return point, []
    why = "; ".join([*reasons[:MOST_REASONS], *["…"] * (len(reasons) > MOST_REASONS)])
    note = (
        f"No findings and no verdicts: {path} is of other scores ({why}). Run eval.py --mode "
        "calibrate with these settings"
    )
    LOG.warning("%s", note)
    return None, [note]
