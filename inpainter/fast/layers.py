"""A generator's layers made ready for inference: thinned weights, any part of the image, fast ELU.

N samples, C channels. Activations are channels_last. P phases (4 if the layer upsamples, else 1),
G gates (2 where the layer is gated, else 1), O and I output and input channels.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.devices import upcast_to_fp32
from inpainter.fast.geometry import ConvGeometry, ConvInput, Region
from inpainter.fast.winograd import Tiling, Workspace, tiling_for, transformed_kernel, winograd
from inpainter.networks.convolution import phase_kernels
from inpainter.networks.dropout import ChannelMasks
from inpainter.networks.generator import ConvBlock

LOG2_E = 1 / math.log(2)
CHUNK = 131072
"""Numbers per thread that are activated at a time on a CPU, so that they stay in its cache."""
CHANNEL_MULTIPLE = 8
"""Convolutions prefer channels in multiples of this: dead ones fill the last one up."""


class Selection(NamedTuple):
    """The channels that a thinned layer keeps: numbers (k,), and what each is worth (k,).

    The gain is 1 / (1 - p) for a live channel and 0 for a dead one that only fills the row up.
    """

    index: Tensor
    gain: Tensor


class Patch(NamedTuple):
    """Activations (N, C, h, w) of a region of an image that has `hw` pixels at this resolution.

    channels: which they are, their gains not yet applied; None = all of the layer's.
    """

    values: Tensor
    region: Region
    hw: tuple[int, int]
    channels: Selection | None = None

    def part(self, region: Region) -> Tensor:
        """The values of a region inside this one, (N, C, h, w), a view."""
        if region == self.region:
            return self.values
        rows, cols = region.within(self.region)
        return self.values[:, :, rows, cols]


class Arithmetic(NamedTuple):
    """How all layers compute: the type of activations and weights, and the memory they share."""

    dtype: torch.dtype
    workspace: Workspace
    minimal_filtering: bool
    """Whether fp32 convolutions on a CPU may go the way of `inpainter.fast.winograd`."""


class Kernel:
    """Weights as a convolution takes them, (P*G*O, I, k, k), and their minimal-filtering forms."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias
        self.forms: dict[tuple[int, int], Tensor] = {}

    def form(self, tiling: Tiling) -> Tensor:
        """The kernel transformed for a tile's size, remembered for the next call."""
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
        self.geometry = ConvGeometry(conv.kernel_size[0], conv.stride[0], conv.dilation[0], up)
        self.activation = block.activation
        self.gates = 2 if block.gated else 1
        self.phases = 4 if up else 1
        self.arithmetic = arithmetic
        weight = conv.weight.detach()
        phases = phase_kernels(weight) if up else weight[None]
        self.weight = phases.unflatten(1, (self.gates, -1))  # (P, G, O, I, k, k)
        self.bias = conv.bias.detach().unflatten(0, (self.gates, -1))  # (G, O)
        self.kernel = self.thinned(None, None)

    def thinned(self, inputs: Selection | None, outputs: Selection | None) -> Kernel:
        """The kernel with some input and output channels only; None = all of them."""
        weight, bias, dtype = self.weight, self.bias, self.arithmetic.dtype
        if outputs is not None:
            weight = weight.index_select(2, outputs.index)
            bias = bias.index_select(1, outputs.index)
        if inputs is not None:
            weight = weight.index_select(3, inputs.index) * inputs.gain[:, None, None]
        flat = weight.flatten(0, 2).to(dtype).contiguous(memory_format=torch.channels_last)
        return Kernel(flat, bias.flatten().repeat(self.phases).to(dtype))

    def __call__(
        self, x: Patch, wanted: Region, kernel: Kernel | None = None, out: Tensor | None = None
    ) -> Patch:
        """Runs the layer on a patch, to have a region of its output.

        The result may be larger by a pixel where the layer upsamples. out: where to write it, for
        layers that do not.
        """
        kernel = self.kernel if kernel is None else kernel
        rows = self.geometry.taps(wanted.rows, x.hw[0])
        cols = self.geometry.taps(wanted.cols, x.hw[1])
        region = Region(rows.upsampled(), cols.upsampled()) if self.geometry.up else wanted
        y = self.convolve(x.part(Region(rows.span, cols.span)), rows, cols, region, kernel)
        return Patch(self.finish(y, out), region, self.geometry.out_hw(x.hw))

    def convolve(
        self, x: Tensor, rows: ConvInput, cols: ConvInput, region: Region, kernel: Kernel
    ) -> Tensor:
        """Pre-activations (N, P*G*C, h, w) of an output region, to use before the next convolution.

        x: what rows and cols say of the input.
        """
        size, stride, dilation = kernel.weight.shape[2], *self.geometry[1:3]
        conv_hw = tuple(side // 2 for side in region.hw) if self.geometry.up else region.hw
        tiling = None
        filtered = self.arithmetic.minimal_filtering and stride == 1
        if filtered and x.dtype == torch.float32 and x.device.type == "cpu":
            out_channels, in_channels = kernel.weight.shape[:2]
            tiling = tiling_for(conv_hw, dilation, size, in_channels, out_channels)
        if tiling is not None:
            form, pads = kernel.form(tiling), (rows.before, cols.before)
            geometry = (size, pads, conv_hw, dilation, tiling)
            return winograd(x, form, kernel.bias, *geometry, self.arithmetic.workspace)
        pads = (rows.before, cols.before)
        if not all(0 <= side.before - side.after < stride for side in (rows, cols)):
            # conv2d pads opposite sides alike
            x, pads = F.pad(x, (cols.before, cols.after, rows.before, rows.after)), (0, 0)
        return F.conv2d(x, kernel.weight, kernel.bias, stride, pads, dilation)

    def finish(self, y: Tensor, out: Tensor | None) -> Tensor:
        """Activates a convolution's result, gates it, and puts its phases in their places.

        y: (N, P*G*C, h, w) channels_last, overwritten; out: (N, C, h, w) or (N, C, 2h, 2w) where
        P = 4, the place of the result, None = a new tensor. Returns the result, channels_last.
        """
        n, c, h, w = y.shape
        side = 2 if self.phases == 4 else 1
        channels = c // (self.gates * self.phases)
        places = y.permute(0, 2, 3, 1).unflatten(3, (side, side, self.gates, channels))
        features = places[..., 0, :]  # (N, h, w, side, side, C)
        if out is None:
            out = y.new_empty(n, h * side, w * side, channels).permute(0, 3, 1, 2)
        target = out.permute(0, 2, 3, 1).unflatten(2, (w, side)).unflatten(1, (h, side))
        target = target.permute(0, 1, 3, 2, 4, 5)  # like features
        if self.activation == "none":
            target.copy_(features)
            return out
        inputs = [features, target] + ([places[..., 1, :]] if self.gates == 2 else [])
        rows = h * n
        if y.device.type == "cpu":
            rows = max(1, CHUNK * torch.get_num_threads() // (w * c))
        if rows >= n * h:
            self.activate(*inputs)
            return out
        for sample in range(n):
            for part in zip(*(x[sample].split(rows) for x in inputs), strict=True):
                self.activate(*part)
        return out

    def activate(self, features: Tensor, out: Tensor, gate: Tensor | None = None) -> None:
        """Activates features into out, times the gate's sigmoid if there is one; overwrites both.

        As few calls as there are passes: threads that score side by side wait for each other at
        calls.
        """
        target = out if gate is None else features
        if self.activation == "relu":
            torch.clamp(features, min=0, out=target)
        elif features.device.type != "cpu":
            F.elu_(features)  # a pass where the way below takes five
            if target is not features:
                target.copy_(features)
        else:
            scratch, zero = self.arithmetic.workspace.planned(
                ("elu", features.shape, features.dtype, features.device),
                lambda: (
                    self.arithmetic.workspace.take("elu", features.shape, features),
                    features.new_zeros(()),
                ),
            )
            elu_into(features, scratch, zero, target)
        if gate is not None:
            torch.mul(features, gate.sigmoid_(), out=out)


def elu_into(x: Tensor, scratch: Tensor, zero: Tensor, out: Tensor) -> None:
    """ELU within 1e-7, without the slow expm1, in few passes; out may be x. zero: 0, without axes.

    It is min(max(x, 0), e**x - 1): of negative numbers e**x - 1 < 0, of positive ones x < e**x - 1.
    """
    if x.dtype == torch.bfloat16:  # rounds e**x - 1 of small positive numbers to 0
        torch.clamp(x, max=0, out=scratch)
        torch.maximum(x, scratch.mul_(LOG2_E).exp2_().sub_(1), out=out)
        return
    torch.mul(x, LOG2_E, out=scratch)
    torch.clamp(x, zero, scratch.exp2_().sub_(1), out=out)


class DropPlan(NamedTuple):
    """By layer name: `selections` where the windows share their masks, else `factors` (N, C, 1, 1).

    The default drops nothing.
    """

    selections: Mapping[str, Selection] = {}
    factors: Mapping[str, Tensor] = {}

    def apply(self, layer: str, x: Patch) -> Patch:
        """Drops channels of a layer's activations: leaves them out, or multiplies by 0."""
        if layer in self.selections:
            selection = self.selections[layer]
            return x._replace(values=select_channels(x.values, selection), channels=selection)
        if layer in self.factors:
            return x._replace(values=x.values * self.factors[layer])
        return x


NO_DROPOUT = DropPlan()


def select_channels(x: Tensor, selection: Selection) -> Tensor:
    """The selected channels of x (N, C, h, w), channels_last, gains not applied.

    As a product with a matrix of zeros and ones, which is exact and on a CPU ten times faster than
    index_select along the last dimension.
    """
    matrix = x.new_zeros(x.shape[1], len(selection.index))
    matrix[selection.index, torch.arange(len(selection.index), device=x.device)] = 1
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)
    return torch.mm(rows, matrix).view(n, h, w, -1).permute(0, 3, 1, 2)


def drop_plan(masks: ChannelMasks | None, m: int, like: Tensor) -> DropPlan:
    """What the m-th completion drops, in the form that the layers take.

    masks: None without dropout. Where all windows have the same (`masks.same`), channels that drop
    are left out, else they are multiplied by 0. like: a tensor whose device and type are wanted.
    """
    if masks is None:
        return NO_DROPOUT
    drop = masks.completion(m)
    selections, factors = {}, {}
    for name, keep in drop.keep.items():
        if masks.same:
            selections[name] = selection_of(keep[0], drop.scale, like)
        else:
            keep = keep.to(like.device, non_blocking=True).to(like.dtype)
            factors[name] = (keep * drop.scale)[:, :, None, None]
    return DropPlan(selections, factors)


def selection_of(keep: Tensor, scale: float, like: Tensor) -> Selection:
    """The live channels of a mask (C,) bool, and as many dead ones as fill the last multiple."""
    count = max(int(keep.sum()), 1)
    count = min(-(-count // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE, len(keep))
    index = torch.argsort(~keep, stable=True)[:count].sort().values
    gain = upcast_to_fp32(keep[index].to(like.dtype)) * scale
    return Selection(*(x.to(like.device, non_blocking=True) for x in (index, gain)))
