"""Both stages of the generator on the fast path: only what the hole's completion depends on.

N windows, C image channels, H x W window, h x w hole. A chain's plan is a region for every layer's
output, worked out backwards from the region that is wanted of the last. What the hole cannot alter
is computed once for each window.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.runtime import upcast_to_fp32
from inpainter.fast.attention import FastAttention
from inpainter.fast.geometry import Region, centre, whole
from inpainter.fast.layers import Arithmetic, DropPlan, FastLayer, FirstLayer, Patch, Selection
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
            self.needed.append(self.layers[i].geometry.needed(self.needed[-1], self.hws[i]))
        self.input_needed = self.needed.pop()
        self.needed.reverse()

    def first_live(self, live: Collection[str]) -> int:
        """How many layers are the same for all completions: to the first that drops."""
        for i, name in enumerate(self.names):
            if name in live:
                return i + 1
        return len(self.names)

    def run(
        self,
        x: Patch,
        dropping: DropPlan,
        incoming: Selection | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Patch, Selection | None]:
        """Runs layers start … stop - 1 and drops what each of them drops.

        incoming: which channels x holds, none = all. Returns the last layer's activations and which
        channels they are.
        """
        for i in range(start, len(self.layers) if stop is None else stop):
            name, layer = self.names[i], self.layers[i]
            outgoing = dropping.selections.get(name)
            kernel = None
            if incoming is not None or outgoing is not None:
                kernel = layer.thinned(incoming, outgoing)
            x = layer(x, self.needed[i], kernel)
            if name in dropping.factors:
                x = x._replace(values=x.values * dropping.factors[name])
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
        self.buffered = [
            chain.layers[i + 1].geometry.needed(self.changed[i + 1], chain.hws[i + 1])
            if i + 1 < count
            else wanted[i]
            for i in range(count)
        ]
        self.static = self._static_regions()

    def _static_regions(self) -> list[Region | None]:
        """Region of each layer's output that depends only on the surroundings; None if unused."""
        static: list[Region | None] = [None] * self.count
        for i in reversed(range(self.count)):
            if not self.changed[i].covers(self.buffered[i]):
                static[i] = self.buffered[i]
            if i + 1 < self.count and static[i + 1] is not None:
                needed = self.chain.layers[i + 1].geometry.needed(
                    static[i + 1], self.chain.hws[i + 1]
                )
                static[i] = needed if static[i] is None else static[i].hull(needed)
        return static

    def surroundings(self, first: Patch) -> list[Tensor]:
        """Buffers of `buffered` regions, one for each layer, with the surroundings in their places.

        first: the first layer's output around a hole of any content, static[0] or more.
        """
        buffers, x = [], first
        for i in range(self.count):
            if i > 0 and self.static[i] is not None:
                x = self.chain.layers[i](x, self.static[i])
            region = self.buffered[i]
            if self.changed[i].covers(region):
                n, channels = len(first.values), self.chain.layers[i].kernel.channels
                empty = first.values.new_empty(n, *region.hw, channels)
                buffers.append(empty.permute(0, 3, 1, 2))
            else:
                buffers.append(x.part(region).permute(0, 2, 3, 1).clone().permute(0, 3, 1, 2))
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

    def prefix(self, known: Tensor, live: Collection[str]) -> CoarsePrefix:
        """Runs the layers up to the first that drops, with all their channels.

        known: windows with the hole zeroed, (N, C, H, W).
        """
        region = self.chain.input_needed
        hw = (known.shape[2], known.shape[3])
        sums = self.first.sums(known, whole(hw), region, self.first.constants(region))
        x = Patch(self.first.activate(sums, 0), region, hw)
        count = self.chain.first_live(live)
        from_nothing = DropPlan()
        return CoarsePrefix(self.chain.run(x, from_nothing, stop=count)[0], count)

    def complete(self, prefix: CoarsePrefix, dropping: DropPlan) -> Tensor:
        """One completion of the hole: (N, C, h, w), clamped to [-1, 1]."""
        x, channels = dropping.apply(self.chain.names[prefix.count - 1], prefix.patch)
        x, _ = self.chain.run(x, dropping, channels, start=prefix.count)
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
        self.incremental_chains: dict[
            tuple[int, int], tuple[IncrementalChain, IncrementalChain]
        ] = {}

    def shared_chains(self, live: Collection[str]) -> tuple[IncrementalChain, IncrementalChain]:
        """The branches' layers up to the first that drops, planned once for each set of these."""
        counts = tuple(chain.first_live(live) for chain in self.chains)
        if counts not in self.incremental_chains:
            changed = self.first.geometry.affected_outputs(self.hole, self.hw)
            self.incremental_chains[counts] = tuple(
                IncrementalChain(chain, count, changed)
                for chain, count in zip(self.chains, counts, strict=True)
            )
        return self.incremental_chains[counts]

    def surroundings(self, known: Tensor, live: Collection[str]) -> Surroundings:
        """Runs the shared layers over what lies around the hole.

        known: windows with the hole zeroed, (N, C, H, W).
        """
        shared = self.shared_chains(live)
        regions = [chain.changed[0] for chain in shared]
        regions += [chain.static[0] for chain in shared if chain.static[0] is not None]
        region = regions[0]
        for other in regions[1:]:
            region = region.hull(other)
        all_sums = self.first.sums(known, whole(self.hw), region, self.first.constants(region))
        changed = regions[0].hull(regions[1])
        rows, cols = changed.within(region)
        sums = all_sums[:, rows, cols].clone()
        branches = []
        for i, chain in enumerate(shared):
            first = Patch(self.first.activate(all_sums, i), region, self.hw)
            branches.append(Branch(chain, chain.surroundings(first)))
        return Surroundings(sums, tuple(branches))

    def complete(self, around: Surroundings, hole: Tensor, dropping: DropPlan) -> Tensor:
        """One completion from the coarse one: (N, C, h, w) -> (N, C, h, w), clamped to [-1, 1]."""
        changed = around.branches[0].chain.changed[0].hull(around.branches[1].chain.changed[0])
        sums = self.first.sums(upcast_to_fp32(hole), self.hole, changed, around.sums)
        (kept, kept_channels), (matching, matching_channels) = (
            self.branch(i, sums, changed, around.branches[i], dropping) for i in (0, 1)
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
        channels = joint_selection(kept_channels, attended_channels, self.width, both)
        x, _ = self.decoder.run(Patch(both, region, self.quarter_hw), dropping, channels)
        return x.part(self.hole).clamp(-1, 1)

    def branch(
        self, i: int, sums: Tensor, region: Region, shared: Branch, dropping: DropPlan
    ) -> tuple[Patch, Selection | None]:
        """Runs one branch to its end over the changed hole."""
        changed = shared.chain
        rows, cols = changed.changed[0].within(region)
        self.first.activate(sums[:, rows, cols], i, changed.place(shared.buffers, 0))
        patch, channels = dropping.apply(
            self.chains[i].names[changed.count - 1], changed.run(shared.buffers)
        )
        return self.chains[i].run(patch, dropping, channels, start=changed.count)


def joint_selection(
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
