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

from inpainter.fast.attention import FastAttention
from inpainter.fast.geometry import Region, centre, whole
from inpainter.fast.layers import (
    NO_DROPOUT,
    Arithmetic,
    DropPlan,
    FastLayer,
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

    chain: the layers, none of which upsamples; count: how many of them to run; changed: the region
    of the input that changes.
    """

    def __init__(self, chain: Chain, count: int, changed: Region) -> None:
        self.chain = chain
        self.count = count
        self.changed: list[Region] = []
        for layer, hw, wanted in zip(chain.layers[:count], chain.hws, chain.needed, strict=False):
            changed = layer.geometry.affected_outputs(changed, hw)
            self.changed.append(changed.common(wanted))
        self.buffered = [chain.input_of(i, self.changed[i]) for i in range(1, count)]
        self.buffered.append(chain.needed[count - 1])
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

    def surroundings(self, x: Patch) -> list[Tensor]:
        """Buffers of `buffered` regions, one for each layer, with the surroundings in their places.

        x: the chain's input, of any content where it changes.
        """
        buffers = []
        for i, (layer, region) in enumerate(zip(self.chain.layers, self.buffered, strict=False)):
            if self.static[i] is not None:
                x = layer(x, self.static[i])
            shape = (len(x.values), *region.hw, layer.kernel.channels)
            buffer = x.values.new_empty(shape).permute(0, 3, 1, 2)
            if not self.changed[i].covers(region):
                buffer.copy_(x.part(region))
            buffers.append(buffer)
        return buffers

    def run(self, x: Patch, buffers: list[Tensor]) -> Patch:
        """Runs the layers over what changed of the input; the result is the last buffer."""
        for i, (buffer, region) in enumerate(zip(buffers, self.buffered, strict=True)):
            rows, cols = self.changed[i].within(region)
            self.chain.layers[i](x, self.changed[i], out=buffer[:, :, rows, cols])
            x = Patch(buffer, region, self.chain.hws[i + 1])
        return x


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
        self.chain = Chain(named_layers(stage, "", 1, 17, arithmetic), window_hw, self.hole)

    def prefix(self, known: Patch, active: Collection[str]) -> CoarsePrefix:
        """Runs the layers up to the first that drops, with all their channels.

        known: windows with the hole zeroed and their mask planes, (N, C + 2, H, W).
        """
        count = self.chain.shared_layers(active)
        return CoarsePrefix(self.chain.run(known, NO_DROPOUT, stop=count)[0], count)

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


class Surroundings(NamedTuple):
    """What the completions of a batch share.

    filled: the stage's input, into whose hole every completion writes; branches: the layers of the
    convolution branch and of the attention branch up to the first that drops, and their buffers.
    """

    filled: Patch
    branches: list[tuple[IncrementalChain, list[Tensor]]]


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
        self.quarter_hw = (window_hw[0] // 4, window_hw[1] // 4)
        self.decoder = Chain(
            named_layers(stage, "all", 11, 17, arithmetic), self.quarter_hw, self.hole
        )
        joint = self.decoder.input_needed
        self.matched = Chain(named_layers(stage, "pm", 9, 10, arithmetic), self.quarter_hw, joint)
        self.chains = (
            Chain(named_layers(stage, "", 1, 10, arithmetic), window_hw, joint),
            Chain(named_layers(stage, "pm", 1, 6, arithmetic), window_hw, whole(self.quarter_hw)),
        )
        channels = stage.pmconv6.out_channels
        self.attended = self.matched.input_needed
        self.attend = FastAttention(self.quarter_hw, self.attended, self.hole, channels)
        self.width = stage.conv5.out_channels

    def shared_chains(self, active: Collection[str]) -> list[IncrementalChain]:
        """The branches' layers up to the first that drops."""
        return [
            IncrementalChain(chain, chain.shared_layers(active), self.hole) for chain in self.chains
        ]

    def surroundings(self, known: Patch, active: Collection[str]) -> Surroundings:
        """Runs the shared layers over what lies around the hole.

        known: windows with their mask planes, (N, C + 2, H, W); completions are written into it.
        """
        chains = self.shared_chains(active)
        return Surroundings(known, [(chain, chain.surroundings(known)) for chain in chains])

    def complete(self, around: Surroundings, hole: Tensor, plan: DropPlan) -> Tensor:
        """One completion from the coarse one: (N, C, h, w) -> (N, C, h, w), clamped to [-1, 1]."""
        around.filled.part(self.hole)[:, : hole.shape[1]] = hole
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
        last = self.chains[i].names[shared.count - 1]
        patch, channels = plan.apply(last, shared.run(around.filled, buffers))
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
