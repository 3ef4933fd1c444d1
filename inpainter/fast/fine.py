"""The fine stage on the fast path: what the hole cannot alter is computed once per window.

N windows, C image channels, H x W window, h x w hole.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from common.runtime import at_least_fp32
from inpainter.fast.attention import FastAttention
from inpainter.fast.chains import Chain, ChangedChain
from inpainter.fast.coarse import named_layers
from inpainter.fast.dropping import Dropping
from inpainter.fast.first_layer import FirstLayer
from inpainter.fast.geometry import Region, centre, whole
from inpainter.fast.layers import Arithmetic, Patch, Selection
from inpainter.generator import FineGenerator


class Branch(NamedTuple):
    """The layers of one branch up to the first that drops, and their buffers for a batch."""

    chain: ChangedChain
    buffers: list[Tensor]


class Surroundings(NamedTuple):
    """What the completions of a batch share: the convolution branch and the attention branch."""

    sums: Tensor
    branches: tuple[Branch, Branch]


class FastFine:
    """The fine generator for one size of window and hole."""

    def __init__(
        self,
        stage: FineGenerator,
        window_hw: tuple[int, int],
        hole_hw: tuple[int, int],
        arithmetic: Arithmetic,
    ) -> None:
        self.hole = centre(window_hw, hole_hw)
        self.hw = window_hw
        self.quarter_hw = (window_hw[0] // 4, window_hw[1] // 4)
        self.first = FirstLayer([stage.conv1, stage.pmconv1], window_hw, hole_hw, arithmetic)
        self.decoder = Chain(
            named_layers(stage, "all", 11, 17, arithmetic), self.quarter_hw, self.hole
        )
        joint = self.decoder.input_needed
        self.matched = Chain(named_layers(stage, "pm", 9, 10, arithmetic), self.quarter_hw, joint)
        # The first layers' arithmetic is FirstLayer's; here they give names and geometry.
        self.chains = (
            Chain(named_layers(stage, "", 1, 10, arithmetic), window_hw, joint),
            Chain(named_layers(stage, "pm", 1, 6, arithmetic), window_hw, whole(self.quarter_hw)),
        )
        channels = stage.pmconv6.out_channels
        wanted = self.matched.input_needed
        self.attend = FastAttention(self.quarter_hw, wanted, self.hole, channels)
        self.attended = wanted
        self.width = stage.conv5.out_channels
        self.changed_chains: dict[tuple[int, int], tuple[ChangedChain, ChangedChain]] = {}

    def shared_chains(self, live: Collection[str]) -> tuple[ChangedChain, ChangedChain]:
        """The branches' layers up to the first that drops, planned once for each set of these."""
        counts = tuple(chain.first_live(live) for chain in self.chains)
        if counts not in self.changed_chains:
            changed = self.first.reach.reached(self.hole, self.hw)
            self.changed_chains[counts] = tuple(
                ChangedChain(chain, count, changed)
                for chain, count in zip(self.chains, counts, strict=True)
            )
        return self.changed_chains[counts]

    def surroundings(self, known: Tensor, live: Collection[str]) -> Surroundings:
        """Runs the shared layers over what lies around the hole.

        known: windows with the hole zeroed, (N, C, H, W).
        """
        shared = self.shared_chains(live)
        regions = [chain.fresh[0] for chain in shared]
        regions += [chain.still[0] for chain in shared if chain.still[0] is not None]
        region = regions[0]
        for other in regions[1:]:
            region = region.hull(other)
        all_sums = self.first.sums(known, whole(self.hw), region, self.first.constants(region))
        fresh = regions[0].hull(regions[1])
        rows, cols = fresh.within(region)
        sums = all_sums[:, rows, cols].clone()
        branches = []
        for i, chain in enumerate(shared):
            first = Patch(self.first.activate(all_sums, i), region, self.hw)
            branches.append(Branch(chain, chain.surroundings(first)))
        return Surroundings(sums, tuple(branches))

    def complete(self, around: Surroundings, hole: Tensor, dropping: Dropping) -> Tensor:
        """One completion from the coarse one: (N, C, h, w) -> (N, C, h, w), clamped to [-1, 1]."""
        fresh = around.branches[0].chain.fresh[0].hull(around.branches[1].chain.fresh[0])
        sums = self.first.sums(at_least_fp32(hole), self.hole, fresh, around.sums)
        (kept, kept_channels), (matching, matching_channels) = (
            self.branch(i, sums, fresh, around.branches[i], dropping) for i in (0, 1)
        )
        features = matching.part(whole(self.quarter_hw))
        if matching_channels is not None:
            features = features * matching_channels.gain.to(features.dtype)[:, None, None]
            matching_channels = matching_channels._replace(
                gain=torch.ones_like(matching_channels.gain)
            )
        attended = Patch(self.attend(features), self.attended, self.quarter_hw)
        attended, attended_channels = self.matched.run(attended, dropping, matching_channels)
        region = self.decoder.input_needed
        both = torch.cat([kept.part(region), attended.part(region)], dim=1)
        channels = joined(kept_channels, attended_channels, self.width, both)
        x, _ = self.decoder.run(Patch(both, region, self.quarter_hw), dropping, channels)
        return x.part(self.hole).clamp(-1, 1)

    def branch(
        self, i: int, sums: Tensor, region: Region, shared: Branch, dropping: Dropping
    ) -> tuple[Patch, Selection | None]:
        """Runs one branch to its end over the changed hole."""
        changed = shared.chain
        rows, cols = changed.fresh[0].within(region)
        self.first.activate(sums[:, rows, cols], i, changed.place(shared.buffers, 0))
        patch, channels = dropping.apply(
            self.chains[i].names[changed.count - 1], changed.run(shared.buffers)
        )
        return self.chains[i].run(patch, dropping, channels, start=changed.count)


def joined(
    first: Selection | None, second: Selection | None, width: int, like: Tensor
) -> Selection | None:
    """Which channels the concatenation of two branches, `width` channels each, holds."""
    if first is None and second is None:
        return None
    every = Selection(
        torch.arange(width, device=like.device), torch.ones(width, device=like.device)
    )
    first, second = first or every, second or every
    return Selection(
        torch.cat([first.index, width + second.index]), torch.cat([first.gain, second.gain])
    )
