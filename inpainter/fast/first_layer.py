"""A stage's first layer, split into the image's part and the part that the mask planes give.

The planes (ones, and the mask) are the same for every window, so their share of the convolution,
which depends on the position, is computed once. N windows, C image channels, O output channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inpainter.blocks import ConvBlock
from inpainter.fast.activations import finish
from inpainter.fast.geometry import Reach, Region
from inpainter.fast.layers import Arithmetic
from inpainter.masks import centre_mask


class FirstLayer:
    """The first convolution of one stage, or of its branches side by side.

    blocks: convolutions with the same input; window_hw, hole_hw in pixels. The sums are made in
    fp32 whatever the arithmetic of the layers after them.
    """

    def __init__(
        self,
        blocks: Sequence[ConvBlock],
        window_hw: tuple[int, int],
        hole_hw: tuple[int, int],
        arithmetic: Arithmetic,
    ) -> None:
        self.blocks = list(blocks)
        self.arithmetic = arithmetic
        self.reach = Reach(blocks[0].conv.kernel_size[0])
        self.hw = window_hw
        weight = torch.cat([block.conv.weight.detach() for block in blocks])
        bias = torch.cat([block.conv.bias.detach() for block in blocks])
        mask = centre_mask(window_hw, hole_hw, weight.device).to(weight.dtype)
        planes = torch.cat([torch.ones_like(mask), mask], dim=1)
        constant = F.conv2d(planes, weight[:, -2:], bias, padding=self.reach.padding)
        self.constant = constant[0].permute(1, 2, 0).contiguous()  # (H, W, O)
        # Strides of channels_last, which `contiguous` leaves out where C is 1.
        self.weight = weight[:, :-2].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        self.widths = [block.conv.out_channels for block in blocks]

    def sums(self, image: Tensor, around: Region, region: Region, added: Tensor) -> Tensor:
        """Pre-activations of an output region: (N, h, w, O), fp32.

        image: (N, C, h', w') of the region `around`, zero elsewhere; added: (N or 1, h, w, O), what
        the planes or the surroundings contribute.
        """
        reach = self.reach.padding
        grown = Region(*(type(s)(s.lo - reach, s.hi + reach) for s in region))
        inside = grown.common(around)
        n, channels = image.shape[:2]
        padded = image.new_zeros(n, *grown.hw, channels, dtype=self.weight.dtype)
        rows, cols = inside.within(around)
        target_rows, target_cols = inside.within(grown)
        padded[:, target_rows, target_cols] = image[:, :, rows, cols].permute(0, 2, 3, 1)
        sums = F.conv2d(padded.permute(0, 3, 1, 2), self.weight)  # (N, O, h, w), channels_last
        return sums.permute(0, 2, 3, 1).add_(added)

    def constants(self, region: Region) -> Tensor:
        """What the mask planes and the bias contribute to a region, (1, h, w, O)."""
        return self.constant[region.rows.lo : region.rows.hi, region.cols.lo : region.cols.hi][None]

    def activate(self, sums: Tensor, branch: int, out: Tensor | None = None) -> Tensor:
        """One branch's activations of `sums`, (N, C, h, w) channels_last; overwrites them."""
        start = sum(self.widths[:branch])
        y = sums[..., start : start + self.widths[branch]].permute(0, 3, 1, 2)
        block = self.blocks[branch]
        y = y.to(self.arithmetic.dtype)
        return finish(
            y, block.activation, 2 if block.gated else 1, 1, self.arithmetic.workspace, out
        )
