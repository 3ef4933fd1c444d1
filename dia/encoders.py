"""Encoders: ResNet trunks with the four heads of CSI, in the published state-dict layout.

B images, C channels, H W pixels, d width of the penultimate features, K shifts.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

import torch
from torch import Tensor, nn

from common.checkpoint import (
    CheckpointError,
    load_module,
    load_tensors,
    require_finite_weights,
    require_state_dict,
)
from common.devices import upcast_to_fp32
from dia.settings import IMAGENET_WIDTH, EncoderName

LOG = logging.getLogger(__name__)
ENCODER_NAMES: tuple[str, ...] = get_args(EncoderName)
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
EPSILON = 1e-8
SMALL_POOL = 4
"""Side in pixels of the window that the published small-image networks average."""


class Heads(NamedTuple):
    """Encoder outputs for B images; heads that were not requested are None."""

    linear: Tensor
    """(B, classes) logits."""
    penultimate: Tensor
    """(B, d)."""
    simclr: Tensor | None = None
    """(B, 128), not normalised."""
    shift: Tensor | None = None
    """(B, K) logits."""
    joint: Tensor | None = None
    """(B, 4·classes) logits, shift-major."""
    projector: Tensor | None = None
    """(B, d), simsiam models only."""
    predictor: Tensor | None = None
    """(B, d), simsiam models only."""

    def in_fp32(self) -> "Heads":
        """The same outputs as float32, or as they are where that is wider."""
        return Heads(*(None if head is None else upcast_to_fp32(head) for head in self))


class Encoder(nn.Module):
    """A ResNet trunk with the heads `linear`, `simclr`, `shift` and `joint` on its features."""

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        width: int,
        *,
        n_classes: int,
        n_shifts: int,
        simclr_dim: int = 128,
        small_images: bool = False,
        simsiam: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        """Features per image, d."""
        self.small_images = small_images
        self.simsiam = simsiam
        self._stages = tuple(stages)
        self.linear = nn.Linear(width, n_classes)
        self.simclr_layer = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, simclr_dim)
        )
        self.shift_cls_layer = nn.Linear(width, n_shifts)
        self.joint_distribution_layer = nn.Linear(width, 4 * n_classes)
        for name, stage in stages.items():
            self.add_module(name, stage)
        if simsiam:
            self.projector = Projector(width)
            # SimSiam's predictor as published here: no batch norm, no bottleneck.
            layers = {"layer1": nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU())}
            layers["layer2"] = nn.Linear(width, width)
            self.predictor = nn.Sequential(OrderedDict(layers))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The stem's map and those of the four stages, for images (B, 3, H, W) in [0, 1]."""
        x = (images - 0.5) / 0.5
        maps = []
        for name in self._stages:
            x = self.get_submodule(name)(x)
            if name == self._stages[-5] or name.startswith("layer"):  # the stem's last part, stages
                maps.append(x)
        return maps

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (B, d) of images (B, 3, H, W) in [0, 1]."""
        last = self.feature_maps(images)[-1]
        return pool_small(last) if self.small_images else last.mean(dim=(2, 3))

    def forward(self, images: Tensor, *heads: str) -> Heads:
        """Runs the trunk and the heads that are named besides linear and penultimate.

        images: (B, 3, H, W) in [0, 1]; normalisation to [-1, 1] happens inside. heads: simclr,
        shift, joint, and for simsiam models projector and predictor; a ValueError names others.
        """
        known = ["simclr", "shift", "joint", *(["projector", "predictor"] if self.simsiam else [])]
        unknown = sorted(set(heads) - set(known))
        if unknown:
            raise ValueError(f"this encoder has no head {', '.join(unknown)}; it has {known}")
        penultimate = self.features(images)
        outputs: dict[str, Tensor] = {}
        base = penultimate
        if self.simsiam and {"simclr", "projector", "predictor"} & set(heads):
            # The simclr head of the simsiam models stands on the projector.
            base = outputs["projector"] = self.projector(penultimate)
        if "predictor" in heads:
            outputs["predictor"] = self.predictor(base)
        if "simclr" in heads:
            outputs["simclr"] = self.simclr_layer(base)
        if "shift" in heads:
            outputs["shift"] = self.shift_cls_layer(penultimate)
        if "joint" in heads:
            outputs["joint"] = self.joint_distribution_layer(penultimate)
        return Heads(self.linear(penultimate), penultimate, **outputs)


class Projector(nn.Module):
    """SimSiam's projector (Chen & He 2020) as published here: layers 1 and 3 are used, 2 is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = _projector_layer(width, relu=True)
        self.layer2 = _projector_layer(width, relu=True)  # in published checkpoints, never called
        self.layer3 = _projector_layer(width, relu=False)
        self.layer3[-1].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer1(x))


def build_encoder(
    name: str,
    *,
    n_classes: int,
    n_shifts: int,
    simclr_dim: int = 128,
    width: int = 64,
) -> Encoder:
    """An encoder by its published name, with fresh weights.

    width: channels of the first stage of the small-image ResNets (64 as published); the *_imagenet
    ones have theirs from torchvision. Raises ValueError for an unknown name.
    """
    if name not in ENCODER_NAMES:
        raise ValueError(f"model {name!r} is unknown; choose from {', '.join(ENCODER_NAMES)}")
    depth, _, kind = name.partition("_")
    if kind and width != IMAGENET_WIDTH:
        raise ValueError(
            f"only the small-image ResNets have a width; {name} has {IMAGENET_WIDTH}, got {width}"
        )
    stages, d = imagenet_trunk(depth) if kind else small_image_trunk(depth, width)
    return Encoder(
        stages,
        d,
        n_classes=n_classes,
        n_shifts=n_shifts,
        simclr_dim=simclr_dim,
        small_images=not kind,
        simsiam=kind.endswith("simsiam"),
    )


def layout_for(device: torch.device, width: int = 64) -> torch.memory_format:
    """How a network's kernels lie in memory; width: channels of its first layer.

    Channels last on a CPU where the network is narrower than the published ones: that is faster
    there (1.3 to 1.7 times), and at width 64 it is not (0.7 to 1.1 times).
    """
    narrow = width < 64 and device.type == "cpu"
    return torch.channels_last if narrow else torch.contiguous_format


def encoder_weights(path: Path, file: BinaryIO | None = None) -> dict[str, Tensor]:
    """The weights in a *.model file. Raises CheckpointError for anything else, in one line.

    file: the same, opened before.
    """
    state = load_tensors(path, file)
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        raise CheckpointError(
            f"{path} is a file to go on with (state.pt, model-N.pt), not an encoder's weights. "
            "Pass last.model or best_*.model of a run of train_dia.py."
        )
    state = require_state_dict(state, str(path))
    require_finite_weights(state, str(path))
    return state


def load_weights(
    encoder: Encoder, state: Mapping[str, Any], *, source: str, strict: bool = True
) -> None:
    """Loads a `*.model` state dict, ours or published.

    strict: False leaves weights as they are that the state lacks, and passes over others; those of
    another shape are named in a warning. Raises CheckpointError for another architecture.
    """
    if not strict:
        own = encoder.state_dict()
        known = {name: values for name, values in state.items() if name in own}
        fitting = {name: v for name, v in known.items() if v.shape == own[name].shape}
        left = [f"{n}: {(*known[n].shape,)} for {(*own[n].shape,)}" for n in known.keys() - fitting]
        if left:
            LOG.warning("%s: not taken, of another shape: %s.", source, "; ".join(sorted(left)))
        state = own | fitting
    try:
        load_module(encoder, state, source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} If it is another architecture, check --model, --shift_trans_type (K) and the "
            "number of classes of --dataset."
        ) from error


def _projector_layer(width: int, *, relu: bool) -> nn.Sequential:
    layer = nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width))
    return layer.append(nn.ReLU()) if relu else layer


def imagenet_trunk(name: str) -> tuple[dict[str, nn.Module], int]:
    """torchvision's ResNet up to its last map: its stages by name in calling order, and d."""
    from torchvision.models import get_model  # slow to import

    network = get_model(name, weights=None)
    width = network.fc.in_features
    stem = {part: getattr(network, part) for part in ("conv1", "bn1", "relu", "maxpool")}
    return stem | {f"layer{i}": getattr(network, f"layer{i}") for i in range(1, 5)}, width


def small_image_trunk(name: str, width: int = 64) -> tuple[dict[str, nn.Module], int]:
    """A ResNet for images of about 32²: 3×3 stem, no max-pool; its stages by name, and d.

    width: channels of the first stage (64 as published); d = 8 · width · expansion.
    """
    block = BottleneckBlock if name == "resnet50" else PlainBlock
    stages: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, width, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
    }
    channels = width
    for i, count in enumerate(DEPTHS[name]):
        planes = width * 2**i
        blocks = []
        for j in range(count):
            blocks.append(block(channels, planes, stride=2 if i and not j else 1))
            channels = planes * block.expansion
        stages[f"layer{i + 1}"] = nn.Sequential(*blocks)
    return stages, channels


class PlainBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut (He et al. 2015)."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.shortcut = _shortcut(channels, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(subsample(x, self.stride))).relu()


class BottleneckBlock(nn.Module):
    """1×1, 3×3, 1×1 convolutions around a shortcut; the 3×3 has the stride."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        wide = planes * self.expansion
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.stride = stride
        self.shortcut = _shortcut(channels, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        return (self.bn3(self.conv3(out)) + self.shortcut(subsample(x, self.stride))).relu()


def normalise(features: Tensor) -> Tensor:
    """Rows of (N, d) divided by their norm + 1e-8."""
    return features / (features.norm(dim=1, keepdim=True) + EPSILON)


def pool_small(x: Tensor) -> Tensor:
    """Averages the last map (B, d, H, W) to (B, d).

    The published network averages one 4×4 window; maps of another size, which it cannot take, are
    averaged whole.
    """
    if all(SMALL_POOL <= side < 2 * SMALL_POOL for side in x.shape[-2:]):
        x = x[:, :, :SMALL_POOL, :SMALL_POOL]
    return x.mean(dim=(2, 3))


def subsample(x: Tensor, stride: int) -> Tensor:
    """Every stride-th pixel of (B, C, H, W), from the first: what a strided 1×1 kernel looks at."""
    return x if stride == 1 else x[:, :, ::stride, ::stride]


def _shortcut(channels: int, wide: int, stride: int) -> nn.Sequential:
    """A 1×1 convolution of the subsampled map, with stride 1.

    The strided one is the same arithmetic, but on CPUs oneDNN writes beyond its buffers, or returns
    wrong gradients, where a channels-last map has fewer channels than a vector register holds.
    """
    if stride == 1 and channels == wide:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide))
