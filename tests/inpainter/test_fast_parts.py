"""Geometry, minimal filtering and attention of the fast engine, each against the direct way."""

import pytest
import torch
import torch.nn.functional as F

from inpainter.fast.attention import FastAttention
from inpainter.fast.geometry import ConvGeometry, Region, Span, centre, whole
from inpainter.fast.winograd import Tiling, Workspace, tiles_for, transformed_kernel, winograd
from inpainter.networks.attention import contextual_attention
from inpainter.windows import centre_mask

GEOMETRIES = [
    ConvGeometry(3),
    ConvGeometry(5),
    ConvGeometry(3, stride=2),
    ConvGeometry(3, dilation=4),
    ConvGeometry(3, up=True),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("span", [(0, 24), (0, 5), (6, 11), (7, 18), (20, 24)])
def test_intervals_are_those_that_a_convolution_shows(
    geometry: ConvGeometry, span: tuple[int, int]
) -> None:
    """A change of the input shows where `affected_outputs` says; outputs read what `taps` says."""
    size, changed = 24, Span(*span)

    def run(x):
        x = x.repeat_interleave(2) if geometry.up else x
        kernel = torch.ones(1, 1, geometry.kernel)
        return F.conv1d(
            x[None], kernel, None, geometry.stride, geometry.padding, geometry.dilation
        )[0]

    x = torch.zeros(size)
    x[span[0] : span[1]] = 1
    assert geometry.out_size(size) == len(run(x))
    touched = run(x).nonzero().flatten()
    affected = geometry.affected_outputs(Region(changed, changed), (size, size)).rows
    assert (affected.lo, affected.hi) == (int(touched[0]), int(touched[-1]) + 1)
    taps = geometry.taps(affected, size)
    assert (taps.span.lo <= changed.lo, taps.span.hi >= changed.hi) == (True, True)
    outside = torch.ones(size)
    outside[taps.span.lo : taps.span.hi] = 0
    assert run(outside)[affected.lo : affected.hi].count_nonzero() == 0


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize(("size", "tile"), [(3, (4, 4)), (3, (2, 4)), (2, (3, 5)), (2, (5, 3))])
def test_minimal_filtering_is_the_convolution(size, tile, dilation) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 19, 14, generator=generator)
    weight = torch.randn(7, 5, size, size, generator=generator)
    bias = torch.randn(7, generator=generator)
    expected = F.conv2d(F.pad(x, (2, 1, 1, 2)), weight, bias, dilation=dilation)
    out_hw = tuple(expected.shape[2:])
    counts = [tiles_for(side, m, dilation) for side, m in zip(out_hw, tile, strict=True)]
    tiling = Tiling(*tile, *counts)
    kernel = transformed_kernel(weight, tiling)
    y = winograd(x, kernel, bias, size, (1, 2), out_hw, dilation, tiling, Workspace())
    torch.testing.assert_close(y, expected, rtol=0, atol=3e-4)  # rounding: 5e-5 of the spread
    parts = (x.double(), transformed_kernel(weight.double(), tiling), bias.double())
    exact = winograd(*parts, size, (1, 2), out_hw, dilation, tiling, Workspace())
    padded = F.pad(x.double(), (2, 1, 1, 2))
    expected = F.conv2d(padded, weight.double(), bias.double(), dilation=dilation)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("hw", "hole_hw", "wanted"),
    [
        ((48, 40), (32, 32), Region(Span(16, 32), Span(14, 26))),
        ((48, 40), (32, 32), Region(Span(17, 31), Span(15, 23))),
        ((24, 24), (48, 48), Region(Span(4, 20), Span(3, 21))),
        ((16, 24), (64, 32), Region(Span(0, 16), Span(9, 15))),
        ((16, 16), (64, 64), whole((16, 16))),
    ],
)
def test_attention_is_the_plain_one_where_it_is_wanted(hw, hole_hw, wanted) -> None:
    window_hw = (4 * hw[0], 4 * hw[1])
    features = torch.randn(2, 8, *hw, generator=torch.Generator().manual_seed(1))
    features = features.contiguous(memory_format=torch.channels_last)
    mask = centre_mask(window_hw, hole_hw)
    rows, cols = wanted.within(whole(hw))
    expected = contextual_attention(features, features, mask).output[:, :, rows, cols]
    attend = FastAttention(hw, wanted, centre(window_hw, hole_hw), 8)
    torch.testing.assert_close(attend(features), expected, rtol=0, atol=2e-5)
