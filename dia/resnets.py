"""Trunks of the encoders: torchvision's ResNets, and ResNets for small images.

Attribute names are the published state-dict keys. B images, H W pixels, d width of the features.
"""

from collections.abc import Sequence

import torchvision
from torch import Tensor, nn

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
SMALL_POOL = 4


def imagenet_trunk(name: str) -> tuple[dict[str, nn.Module], int]:
    """torchvision's ResNet up to its last map: its stages by name in calling order, and d."""
    network = torchvision.models.get_model(name, weights=None)
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


def pool_small(x: Tensor) -> Tensor:
    """Averages the last map (B, d, H, W) to (B, d).

    The published network averages one 4×4 window; maps of another size, which it cannot take, are
    averaged whole.
    """
    sides: Sequence[int] = x.shape[-2:]
    if all(SMALL_POOL <= side < 2 * SMALL_POOL for side in sides):
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
