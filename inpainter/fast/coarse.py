"""The coarse stage on the fast path. N windows, C image channels, H x W window, h x w hole."""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from inpainter.fast.chains import Chain
from inpainter.fast.dropping import Dropping
from inpainter.fast.first_layer import FirstLayer
from inpainter.fast.geometry import centre, whole
from inpainter.fast.layers import Arithmetic, FastLayer, Patch
from inpainter.generator import CoarseGenerator, Stage


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
        """Runs the layers up to the first that drops, whose channels are all still there.

        known: windows with the hole zeroed, (N, C, H, W).
        """
        region = self.chain.input_needed
        hw = (known.shape[2], known.shape[3])
        sums = self.first.sums(known, whole(hw), region, self.first.constants(region))
        x = Patch(self.first.activate(sums, 0), region, hw)
        count = self.chain.first_live(live)
        from_nothing = Dropping()
        return CoarsePrefix(self.chain.run(x, from_nothing, stop=count)[0], count)

    def complete(self, prefix: CoarsePrefix, dropping: Dropping) -> Tensor:
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
