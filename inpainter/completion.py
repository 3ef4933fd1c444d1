"""Pluralistic completion: each window's hole completed M times under channel dropout.

The plain way: every completion is a pass of the whole generator. N windows, M completions, C
channels, H x W window, h x w hole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from common.runtime import generator_for
from inpainter.blocks import Drop
from inpainter.critic import Critic
from inpainter.dropout import ChannelDropout, ElementDropout, draw_keep_masks, live_layers
from inpainter.generator import Generator
from inpainter.masks import centre_crop, centre_mask
from inpainter.scores import distances_over, l2_distance, metric_values, spaces_of
from inpainter.settings import GeneratorConfig, Metric, TestConfig

DrawDropout = Callable[[Sequence[int], int], Drop | None]
"""(window numbers, m) -> what the m-th completion of these windows drops."""


def channel_dropout_of(
    layers: dict[str, int], M: int, p: float, seed: int, image_name: str, shared: bool = False
) -> DrawDropout:
    """Channel dropout drawn for each window from the seed, the image's name and its number.

    layers: name -> channels. Results so depend neither on the batch nor on the windows before; the
    first completions of a larger M are those of a smaller. shared: all windows drop the same.
    """
    drawn: dict[int, dict[str, Tensor]] = {}

    def draw(numbers: Sequence[int], m: int) -> ChannelDropout:
        if m == 0:
            drawn.clear()
            for number in numbers:
                generator = generator_for(seed, image_name, "all" if shared else number)
                drawn[number] = draw_keep_masks(layers, M, p, generator)
        keep = {name: torch.stack([drawn[n][name][m] for n in numbers]) for name in layers}
        return ChannelDropout(keep, p)

    return draw


def element_dropout_of(layers: Sequence[str], p: float, seed: int, image_name: str) -> DrawDropout:
    """Elementwise dropout (`netG.dropout_type: 1D`), drawn for each window and completion."""

    def draw(numbers: Sequence[int], m: int) -> ElementDropout:
        generators = [generator_for(seed, image_name, number, m) for number in numbers]
        return ElementDropout(layers, p, generators)

    return draw


def dropout_of(
    generator: Generator, netG: GeneratorConfig, test: TestConfig, seed: int, image_name: str
) -> DrawDropout | None:
    """What drops while completing the windows of one image; none where nothing does."""
    channels = generator.droppable_layers()
    layers = {name: channels[name] for name in live_layers(netG, list(channels))}
    if test.droprate == 0 or not layers:
        return None
    if netG.dropout_type == "1D":
        return element_dropout_of(list(layers), test.droprate, seed, image_name)
    shared = test.share_dropout_masks
    M, p = test.heatmap_M_inpaint, test.droprate
    return channel_dropout_of(layers, M, p, seed, image_name, shared)


class Scorer(Protocol):
    """What makes completions and sees them as the metrics do, in whichever way."""

    metrics: tuple[Metric, ...]
    mask_hw: tuple[int, int]
    spaces: frozenset[str]

    def completions(
        self, windows: Tensor, numbers: Sequence[int], draw: DrawDropout | None
    ) -> Iterator[Tensor]: ...

    def represent(self, holes: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class WindowScorer:
    """Scores windows by completion distance: the oracle of every faster way."""

    generator: Generator
    critic: Critic | None
    """Its features are the space of the `_feature` metrics; none where there are no such."""
    metrics: tuple[Metric, ...]
    M: int
    mask_hw: tuple[int, int]
    spaces: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spaces", frozenset(spaces_of(self.metrics)))

    @torch.inference_mode()
    def __call__(
        self, windows: Tensor, numbers: Sequence[int], draw: DrawDropout | None
    ) -> dict[Metric, Tensor]:
        """Scores of a batch: every metric's (N,) values, larger = more anomalous.

        windows: (N, C, H, W) in [-1, 1]; numbers: the windows' numbers in their image.
        """
        return score_windows(self, windows, numbers, draw)

    def completions(
        self, windows: Tensor, numbers: Sequence[int], draw: DrawDropout | None
    ) -> Iterator[Tensor]:
        """The holes' completions, (N, C, h, w) each, one after the other; one if nothing drops."""
        for m in range(self.M if draw is not None else 1):
            yield self.complete(windows, draw(numbers, m) if draw is not None else None)

    def complete(self, windows: Tensor, drop: Drop | None) -> Tensor:
        """One completion of every window's hole: (N, C, H, W) -> (N, C, h, w) in [-1, 1]."""
        mask = centre_mask(tuple(windows.shape[2:]), self.mask_hw, windows.device)
        mask = mask.expand(len(windows), -1, -1, -1)
        return centre_crop(self.generator(windows * (1 - mask), mask, drop).fine, self.mask_hw)

    def represent(self, holes: Tensor) -> dict[str, Tensor]:
        """Holes (N, C, h, w) as the metrics' spaces see them: pixels, critic features, or both."""
        spaces = {}
        if "image" in self.spaces:
            spaces["image"] = holes
        if "feature" in self.spaces:
            spaces["feature"] = self.critic.features(holes)
        return spaces


def score_windows(
    scorer: "Scorer", windows: Tensor, numbers: Sequence[int], draw: DrawDropout | None
) -> dict[Metric, Tensor]:
    """Every metric's (N,) values of a batch, from the completions that the scorer makes.

    windows: (N, C, H, W) in [-1, 1]; numbers: the windows' numbers in their image.
    """
    truth = scorer.represent(centre_crop(windows, scorer.mask_hw))
    distances: dict[str, list[Tensor]] = {space: [] for space in truth}
    if scorer.spaces - {"no_dropout"}:
        for completion in scorer.completions(windows, numbers, draw):
            estimate = scorer.represent(completion)
            for space, values in distances.items():
                values.append(l2_distance(truth[space], estimate[space]))
    stacked = {space: distances_over(values) for space, values in distances.items() if values}
    if "no_dropout" in scorer.spaces:
        (estimate,) = scorer.completions(windows, numbers, None)
        distance = l2_distance(centre_crop(windows, scorer.mask_hw), estimate)
        stacked["no_dropout"] = distance[:, None]
    return metric_values(scorer.metrics, stacked)
