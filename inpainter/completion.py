"""Pluralistic completion: each window's hole completed M times under channel dropout.

The plain way: every completion is a pass of the whole generator. N windows, M completions, C
channels, H x W window, h x w hole.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.devices import upcast_to_fp32
from inpainter.calibration import DESCRIPTION, describe
from inpainter.networks.dropout import Drop, ImageDropout, WindowMasks, active_dropout_layers
from inpainter.networks.generator import Generator
from inpainter.settings import GeneratorConfig, Metric, TestConfig
from inpainter.windows import centre_crop, centre_mask

DETAIL = "detail"
"""Key of the details among a batch's values."""
CELLS = 8
"""Cells along a hole's side in which it is told where the completion is off."""


def dropout_of(
    generator: Generator, netG: GeneratorConfig, test: TestConfig, seed: int, image_name: str
) -> ImageDropout | None:
    """What drops while completing the windows of one image; None where nothing does."""
    channels = generator.droppable_layers()
    layers = {name: channels[name] for name in active_dropout_layers(netG, list(channels))}
    if test.droprate == 0 or not layers:
        return None
    return ImageDropout(
        layers,
        test.heatmap_M_inpaint,
        test.droprate,
        seed,
        image_name,
        elementwise=netG.dropout_type == "1D",
        shared=test.share_dropout_masks,
    )


class FeatureNetwork(Protocol):
    """What the `_feature` metrics see holes through: the local critic, or a pretrained network."""

    def features(self, x: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Tensor]: ...


class Scorer(Protocol):
    """Interface of a window scorer: generates completions and maps them to the metric spaces."""

    metrics: tuple[Metric, ...]
    mask_hw: tuple[int, int]
    spaces: frozenset[str]

    def completions(self, windows: Tensor, masks: WindowMasks | None) -> Iterator[Tensor]: ...

    def represent(self, holes: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class WindowScorer:
    """Scores windows by completion distance: the reference implementation."""

    generator: Generator
    feature_network: FeatureNetwork | None
    """Its features are the space of the `_feature` metrics; None where there are no such."""
    metrics: tuple[Metric, ...]
    mask_hw: tuple[int, int]

    @property
    def spaces(self) -> frozenset[str]:
        """Where the metrics measure: "image", "feature", "no_dropout"."""
        return spaces_of(self.metrics)

    @torch.inference_mode()
    def __call__(
        self, windows: Tensor, masks: WindowMasks | None, *, more: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Scores of a batch: every metric's (N,) values, larger = more anomalous.

        windows: (N, C, H, W) in [-1, 1]; masks: channels that completions keep, None without
        dropout. more: what else to return, DESCRIPTION or DETAIL; see score_windows.
        """
        return score_windows(self, windows, masks, more=more)

    def completions(self, windows: Tensor, masks: WindowMasks | None) -> Iterator[Tensor]:
        """The holes' completions, (N, C, h, w) each, one after the other; one if nothing drops."""
        for m in range(1 if masks is None else masks.M):
            yield self.complete(windows, None if masks is None else masks.completion(m))

    def complete(self, windows: Tensor, drop: Drop | None) -> Tensor:
        """One completion of every window's hole: (N, C, H, W) -> (N, C, h, w) in [-1, 1]."""
        mask = centre_mask(tuple(windows.shape[2:]), self.mask_hw, windows.device)
        mask = mask.expand(len(windows), -1, -1, -1)
        return centre_crop(self.generator(windows * (1 - mask), mask, drop).fine, self.mask_hw)

    def represent(self, holes: Tensor) -> dict[str, Tensor]:
        """Holes (N, C, h, w) as the metrics' spaces see them: pixels, features, or both."""
        spaces = {}
        if "image" in self.spaces:
            spaces["image"] = holes
        if "feature" in self.spaces:
            spaces["feature"] = self.feature_network.features(holes)
        return spaces


def score_windows(
    scorer: Scorer, windows: Tensor, masks: WindowMasks | None, *, more: Collection[str] = ()
) -> dict[str, Tensor]:
    """Every metric's (N,) values of a batch, from the completions that the scorer makes.

    windows: (N, C, H, W) in [-1, 1]; masks: channels that completions keep, None without
    dropout. more: also DESCRIPTION, (N, F), what inpainter.calibration.describe says of them, or
    DETAIL, (N, 2, CELLS, CELLS), where in the holes the completions are off.
    """
    truth = scorer.represent(centre_crop(windows, scorer.mask_hw))
    distances: dict[str, list[Tensor]] = {space: [] for space in truth}
    moments = Moments()
    if scorer.spaces - {"no_dropout"}:
        for completion in scorer.completions(windows, masks):
            estimate = scorer.represent(completion)
            for space, values in distances.items():
                values.append(l2_distance(truth[space], estimate[space]))
            if more:
                moments.add(completion)
    if "no_dropout" in scorer.spaces:
        (estimate,) = scorer.completions(windows, None)
        distances["no_dropout"] = [l2_distance(centre_crop(windows, scorer.mask_hw), estimate)]
        if more and moments.count == 0:
            moments.add(estimate)
    stacked = {space: torch.stack(values, dim=1) for space, values in distances.items()}  # (N, M)
    result: dict[str, Tensor] = dict(metric_values(scorer.metrics, stacked))
    if DESCRIPTION in more:
        result[DESCRIPTION] = describe(windows, moments.mean, moments.spread())
    if DETAIL in more:
        result[DETAIL] = detail_of(centre_crop(windows, scorer.mask_hw), moments.mean)
    return result


def detail_of(truth: Tensor, completion: Tensor) -> Tensor:
    """The mean squared difference in CELLS x CELLS cells of each hole, by its sign.

    (N, C, h, w) twice -> (N, 2, CELLS, CELLS) float32 >= 0: that of pixels that are brighter than
    their completion, and of darker ones.
    """
    difference = upcast_to_fp32(truth - completion)
    signs = torch.stack([difference.clamp(min=0), difference.clamp(max=0)], dim=1)
    return F.adaptive_avg_pool2d(signs.square().mean(dim=2), CELLS).float()


class Moments:
    """Mean and spread of completions that come one after the other (Welford's sums)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())
        """(N, C, h, w) both, from the first completion on."""

    def add(self, completion: Tensor) -> None:
        """Takes in one completion of every window, (N, C, h, w)."""
        self.count += 1
        if self.count == 1:
            self.mean = completion.float().clone()
            self.squares = torch.zeros_like(self.mean)
            return
        difference = completion - self.mean
        self.mean += difference / self.count
        self.squares += difference * (completion - self.mean)

    def spread(self) -> Tensor:
        """Standard deviation between the completions, averaged over pixels and channels: (N,)."""
        return (self.squares / max(self.count - 1, 1)).sqrt().mean(dim=(1, 2, 3))


def l2_distance(truth: Tensor, completion: Tensor) -> Tensor:
    """Euclidean distance of each sample, over all other dimensions; (N, ...) twice -> (N,) >= 0."""
    return upcast_to_fp32((truth - completion).flatten(1)).norm(dim=1)


def reduce_distances(distances: Tensor, reduction: str) -> Tensor:
    """Smallest (MCD), mean (MeanCD) or lower median (MedCD) over the completions.

    distances: (N, M) -> (N,). MCD is equation 3 of the paper; the median of an even M is the lower
    one, as published (P23).
    """
    match reduction:
        case "MCD":
            return distances.amin(dim=1)
        case "MeanCD":
            return distances.mean(dim=1)
        case _:
            return distances.median(dim=1).values


def spaces_of(metrics: Sequence[Metric]) -> frozenset[str]:
    """The spaces that the metrics measure in: "image", "feature", or "no_dropout" by itself."""
    return frozenset(m if m == "no_dropout" else m.partition("_")[2] for m in metrics)


def metric_values(metrics: Sequence[Metric], distances: dict[str, Tensor]) -> dict[Metric, Tensor]:
    """Every metric of N windows, (N,) each.

    distances: by space, (N, M) each; "no_dropout" is (N, 1).
    """
    values = {}
    for metric in metrics:
        reduction, _, space = metric.partition("_")
        if metric == "no_dropout":
            values[metric] = distances["no_dropout"][:, 0]
        else:
            values[metric] = reduce_distances(distances[space], reduction)
    return values
