"""Which part of a layer's input is needed, and which of its output a change affects.

All intervals are half-open, in pixels of the layer's own resolution, and clipped to the image; a
convolution pads with zeros where an interval meets the image's border.
"""

from typing import NamedTuple

from inpainter.windows import centre_corner


class Span(NamedTuple):
    """[lo, hi) along one axis."""

    lo: int
    hi: int

    def common(self, other: "Span") -> "Span":
        lo = max(self.lo, other.lo)
        return Span(lo, max(lo, min(self.hi, other.hi)))

    def within(self, outer: "Span") -> slice:
        """Where this span lies in a tensor that holds `outer`."""
        return slice(self.lo - outer.lo, self.hi - outer.lo)


class Region(NamedTuple):
    """A rectangle: rows and columns."""

    rows: Span
    cols: Span

    def common(self, other: "Region") -> "Region":
        return Region(self.rows.common(other.rows), self.cols.common(other.cols))

    def within(self, outer: "Region") -> tuple[slice, slice]:
        """Index of this region in the last two dimensions of a tensor that holds `outer`."""
        return self.rows.within(outer.rows), self.cols.within(outer.cols)

    @property
    def hw(self) -> tuple[int, int]:
        return self.rows.hi - self.rows.lo, self.cols.hi - self.cols.lo


def whole(hw: tuple[int, int]) -> Region:
    """The region of a complete image of hw pixels."""
    return Region(Span(0, hw[0]), Span(0, hw[1]))


def centre(hw: tuple[int, int], hole_hw: tuple[int, int]) -> Region:
    """The central hole of an image."""
    top, left = centre_corner(hw, hole_hw)
    return Region(Span(top, top + hole_hw[0]), Span(left, left + hole_hw[1]))


class ConvInput(NamedTuple):
    """What a convolution reads along one axis: a span of the input, then zeros around it."""

    span: Span
    before: int
    after: int

    def upsampled(self) -> Span:
        """The outputs that the 2x2 phases of an upsampling layer give of what is read."""
        return Span(2 * (self.span.lo - self.before) + 1, 2 * (self.span.hi + self.after) - 1)


class ConvGeometry(NamedTuple):
    """The geometry of a layer: same-padded convolution, after a nearest ×2 upsampling if `up`."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    up: bool = False

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel // 2)

    def out_size(self, size: int) -> int:
        return 2 * size if self.up else (size - 1) // self.stride + 1

    def out_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        return self.out_size(hw[0]), self.out_size(hw[1])

    def taps(self, out: Span, size: int) -> ConvInput:
        """What the outputs [lo, hi) read of an input of `size` pixels.

        For an upsampling layer in pixels before the upsampling.
        """
        if self.up:
            lo, hi = (out.lo - 1) // 2, (out.hi + 2) // 2
        else:
            lo = out.lo * self.stride - self.padding
            hi = (out.hi - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1) + 1
        span = Span(min(max(lo, 0), size), max(min(hi, size), 0))
        return ConvInput(span, max(-lo, 0), max(hi - size, 0))

    def needed(self, out: Region, hw: tuple[int, int]) -> Region:
        """The part of an input of hw pixels that an output region is made of."""
        return Region(self.taps(out.rows, hw[0]).span, self.taps(out.cols, hw[1]).span)

    def affected_outputs(self, changed: Region, hw: tuple[int, int]) -> Region:
        """The outputs that a change of the input region can alter."""
        return Region(self._affected(changed.rows, hw[0]), self._affected(changed.cols, hw[1]))

    def _affected(self, changed: Span, size: int) -> Span:
        if self.up:
            lo, hi = 2 * changed.lo - 1, 2 * changed.hi + 1
        else:
            first = changed.lo + self.padding - self.dilation * (self.kernel - 1)
            lo = -(-first // self.stride)
            hi = (changed.hi - 1 + self.padding) // self.stride + 1
        return Span(max(lo, 0), min(hi, self.out_size(size)))
