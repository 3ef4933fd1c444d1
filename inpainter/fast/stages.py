"""Both stages of the generator on the fast path: only what the hole's completion depends on.

N windows, C image channels, H x W window, h x w hole. A chain has a region for every layer's
output, worked out backwards from the region that is wanted of the last. What the hole cannot alter
is computed once for each window.
"""

from collections.abc import Collection, Sequence
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

    def run(self, x: Patch, plan: DropPlan, start: int = 0, stop: int | None = None) -> Patch:
        """Runs layers start … stop - 1 and drops what each of them drops."""
        layers = list(zip(self.names, self.layers, self.needed, strict=True))
        for name, layer, region in layers[start:stop]:
            kept = plan.selections.get(name)
            all_channels = x.channels is None and kept is None
            x = layer(x, region, None if all_channels else layer.thinned(x.channels, kept))
            x = x._replace(channels=kept) if kept is not None else plan.apply(name, x)
        return x

    def outputs(self, x: Patch, count: int) -> list[Patch]:
        """What the first layers make of an input, each with all its channels."""
        found = []
        for layer, region in zip(self.layers[:count], self.needed, strict=False):
            x = layer(x, region)
            found.append(x)
        return found

    def update(self, x: Patch, outputs: list[Patch], changed: Region) -> Patch:
        """Computes what a change of the input's region alters in `outputs`; returns the last.

        For layers that do not upsample.
        """
        for layer, y in zip(self.layers, outputs, strict=False):
            changed = layer.geometry.affected_outputs(changed, x.hw)
            region = changed.common(y.region)
            layer(x, region, out=y.part(region))
            x = y
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
        return CoarsePrefix(self.chain.run(known, NO_DROPOUT, stop=count), count)

    def complete(self, prefix: CoarsePrefix, plan: DropPlan) -> Tensor:
        """One completion of the hole: (N, C, h, w), clamped to [-1, 1]."""
        x = plan.apply(self.chain.names[prefix.count - 1], prefix.patch)
        return self.chain.run(x, plan, start=prefix.count).part(self.hole).clamp(-1, 1)


def named_layers(
    stage: Stage, prefix: str, first: int, last: int, arithmetic: Arithmetic
) -> list[tuple[str, FastLayer]]:
    """(full name, layer) of `<prefix>conv<first>` … `<prefix>conv<last>`."""
    return [
        (f"{stage.name}.{layer}", FastLayer(block, arithmetic, up=layer in Stage.UPSAMPLE_BEFORE))
        for layer, block in stage.layers(prefix, first, last)
    ]


class Surroundings(NamedTuple):
    """What the completions of a batch share, and write their own part into.

    filled: the stage's input; outputs: of the layers up to the first that drops, of the convolution
    branch and of the attention branch.
    """

    filled: Patch
    outputs: list[list[Patch]]


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

    def surroundings(self, known: Patch, active: Collection[str]) -> Surroundings:
        """Runs the layers up to the first that drops, before the hole has any content.

        known: windows with their mask planes, (N, C + 2, H, W).
        """
        return Surroundings(
            known, [chain.outputs(known, chain.shared_layers(active)) for chain in self.chains]
        )

    def complete(self, around: Surroundings, hole: Tensor, plan: DropPlan) -> Tensor:
        """One completion from the coarse one: (N, C, h, w) -> (N, C, h, w), clamped to [-1, 1]."""
        around.filled.part(self.hole)[:, : hole.shape[1]] = hole
        convolved, matching = (self.branch(i, around, plan) for i in (0, 1))
        features, channels = matching.part(whole(self.quarter_hw)), matching.channels
        if channels is not None:
            features = features * channels.gain.to(features.dtype)[:, None, None]
            channels = channels._replace(gain=torch.ones_like(channels.gain))
        attended = Patch(self.attend(features), self.attended, self.quarter_hw, channels)
        attended = self.matched.run(attended, plan)
        region = self.decoder.input_needed
        both = torch.cat([convolved.part(region), attended.part(region)], dim=1)
        channels = joint_selection(convolved.channels, attended.channels, self.width, both)
        x = self.decoder.run(Patch(both, region, self.quarter_hw, channels), plan)
        return x.part(self.hole).clamp(-1, 1)

    def branch(self, i: int, around: Surroundings, plan: DropPlan) -> Patch:
        """Runs one branch to its end over the changed hole."""
        chain, outputs = self.chains[i], around.outputs[i]
        x = chain.update(around.filled, outputs, self.hole)
        x = plan.apply(chain.names[len(outputs) - 1], x)
        return chain.run(x, plan, start=len(outputs))


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
