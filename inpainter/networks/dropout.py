"""Which layers drop channels, and what they drop, as data. N samples or windows, M completions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.random_numbers import generator_for
from inpainter.settings import GeneratorConfig

Drop = Callable[[str, Tensor], Tensor]
"""Called as drop(layer name, activations (N, C, H, W)); returns them with what it drops zeroed."""


def active_dropout_layers(config: GeneratorConfig, droppable: Sequence[str]) -> list[str]:
    """Names of the layers that drop while completing, by `netG.dropout_which`.

    CUSTOM takes the layers whose published module path, `<stage>.<layer>.dropout`, contains an
    entry of the custom lists (P2, P3).
    """
    coarse = [name for name in droppable if name.startswith("coarse_generator.")]
    fine = [name for name in droppable if name.startswith("fine_generator.")]
    match config.dropout_which:
        case "ALL":
            return [*coarse, *fine]
        case "COARSE":
            return coarse
        case "FINE":
            return fine
        case "CUSTOM":
            return [
                *_containing(coarse, config.custom_drop_layers_coarse, config.strip_self_prefix),
                *_containing(fine, config.custom_drop_layers_fine, config.strip_self_prefix),
            ]


def _containing(names: Sequence[str], entries: Sequence[str], strip_self: bool) -> list[str]:
    if strip_self:
        entries = [entry.removeprefix("self.") for entry in entries]
    return [name for name in names if any(entry in f"{name}.dropout" for entry in entries)]


class ChannelDropout:
    """Dropout2d with given masks: kept channels are scaled by 1 / (1 - p), the others zeroed.

    keep: layer name -> (N, C) bool, true where the channel is kept; other layers keep everything.
    """

    def __init__(self, keep: Mapping[str, Tensor], p: float) -> None:
        self.keep = keep
        self.scale = 1 / (1 - p)

    def __call__(self, layer: str, x: Tensor) -> Tensor:
        keep = self.keep.get(layer)
        if keep is None:
            return x
        return x * (keep.to(x.device, x.dtype) * self.scale)[:, :, None, None]


class ElementDropout:
    """Elementwise dropout (`netG.dropout_type: 1D`); one generator per sample draws."""

    def __init__(self, layers: Sequence[str], p: float, generators: Sequence[torch.Generator]):
        self.layers = frozenset(layers)
        self.p = p
        self.generators = generators

    def __call__(self, layer: str, x: Tensor) -> Tensor:
        if layer not in self.layers:
            return x
        draws = torch.stack([torch.rand(x.shape[1:], generator=g) for g in self.generators])
        return x * ((draws >= self.p).to(x.device, x.dtype) / (1 - self.p))


@dataclass(frozen=True)
class ChannelMasks:
    """The channels that the M completions of N windows keep."""

    keep: Mapping[str, Tensor]
    """Layer name -> (N, M, C) bool."""
    p: float
    """Probability with which a channel was dropped."""
    same: bool = False
    """All windows keep the same channels, so that the others need not be computed at all."""

    @property
    def M(self) -> int:  # noqa: N802
        return next(iter(self.keep.values())).shape[1]

    def completion(self, m: int) -> ChannelDropout:
        """What the m-th completion of these windows drops."""
        return ChannelDropout({name: keep[:, m] for name, keep in self.keep.items()}, self.p)

    def of_window(self, i: int) -> "ChannelMasks":
        """The masks of one of the windows."""
        keep = {name: masks[i : i + 1] for name, masks in self.keep.items()}
        return replace(self, keep=keep, same=True)


@dataclass(frozen=True)
class ElementMasks:
    """Elementwise dropout of N windows: masks as large as the activations, drawn when used."""

    layers: tuple[str, ...]
    M: int
    p: float
    keys: tuple[tuple[int | str, ...], ...]
    """What each window's random numbers depend on, besides the completion."""

    def completion(self, m: int) -> ElementDropout:
        """What the m-th completion of these windows drops."""
        return ElementDropout(self.layers, self.p, [generator_for(*key, m) for key in self.keys])

    def of_window(self, i: int) -> "ElementMasks":
        """The masks of one of the windows."""
        return replace(self, keys=self.keys[i : i + 1])


WindowMasks = ChannelMasks | ElementMasks


@dataclass(frozen=True)
class ImageDropout:
    """What drops while the windows of one image are completed; `masks` draws it, window by window.

    A window's masks follow from the seed, the image's name and the window's number alone, so
    results depend neither on the batch nor on the windows before. Each channel is kept with
    probability 1 - p. The first completions of a larger M are those of a smaller one.
    """

    layers: Mapping[str, int]
    """Active layers: name -> channels."""
    M: int
    p: float
    seed: int
    image_name: str
    elementwise: bool = False
    """`netG.dropout_type: 1D`."""
    shared: bool = False
    """All windows drop the same channels."""

    def masks(self, numbers: Sequence[int]) -> WindowMasks:
        """What the completions of these windows drop, by their numbers in the image."""
        if self.elementwise:
            keys = tuple((self.seed, self.image_name, number) for number in numbers)
            return ElementMasks(tuple(self.layers), self.M, self.p, keys)
        # Seeded by hash, drawn by torch: another generator would change every heatmap made so far.
        drawn_for = ["all"] * len(numbers) if self.shared else numbers
        generators = [generator_for(self.seed, self.image_name, each) for each in drawn_for]
        draws = [torch.rand(self.M, sum(self.layers.values()), generator=g) for g in generators]
        keep = split_by_layer(torch.stack(draws) >= self.p, self.layers)
        return ChannelMasks(keep, self.p, same=self.shared)


def split_by_layer(keep: Tensor, layers: Mapping[str, int]) -> dict[str, Tensor]:
    """(..., all channels) -> by layer (..., C); layers: name -> channels."""
    return dict(zip(layers, keep.split(list(layers.values()), dim=-1), strict=True))
