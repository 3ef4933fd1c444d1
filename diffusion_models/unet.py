"""The U-Net that predicts the noise, in the published checkpoint layout.

After lucidrains' denoising-diffusion-pytorch 0.27.12 (MIT): attribute names are the published
state-dict keys. B images, C channels, H W pixels.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_models.blocks import (
    NORM_GROUPS,
    CosineAttention,
    LinearAttention,
    Normalised,
    Residual,
    ResidualBlock,
    TimeEmbedding,
    conv3,
    downsample,
    upsample,
)


class Unet(nn.Module):
    """Predicts the noise in x at step t."""

    def __init__(
        self,
        dim: int = 64,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if dim < 8 or dim % NORM_GROUPS:
            raise ValueError(f"dim must be a multiple of {NORM_GROUPS} (group norm), got {dim}")
        if dilation < 1:
            raise ValueError(f"dilation must be 1 (none) or more, got {dilation}")
        self.channels = channels
        self.dilation = dilation
        self.shrinks_by = (2 * dilation) ** (len(dim_mults) - 1)
        """Image sides must be multiples of this number of pixels."""
        widths = [dim, *(dim * m for m in dim_mults)]
        time_width = 4 * dim
        self.init_conv = nn.Conv2d(channels, dim, 7, padding=3 * dilation, dilation=dilation)
        self.time_mlp = nn.Sequential(
            TimeEmbedding(dim),
            nn.Linear(dim, time_width),
            nn.GELU(),
            nn.Linear(time_width, time_width),
        )

        def level(channels_in: int, channels: int, resample: nn.Module) -> nn.ModuleList:
            blocks = [ResidualBlock(channels_in, channels, time_width, dilation) for _ in range(2)]
            attention = Residual(Normalised(channels, LinearAttention(channels)))
            return nn.ModuleList([*blocks, attention, resample])

        steps = list(itertools.pairwise(widths))
        down_kinds = [downsample] * (len(steps) - 1) + [conv3]
        up_kinds = [upsample] * (len(steps) - 1) + [conv3]
        self.downs = nn.ModuleList(
            level(a, a, kind(a, b, dilation))
            for (a, b), kind in zip(steps, down_kinds, strict=True)
        )
        last = widths[-1]
        self.mid_block1 = ResidualBlock(last, last, time_width, dilation)
        self.mid_attn = Residual(Normalised(last, CosineAttention(last)))
        self.mid_block2 = ResidualBlock(last, last, time_width, dilation)
        self.ups = nn.ModuleList(
            level(a + b, b, kind(b, a, dilation))
            for (a, b), kind in zip(reversed(steps), up_kinds, strict=True)
        )
        self.final_res_block = ResidualBlock(2 * dim, dim, time_width, dilation)
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
