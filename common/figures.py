"""Figures, saved as PNG or SVG and never shown.

Without pyplot, so without global state. Brighter heat is more anomalous. Images are (H, W),
(1, H, W) or (3, H, W) in [0, 1], heatmaps and masks (H, W) of the same size; arrays or CPU tensors.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.ndimage import binary_erosion

from common.files import write_atomic

mpl.rcParams["text.parse_math"] = False  # a $ in a file's name starts no formula
mpl.rcParams["text.usetex"] = False

DPI = 130
LONGEST_TITLE = 100
SVG_SIZE = (3.8, 3.4)
"""Inches, so that an SVG shown in a column of 19 rem can be read."""
HEAT = "magma"
BOX_COLOUR = "#35e0ff"  # stands out on grey and on magma
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Okabe and Ito's, told apart by colour-blind readers; after the last they repeat, dashed

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]  # x and y (n,) by name
Target = Path | BinaryIO
"""Where a plot goes: to a path as PNG, to an open file as SVG."""


class SheetRow(NamedTuple):
    """One image of a contact sheet."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    """(H, W), non-zero = lesion."""
    heatmaps: Sequence[np.ndarray | None]
    """(H, W) per heatmap column, larger = more anomalous; None leaves the cell empty."""


def heatmap_panel(
    image: np.ndarray,
    heatmap: np.ndarray,
    path: Path,
    title: str = "",
    *,
    boxes: Sequence[Sequence[float]] = (),
    score_name: str = "anomaly score",
) -> None:
    """Saves the image beside the heatmap overlaid on it, with colour bar and boxes.

    heatmap: (H, W); where it is NaN (not computed yet) there is no colour. boxes: (top, left,
    height, width, …) in pixels. Raises ValueError where the sizes differ.
    """
    picture = as_picture(image)
    heat = as_map(heatmap, picture, title or str(path))
    panel_height = float(np.clip(4.6 * heat.shape[0] / heat.shape[1], 1.6, 9.0))
    figure = Figure(figsize=(10.2, panel_height + 0.6), layout="constrained")
    plain, overlaid = figure.subplots(1, 2)
    show_image(plain, picture)
    norm = show_overlay(overlaid, picture, heat)
    for axes, (top, left, height, width, *_) in itertools.product((plain, overlaid), boxes):
        corner = (left - 0.5, top - 0.5)  # a pixel's centre has its whole coordinates
        axes.add_patch(Rectangle(corner, width, height, fill=False, color=BOX_COLOUR, lw=1.4))
    beside = overlaid.inset_axes((1.02, 0, 0.04, 1))
    bar = figure.colorbar(ScalarMappable(norm, HEAT), cax=beside)
    bar.set_label(score_name, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    figure.suptitle(shortened(title), fontsize=11)
    save(figure, path)


def contact_sheet(
    rows: Sequence[SheetRow], path: Path, *, columns: Sequence[str], title: str = ""
) -> None:
    """Saves a table of pictures: image | truth | a heatmap per column.

    columns: one title per heatmap. Each heatmap's colours are scaled by itself (1st to 99.8th
    percentile), so they do not compare images. Raises ValueError where a row's sizes or number of
    heatmaps differ.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    height, width = as_picture(rows[0].image).shape[:2]
    cell_height = float(np.clip(2.0 * height / width, 0.9, 4.0))
    size = (2.0 * (2 + len(columns)) + 0.3, cell_height * len(rows) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01)
    grid = figure.subplots(len(rows), 2 + len(columns), squeeze=False)
    for cells, row in zip(grid, rows, strict=True):
        if len(row.heatmaps) != len(columns):
            raise ValueError(f"{row.name}: {len(row.heatmaps)} heatmaps, {len(columns)} columns")
        draw_row(cells, row)
    for axes, name in zip(grid[0], ["image", "truth", *columns], strict=True):
        axes.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def draw_row(cells: Sequence[Axes], row: SheetRow) -> None:
    """Draws one image of a contact sheet into its row of axes."""
    picture = as_picture(row.image)
    show_image(cells[0], picture)
    cells[0].set_ylabel(row.name[-30:], fontsize=8)
    show_image(cells[1], picture)
    truth = as_map(row.truth, picture, f"{row.name}, truth") != 0
    if truth.any():
        cells[1].contourf(truth, levels=[0.5, 1.5], colors=[BOX_COLOUR], alpha=0.2)
        cells[1].contour(truth, levels=[0.5], colors=[BOX_COLOUR], linewidths=1.0)
    for axes, heatmap in zip(cells[2:], row.heatmaps, strict=True):
        hide_frame(axes)
        if heatmap is not None:
            heat = as_map(heatmap, picture, row.name)
            low, high = spread(np.nanpercentile(heat, [1, 99.8]))
            axes.imshow(heat, cmap=HEAT, vmin=low, vmax=high)


def roc_curves(curves: Curves, target: Target, title: str = "") -> None:
    """Saves ROC curves by name: x false, y true positive rate; the diagonal is chance."""
    figure, axes = plot_axes(title, "false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":", label="chance")
    axes.set_aspect("equal")
    draw_curves(figure, axes, curves, target)


def precision_recall_curves(
    curves: Curves, target: Target, title: str = "", *, prevalence: float
) -> None:
    """Saves precision-recall curves by name: x recall, y precision.

    prevalence: share of anomalous entries, which is chance's precision.
    """
    figure, axes = plot_axes(title, "recall", "precision")
    axes.axhline(prevalence, color="0.6", lw=1, ls=":", label=f"chance ({prevalence:.3g})")
    draw_curves(figure, axes, curves, target)


def froc_curves(
    curves: Curves, target: Target, title: str = "", *, per: str, limits: tuple[float, float]
) -> None:
    """Saves FROC curves by name: x false positives per `per`, y share of lesions found.

    limits: the part of x that is shown, on a logarithmic scale.
    """
    figure, axes = plot_axes(title, f"false positives per {per}", "share of lesions found")
    axes.set_xscale("log", base=2)
    ticks = 2.0 ** np.arange(np.floor(np.log2(limits[0])), np.log2(limits[1]) + 1)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    drawn = {
        name: (np.append(x.clip(limits[0] / 2), max(x[-1], limits[1])), np.append(y, y[-1]))
        for name, (x, y) in curves.items()
    }  # from the left edge, where 0 has no place, to the right one
    draw_curves(figure, axes, drawn, target, limits)


def score_histogram(
    edges: np.ndarray,
    counts: Mapping[str, np.ndarray],
    target: Target,
    title: str = "",
    *,
    score_name: str = "anomaly score",
) -> None:
    """Saves the distributions of scores, each scaled to an area of 1.

    edges: (bins + 1,) rising. counts: per name (bins,), normal first.
    """
    figure, axes = plot_axes(title, score_name, "density")
    for (name, values), colour in zip(counts.items(), COLOURS, strict=False):
        density = np.asarray(values) / (max(np.sum(values), 1) * np.diff(edges))
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.25)
        axes.stairs(
            density, edges, color=colour, linewidth=1.5, label=f"{name} (n = {np.sum(values):,})"
        )
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
    save_plot(figure, axes, target)


def plot_axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_curves(
    figure: Figure,
    axes: Axes,
    curves: Curves,
    target: Target,
    x_limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Draws curves of values in [0, 1] and saves the figure."""
    for number, (name, (x, y)) in enumerate(curves.items()):
        style = "-" if number < len(COLOURS) else "--"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, y, style, color=colour, linewidth=1.8, label=name)
    axes.set(xlim=x_limits, ylim=(0, 1.01))
    save_plot(figure, axes, target)


def save_plot(figure: Figure, axes: Axes, target: Target) -> None:
    axes.legend(fontsize=8, loc="best", frameon=False)
    save(figure, target)


def show_image(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    hide_frame(axes)


def show_overlay(axes: Axes, picture: np.ndarray, heat: np.ndarray) -> Normalize:
    """Draws heat over the image, the more opaque the hotter; NaN is transparent.

    Returns the scale of its colours, from the smallest to the largest score.
    """
    show_image(axes, picture)
    known = np.isfinite(heat)
    extremes = (heat[known].min(), heat[known].max()) if known.any() else (0.0, 1.0)
    norm = Normalize(*spread(extremes), clip=True)
    axes.imshow(heat, cmap=HEAT, norm=norm, alpha=opacity(heat, norm))
    return norm


def opacity(heat: np.ndarray, norm: Normalize) -> np.ndarray:
    """How opaque heat (H, W) lies over its image, in [0, 1]: more where hotter; NaN not at all."""
    strength = np.asarray(norm(np.nan_to_num(heat)), dtype=float)
    return np.where(np.isfinite(heat), 0.1 + 0.6 * strength, 0)


def overlay(
    image: np.ndarray,
    heatmap: np.ndarray,
    limits: tuple[float, float],
    *,
    outlined: np.ndarray | None = None,
) -> np.ndarray:
    """The heatmap in colours over its image: (H, W, 3) uint8.

    limits: scores of the darkest and of the brightest colour. outlined: (H, W), not zero in regions
    whose borders are drawn. Raises ValueError where sizes differ.
    """
    picture = as_picture(image)
    heat, norm = as_map(heatmap, picture, "image"), Normalize(*spread(limits), clip=True)
    colours = mpl.colormaps[HEAT](norm(np.nan_to_num(heat)))[:, :, :3]
    below = picture if picture.ndim == 3 else picture[:, :, None]
    alpha = opacity(heat, norm)[:, :, None]
    drawn = alpha * colours + (1 - alpha) * below
    if outlined is not None:
        inside = as_map(outlined, picture, "outline") != 0
        drawn[inside & ~binary_erosion(inside)] = to_rgb(BOX_COLOUR)
    return (drawn * 255).round().astype(np.uint8)


def heat_colours(n: int = 9) -> list[str]:
    """The colours of heat from low to high as n texts #rrggbb, for a legend."""
    return [to_hex(colour) for colour in mpl.colormaps[HEAT](np.linspace(0, 1, n))]


def shortened(title: str) -> str:
    """A title that fits a figure: of a long one the end, where names differ."""
    return title if len(title) <= LONGEST_TITLE else "…" + title[1 - LONGEST_TITLE :]


def hide_frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def spread(limits: Sequence[float]) -> tuple[float, float]:
    """Limits that differ, so that a constant heatmap can be drawn."""
    low, high = float(limits[0]), float(limits[1])
    return (low, high) if high > low else (low, low + 1.0)


def as_picture(image: np.ndarray) -> np.ndarray:
    """An image (H, W), (1, H, W) or (3, H, W) as matplotlib wants it: (H, W) or (H, W, 3)."""
    picture = np.asarray(image, dtype=np.float32).clip(0, 1)
    if picture.ndim == 3 and picture.shape[0] in (1, 3):
        return picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
    if picture.ndim != 2:
        raise ValueError(f"expected (H, W), (1, H, W) or (3, H, W), got {picture.shape}")
    return picture


def as_map(values: np.ndarray, picture: np.ndarray, name: str) -> np.ndarray:
    """A heatmap or mask as an array. Raises ValueError where it has not the picture's size."""
    array = np.asarray(values)
    if array.shape != picture.shape[:2]:
        raise ValueError(f"{name}: image is {picture.shape[:2]}, map is {array.shape} (H, W)")
    return array


def save(figure: Figure, target: Target) -> None:
    """Writes a PNG, which appears whole or not at all, or an SVG without date and random names."""
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": "", "svg.fonttype": "path"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names in any script
        # The canvases draw once; figure.savefig would draw twice, the same.
        if isinstance(target, Path):
            figure.set_dpi(DPI)
            write_atomic(target, FigureCanvasAgg(figure).print_png)
        else:
            figure.set_size_inches(SVG_SIZE)
            FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
