"""A generator's layer made ready for inference: thinned weights, any part of the image, fast ELU.

N samples, C channels. Activations are channels_last. P phases (4 if the layer upsamples, else 1),
G gates (2 where the layer is gated, else 1), O and I output and input channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inpainter.blocks import ConvBlock
from inpainter.fast.activations import finish
from inpainter.fast.geometry import Reach, Region, Span, whole
from inpainter.fast.winograd import Tiling, tiling_for, transformed_kernel, winograd
from inpainter.fast.workspace import Workspace

SLACK = 1.1
"""A layer computes all it can where that is at most this much more than what is wanted: cheaper
than copying the wanted part out."""


class Patch(NamedTuple):
    """Activations (N, C, h, w) of a region of an image that has `hw` pixels at this resolution."""

    values: Tensor
    region: Region
    hw: tuple[int, int]

    def part(self, region: Region) -> Tensor:
        """The values of a region inside this one, (N, C, h, w), a view."""
        if region == self.region:
            return self.values
        rows, cols = region.within(self.region)
        return self.values[:, :, rows, cols]


class Selection(NamedTuple):
    """The channels that a thinned layer keeps: numbers (k,), and what each is worth (k,).

    The gain is 1 / (1 - p) for a live channel and 0 for a dead one that only fills the row up.
    """

    index: Tensor
    gain: Tensor


class Arithmetic(NamedTuple):
    """How all layers compute: the type of activations and weights, and the memory they share."""

    dtype: torch.dtype
    workspace: Workspace
    minimal_filtering: bool
    """Whether fp32 convolutions on a CPU may go the way of `inpainter.fast.winograd`."""


class Kernel:
    """Weights as a convolution takes them: (P*G*O, I, k, k), and their forms for minimal filtering.

    channels: O, what the layer leaves behind.
    """

    def __init__(self, weight: Tensor, bias: Tensor, channels: int) -> None:
        self.weight = weight
        self.bias = bias
        self.channels = channels
        self.forms: dict[tuple[int, int], Tensor] = {}

    def form(self, tiling: Tiling) -> Tensor:
        """The kernel transformed for a tile's size, kept for the next call."""
        key = (tiling.rows, tiling.cols)
        if key not in self.forms:
            self.forms[key] = transformed_kernel(self.weight, tiling)
        return self.forms[key]


class FastLayer:
    """One ConvBlock, run on regions of the image with some of its channels.

    block: the layer; up: whether a nearest ×2 upsampling precedes it.
    """

    def __init__(self, block: ConvBlock, arithmetic: Arithmetic, *, up: bool = False) -> None:
        conv = block.conv
        self.reach = Reach(conv.kernel_size[0], conv.stride[0], conv.dilation[0], up)
        self.activation = block.activation
        self.gates = 2 if block.gated else 1
        self.phases = 4 if up else 1
        self.arithmetic = arithmetic
        weight = conv.weight.detach()
        phases = phase_kernels(weight) if up else weight[None]
        self.weight = phases.unflatten(1, (self.gates, -1))  # (P, G, O, I, k, k)
        self.bias = conv.bias.detach().unflatten(0, (self.gates, -1))  # (G, O)
        self.kernel = self.kernel_for(self.weight, self.bias)

    def kernel_for(self, weight: Tensor, bias: Tensor) -> Kernel:
        """weight (P, G, O, I, k, k) and bias (G, O) in the layout and type of the arithmetic."""
        flat = weight.flatten(0, 2).to(self.arithmetic.dtype)  # (P*G*O, I, k, k)
        bias = bias.flatten().repeat(self.phases).to(self.arithmetic.dtype)
        return Kernel(flat.contiguous(memory_format=torch.channels_last), bias, weight.shape[2])

    def tiling(self, kernel: Kernel, out_hw: tuple[int, int], x: Tensor) -> Tiling | None:
        """How to tile the output for minimal filtering; none = convolve directly."""
        suits = (
            self.arithmetic.minimal_filtering
            and x.dtype == torch.float32
            and x.device.type == "cpu"
        )
        if not suits or self.reach.stride > 1:
            return None
        out_channels, in_channels, size, _ = kernel.weight.shape
        return tiling_for(out_hw, self.reach.dilation, size, in_channels, out_channels)

    def thinned(self, inputs: Selection | None, outputs: Selection | None) -> Kernel:
        """The kernel with some input and output channels only; none = all of them."""
        weight, bias = self.weight, self.bias
        if outputs is not None:
            weight, bias = (
                weight.index_select(2, outputs.index),
                bias.index_select(1, outputs.index),
            )
        if inputs is not None:
            weight = weight.index_select(3, inputs.index) * inputs.gain[:, None, None]
        return self.kernel_for(weight, bias)

    def __call__(
        self,
        x: Patch,
        wanted: Region | None = None,
        kernel: Kernel | None = None,
        out: Tensor | None = None,
    ) -> Patch:
        """Runs the layer on a patch.

        wanted: what is needed of the output, none = all that the patch allows; the result may be a
        little more. out: where to write exactly the wanted region.
        """
        kernel = self.kernel if kernel is None else kernel
        region = self.reach.computable(x.region, x.hw)
        if wanted is not None and (out is not None or region.area > SLACK * wanted.area):
            region = wanted
        workspace = self.arithmetic.workspace
        y, made, lent = self.convolve(x, region, kernel)
        out_hw = self.reach.out_hw(x.hw)
        finishing = (y, self.activation, self.gates, self.phases, workspace)
        if made != region:
            result = finish(*finishing, in_place=not lent)
            values = Patch(result, made, out_hw).part(region)
            return Patch(values if out is None else out.copy_(values), region, out_hw)
        result = finish(*finishing, out, in_place=not lent)
        return Patch(result, region, out_hw)

    def convolve(self, x: Patch, region: Region, kernel: Kernel) -> tuple[Tensor, Region, bool]:
        """The convolution before the activation, the region that it covers, and whether it is lent:

        memory of the workspace, to be used before the next convolution.
        """
        rows = self.reach.taps(region.rows, x.hw[0])
        cols = self.reach.taps(region.cols, x.hw[1])
        values = x.part(Region(rows.span, cols.span))
        pads = (rows.before, rows.after, cols.before, cols.after)
        made, conv_hw = region, region.hw
        if self.reach.up:
            conv_hw = tuple(t.before + len(t.span) + t.after - 1 for t in (rows, cols))
            made = Region(*(Span(2 * (t.span.lo - t.before) + 1, 2 * (t.span.hi + t.after) - 1)
                            for t in (rows, cols)))  # fmt: skip
        tiling = self.tiling(kernel, conv_hw, values)
        if tiling is None:
            return convolution(values, kernel, pads, conv_hw, self.reach), made, False
        y = winograd(
            values,
            kernel.form(tiling),
            kernel.bias,
            kernel.weight.shape[2],
            (rows.before, cols.before),
            conv_hw,
            self.reach.dilation,
            tiling,
            self.arithmetic.workspace,
        )
        return y, made, True


def convolution(
    x: Tensor,
    kernel: Kernel,
    pads: tuple[int, int, int, int],
    out_hw: tuple[int, int],
    reach: Reach,
) -> Tensor:
    """conv2d with zeros at the top, bottom, left and right as `pads` says."""
    stride, dilation = reach.stride, reach.dilation
    size = kernel.weight.shape[2]
    top, _, left, _ = pads
    expected = tuple(
        (side + 2 * before - dilation * (size - 1) - 1) // stride + 1
        for side, before in zip(x.shape[2:], (top, left), strict=True)
    )
    if expected != out_hw:
        x = zero_padded(x, pads)
        top = left = 0
    return F.conv2d(x, kernel.weight, kernel.bias, stride, (top, left), dilation)


def zero_padded(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """x with zeros at the top, bottom, left and right, channels_last."""
    top, bottom, left, right = pads
    n, c, h, w = x.shape
    padded = x.new_zeros(n, h + top + bottom, w + left + right, c).permute(0, 3, 1, 2)
    padded[:, :, top : top + h, left : left + w] = x
    return padded


def phase_kernels(weight: Tensor) -> Tensor:
    """conv3x3 after nearest ×2 as four 2x2 convolutions: (O, I, 3, 3) -> (4, O, I, 2, 2).

    Phase (a, b) of the window at low-resolution pixels (j, j + 1) is the output at 2j + 1 + a: its
    three taps fall on two pixels only.
    """
    exact = weight.double()

    def halves(w: Tensor, dim: int) -> list[Tensor]:
        first, second, third = w.unbind(dim)
        return [
            torch.stack([first + second, third], dim),
            torch.stack([first, second + third], dim),
        ]

    phases = [phase for rows in halves(exact, 2) for phase in halves(rows, 3)]
    return torch.stack(phases).to(weight.dtype)


def whole_patch(x: Tensor) -> Patch:
    """A whole image's activations, channels_last."""
    hw = (x.shape[2], x.shape[3])
    return Patch(x.contiguous(memory_format=torch.channels_last), whole(hw), hw)
