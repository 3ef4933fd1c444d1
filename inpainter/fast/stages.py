"""Both stages of the generator on the fast path: only what the hole's completion depends on.

N windows, C image channels, H x W window, h x w hole. A chain has a region for every layer's
output, worked out backwards from the region that is wanted of the last. What the hole cannot alter
is computed once for each window.
"""

from collections.abc import Collection, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from common.runtime import upcast_to_fp32
from inpainter.fast.attention import FastAttention
from inpainter.fast.geometry import Region, centre, whole
from inpainter.fast.layers import (
    NO_DROPOUT,
    Arithmetic,
    DropPlan,
    FastLayer,
    FirstLayer,
    Patch,
    Selection,
)
from inpainter.networks.generator import CoarseGenerator, FineGenerator, Stage


class Chain:
    """Named layers, the resolution of each, and the region that is needed of each output.

    layers: (full name, layer); in_hw: size of the first layer's input; wanted: region of the last
    layer's output.
    """

    def __init__(
        self, layers: Sequence[tuple[str, FastLayer]], in_hw: tuple[int, int], wanted: Region
    ) -> None:
        self.names = [name for name, _ in layers]
        self.layers = [layer for _, layer in layers]
        self.hws = [in_hw]
        for layer in self.layers:
            self.hws.append(layer.geometry.out_hw(self.hws[-1]))
        self.needed = [wanted]
        for i in reversed(range(len(layers))):
            self.needed.append(self.input_of(i, self.needed[-1]))
        self.input_needed = self.needed.pop()
        self.needed.reverse()

    def input_of(self, i: int, region: Region) -> Region:
        """The part of layer i's input that a region of its output is made of."""
        return self.layers[i].geometry.needed(region, self.hws[i])

    def shared_layers(self, active: Collection[str]) -> int:
        """How many layers are the same for all completions: to the first of those that drop."""
        return next((i + 1 for i, name in enumerate(self.names) if name in active), len(self.names))

    def run(
        self,
        x: Patch,
        plan: DropPlan,
        incoming: Selection | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Patch, Selection | None]:
        """Runs layers start … stop - 1 and drops what each of them drops.

        incoming: which channels x holds, None = all. Returns the last layer's activations and which
        channels they are.
        """
        layers = list(zip(self.names, self.layers, self.needed, strict=True))
        for name, layer, region in layers[start:stop]:
            outgoing = plan.selections.get(name)
            all_channels = incoming is None and outgoing is None
            x = layer(x, region, None if all_channels else layer.thinned(incoming, outgoing))
            if name in plan.factors:
                x = x._replace(values=x.values * plan.factors[name])
            incoming = outgoing
        return x, incoming


class IncrementalChain:
    """A chain whose input changes in one region only: the rest of every layer is computed once.

    chain: the layers; count: how many of them to run; changed: the region of the first layer's
    *output* that changes. The first layer is run by the caller, which fills `changed[0]` of its
    buffer.
    """

    def __init__(self, chain: Chain, count: int, changed: Region) -> None:
        self.chain = chain
        self.count = count
        wanted = chain.needed[:count]
        affected = [changed]
        for i in range(1, count):
            affected.append(chain.layers[i].geometry.affected_outputs(affected[-1], chain.hws[i]))
        self.changed = [a.common(b) for a, b in zip(affected, wanted, strict=True)]
        self.buffered = [chain.input_of(i, self.changed[i]) for i in range(1, count)]
        self.buffered.append(wanted[-1])
        self.static = self._static_regions()

    def _static_regions(self) -> list[Region | None]:
        """Region of each layer's output that depends only on the surroundings; None if unused."""
        static: list[Region | None] = []
        for i in reversed(range(self.count)):
            regions = [] if self.changed[i].covers(self.buffered[i]) else [self.buffered[i]]
            if static and static[-1] is not None:
                regions.append(self.chain.input_of(i + 1, static[-1]))
            static.append(reduce(Region.hull, regions) if regions else None)
        return static[::-1]

    def surroundings(self, first: Patch) -> list[Tensor]:
        """Buffers of `buffered` regions, one for each layer, with the surroundings in their places.

        first: the first layer's output around a hole of any content, static[0] or more.
        """
        buffers, x = [], first
        for i, (layer, region) in enumerate(zip(self.chain.layers, self.buffered, strict=False)):
            if i > 0 and self.static[i] is not None:
                x = layer(x, self.static[i])
            shape = (len(first.values), *region.hw, layer.kernel.channels)
            buffer = first.values.new_empty(shape).permute(0, 3, 1, 2)
            if not self.changed[i].covers(region):
                buffer.copy_(x.part(region))
            buffers.append(buffer)
        return buffers

    def place(self, buffers: list[Tensor], i: int) -> Tensor:
        """Where layer i's changed part lies in its buffer, a view."""
        rows, cols = self.changed[i].within(self.buffered[i])
        return buffers[i][:, :, rows, cols]

    def run(self, buffers: list[Tensor]) -> Patch:
        """Runs the layers after the first over what changed; the result is the last buffer."""
        for i in range(1, self.count):
            before = Patch(buffers[i - 1], self.buffered[i - 1], self.chain.hws[i])
            self.chain.layers[i](before, self.changed[i], out=self.place(buffers, i))
        last = self.count - 1
        return Patch(buffers[last], self.buffered[last], self.chain.hws[self.count])


class CoarsePrefix(NamedTuple):
    """Activations that all completions of a batch share, and the number of layers behind them."""

    patch: Patch
    count: int


class FastCoarse:
    """The coarse generator for one size of window and hole."""

    def __init__(
        self,
        stage: CoarseGenerator,
        window_hw: tuple[int, int],
        hole_hw: tuple[int, int],
        arithmetic: Arithmetic,
    ) -> None:
        self.hole = centre(window_hw, hole_hw)
        self.first = FirstLayer([stage.conv1], window_hw, hole_hw, arithmetic)
        self.chain = Chain(named_layers(stage, "", 2, 17, arithmetic), window_hw, self.hole)

    def prefix(self, known: Tensor, active: Collection[str]) -> CoarsePrefix:
        """Runs the layers up to the first that drops, with all their channels.

        known: windows with the hole zeroed, (N, C, H, W).
        """
        region = self.chain.input_needed
        hw = (known.shape[2], known.shape[3])
        sums = self.first.sums(known, whole(hw), region, self.first.constants(region))
        x = Patch(self.first.activate(sums, 0), region, hw)
        count = self.chain.shared_layers(active)
        return CoarsePrefix(self.chain.run(x, NO_DROPOUT, stop=count)[0], count)

    def complete(self, prefix: CoarsePrefix, plan: DropPlan) -> Tensor:
        """One completion of the hole: (N, C, h, w), clamped to [-1, 1]."""
        x, channels = plan.apply(self.chain.names[prefix.count - 1], prefix.patch)
        x, _ = self.chain.run(x, plan, channels, start=prefix.count)
        return x.part(self.hole).clamp(-1, 1)


def named_layers(
    stage: Stage, prefix: str, first: int, last: int, arithmetic: Arithmetic
) -> list[tuple[str, FastLayer]]:
    """(full name, layer) of `<prefix>conv<first>` … `<prefix>conv<last>`."""
    return [
        (f"{stage.name}.{layer}", FastLayer(block, arithmetic, up=layer in Stage.UPSAMPLE_BEFORE))
        for layer, block in stage.layers(prefix, first, last)
    ]


class Branch(NamedTuple):
    """The layers of one branch up to the first that drops, and their buffers for a batch."""

    chain: IncrementalChain
    buffers: list[Tensor]


class Surroundings(NamedTuple):
    """What the completions of a batch share.

    sums: pre-activations of both first layers over `changed`, all that a hole can alter; branches:
    the convolution branch and the attention branch.
    """

    sums: Tensor
    changed: Region
    branches: list[Branch]


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
        self.attended = self.matched.input_needed
        self.attend = FastAttention(self.quarter_hw, self.attended, self.hole, channels)
        self.width = stage.conv5.out_channels
        self.incremental_chains: dict[tuple[int, ...], list[IncrementalChain]] = {}

    def shared_chains(self, active: Collection[str]) -> list[IncrementalChain]:
        """The branches' layers up to the first that drops, planned once for each set of these."""
        counts = tuple(chain.shared_layers(active) for chain in self.chains)
        if counts not in self.incremental_chains:
            changed = self.first.geometry.affected_outputs(self.hole, self.hw)
            self.incremental_chains[counts] = [
                IncrementalChain(*pair, changed) for pair in zip(self.chains, counts, strict=True)
            ]
        return self.incremental_chains[counts]

    def surroundings(self, known: Tensor, active: Collection[str]) -> Surroundings:
        """Runs the shared layers over what lies around the hole.

        known: windows with the hole zeroed, (N, C, H, W).
        """
        chains = self.shared_chains(active)
        changed = chains[0].changed[0].hull(chains[1].changed[0])
        static = [chain.static[0] for chain in chains if chain.static[0] is not None]
        region = reduce(Region.hull, static, changed)
        all_sums = self.first.sums(known, whole(self.hw), region, self.first.constants(region))
        rows, cols = changed.within(region)
        sums = all_sums[:, rows, cols].clone()
        branches = []
        for i, chain in enumerate(chains):
            first = Patch(self.first.activate(all_sums, i), region, self.hw)
            branches.append(Branch(chain, chain.surroundings(first)))
        return Surroundings(sums, changed, branches)

    def complete(self, around: Surroundings, hole: Tensor, plan: DropPlan) -> Tensor:
        """One completion from the coarse one: (N, C, h, w) -> (N, C, h, w), clamped to [-1, 1]."""
        sums = self.first.sums(upcast_to_fp32(hole), self.hole, around.changed, around.sums)
        around = around._replace(sums=sums)
        convolved, convolved_channels = self.branch(0, around, plan)
        matching, matching_channels = self.branch(1, around, plan)
        features = matching.part(whole(self.quarter_hw))
        if matching_channels is not None:
            index, gain = matching_channels
            features = features * gain.to(features.dtype)[:, None, None]
            matching_channels = Selection(index, torch.ones_like(gain))
        attended = Patch(self.attend(features), self.attended, self.quarter_hw)
        attended, attended_channels = self.matched.run(attended, plan, matching_channels)
        region = self.decoder.input_needed
        both = torch.cat([convolved.part(region), attended.part(region)], dim=1)
        channels = joint_selection(convolved_channels, attended_channels, self.width, both)
        x, _ = self.decoder.run(Patch(both, region, self.quarter_hw), plan, channels)
        return x.part(self.hole).clamp(-1, 1)

    def branch(
        self, i: int, around: Surroundings, plan: DropPlan
    ) -> tuple[Patch, Selection | None]:
        """Runs one branch to its end over the changed hole."""
        shared, buffers = around.branches[i]
        rows, cols = shared.changed[0].within(around.changed)
        self.first.activate(around.sums[:, rows, cols], i, shared.place(buffers, 0))
        last = self.chains[i].names[shared.count - 1]
        patch, channels = plan.apply(last, shared.run(buffers))
        return self.chains[i].run(patch, plan, channels, start=shared.count)


def joint_selection(
    first: Selection | None, second: Selection | None, width: int, like: Tensor
) -> Selection | None:
    """Which channels the concatenation of two branches, `width` channels each, holds."""
    if first is None and second is None:
        return None
    index = torch.arange(width, device=like.device)
    every = Selection(index, torch.ones(width, device=like.device))
    first, second = first or every, second or every
    index = torch.cat([first.index, width + second.index])
    return Selection(index, torch.cat([first.gain, second.gain]))
