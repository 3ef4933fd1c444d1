"""Building blocks of the generator: the fast ELU, the output clamps, plain and gated convolutions.

N samples, C channels, H x W pixels.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["elu", "fast_elu", "relu", "none"]
ConvType = Literal["plain", "gated"]
Clamp = Literal["hard", "leaky"]
Drop = Callable[[str, Tensor], Tensor]
"""Called as drop(layer name, activations (N, C, H, W)); returns them with what it drops zeroed."""


class _FastElu(torch.autograd.Function):
    """ELU as max(x, exp(min(x, 0)) - 1); torch's CPU kernel calls expm1, which is slower."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = torch.maximum(x, x.clamp(max=0).exp_().sub_(1))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.clamp(max=0).add_(1).mul_(grad)  # dy/dx = y + 1 where x < 0, else 1


def fast_elu(x: Tensor) -> Tensor:
    """ELU with alpha 1, within 1e-7 of `torch.nn.functional.elu`, and its gradient.

    x: any shape, returns the same shape in (-1, inf).
    """
    return _FastElu.apply(x)


class _LeakyClamp(torch.autograd.Function):
    """Clamp to [-1, 1] whose gradient also passes where following it leads back inside."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        leads_out = ((x > 1) & (grad < 0)) | ((x < -1) & (grad > 0))
        return grad.masked_fill(leads_out, 0)


def clamp_output(x: Tensor, clamp: Clamp) -> Tensor:
    """Clamps to [-1, 1]; see `netG.output_clamp` for what happens to the gradient outside."""
    return _LeakyClamp.apply(x) if clamp == "leaky" else x.clamp(-1, 1)


def activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "elu":
            return F.elu(x)
        case "fast_elu":
            return fast_elu(x)
        case "relu":
            return torch.relu(x)
        case "none":
            return x


class ConvBlock(nn.Module):
    """Convolution, then activation; gated: one convolution of twice the width, ELU(a) * sigmoid(b).

    Gating after Yu et al. 2019 (arXiv 1806.03589, section 3.1); the first half of the convolution's
    outputs are the features. The weights are `conv.weight` and `conv.bias`, as published.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: Activation = "elu",
        conv_type: ConvType = "plain",
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gated = conv_type == "gated"
        self.out_channels = out_channels
        self.conv = nn.Conv2d(
            in_channels,
            out_channels * (2 if self.gated else 1),
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        y = self.conv(x)
        if not self.gated:
            return activate(y, self.activation)
        features, gate = y.chunk(2, dim=1)
        return activate(features, self.activation) * torch.sigmoid(gate)


def he_init(network: nn.Module, last_layer_gain: float = 0.1) -> None:
    """He initialisation of every ConvBlock; layers without activation start small.

    Torch's default loses the signal layer by layer (a completion of a fresh generator then has a
    standard deviation of 3e-5); a large last layer starts at the clamp, where training can stick.
    """
    for block in network.modules():
        if not isinstance(block, ConvBlock):
            continue
        fan_in = block.conv.weight[0].numel()
        gain = last_layer_gain if block.activation == "none" else math.sqrt(2)
        gain *= 2 if block.gated else 1  # an open gate starts at sigmoid(0) = 1/2
        with torch.no_grad():
            features = block.conv.weight[: block.out_channels]
            features.normal_(std=gain / math.sqrt(fan_in))
            if block.gated:
                block.conv.weight[block.out_channels :].normal_(std=0.5 / math.sqrt(fan_in))
            block.conv.bias.zero_()
