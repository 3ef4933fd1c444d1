"""What the U-Net is made of: standardised convolutions, norms, attention, residual blocks.

After lucidrains' denoising-diffusion-pytorch 0.27.12 (MIT): attribute names are the published
state-dict keys. B images, H W pixels, h heads of width d, n = H·W positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_WIDTH = 4, 32
COSINE_ATTENTION_SCALE = 10.0
NORM_GROUPS = 8


def _epsilon(x: Tensor) -> float:
    # The reference has 1e-3 for float64 too, which we only ever use to check float32.
    return 1e-5 if x.dtype in (torch.float32, torch.float64) else 1e-3


class StandardisedConv2d(nn.Conv2d):
    """Convolution whose kernels are shifted and scaled to mean 0, variance 1 (Qiao et al. 2019)."""

    frozen = False
    """Whether `weight` holds the standardised kernels already."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.frozen else self.standardised_kernels()
        return self._conv_forward(x, weight, self.bias)

    def standardised_kernels(self) -> Tensor:
        """The kernels that the convolution is done with, of the shape of `weight`."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * (variance + _epsilon(self.weight)).rsqrt()

    @torch.no_grad()
    def freeze(self) -> None:
        """Standardises `weight` for good, so that no later call has to; ends training."""
        if not self.frozen:
            self.weight.copy_(self.standardised_kernels())
            self.frozen = True


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel, with a gain and no offset."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C); one fused pass in channels_last
        normalised = F.layer_norm(pixels, pixels.shape[3:], self.g.flatten(), eps=_epsilon(x))
        return normalised.permute(0, 3, 1, 2)


class Normalised(nn.Module):
    """A layer behind its own channel norm."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Residual(nn.Module):
    """A layer around which its input is added."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time step at geometrically spaced frequencies: (B,) → (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        rate = math.log(10000) / (half - 1)
        frequencies = torch.exp(torch.arange(half, device=t.device) * -rate)
        angles = t[:, None] * frequencies[None]  # (B, width / 2)
        return torch.cat((angles.sin(), angles.cos()), dim=1)


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3·h·d, H, W) → three (B, h, d, n)."""
    q, k, v = qkv.flatten(2).unflatten(1, (3, HEADS, HEAD_WIDTH)).unbind(1)
    return q, k, v


class LinearAttention(nn.Module):
    """Attention whose cost is linear in the number of positions (Shen et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = HEADS * HEAD_WIDTH
        self.to_qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden, channels, 1), ChannelNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        q, k, v = split_heads(self.to_qkv(x))
        context = v @ k.softmax(dim=3).transpose(2, 3)  # (B, h, d, d)
        # The reference scales q and v; the product of the two is much smaller than they are.
        context = context * (HEAD_WIDTH**-0.5 / (height * width))
        out = (context @ q.softmax(dim=2)).flatten(1, 2)  # (B, h·d, n)
        return self.to_out(out.unflatten(2, (height, width)))


class CosineAttention(nn.Module):
    """Full attention over positions, by normalised queries and keys, times 10."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = HEADS * HEAD_WIDTH
        self.to_qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.to_qkv(x))
        # The reference normalises over the positions, not over the head's channels.
        q, k = F.normalize(q, dim=3), F.normalize(k, dim=3)
        weights = (q.transpose(2, 3) @ k * COSINE_ATTENTION_SCALE).softmax(dim=3)  # (B, h, n, n)
        out = (v @ weights.transpose(2, 3)).flatten(1, 2)  # (B, h·d, n)
        return self.to_out(out.unflatten(2, x.shape[-2:]))


class ConvBlock(nn.Module):
    """Standardised 3×3 convolution, group norm, optional scale and shift, SiLU."""

    def __init__(self, channels_in: int, channels_out: int, dilation: int) -> None:
        super().__init__()
        self.proj = StandardisedConv2d(
            channels_in, channels_out, 3, padding=dilation, dilation=dilation
        )
        self.norm = nn.GroupNorm(NORM_GROUPS, channels_out)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        x = self.norm(self.proj(x))
        if scale is not None and shift is not None:
            x = x * (scale + 1) + shift
        return F.silu(x)


class ResidualBlock(nn.Module):
    """Two convolution blocks, the first modulated by the time embedding, around a skip."""

    def __init__(self, channels_in: int, channels_out: int, time_width: int, dilation: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * channels_out))
        self.block1 = ConvBlock(channels_in, channels_out, dilation)
        self.block2 = ConvBlock(channels_out, channels_out, dilation)
        same = channels_in == channels_out
        self.res_conv = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.mlp(embedding)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, scale, shift)) + self.res_conv(x)


def downsample(channels_in: int, channels_out: int, dilation: int) -> nn.Conv2d:
    """4×4 convolution that shrinks both sides by 2·dilation."""
    # The reference pads by 2·dilation - 1, which is the same for the dilations
    # 1 and 2; for larger ones its maps come out one pixel too large and the skips do not fit.
    return nn.Conv2d(
        channels_in,
        channels_out,
        4,
        stride=2 * dilation,
        padding=3 * dilation // 2,
        dilation=dilation,
    )


def upsample(channels_in: int, channels_out: int, dilation: int) -> nn.Sequential:
    """Nearest enlargement by 2·dilation, then a 3×3 convolution."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2 * dilation, mode="nearest"),
        conv3(channels_in, channels_out, dilation),
    )


def conv3(channels_in: int, channels_out: int, dilation: int) -> nn.Conv2d:
    """3×3 convolution that keeps the size."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=dilation, dilation=dilation)
