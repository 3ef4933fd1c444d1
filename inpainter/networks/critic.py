"""The WGAN critics: one sees the box, one the whole crop. N samples, d base width, h x w pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, which the published numbers used (P15)
SLOPE = 0.2  # of leaky ReLU below 0


class CriticBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 5, stride=2, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not torch.is_grad_enabled():
            return F.leaky_relu(y, SLOPE)
        # Slopes as constants: leaky_relu's second derivative, zeros, would be carried through all
        # layers below whenever the gradient penalty is differentiated.
        return y * torch.where(y.detach() > 0, y.new_ones(()), SLOPE)


class CriticTrunk(nn.Module):
    def __init__(self, channels: int, d: int) -> None:
        super().__init__()
        self.conv1 = CriticBlock(channels, d)
        self.conv2 = CriticBlock(d, 2 * d)
        self.conv3 = CriticBlock(2 * d, 4 * d)
        self.conv4 = CriticBlock(4 * d, 4 * d)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv4(self.conv3(self.conv2(self.conv1(x))))


class Critic(nn.Module):
    """Scores patches (larger = more real) and gives the features of `MCD_feature`.

    patch_hw: height and width of the patches, multiples of 16 pixels.
    """

    def __init__(self, channels: int, d: int, patch_hw: tuple[int, int]) -> None:
        super().__init__()
        self.channels = channels
        self.dis_conv_module = CriticTrunk(channels, d)
        self.linear = nn.Linear(4 * d * (patch_hw[0] // 16) * (patch_hw[1] // 16), 1)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, h, w) in [-1, 1] -> (N, 4d, h/16, w/16); colour goes in grey if C is 1."""
        return self.dis_conv_module(to_channels(x, self.channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) in [-1, 1] -> (N, 1), unbounded, larger = more real."""
        return self.linear(self.features(x).flatten(1))


def to_channels(x: Tensor, channels: int) -> Tensor:
    """Turns colour images grey where a 1-channel critic judges a colour generator."""
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 3 and channels == 1:
        red, green, blue = (x[:, i : i + 1] * weight for i, weight in enumerate(GREY_WEIGHTS))
        return red + green + blue
    raise ValueError(f"a critic of {channels} channels cannot judge images {tuple(x.shape)}")
