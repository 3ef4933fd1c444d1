"""The U-Net that predicts the noise, in the published checkpoint layout.

After lucidrains' denoising-diffusion-pytorch 0.27.12 (MIT): names of classes are its own, names of
attributes are the published state-dict keys. B images, C channels, H W pixels, E numbers of a time
embedding, h heads of width d, n = H·W positions.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_WIDTH = 4, 32
COSINE_SIM_SCALE = 10.0
NORM_GROUPS = 8


class Unet(nn.Module):
    """Predicts the noise in x at step t."""

    def __init__(
        self,
        dim: int = 64,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        dilation: int = 1,
    ) -> None:
        """dim: base width, a multiple of 8. dim_mults: widths of the levels in base widths."""
        super().__init__()
        self.channels = channels
        self.dilation = dilation
        self.shrinks_by = (2 * dilation) ** (len(dim_mults) - 1)
        """Image sides must be multiples of this number of pixels."""
        widths = [dim, *(dim * m for m in dim_mults)]
        time_dim = 4 * dim
        self.init_conv = nn.Conv2d(channels, dim, 7, padding=3 * dilation, dilation=dilation)
        self.time_mlp = nn.Sequential(
            SinusoidalPosEmb(dim),
            nn.Linear(dim, time_dim),
            nn.GELU(),
            nn.Linear(time_dim, time_dim),
        )

        def level(dim_in: int, dim_out: int, resample: nn.Module) -> nn.ModuleList:
            blocks = [ResnetBlock(dim_in, dim_out, time_dim, dilation) for _ in range(2)]
            attention = Residual(PreNorm(dim_out, LinearAttention(dim_out)))
            return nn.ModuleList([*blocks, attention, resample])

        in_out = list(itertools.pairwise(widths))
        down_kinds = [downsample] * (len(in_out) - 1) + [conv3]
        up_kinds = [upsample] * (len(in_out) - 1) + [conv3]
        self.downs = nn.ModuleList(
            level(a, a, kind(a, b, dilation))
            for (a, b), kind in zip(in_out, down_kinds, strict=True)
        )
        mid_dim = widths[-1]
        self.mid_block1 = ResnetBlock(mid_dim, mid_dim, time_dim, dilation)
        self.mid_attn = Residual(PreNorm(mid_dim, QKNormAttention(mid_dim)))
        self.mid_block2 = ResnetBlock(mid_dim, mid_dim, time_dim, dilation)
        self.ups = nn.ModuleList(
            level(a + b, b, kind(b, a, dilation))
            for (a, b), kind in zip(reversed(in_out), up_kinds, strict=True)
        )
        self.final_res_block = ResnetBlock(2 * dim, dim, time_dim, dilation)
        self.final_conv = nn.Conv2d(dim, channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise: x (B, C, H, W), t (B,) integer steps → (B, C, H, W).

        H and W must be multiples of `shrinks_by` pixels; a ValueError says so.
        """
        if x.shape[1] != self.channels or any(side % self.shrinks_by for side in x.shape[-2:]):
            raise ValueError(
                f"the U-Net takes (B, {self.channels}, H, W) with H and W multiples of "
                f"{self.shrinks_by} pixels, got {tuple(x.shape)}; resize the images"
            )
        stem = x = self.init_conv(x)
        embedding = self.time_mlp(t)
        skips: list[Tensor] = []
        for block1, block2, attention, resample in self.downs:
            x = block1(x, embedding)
            skips.append(x)
            x = attention(block2(x, embedding))
            skips.append(x)
            x = resample(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, embedding)), embedding)
        for block1, block2, attention, resample in self.ups:
            x = block1(torch.cat((x, skips.pop()), dim=1), embedding)
            x = attention(block2(torch.cat((x, skips.pop()), dim=1), embedding))
            x = resample(x)
        x = self.final_res_block(torch.cat((x, stem), dim=1), embedding)
        return self.final_conv(x)


def conv3(dim_in: int, dim_out: int, dilation: int) -> nn.Conv2d:
    """3×3 convolution that keeps the size."""
    return nn.Conv2d(dim_in, dim_out, 3, padding=dilation, dilation=dilation)


def downsample(dim_in: int, dim_out: int, dilation: int) -> nn.Conv2d:
    """4×4 convolution that shrinks both sides by 2·dilation."""
    # The reference pads by 2·dilation - 1, which is the same for the dilations 1 and 2; for larger
    # ones its maps come out one pixel too large and the skips do not fit.
    padding = 3 * dilation // 2
    return nn.Conv2d(dim_in, dim_out, 4, stride=2 * dilation, padding=padding, dilation=dilation)


def upsample(dim_in: int, dim_out: int, dilation: int) -> nn.Sequential:
    """Nearest enlargement by 2·dilation, then a 3×3 convolution."""
    enlarge = nn.Upsample(scale_factor=2 * dilation, mode="nearest")
    return nn.Sequential(enlarge, conv3(dim_in, dim_out, dilation))


class SinusoidalPosEmb(nn.Module):
    """Sines and cosines of the step at geometrically spaced frequencies."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """(B,) → (B, dim)."""
        half = self.dim // 2
        rate = math.log(10000) / (half - 1)
        frequencies = torch.exp(torch.arange(half, device=t.device) * -rate)
        angles = t[:, None] * frequencies[None]  # (B, dim / 2)
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class ResnetBlock(nn.Module):
    """Two convolution blocks, the first modulated by the time embedding, around a skip."""

    def __init__(self, dim: int, dim_out: int, time_dim: int, dilation: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.block1 = Block(dim, dim_out, dilation)
        self.block2 = Block(dim_out, dim_out, dilation)
        self.res_conv = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, dim, H, W), (B, E) → (B, dim_out, H, W)."""
        scale, shift = self.mlp(embedding)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, (scale, shift))) + self.res_conv(x)


class Block(nn.Module):
    """Standardised 3×3 convolution, group norm, optional scale and shift, SiLU."""

    def __init__(self, dim: int, dim_out: int, dilation: int) -> None:
        super().__init__()
        self.proj = WeightStandardizedConv2d(dim, dim_out, 3, padding=dilation, dilation=dilation)
        self.norm = nn.GroupNorm(NORM_GROUPS, dim_out)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, dim, H, W), twice (B, dim_out, 1, 1) → (B, dim_out, H, W)."""
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return F.silu(x)


class WeightStandardizedConv2d(nn.Conv2d):
    """Convolution whose kernels are shifted and scaled to mean 0, variance 1 (Qiao et al. 2019)."""

    frozen = False
    """Whether `weight` holds the standardised kernels already."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H, W)."""
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


class Residual(nn.Module):
    """A layer around which its input is added; keeps the shape."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return x + self.fn(x)


class PreNorm(nn.Module):
    """A layer behind its own norm; keeps the shape."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = LayerNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return self.fn(self.norm(x))


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of each pixel, with a gain and no offset."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C); one fused pass in channels_last
        normalised = F.layer_norm(pixels, pixels.shape[3:], self.g.flatten(), eps=_epsilon(x))
        return normalised.permute(0, 3, 1, 2)


class LinearAttention(nn.Module):
    """Attention whose cost is linear in the number of positions (Shen et al. 2018)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = HEADS * HEAD_WIDTH
        self.to_qkv = nn.Conv2d(dim, 3 * hidden, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden, dim, 1), LayerNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        height, width = x.shape[-2:]
        q, k, v = split_heads(self.to_qkv(x))
        context = v @ k.softmax(dim=3).transpose(2, 3)  # (B, h, d, d)
        # The reference scales q and v; the product of the two is much smaller than they are.
        context = context * (HEAD_WIDTH**-0.5 / (height * width))
        out = (context @ q.softmax(dim=2)).flatten(1, 2)  # (B, h·d, n)
        return self.to_out(out.unflatten(2, (height, width)))


class QKNormAttention(nn.Module):
    """Full attention over positions, by normalised queries and keys, times 10."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = HEADS * HEAD_WIDTH
        self.to_qkv = nn.Conv2d(dim, 3 * hidden, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        q, k, v = split_heads(self.to_qkv(x))
        # The reference normalises over the positions, not over the head's channels.
        q, k = F.normalize(q, dim=3), F.normalize(k, dim=3)
        weights = (q.transpose(2, 3) @ k * COSINE_SIM_SCALE).softmax(dim=3)  # (B, h, n, n)
        out = (v @ weights.transpose(2, 3)).flatten(1, 2)  # (B, h·d, n)
        return self.to_out(out.unflatten(2, x.shape[-2:]))


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3·h·d, H, W) → three (B, h, d, n)."""
    q, k, v = qkv.flatten(2).unflatten(1, (3, HEADS, HEAD_WIDTH)).unbind(1)
    return q, k, v


def _epsilon(x: Tensor) -> float:
    # The reference has 1e-3 for float64 too, which we only ever use to check float32.
    return 1e-5 if x.dtype in (torch.float32, torch.float64) else 1e-3
