"""The HTML page of a DIA evaluation: its numbers, its curves, its worst images.

Scores here are larger for normal images, as published; how wrong one is, is reckoned from its
negative. N images.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_curve
from torch import Tensor

from common.checkpoint import load_tensors
from common.config import config_to_yaml, resolve_path
from common.figures import roc_curves, score_histogram
from common.files import escaped
from common.html_report import (
    Chart,
    Entry,
    Gallery,
    Page,
    Picture,
    Record,
    Table,
    Tile,
    as_svg,
    common_facts,
    named,
    picture_of,
    record,
    value_and_ends,
    within_budget,
    wrongness,
)
from common.image_sets import ImageSet
from common.images import ImageError
from common.metrics import format_interval
from dia.localisation import Heatmaps
from dia.predictor import TrainedEncoder
from dia.results import HISTOGRAM_BINS, NORMAL, Results, SetScores, labelled
from dia.settings import DiaConfig
from diffusion_models.dissolve import (
    Dissolver,
    from_dissolving_size,
    load_dissolver,
    to_dissolving_size,
)

LOG = logging.getLogger(__name__)
DISSOLVING_STEP = 100
"""Of the dissolved copies that the page shows: the most that published trainings dissolve."""
KINDS = {
    "missed": "anomaly, high score",
    "found": "anomaly",
    "alarm": "normal, low score",
    "quiet": "normal",
}


@dataclass(frozen=True)
class Scored:
    """An evaluation that is finished."""

    encoder: TrainedEncoder
    sets: Mapping[str, ImageSet]
    scores: Mapping[str, Mapping[str, SetScores]]
    """By score, then by set."""
    results: Mapping[str, Results]
    facts: Mapping[str, Any]
    """What results.json says of mode, dataset and checkpoint."""
    heatmaps: Heatmaps
    """Of the first score; empty where there are none."""
    dissolver: Dissolver | None
    """What `load_configured` returned."""


class Shown(NamedTuple):
    """An image of the gallery before it is read."""

    set_name: str
    images: ImageSet
    number: int
    value: float
    """Of the number that the gallery shows."""
    wrongness: float
    kind: str
    """A key of KINDS."""
    remark: str


def dia_page(scored: Scored, command: Sequence[str]) -> Page:
    """The page of an evaluation, with the images on which the first score is most wrong.

    Reads those images, and dissolves them where there is a dissolver.
    """
    first = next(iter(scored.results))
    titles = {name: title_of(name, images) for name, images in scored.sets.items()}
    counts = {name: len(values.names) for name, values in scored.scores[first].items()}
    anomalies = ", ".join(f"{n} of {titles[name]}" for name, n in counts.items() if name != NORMAL)
    config = scored.encoder.config
    return Page(
        title=f"DIA: {config.data.dataset}",
        lead=(
            f"{counts[NORMAL]} normal images against {anomalies}. Larger scores are more normal. "
            "Intervals are 95 % bootstrap intervals over images."
        ),
        tiles_title=first,
        tiles=tiles(scored.results[first]),
        warnings=warnings(scored.facts),
        tables=[numbers(scored.results, titles)],
        charts=[c for score, sets in scored.scores.items() for c in charts(score, sets, titles)],
        gallery=gallery(scored, first, titles),
        facts=[*common_facts(command), *plain_facts(scored.facts)],
        records=records(config, scored.facts),
    )


def title_of(name: str, images: ImageSet) -> str:
    """A set by the name of its class, where it is one class, else by its own."""
    numbers = set(images.labels.tolist())
    if name.startswith("one_class_") and len(numbers) == 1:
        return escaped(images.classes[numbers.pop()])
    return escaped(name)


def tiles(result: Results) -> list[Tile]:
    """Image AUROC against all anomalies, and the mean over sets where there are several."""
    found = [Tile("image AUROC, all anomalies", *value_and_ends(result.pooled))]
    if len(result.by_set) > 1:
        note = f"of {len(result.by_set)} sets of anomalies"
        found.append(Tile("image AUROC, mean", f"{result.one_class_mean:.3f}", note))
    return found


def warnings(facts: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    if facts["selected_by"] == "test":
        found.append(
            "The checkpoint was chosen by its AUROC on the test images (select_by: test, as "
            "published), so these numbers are too good."
        )
    if facts["images_left_out"]:
        found.append(f"{len(facts['images_left_out'])} images could not be read.")
    return found


def numbers(results: Mapping[str, Results], titles: Mapping[str, str]) -> Table:
    """AUROC of every score against every set of anomalies."""
    rows = []
    for score, result in results.items():
        sets = result.by_set.items()
        rows += [[score, titles[name], format_interval(value)] for name, value in sets]
        if len(sets) > 1:
            rows.append([score, "mean of these", f"{result.one_class_mean:.3f}"])
            rows.append([score, "all of them together", format_interval(result.pooled)])
    return Table("AUROC of every score", ["score", "normal images against", "AUROC"], rows)


def charts(score: str, sets: Mapping[str, SetScores], titles: Mapping[str, str]) -> list[Chart]:
    """ROC curves of one score against each set, and how the sets' scores are distributed."""
    normal, lines = sets[NORMAL].scores, {}
    for name, scored in sets.items():
        if name != NORMAL:
            lines[titles[name]] = roc_curve(*labelled(normal, scored.scores))[:2]
    every = np.concatenate([scored.scores for scored in sets.values()])
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-6), HISTOGRAM_BINS + 1)
    counts = {titles[n]: np.histogram(s.scores, edges)[0] for n, s in sets.items()}
    curve, spread = f"ROC of {score} over images", f"How {score} is distributed over images"
    roc = as_svg(lambda file: roc_curves(lines, file))
    histogram = as_svg(
        lambda file: score_histogram(edges, counts, file, score_name=f"{score}, larger = normal")
    )
    ends = f"{edges[0]:.3g} to {edges[-1]:.3g}"
    return [
        Chart(curve, roc, f"{curve}: normal images against {', '.join(lines)}"),
        Chart(spread, histogram, f"{spread}: {', '.join(counts)}, {ends}"),
    ]


def gallery(scored: Scored, score: str, titles: Mapping[str, str]) -> Gallery:
    """The images on which one score is most wrong."""
    shown = judge(scored.sets, scored.scores[score], titles)
    worst = sorted(shown, key=lambda one: -one.wrongness)
    worst = worst[: scored.encoder.config.evaluation.report_images]
    limits = heat_limits(scored.heatmaps, worst)
    drawn = draw_entries(worst, "score", scored.encoder, scored.dissolver, scored.heatmaps, limits)
    entries = within_budget(drawn)
    kinds = {kind: text for kind, text in KINDS.items() if any(e.kind == kind for e in entries)}
    note = (
        f"Score is {score}, larger for normal images. An anomaly is missed the worse the more "
        "normal images score as low; a normal image is a false alarm the worse the more anomalies "
        "score as high."
    )
    if scored.dissolver is not None:
        note += " Dissolved is the image without the detail that the diffusion model removes."
    if limits:
        note += (
            " Heatmaps say how much more normal the image becomes when a patch is blurred; their "
            "colours begin at no change."
        )
    return Gallery(entries, kinds, {"score": "score"}, len(shown), limits, note)


def judge(
    sets: Mapping[str, ImageSet], scores: Mapping[str, SetScores], titles: Mapping[str, str]
) -> list[Shown]:
    """How wrong the score of every image is that has one."""
    labels = [name != NORMAL for name, values in scores.items() for _ in values.names]
    values = np.concatenate([scored.scores for scored in scores.values()])
    wrong = iter(wrongness(labels, -values).tolist())
    found = []
    for name, scored in scores.items():
        number_of = {image: number for number, image in enumerate(sets[name].names)}
        for image, value in zip(scored.names, scored.scores.tolist(), strict=True):
            share = next(wrong)
            if name == NORMAL:
                kind = "alarm" if share >= 0.5 else "quiet"
                remark = f"{share:.0%} of the anomalies score as high"
            else:
                kind = "missed" if share >= 0.5 else "found"
                remark = f"{titles[name]}; {share:.0%} of the normal images score as low"
            number = number_of[image]
            found.append(Shown(name, sets[name], number, value, share, kind, remark))
    return found


def load_configured(encoder: TrainedEncoder) -> Dissolver | None:
    """The diffusion model that contrastive.diffusion_model_path names, if any.

    Raises CheckpointError, and ConfigError where it cannot dissolve images of the encoder's size.
    """
    settings, data = encoder.config.contrastive, encoder.config.data
    if settings.diffusion_model_path is None:
        return None
    path = resolve_path(settings.diffusion_model_path, "contrastive.diffusion_model_path")
    dissolver = load_dissolver(
        path,
        device=encoder.device,
        weights=settings.dissolve_weights,
        dissolve_range=settings.dissolve_range,
    )
    side = dissolver.image_size or settings.diff_resolution
    dissolver.require_fitting(path, side, "contrastive.diff_resolution")
    to_dissolving_size(torch.zeros(1, 3, data.side, data.side), side, data.row.fit)
    return dissolver


def heat_limits(heatmaps: Heatmaps, shown: Sequence[Shown]) -> dict[str, tuple[float, float]]:
    """From no change to the median of the shown images' largest values; {} without heatmaps."""
    keys = [(one.set_name, one.images.names[one.number]) for one in shown]
    files = [heatmaps[key] for key in keys if key in heatmaps]
    if not files:
        return {}
    maxima = [float(load_tensors(file).max()) for _, file in files]
    return {files[0][0]: (0.0, max(float(np.median(maxima)), 1e-6))}


def draw_entries(
    shown: Sequence[Shown],
    value: str,
    encoder: TrainedEncoder,
    dissolver: Dissolver | None = None,
    heatmaps: Heatmaps = MappingProxyType({}),
    limits: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> Iterator[Entry]:
    """Reads and draws one image after the other; those that cannot be read again are left out.

    value: key of the number that each has.
    """
    for one in shown:
        own = one.images.names[one.number]
        name = escaped(own)
        try:
            image = replace(one.images, size=None)[one.number].image
        except ImageError as error:
            LOG.warning("report.html does not show %s: %s", name, error)
            continue
        pictures: list[Picture] = [picture_of(image.numpy(), "image", f"{name}: {one.remark}")]
        if dissolver is not None:
            copy = dissolved(encoder, dissolver, one.images[one.number].image)
            step = min(DISSOLVING_STEP, dissolver.diffusion.steps - 1)
            alt = f"{name}, dissolved"
            pictures.append(picture_of(copy.numpy(), f"dissolved at t = {step}", alt))
        if (one.set_name, own) in heatmaps:
            metric, file = heatmaps[one.set_name, own]
            heat = load_tensors(file).numpy()
            alt = f"{metric} of {name}, at most {heat.max():.3g}"
            pictures.append(
                picture_of(image.numpy(), metric, alt, heatmap=heat, limits=limits[metric])
            )
        yield Entry(name, one.kind, one.remark, {value: one.value}, one.wrongness, pictures)


def dissolved(encoder: TrainedEncoder, dissolver: Dissolver, image: Tensor) -> Tensor:
    """An image (3, side, side) dissolved at the diffusion model's size, and brought back."""
    config = encoder.config
    resolution, fit = (
        dissolver.image_size or config.contrastive.diff_resolution,
        config.data.row.fit,
    )
    small = to_dissolving_size(image[None], resolution, fit)
    step = min(DISSOLVING_STEP, dissolver.diffusion.steps - 1)
    size = (image.shape[1], image.shape[2])
    return from_dissolving_size(dissolver(small, step), size, fit)[0].clamp(0, 1).cpu()


def records(config: DiaConfig, facts: Mapping[str, Any]) -> list[Record]:
    """Settings and names that are folded away."""
    found = [record("Settings of this evaluation", config_to_yaml(config))]
    if facts["images_left_out"]:
        found.append(record("Images that could not be read", named(facts["images_left_out"])))
    return found


def accuracy_page(
    encoder: TrainedEncoder,
    images: ImageSet,
    names: Sequence[str],
    probabilities: np.ndarray,
    facts: Mapping[str, Any],
    command: Sequence[str],
) -> Page:
    """The page of the modes of the class heads, with the images that look least like their class.

    names: of the images that could be read   probabilities: (N, classes) of these   facts: also
    error and ece, in percent.
    """
    number_of, shown = {name: number for number, name in enumerate(images.names)}, []
    for name, row in zip(names, probabilities, strict=True):
        number = number_of[name]
        truth, taken = int(images.labels[number]), int(row.argmax())
        kind = "found" if truth == taken else "missed"
        remark = f"is {class_name(images, truth)}"
        if truth != taken:
            remark += f", taken for {class_name(images, taken)}"
        value = float(row[truth]) if truth < row.size else 0.0  # a class that training lacked
        shown.append(Shown("test", images, number, value, 1 - value, kind, remark))
    worst = sorted(shown, key=lambda one: -one.wrongness)
    worst = worst[: encoder.config.evaluation.report_images]
    entries = within_budget(draw_entries(worst, "probability", encoder))
    kinds = {"missed": "wrong class", "found": "right class"}
    note = "Probability is that of the image's own class."
    values = {"probability": "probability"}
    return Page(
        title=f"DIA: {encoder.config.data.dataset}",
        lead=f"{len(names)} images, each taken for one of {len(images.classes)} classes.",
        tiles_title=str(facts["mode"]),
        tiles=[
            Tile("images of which the class is wrong", f"{facts['error']:.3f} %"),
            Tile("expected calibration error", f"{facts['ece']:.3f} %"),
        ],
        warnings=warnings(facts),
        tables=[],
        charts=[],
        gallery=Gallery(entries, kinds, values, len(shown), note=note),
        facts=[*common_facts(command), *plain_facts(facts)],
        records=records(encoder.config, facts),
    )


def class_name(images: ImageSet, number: int) -> str:
    """A class's name; its number where the encoder knows more classes than the images have."""
    return escaped(images.classes[number]) if number < len(images.classes) else f"class {number}"


def plain_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What results.json says of the evaluation, without the list of images left out."""
    return [(key, str(value)) for key, value in facts.items() if key != "images_left_out"]
