"""Why a place in a heatmap scores as it does: its window, what was completed, and how far it is.

The window is the heatmap's own that is centred nearest to the place, and its dropout is the same as
in the prediction, so that the numbers are those behind the heatmap. M completions, C h w hole.
"""

import argparse
import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor

from common.checkpoint import CheckpointError
from common.config import resolve_path
from common.devices import tf32_products
from common.errors import ExitStatus, UserError
from common.figures import (
    BOX_COLOUR,
    COLOURS,
    HEAT,
    as_picture,
    hide_frame,
    save,
    shortened,
    spread,
)
from common.files import absolute, escaped
from common.images import to_signed
from inpainter.completion import l2_distance, metric_values
from inpainter.findings import operating_point_for
from inpainter.heatmap import Heatmaps, windows_to_score
from inpainter.predictor import Predictor, open_checkpoint
from inpainter.settings import Metric, PicardConfig
from inpainter.windows import (
    WindowGrid,
    centre_corner,
    centre_crop,
    cut_windows,
    pad_image,
    resized,
    scaled_hw,
    window_grid,
)

LOG = logging.getLogger(__name__)


class ExplainError(UserError):
    """The place is none of the image."""

    status = ExitStatus.BAD_SETTINGS


@dataclass(frozen=True)
class Explanation:
    """One window, at one scale, of an image."""

    metric: Metric
    scale: float
    number: int
    """Of the window, as windows.py counts."""
    centre: tuple[float, float]
    """Column and row of the window's centre in the original image, in pixels."""
    window: Tensor
    """(C, H, W) in [0, 1]."""
    hole_hw: tuple[int, int]
    completions: Tensor
    """(M, C, h, w) in [-1, 1]; one without dropout."""
    distances: Tensor
    """(M,): each completion's distance from the truth, in the metric's space."""
    distance: float
    """The metric's, of them all."""
    score: float | None
    """What the heatmap is made of: the distance, or with test.calibration its surprise; None where
    the image's other windows, on which a surprise depends, were not scored."""
    has_tissue: bool
    """Whether the window is scored at all; else the heatmap has 0 there."""

    @property
    def truth(self) -> Tensor:
        """What is in the hole, (C, h, w) in [0, 1]."""
        return centre_crop(self.window, self.hole_hw)

    @property
    def hole_box(self) -> tuple[int, int, int, int]:
        """Top, left, height, width of the hole within the window."""
        return (*centre_corner(self.window.shape[1:], self.hole_hw), *self.hole_hw)

    @property
    def closest(self) -> int:
        """Which completion is nearest to the truth."""
        return int(self.distances.argmin())


@dataclass(frozen=True)
class Normal:
    """Scores of windows that the explained one is compared with."""

    scores: np.ndarray
    """(n,) ascending."""
    of: str
    """Of which windows, in words."""
    is_distance: bool
    """Compared with the window's distance, not with its score."""

    def share_below(self, value: float) -> float:
        """The share of these windows that score less, in [0, 1]."""
        return float(np.searchsorted(self.scores, value, side="left")) / len(self.scores)


def explain(
    config: PicardConfig,
    checkpoint: tuple[Path, int | str],
    image: Path,
    place: tuple[int, int],
    output: Path,
    *,
    name: str | None = None,
) -> str:
    """Writes a picture strip on a place of an image, a row per scale, and returns what it says.

    checkpoint: folder and step; place: column and row in pixels of the original image; output: the
    folder; name: what the dropout is drawn for, the file's name if None. By the first of
    test.heatmap_metrics. Raises ExplainError for a place beside the image, and as predict does.
    """
    predictor = open_checkpoint(config, *checkpoint, option="--checkpoint_iter")
    predictor.require_finite_weights()
    pixels = predictor.pixels_of(image)
    (x, y), (H, W) = place, pixels.shape[1:]
    if not (0 <= x < W and 0 <= y < H):
        raise ExplainError(
            f"--explain {image} {x} {y}: the image has columns 0 to {W - 1} and rows 0 to {H - 1}; "
            "first the column, then the row"
        )
    metric = config.test.heatmap_metrics[0]
    name = image.name if name is None else name
    *_, last = predictor.score_image(pixels, name)  # a window's score may depend on the others
    whole = last.by_scale()
    heat = last.heatmaps[metric][y, x].item()
    rows, lines = [], [f"{escaped(name)}: the heatmap of {metric} is {heat:.4g} there"]
    for scale in config.test.scales:
        found = explained(predictor, pixels, name, place, scale, metric, whole[scale])
        normal = normal_windows(predictor, scale, metric, whole[scale])
        rows.append((found, normal))
        lines.append(sentence(found, normal))
    stem = f"explain_{image.stem if '#' not in image.name else image.name}_{x}_{y}_{metric}.png"
    path = output / stem
    explanation_strip(rows, path, f"{escaped(name)}, column {x}, row {y}")
    return "\n".join([*lines, f"Picture: {path}"])


def explain_from_arguments(
    config: PicardConfig, checkpoint_dir: Path, arguments: argparse.Namespace
) -> str:
    """predict_heatmap.py --explain IMAGE X Y. Raises ExplainError for what are no whole numbers."""
    image, *written = arguments.explain
    try:
        x, y = (int(number) for number in written)
    except ValueError:
        raise ExplainError(
            f"--explain {image} {' '.join(written)}: after the image stand two whole numbers, the "
            "column and the row"
        ) from None
    checkpoint, output = (checkpoint_dir, arguments.checkpoint_iter), arguments.output_dir or Path()
    name = name_in_heatmaps(Path(image), config, arguments.image_dir)
    return explain(config, checkpoint, Path(image), (x, y), output, name=name)


def name_in_heatmaps(image: Path, config: PicardConfig, image_dir: Path | None) -> str:
    """What a prediction of image_dir, or of test_data_path, calls an image, by which it drops.

    An image that lies elsewhere has its file's name, as where it is named alone.
    """
    if image_dir is None and config.test_data_path is not None:
        image_dir = resolve_path(config.test_data_path, "test_data_path")
    path = absolute(image)
    if image_dir is not None and path.is_relative_to(folder := absolute(image_dir)):
        return path.relative_to(folder).as_posix()
    return image.name


def nearest_window(grid: WindowGrid, place: tuple[float, float]) -> int:
    """The number of the window whose centre is nearest to a place (column, row)."""
    x, y = place
    left, _, top, _ = grid.pad
    (h, w), s = grid.window_hw, grid.stride
    row = min(max(round((y + 0.5 + top - h / 2) / s), 0), grid.grid_hw[0] - 1)
    col = min(max(round((x + 0.5 + left - w / 2) / s), 0), grid.grid_hw[1] - 1)
    return row * grid.grid_hw[1] + col


@torch.inference_mode()
def explained(
    predictor: Predictor,
    pixels: Tensor,
    name: str,
    place: tuple[int, int],
    scale: float,
    metric: Metric,
    scored: Heatmaps | None = None,
) -> Explanation:
    """The window nearest to a place (column, row of the original), at a scale.

    pixels: (C, H, W) in [0, 1]; scored: the image's scores at that scale.
    """
    test = predictor.config.test
    H, W = pixels.shape[1:]
    small = resized(pixels, scaled_hw((H, W), scale))
    h, w = small.shape[1:]
    grid = window_grid((h, w), test.patch_shape[:2], test.patch_stride, test.heatmap_alignment)
    number = nearest_window(grid, ((place[0] + 0.5) * w / W - 0.5, (place[1] + 0.5) * h / H - 0.5))
    padded = pad_image(small, grid)
    window = cut_windows(padded, grid, [number])
    dropout = None if metric == "no_dropout" else predictor.dropout(name)
    masks = None if dropout is None else dropout.masks([number])
    scorer, signed = predictor.scorer, to_signed(window.to(predictor.device))
    with tf32_products(test.precision == "tf32"):
        completions = torch.cat(list(scorer.completions(signed, masks)))  # (M, C, h, w)
        space = "image" if metric == "no_dropout" else metric.partition("_")[2]
        hole = centre_crop(signed, test.mask_shape)
        if metric == "no_dropout":
            distances = l2_distance(hole.expand_as(completions), completions)
        else:
            of = scorer.represent(hole)[space].expand(len(completions), *[-1] * (hole.ndim - 1))
            made = [scorer.represent(each[None])[space] for each in completions]
            distances = l2_distance(of, torch.cat(made))
    distances = distances.float().cpu()
    by_space = {"no_dropout" if metric == "no_dropout" else space: distances[None]}
    top, left = grid.corner(number)
    centre_y = (top - grid.pad[2] + grid.window_hw[0] / 2) * H / h
    centre_x = (left - grid.pad[0] + grid.window_hw[1] / 2) * W / w
    return Explanation(
        metric=metric,
        scale=scale,
        number=number,
        centre=(centre_x, centre_y),
        window=window[0],
        hole_hw=test.mask_shape,
        completions=completions.float().cpu(),
        distances=distances,
        distance=metric_values((metric,), by_space)[metric].item(),
        score=None if scored is None else scored.grids[metric].flatten()[number].item(),
        has_tissue=number in windows_to_score(padded, grid, predictor.config.seen_test()),
    )


def normal_windows(predictor: Predictor, scale: float, metric: Metric, scored: Heatmaps) -> Normal:
    """What a window is compared with, the best there is.

    Windows of normal images at the operating point; else those of the calibration, by their
    distances; else the image's own, of which most are normal even where there is a lesion.
    """
    try:
        point, _ = operating_point_for(predictor)
    except CheckpointError as error:
        LOG.warning("%s", error)
        point = None
    if point is not None and repr(scale) in point.metrics[metric].normal.windows:
        windows = point.metrics[metric].normal.windows[repr(scale)]
        return Normal(windows, "windows of normal images (operating point)", is_distance=False)
    if scale in predictor.calibrations:
        distances = predictor.calibrations[scale].distances[metric].sort().values.numpy()
        return Normal(distances, "windows of normal images (calibration)", is_distance=True)
    own = scored.grids[metric].flatten().numpy()
    return Normal(np.sort(own[own != 0]), "this image's own windows", is_distance=False)


def standing(found: Explanation, normal: Normal) -> tuple[float, str]:
    """The value that is compared, and where it stands, in words."""
    value = found.distance if normal.is_distance else found.score
    what = "distance" if normal.is_distance else "score"
    if not found.has_tissue or not len(normal.scores):
        return value, "not scored, for want of tissue: the heatmap has 0 there"
    share = normal.share_below(value)
    return value, f"{what} {value:.4g}: above {share:.1%} of {normal.of}"


def sentence(found: Explanation, normal: Normal) -> str:
    """An explanation in a line, for the terminal."""
    x, y = found.centre
    listed = ", ".join(f"{value:.4g}" for value in found.distances.tolist())
    return (
        f"{found.metric}, scale {found.scale:g}: window {found.number}, centred on column {x:.1f}, "
        f"row {y:.1f}; distances of {len(found.distances)} completions: {listed}; the closest is "
        f"number {found.closest + 1}; {standing(found, normal)[1]}"
    )


def explanation_strip(
    rows: Sequence[tuple[Explanation, Normal]], path: Path, title: str = ""
) -> None:
    """Saves a strip per row: window, hole, truth, completions, closest, difference, numbers.

    Images share the grey values of their window, from its darkest to its brightest.
    """
    lines = max(2, *(-(-len(found.completions) // 5) for found, _ in rows))
    widths = (1.3, 1.3, 1, max(1.0, 3.2 / lines * 1.6), 1, 1.15, 1.3, 1.7)
    figure = Figure(figsize=(1.95 * sum(widths), 2.7 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(shortened(title), fontsize=11)
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (found, normal) in zip(parts, rows, strict=True):
        cells = part.subfigures(1, len(widths), width_ratios=widths)
        draw_images(cells[:6], found, lines)
        draw_numbers(cells[6].subplots(), cells[7].subplots(), found, normal)
    save(figure, path)


def draw_images(cells: Sequence[SubFigure], found: Explanation, lines: int) -> None:
    """Draws window, hole, truth, completions in so many lines, the closest, and how far it is."""
    whole, inner = found.window.numpy(), found.truth.numpy()
    completions = ((found.completions + 1) / 2).clamp(0, 1).numpy()
    closest = completions[found.closest]
    limits = spread((float(whole.min()), float(whole.max())))
    top, left, height, width = found.hole_box
    without = whole.copy()
    without[:, top : top + height, left : left + width] = (limits[0] + limits[1]) / 2

    def show(axes: Axes, image: np.ndarray, name: str) -> None:
        scaled = (image - limits[0]) / (limits[1] - limits[0])
        axes.imshow(as_picture(scaled), cmap="gray", vmin=0, vmax=1)
        hide_frame(axes)
        axes.set_title(name, fontsize=8)

    window, hole, truth, nearest, off = (cells[i].subplots() for i in (0, 1, 2, 4, 5))
    show(window, whole, f"window, scale {found.scale:g}")
    border = {"fill": False, "color": BOX_COLOUR, "lw": 1.2}
    window.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, **border))
    show(hole, without, "hole")
    show(truth, inner, "what is in it")
    grid = cells[3].subplots(lines, -(-len(completions) // lines), squeeze=False)
    for axes in grid.flat:
        hide_frame(axes)
    for number, (axes, each) in enumerate(zip(grid.flat, completions, strict=False)):
        show(axes, each, f"{number + 1}")
        axes.title.set_fontsize(7)
    cells[3].suptitle(f"{len(completions)} completions", fontsize=8)
    show(nearest, closest, f"closest, number {found.closest + 1}")
    difference = np.abs(closest - inner).mean(axis=0)
    drawn = off.imshow(difference, cmap=HEAT, vmin=0, vmax=spread((0, difference.max()))[1])
    hide_frame(off)
    off.set_title("|difference|", fontsize=8)
    cells[5].colorbar(drawn, ax=off, shrink=0.6).ax.tick_params(labelsize=6)


def draw_numbers(bars: Axes, counts: Axes, found: Explanation, normal: Normal) -> None:
    """Draws the completions' distances, and where the window stands among the normal ones."""
    numbers = np.arange(1, len(found.distances) + 1)
    colours = [COLOURS[1] if i == found.closest else COLOURS[0] for i in range(len(numbers))]
    bars.barh(numbers, found.distances.numpy(), color=colours)
    bars.invert_yaxis()
    bars.set_yticks(numbers)
    bars.set_title(f"{found.metric.partition('_')[2] or 'distance'} distance", fontsize=8)
    value, words = standing(found, normal)
    counts.hist(normal.scores, bins=40, color=COLOURS[0], alpha=0.6)
    counts.axvline(value, color=COLOURS[1], linewidth=1.5)
    counts.set_yticks([])
    counts.set_title("\n".join(textwrap.wrap(words, 38)), fontsize=8)
    for axes in (bars, counts):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
