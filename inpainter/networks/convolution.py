"""Convolutions of a training in fp32 on a CPU: each product the way that takes least arithmetic.

A convolution after nearest ×2 is four smaller ones before it; wide layers go by minimal filtering,
forwards and backwards. The numbers are torch's but for rounding. N samples, I and O input and
output channels, r kernel size. Images pass channels last.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpainter.fast.winograd import (
    Tiling,
    Workspace,
    tiling_for,
    transformed_kernel,
    weight_gradient,
    winograd,
)

WORKSPACE = Workspace()
FILTERED_FROM = 96
"""Channels of the narrower side from which images are filtered: moving numbers costs less."""
GRADIENT_FILTERED_FROM = 64
"""The same for the weights' gradient."""


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of x may go this way: while training in fp32 on a CPU, uncompiled."""
    if not torch.is_grad_enabled() or not weight.requires_grad or weight.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return x.dtype == weight.dtype == torch.float32


def trained_convolution(x: Tensor, conv: nn.Conv2d, *, enlarge: bool) -> Tensor:
    """(N, I, H, W) -> (N, O, H / stride, W / stride) of a convolution that pads to keep the size.

    enlarge: nearest ×2 before it, (N, I, H, W) -> (N, O, 2H, 2W), of 3x3 kernels.
    """
    if not enlarge:
        geometry = (conv.stride[0], conv.padding[0], conv.dilation[0])
        return _Convolution.apply(x, conv.weight, conv.bias, *geometry)
    phases = phase_kernels(conv.weight).flatten(0, 1)
    return _Interleaved.apply(_Convolution.apply(x, phases, conv.bias.repeat(4), 1, 1, 1))


def phase_kernels(weight: Tensor) -> Tensor:
    """conv3x3 after nearest ×2 as four 2x2 convolutions: (O, I, 3, 3) -> (4, O, I, 2, 2).

    Phase (a, b) of the window at low-resolution pixels (j, j + 1) is the output at 2j + 1 + a: its
    three taps fall on two pixels only.
    """

    def halves(w: Tensor, dim: int) -> list[Tensor]:
        first, second, third = w.unbind(dim)
        pairs = [(first + second, third), (first, second + third)]
        return [torch.stack(pair, dim) for pair in pairs]

    phases = [phase for rows in halves(weight.double(), 2) for phase in halves(rows, 3)]
    return torch.stack(phases).to(weight.dtype)


class _Interleaved(torch.autograd.Function):
    """Phases (N, 4 * O, H + 1, W + 1), the windows from -1 on, in their places: (N, O, 2H, 2W)."""

    @staticmethod
    def forward(ctx, phases: Tensor) -> Tensor:
        ctx.shape = phases.shape
        n, channels, h, w = phases.shape
        shape = (n, channels // 4, 2 * (h - 1), 2 * (w - 1))
        whole = torch.empty(shape, dtype=phases.dtype, memory_format=torch.channels_last)
        for phase, place in _phases_and_places(phases, whole):
            place.copy_(phase)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        phases = torch.empty(ctx.shape, dtype=grad.dtype, memory_format=torch.channels_last)
        phases.zero_()
        for phase, place in _phases_and_places(phases, grad):
            phase.copy_(place)
        return phases


def _phases_and_places(phases: Tensor, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (N, O, H, W) of each of the four phases, and of where it goes."""
    for number, (down, right) in enumerate(itertools.product((0, 1), repeat=2)):
        phase = phases.unflatten(1, (4, -1))[:, number]
        rows = slice(1 - down, phase.shape[2] - down)
        columns = slice(1 - right, phase.shape[3] - right)
        yield phase[:, :, rows, columns], whole[:, :, 1 - down :: 2, 1 - right :: 2]


class _Convolution(torch.autograd.Function):
    """conv2d whose gradients go their own ways; that of the weights from channels that lie apart.

    With channels last torch takes up to five times as long for it on processors with AVX2 alone.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, stride: int, pad: int, dilation: int
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.geometry = (stride, pad, dilation)
        hw = _output_hw(x, weight.shape[2], pad, dilation)
        tiling = _tiling(weight, hw, stride, dilation, FILTERED_FROM)
        if tiling is not None:
            return _filtered(x, weight, bias, pad, hw, dilation, tiling)
        return F.conv2d(x, weight, bias, stride, pad, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_input = _of_input(grad, x, weight, *ctx.geometry) if ctx.needs_input_grad[0] else None
        of_weight = _of_weight(grad, x, weight, *ctx.geometry)
        return of_input, of_weight, grad.sum((0, 2, 3)), None, None, None


def _of_input(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, pad: int, dilation: int
) -> Tensor:
    hw = (x.shape[2], x.shape[3])
    tiling = _tiling(weight, hw, stride, dilation, FILTERED_FROM)
    if tiling is None:
        return _torchs(grad, x, weight, stride, pad, dilation, of_input=True)
    flipped, around = weight.transpose(0, 1).flip(2, 3), dilation * (weight.shape[2] - 1) - pad
    return _filtered(grad, flipped, grad.new_zeros(()), around, hw, dilation, tiling)


def _of_weight(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, pad: int, dilation: int
) -> Tensor:
    hw, size = (grad.shape[2], grad.shape[3]), weight.shape[2]
    tiling = _tiling(weight, hw, stride, dilation, GRADIENT_FILTERED_FROM)
    if tiling is None:
        apart = (_apart("grad", grad), _apart("x", x), weight.contiguous())
        return _torchs(*apart, stride, pad, dilation, of_input=False)
    geometry = (size, (pad, pad), dilation, tiling, WORKSPACE)
    samples = zip(x.split(1), grad.split(1), strict=True)
    return sum(weight_gradient(*sample, *geometry) for sample in samples)


def _apart(name: str, images: Tensor) -> Tensor:
    """The images with channels that lie apart, in memory that the next call overwrites."""
    apart = WORKSPACE.take(name, images.shape, images)
    for place, image in zip(apart, images, strict=True):  # torch transposes matrices twice as fast
        place.flatten(1).copy_(image.permute(1, 2, 0).flatten(0, 1).t())
    return apart


def _torchs(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    pad: int,
    dilation: int,
    *,
    of_input: bool,
) -> Tensor:
    """Torch's gradient of the input or of the weights."""
    pairs = ((stride, stride), (pad, pad), (dilation, dilation))
    wanted = (of_input, not of_input, False)
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *pairs, False, (0, 0), 1, wanted
    )
    return found[0 if of_input else 1]


def _output_hw(x: Tensor, size: int, pad: int, dilation: int) -> tuple[int, int]:
    """Of stride 1."""
    more = 2 * pad - dilation * (size - 1)
    return (x.shape[2] + more, x.shape[3] + more)


def _tiling(
    weight: Tensor, out_hw: tuple[int, int], stride: int, dilation: int, least: int
) -> Tiling | None:
    """How a product is filtered; None where the direct way is faster."""
    out_channels, in_channels, size, _ = weight.shape
    if stride > 1 or min(in_channels, out_channels) < least:
        return None
    return tiling_for(out_hw, dilation, size, in_channels, out_channels)


def _filtered(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pad: int,
    out_hw: tuple[int, int],
    dilation: int,
    tiling: Tiling,
) -> Tensor:
    """The convolution sample by sample: (N, I, H, W) -> (N, O, *out_hw)."""
    kernel, size = transformed_kernel(weight, tiling), weight.shape[2]
    shape = (len(x), weight.shape[0], *out_hw)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    geometry = (size, (pad, pad), out_hw, dilation, tiling, WORKSPACE)
    for sample, result in zip(x.split(1), out.split(1), strict=True):
        result.copy_(winograd(sample, kernel, bias, *geometry))
    return out
