"""The gallery of a heatmap report: the worst images first, and what was completed at their peaks.

Larger scores are more anomalous. M completions of a hole of h w pixels.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps

from common.config import load_config
from common.errors import UserError
from common.figures import HEAT, as_picture, spread
from common.files import escaped
from common.html_report import (
    Entry,
    Gallery,
    Picture,
    picture_of,
    strip_picture,
    within_budget,
    wrongness,
)
from common.images import read_image
from inpainter.evaluation import UNUSABLE, Evaluation
from inpainter.evaluation_results import ImageRow, MetricResult
from inpainter.explain import Explanation, explained
from inpainter.heatmap_tables import VERDICTS, ImageTable, read_heatmap
from inpainter.predictor import Predictor, load_predictor
from inpainter.run_identity import read_identity
from inpainter.settings import PicardConfig

LOG = logging.getLogger(__name__)
BRIGHTEST = 0.5
"""Share of the images whose largest score is below the brightest colour of the heatmaps."""
KINDS = {
    "missed": "lesion, low score",
    "found": "lesion",
    "alarm": "normal, high score",
    "quiet": "normal",
}
VERDICT_KINDS = {
    "missed": "missed",
    "found": "found",
    "alarm": "false alarm",
    "quiet": "normal",
}
"""The same where the folder has verdicts."""
VALUES = {"score": "score", "auroc": "pixel AUROC", "ap": "pixel AP"}


class Judged(NamedTuple):
    """An image of the first metric with how wrong its score is."""

    row: ImageRow
    wrongness: float
    kind: str
    """A key of KINDS."""
    remark: str


def gallery(evaluation: Evaluation, most_images: int) -> Gallery:
    """The images on which the first metric's scores are most wrong, with all metrics' heatmaps."""
    first = evaluation.results[0]
    verdicts = verdicts_of(evaluation.settings.heatmap_dir, first)
    judged = sorted(judge(first, verdicts), key=lambda one: -one.wrongness)
    limits = {result.metric: colour_limits(result) for result in evaluation.results}
    predictor, why_none = predictor_behind(evaluation)
    drawn = draw_entries(evaluation, judged[:most_images], limits, predictor)
    entries = within_budget(drawn)
    note = f"Score is the largest {first.metric} of the image; "
    if first.image_level is None:
        note += "wrong is a low pixel AUROC."
    else:
        note += (
            "a lesion is missed the worse the more normal images score as high, and a false alarm "
            "is the worse the more images with a lesion score as low."
        )
    if verdicts is not None:
        note += " Missed, found and false alarm are the verdicts at the operating point."
    if evaluation.settings.image_dir is None:
        note += " Pass --image_dir to see the images under the heatmaps."
    note += why_none or (
        " Below each image: the window at its peak, its hole, what is in the hole, the "
        "completions, the closest of them, and how far that is; where the peak is beside the "
        "lesions, the same of the lesions' own peak. Grey values run from the window's darkest to "
        "its brightest."
    )
    texts = KINDS if verdicts is None else VERDICT_KINDS
    kinds = {kind: text for kind, text in texts.items() if any(e.kind == kind for e in entries)}
    return Gallery(entries, kinds, VALUES, len(first.rows), limits, note)


def verdicts_of(folder: Path, result: MetricResult) -> dict[str, bool] | None:
    """Image -> whether it was called abnormal; None unless all of the metric's images have one."""
    if not (folder / VERDICTS).is_file():
        return None
    table = ImageTable(folder / VERDICTS)
    found = {
        image: row["verdict"] == "abnormal"
        for image, rows in table.of_image.items()
        for row in rows
        if row["metric"] == result.metric
    }
    return found if all(row.image in found for row in result.rows) else None


def judge(result: MetricResult, verdicts: Mapping[str, bool] | None = None) -> list[Judged]:
    """How wrong each image's score is: beside those of the other kind, else by its pixel AUROC.

    verdicts: whether an image was called abnormal, by name; without them a score is taken for wrong
    where it would be for half of the other kind.
    """
    labels = [row.has_lesion for row in result.rows]
    if result.image_level is None:
        wrong = np.array([1 - (1 if row.auroc is None else row.auroc) for row in result.rows])
    else:
        wrong = wrongness(labels, [row.max_score for row in result.rows])
    found = []
    for row, value in zip(result.rows, wrong.tolist(), strict=True):
        is_wrong = value >= 0.5
        if verdicts is not None:
            is_wrong = verdicts[row.image] != row.has_lesion
        right, not_right = ("found", "missed") if row.has_lesion else ("quiet", "alarm")
        remark = ""
        if result.image_level is not None:
            other = "normal images score as high"
            if not row.has_lesion:
                other = "images with a lesion score as low"
            remark = f"{value:.0%} of the {other}"
        found.append(Judged(row, value, not_right if is_wrong else right, remark))
    return found


def colour_limits(result: MetricResult) -> tuple[float, float]:
    """Scores of the darkest and the brightest colour: the same in all images."""
    maxima = [row.max_score for row in result.rows]
    return float(result.pixels.histogram.edges[0]), float(np.quantile(maxima, BRIGHTEST))


def draw_entries(
    evaluation: Evaluation,
    judged: Sequence[Judged],
    limits: dict[str, tuple[float, float]],
    predictor: Predictor | None,
) -> Iterator[Entry]:
    """Reads and draws one image after the other; predictor: for what it completes at the peaks."""
    files = {r.metric: {entry.image: entry.file for entry in r.entries} for r in evaluation.results}
    for one in judged:
        row, name = one.row, escaped(one.row.image)
        heatmaps = {m: read_heatmap(of[row.image]) for m, of in files.items() if row.image in of}
        truth = evaluation.sources.annotations.labels(row.image, heatmaps[row.metric].shape)
        image = read_quietly(evaluation, row.image)
        pictures: list[Picture] = []
        if image is not None:
            what = "with the outline of its lesions" if row.has_lesion else "normal"
            pictures.append(picture_of(image, "image", f"{name}, {what}", truth=truth))
        for metric, heatmap in heatmaps.items():
            alt = f"{metric} of {name}, at most {heatmap.max():.3g}"
            pictures.append(
                picture_of(image, metric, alt, heatmap=heatmap, limits=limits[metric], truth=truth)
            )
        if image is not None and predictor is not None:
            path = evaluation.settings.image_dir / row.image
            pictures += completions(predictor, path, row, heatmaps[row.metric], truth)
        values = {"score": row.max_score, "auroc": row.auroc, "ap": row.ap}
        yield Entry(name, one.kind, one.remark, values, one.wrongness, pictures)


def predictor_behind(evaluation: Evaluation) -> tuple[Predictor | None, str]:
    """The networks that made the heatmaps, or None and why they are not used, in a sentence.

    The folder's run.txt names the checkpoint; one whose weights are others by now is not used.
    """
    folder = evaluation.settings.heatmap_dir
    metric = evaluation.results[0].metric
    if evaluation.settings.image_dir is None:
        return None, ""
    identity = read_identity(folder) or {}
    checkpoint, found, step = identity.get("checkpoint", "").rpartition(" step ")
    if not found or not (folder / "config.yaml").is_file():
        return None, f" No completions are shown: {escaped(str(folder))} names no checkpoint."
    try:
        config = load_config(
            PicardConfig, folder / "config.yaml", [f"test.heatmap_metrics=[{metric}]"]
        )
        distances = replace(config.test, calibration="off", scales=(1.0,))  # which are shown
        distances = replace(config, test=distances)
        predictor = load_predictor(checkpoint, int(step), distances, device="auto")
    except (UserError, OSError, ValueError) as error:
        LOG.warning("report.html shows no completions: %s", error)
        return None, f" No completions are shown: {escaped(str(error))}"
    if any(identity.get(role) != weights for role, weights in predictor.weights.items()):
        return None, f" No completions are shown: {escaped(checkpoint)} has other weights by now."
    return replace(predictor, config=config), ""


def completions(
    predictor: Predictor, path: Path, row: ImageRow, heatmap: np.ndarray, truth: np.ndarray
) -> list[Picture]:
    """What was completed at the heatmap's peak and, if that is beside the lesions, at theirs.

    heatmap, truth: (H, W); truth is non-zero in lesions. A strip per scale and place.
    """
    places = {"at the peak": np.unravel_index(heatmap.argmax(), heatmap.shape)}
    lesion = truth != 0
    if lesion.any() and not lesion[places["at the peak"]]:
        inside = np.where(lesion, heatmap, -np.inf)
        places["in the lesion"] = np.unravel_index(inside.argmax(), heatmap.shape)
    pixels = predictor.pixels_of(path)
    strips = []
    for where, (y, x) in places.items():
        for scale in predictor.config.test.scales:
            place = (int(x), int(y))
            found = explained(predictor, pixels, row.image, place, scale, row.metric)
            at = where if scale == 1 else f"{where}, at scale {scale:g}"
            strips.append(strip(found, f"{at} (column {x}, row {y})"))
    return strips


def strip(found: Explanation, where: str) -> Picture:
    """A window: itself, its hole, what is in it, the completions, the closest, the difference."""
    low, high = spread((float(found.window.min()), float(found.window.max())))

    def shown(values: np.ndarray) -> np.ndarray:
        return as_picture(((values - low) / (high - low)).clip(0, 1))

    window = found.window.numpy()
    top, left, h, w = found.hole_box
    without = window.copy()
    without[:, top : top + h, left : left + w] = (low + high) / 2
    made = ((found.completions + 1) / 2).numpy()
    truth = found.truth.numpy()
    difference = np.abs(made[found.closest] - truth).mean(axis=0)
    coloured = colormaps[HEAT](difference / max(float(difference.max()), 1e-6))[..., :3]
    M, number = len(made), found.closest + 1
    caption = (
        f"{where}: {M} completions, the closest number {number}, distance {found.distance:.4g}"
    )
    alt = f"{caption}. Window, hole, what is in it, all completions, the closest, |difference|"
    panels = [shown(window), shown(without), shown(truth), tiled([shown(one) for one in made])]
    return strip_picture([*panels, shown(made[found.closest]), coloured], caption, alt)


def tiled(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (h, w) or (h, w, 3) of one size in rows, about twice as wide as high, as one."""
    n_rows = max(1, round((len(pictures) / 2) ** 0.5))
    n_cols = -(-len(pictures) // n_rows)
    gap = max(1, pictures[0].shape[0] // 16)
    edges = [(0, gap), (0, gap), *[(0, 0)] * (pictures[0].ndim - 2)]
    cells = [np.pad(one, edges, constant_values=1) for one in pictures]
    cells += [np.ones_like(cells[0])] * (n_rows * n_cols - len(cells))
    rows = [np.concatenate(cells[i : i + n_cols], axis=1) for i in range(0, len(cells), n_cols)]
    return np.concatenate(rows)


def read_quietly(evaluation: Evaluation, image: str) -> np.ndarray | None:
    """The image (C, H, W) in [0, 1], or None, with a warning, where it cannot be read."""
    folder = evaluation.settings.image_dir
    if folder is None:
        return None
    try:
        settings = evaluation.settings
        shown = {"white_value": settings.white_value, "window": settings.window}
        return read_image(folder / image, **shown).numpy()
    except UNUSABLE as error:
        LOG.warning("report.html shows %s without its image: %s", escaped(image), error)
        return None
