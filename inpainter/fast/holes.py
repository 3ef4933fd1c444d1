"""Completions for the critics' steps: of the holes alone, without gradients, by minimal filtering.

Four of five training steps update the critics, which see a completion only where it fills the hole.
So of every layer that region is computed which the holes of the batch depend on. On a CPU in fp32;
the numbers are the generator's, but for rounding. N samples, C channels, H x W crop, h x w region.
"""

import torch
from torch import Tensor

from inpainter.fast.attention import FastAttention
from inpainter.fast.geometry import Region, Span, whole
from inpainter.fast.layers import Arithmetic, DropPlan, FastLayer, Patch
from inpainter.fast.stages import Chain, named_layers
from inpainter.fast.winograd import Workspace
from inpainter.networks.dropout import ChannelDropout, Drop, ElementDropout
from inpainter.networks.generator import Generator, with_mask_planes

SAMPLED = 8
"""The attention looks at every 8th pixel of a hole; regions are rounded up to multiples of it."""
FROM_PIXELS = 128 * 128
"""Below, it saves nothing."""
Layers = list[tuple[str, FastLayer]]


class HoleCompleter:
    """Fills the holes of a batch as the generator does.

    Takes its weights at the first call, and again at the next one after `forget`.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.arithmetic = Arithmetic(torch.float32, Workspace(), minimal_filtering=True)
        self.layers: dict[str, Layers] = {}

    def forget(self) -> None:
        """To be called where the generator's weights have changed."""
        self.layers = {}

    def suits(self, known: Tensor, drop: Drop | None) -> bool:
        """Whether this way is open and faster: large crops in fp32 on a CPU, no element dropout."""
        if known.device.type != "cpu" or known.dtype != torch.float32:
            return False
        large = known.shape[2] * known.shape[3] >= FROM_PIXELS
        return large and not isinstance(drop, ElementDropout)

    @torch.no_grad()
    def __call__(
        self, known: Tensor, mask: Tensor, drop: Drop | None, attention_mask: Tensor | None
    ) -> Tensor:
        """The crops with their holes filled, (N, C, H, W) in [-1, 1].

        known: (N, C, H, W), zero in the holes; mask: (N, 1, H, W), 1 = hole; drop, attention_mask:
        see Generator. One sample after the other, so that each has its own region.
        """
        if not self.layers:
            self.take_weights()
        filled = known.clone()
        for i in range(len(known)):
            only = slice(i, i + 1)
            plan = DropPlan()
            if isinstance(drop, ChannelDropout):
                kept = {name: keep[only] * drop.scale for name, keep in drop.keep.items()}
                plan = DropPlan(factors={name: f[:, :, None, None] for name, f in kept.items()})
            hidden = mask[only] if attention_mask is None else attention_mask
            filled[only] = self.complete(known[only], mask[only], plan, hidden)
        return filled

    def complete(
        self, known: Tensor, mask: Tensor, plan: DropPlan, attention_mask: Tensor
    ) -> Tensor:
        """One crop with its hole filled, (1, C, H, W)."""
        hw = (known.shape[2], known.shape[3])
        region = rounded(region_of(mask), hw)
        here = (..., *region.within(whole(hw)))
        filled = known.clone()
        filled[here] += self.coarse(known, mask, plan, region) * mask[here]
        if self.generator.fine_generator is None:
            return filled
        fine = self.fine(filled, mask, attention_mask, plan, region)
        filled[here] = known[here] + fine * mask[here]
        return filled

    def take_weights(self) -> None:
        """Makes the layers ready, with the weights that the generator has now."""
        coarse, fine = self.generator.coarse_generator, self.generator.fine_generator
        self.layers = {"coarse": named_layers(coarse, "", 1, 17, self.arithmetic)}
        if fine is not None:
            parts = {"branch": ("", 1, 10), "features": ("pm", 1, 6), "matched": ("pm", 9, 10)}
            for name, part in (parts | {"decoder": ("all", 11, 17)}).items():
                self.layers[name] = named_layers(fine, *part, self.arithmetic)

    def coarse(self, known: Tensor, mask: Tensor, plan: DropPlan, region: Region) -> Tensor:
        """The coarse stage's completion of a region, (N, C, h, w) in [-1, 1]."""
        x = as_patch(with_mask_planes(known, mask))
        return Chain(self.layers["coarse"], x.hw, region).run(x, plan).part(region).clamp(-1, 1)

    def fine(
        self, filled: Tensor, mask: Tensor, attention_mask: Tensor, plan: DropPlan, region: Region
    ) -> Tensor:
        """The fine stage's completion of a region, (N, C, h, w) in [-1, 1]."""
        x = as_patch(with_mask_planes(filled, mask))
        quarter = (x.hw[0] // 4, x.hw[1] // 4)
        decoder = Chain(self.layers["decoder"], quarter, region)
        joint = decoder.input_needed
        matched = Chain(self.layers["matched"], quarter, joint)
        branch = Chain(self.layers["branch"], x.hw, joint).run(x, plan)
        features = Chain(self.layers["features"], x.hw, whole(quarter)).run(x, plan).values
        wanted, channels = matched.input_needed, features.shape[1]
        attend = FastAttention(quarter, wanted, sampled(region_of(attention_mask)), channels)
        attended = matched.run(Patch(attend(features), wanted, quarter), plan)
        both = torch.cat([branch.part(joint), attended.part(joint)], dim=1)
        return decoder.run(Patch(both, joint, quarter), plan).part(region).clamp(-1, 1)


def as_patch(x: Tensor) -> Patch:
    """A whole image (N, C, H, W) as the layers take it."""
    hw = (x.shape[2], x.shape[3])
    return Patch(x.contiguous(memory_format=torch.channels_last), whole(hw), hw)


def region_of(mask: Tensor) -> Region:
    """The smallest region that has the hole of (1, 1, H, W)."""
    hole = mask[0, 0] != 0  # (H, W)
    spans = []
    for axis in (1, 0):
        places = hole.any(dim=axis).nonzero()
        spans.append(Span(int(places[0]), int(places[-1]) + 1))
    return Region(*spans)


def rounded(region: Region, hw: tuple[int, int]) -> Region:
    """The region enlarged to multiples of 8 pixels; image sides are multiples of 16."""
    return Region(
        *(Span(s.lo // SAMPLED * SAMPLED, -(-s.hi // SAMPLED) * SAMPLED) for s in region)
    ).common(whole(hw))


def sampled(hole: Region) -> Region:
    """The region in multiples of 8 pixels that has the same of every 8th pixel as this one."""
    return Region(
        *(Span(-(-s.lo // SAMPLED) * SAMPLED, -(-s.hi // SAMPLED) * SAMPLED) for s in hole)
    )
