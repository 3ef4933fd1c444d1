"""Layers in a row, of which only what the hole's completion depends on is computed.

N windows, C channels. A chain's plan is a region for every layer's output, worked out backwards
from the region that is wanted of the last.
"""

from collections.abc import Collection, Sequence

from torch import Tensor

from inpainter.fast.dropping import Dropping
from inpainter.fast.geometry import Region
from inpainter.fast.layers import FastLayer, Patch, Selection


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
            self.hws.append(layer.reach.out_hw(self.hws[-1]))
        self.needed = [wanted]
        for i in reversed(range(len(layers))):
            self.needed.append(self.layers[i].reach.needed(self.needed[-1], self.hws[i]))
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
        dropping: Dropping,
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


class ChangedChain:
    """A chain whose input changes in one region only: the rest of every layer is computed once.

    chain: the layers; count: how many of them to run; changed: the region of the first layer's
    *output* that changes. The first layer is run by the caller, which fills `fresh[0]` of its
    buffer.
    """

    def __init__(self, chain: Chain, count: int, changed: Region) -> None:
        self.chain = chain
        self.count = count
        wanted = chain.needed[:count]
        reached = [changed]
        for i in range(1, count):
            reached.append(chain.layers[i].reach.reached(reached[-1], chain.hws[i]))
        self.fresh = [a.common(b) for a, b in zip(reached, wanted, strict=True)]
        self.held = [
            chain.layers[i + 1].reach.needed(self.fresh[i + 1], chain.hws[i + 1])
            if i + 1 < count
            else wanted[i]
            for i in range(count)
        ]
        self.still = self._still_regions()

    def _still_regions(self) -> list[Region | None]:
        """What the unchanged surroundings are needed of each layer's output, none = nothing."""
        still: list[Region | None] = [None] * self.count
        for i in reversed(range(self.count)):
            if not self.fresh[i].covers(self.held[i]):
                still[i] = self.held[i]
            if i + 1 < self.count and still[i + 1] is not None:
                needed = self.chain.layers[i + 1].reach.needed(still[i + 1], self.chain.hws[i + 1])
                still[i] = needed if still[i] is None else still[i].hull(needed)
        return still

    def surroundings(self, first: Patch) -> list[Tensor]:
        """Buffers of `held` regions, one for each layer, with the surroundings in their places.

        first: the first layer's output around a hole of any content, still[0] or more.
        """
        buffers, x = [], first
        for i in range(self.count):
            if i > 0 and self.still[i] is not None:
                x = self.chain.layers[i](x, self.still[i])
            held = self.held[i]
            if self.fresh[i].covers(held):
                n, channels = len(first.values), self.chain.layers[i].kernel.channels
                empty = first.values.new_empty(n, *held.hw, channels)
                buffers.append(empty.permute(0, 3, 1, 2))
            else:
                buffers.append(x.part(held).permute(0, 2, 3, 1).clone().permute(0, 3, 1, 2))
        return buffers

    def place(self, buffers: list[Tensor], i: int) -> Tensor:
        """Where layer i's changed part lies in its buffer, a view."""
        rows, cols = self.fresh[i].within(self.held[i])
        return buffers[i][:, :, rows, cols]

    def run(self, buffers: list[Tensor]) -> Patch:
        """Runs the layers after the first over what changed; the result is the last buffer."""
        for i in range(1, self.count):
            before = Patch(buffers[i - 1], self.held[i - 1], self.chain.hws[i])
            self.chain.layers[i](before, self.fresh[i], out=self.place(buffers, i))
        last = self.count - 1
        return Patch(buffers[last], self.held[last], self.chain.hws[self.count])
