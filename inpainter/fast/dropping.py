"""What one completion drops, ready for the layers: channels left out, or factors to multiply by."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.runtime import at_least_fp32
from inpainter.dropout import ChannelDropout
from inpainter.fast.layers import Patch, Selection


@dataclass(frozen=True)
class Dropping:
    """By layer name: `selections` where the windows share their masks, else `factors` (N, C, 1, 1).

    The default drops nothing.
    """

    selections: Mapping[str, Selection] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, layer: str, x: Patch) -> tuple[Patch, Selection | None]:
        """Drops channels of a layer's activations.

        Returns the kept channels and which they are, their gains not yet applied; or, where masks
        differ, all channels multiplied by their factors and None.
        """
        if layer in self.selections:
            selection = self.selections[layer]
            return x._replace(values=chosen(x.values, selection)), selection
        if layer in self.factors:
            return x._replace(values=x.values * self.factors[layer]), None
        return x, None


NOTHING = Dropping()


def chosen(x: Tensor, selection: Selection) -> Tensor:
    """The selected channels of x (N, C, h, w), channels_last, gains not applied.

    As a product with a matrix of zeros and ones, which is exact and on a CPU ten times faster than
    index_select along the last dimension.
    """
    matrix = x.new_zeros(x.shape[1], len(selection.index))
    matrix[selection.index, torch.arange(len(selection.index), device=x.device)] = 1
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)
    return torch.mm(rows, matrix).view(n, h, w, -1).permute(0, 3, 1, 2)


def dropping_of(drop: ChannelDropout, like: Tensor, *, thin: bool, multiple: int) -> Dropping:
    """The masks of a completion in the form that its layers take.

    like: a tensor of the device and type of the arithmetic. thin: leave dead channels out; the
    masks of all windows must then be equal. multiple: selections are filled up to a multiple of it
    with dead channels, which convolutions prefer.
    """
    if thin:
        return Dropping(
            selections={
                name: selection_of(keep[0], drop.scale, like, multiple)
                for name, keep in drop.keep.items()
            }
        )
    factors = {
        name: (moved(keep, like).to(like.dtype) * drop.scale)[:, :, None, None]
        for name, keep in drop.keep.items()
    }
    return Dropping(factors=factors)


def selection_of(keep: Tensor, scale: float, like: Tensor, multiple: int) -> Selection:
    """The live channels of a mask (C,) bool, and as many dead ones as fill the last multiple."""
    count = max(int(keep.sum()), 1)
    count = min(-(-count // multiple) * multiple, len(keep))
    index = torch.argsort(~keep, stable=True)[:count].sort().values
    gain = at_least_fp32(keep[index].to(like.dtype)) * scale
    return Selection(moved(index, like), moved(gain, like))


def moved(x: Tensor, like: Tensor) -> Tensor:
    """x on the device of `like`; the CPU does not wait for a GPU to take it."""
    return x.to(like.device, non_blocking=True)
