"""Which layers drop channels, and the drawing of what they drop. N samples, M completions."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inpainter.settings import GeneratorConfig

KeepMasks = Mapping[str, Tensor]
"""Layer name -> (N, C) bool, true where the channel is kept; other layers keep everything."""


def live_layers(config: GeneratorConfig, droppable: Sequence[str]) -> list[str]:
    """Names of the layers that drop while completing, by `netG.dropout_which`.

    CUSTOM takes the layers whose published module path, `<stage>.<layer>.dropout`, contains an
    entry of the custom lists (quirks P2 and P3).
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
    """Dropout2d with given masks: kept channels are scaled by 1 / (1 - p), the others zeroed."""

    def __init__(self, keep: KeepMasks, p: float) -> None:
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


def draw_keep_masks(
    layers: Mapping[str, int], rows: int, p: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Layer -> (rows, C) bool, each channel kept with probability 1 - p.

    layers: name -> channels. Row i depends on the generator's state and on i only, so the first
    rows of a longer draw are those of a shorter one.
    """
    keep = torch.rand(rows, sum(layers.values()), generator=generator) >= p
    return dict(zip(layers, keep.split(list(layers.values()), dim=1), strict=True))
