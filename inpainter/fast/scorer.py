"""Scores windows as `inpainter.completion.WindowScorer` does, without its waste.

N windows, M completions, C channels, H x W window, h x w hole.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.runtime import at_least_fp32
from inpainter.completion import DrawDropout, WindowScorer, score_windows
from inpainter.critic import Critic, to_channels
from inpainter.dropout import ChannelDropout
from inpainter.fast.coarse import CoarsePrefix, FastCoarse
from inpainter.fast.dropping import NOTHING, Dropping, dropping_of
from inpainter.fast.fine import FastFine, Surroundings
from inpainter.fast.layers import Arithmetic
from inpainter.fast.side_by_side import SideBySide
from inpainter.fast.workspace import Workspace
from inpainter.generator import Generator
from inpainter.masks import centre_crop
from inpainter.scores import spaces_of
from inpainter.settings import Metric

Precision = Literal["fp32", "bf16", "tf32", "fp64"]
DTYPES = {"bf16": torch.bfloat16, "fp64": torch.float64}

THIN_FROM_PIXELS = 128 * 128
"""Windows of at least this size are thinned one by one on a CPU: below, gathering the weights of
every window costs more than the convolutions that it saves."""


class Prepared:
    """What all completions of a batch share, and what turned out to be the same for all so far.

    known: the windows with the hole zeroed, (N, C, H, W), on which all of it depends.
    """

    def __init__(self, known: Tensor, prefix: CoarsePrefix, around: Surroundings | None) -> None:
        self.known = known
        self.prefix = prefix
        self.around = around
        self.coarse: Tensor | None = None


class FastScorer:
    """Scores windows by completion distance; called as WindowScorer is, with the same results.

    generator, critic, metrics, M, mask_hw: as of WindowScorer. precision: bf16 rounds activations
    and weights, softmax and norms stay in fp32; fp64 goes with networks and windows of that type,
    and tells rounding from a difference in what is computed. shared_masks: all windows of a batch
    drop the same channels, which are then left out of the convolutions. thin: leave them out window
    by window; none = where it is faster. minimal_filtering: see `inpainter.fast.winograd`.
    compiled: the attention goes through torch.compile. The weights are taken at the first call and
    not looked at again.
    """

    def __init__(
        self,
        generator: Generator,
        critic: Critic | None,
        metrics: tuple[Metric, ...],
        M: int,
        mask_hw: tuple[int, int],
        *,
        precision: Precision = "fp32",
        shared_masks: bool = False,
        thin: bool | None = None,
        minimal_filtering: bool = True,
        compiled: bool = False,
    ) -> None:
        self.plain = WindowScorer(generator, critic, metrics, M, mask_hw)
        self.generator, self.critic = generator, critic
        self.metrics, self.M, self.mask_hw = metrics, M, mask_hw
        self.spaces = frozenset(spaces_of(metrics))
        dtype = DTYPES.get(precision, torch.float32)
        self.arithmetic = Arithmetic(dtype, Workspace(), minimal_filtering)
        self.shared_masks, self.thin, self.compiled = shared_masks, thin, compiled
        self.parts = (generator, critic, metrics, M, mask_hw)
        self.options = {
            "precision": precision,
            "shared_masks": shared_masks,
            "thin": thin,
            "minimal_filtering": minimal_filtering,
            "compiled": compiled,
        }
        self.threads: SideBySide | None = None
        self.stages: dict[tuple[int, int], tuple[FastCoarse, FastFine | None]] = {}
        self.prepared: dict[frozenset[str], Prepared] = {}

    @torch.inference_mode()
    def __call__(
        self, windows: Tensor, numbers: Sequence[int], draw: DrawDropout | None
    ) -> dict[Metric, Tensor]:
        """Scores of a batch: every metric's (N,) values, larger = more anomalous.

        windows: (N, C, H, W) in [-1, 1]; numbers: the windows' numbers in their image.
        """
        if not self.one_by_one(windows):
            return self.score(windows, numbers, draw)
        tasks = [
            (windows[i : i + 1], numbers[i : i + 1], self.drawn(numbers[i : i + 1], draw))
            for i in range(len(windows))
        ]
        workers = torch.get_num_threads() if windows.device.type == "cpu" else 1
        if workers > 1 and len(windows) > 1:
            if self.threads is None:
                self.threads = SideBySide(
                    lambda: FastScorer(*self.parts, **self.options).score, workers
                )
            single = self.threads.scores(tasks)
        else:
            single = [self.score(*task) for task in tasks]
        return {metric: torch.cat([s[metric] for s in single]) for metric in self.metrics}

    def drawn(self, numbers: Sequence[int], draw: DrawDropout | None) -> DrawDropout | None:
        """The same masks, drawn now: `draw` remembers its last windows only."""
        if draw is None:
            return None
        drops = [draw(numbers, m) for m in range(self.M)]
        return lambda _, m: drops[m]

    def one_by_one(self, windows: Tensor) -> bool:
        """Whether windows are completed one at a time, so that each is thinned by its own masks."""
        if self.thin is not None:
            return self.thin
        large = windows.shape[2] * windows.shape[3] >= THIN_FROM_PIXELS
        return windows.device.type == "cpu" and large

    def score(
        self, windows: Tensor, numbers: Sequence[int], draw: DrawDropout | None
    ) -> dict[Metric, Tensor]:
        """Scores of windows that are completed together."""
        return score_windows(self, windows, numbers, draw)

    def completions(
        self, windows: Tensor, numbers: Sequence[int], draw: DrawDropout | None
    ) -> Iterator[Tensor]:
        """The holes' completions, (N, C, h, w) each, one after the other; one if nothing drops."""
        if len(windows) > 1 and self.one_by_one(windows):
            single = [
                list(self.completions(windows[i : i + 1], numbers[i : i + 1], draw))
                for i in range(len(windows))
            ]
            yield from map(torch.cat, zip(*single, strict=True))
            return
        prepared = None
        for m in range(self.M if draw is not None else 1):
            drop = draw(numbers, m) if draw is not None else None
            if drop is not None and not isinstance(drop, ChannelDropout):
                yield self.plain.complete(windows, drop)
                continue
            live = frozenset(drop.keep) if drop is not None else frozenset()
            if prepared is None:
                prepared = self.prepare(windows, live)
            yield self.complete(prepared, live, self.dropping(drop, windows))

    def dropping(self, drop: ChannelDropout | None, windows: Tensor) -> Dropping:
        if drop is None:
            return NOTHING
        thin = self.shared_masks or self.one_by_one(windows)
        like = windows.new_empty(0, dtype=self.arithmetic.dtype)
        return dropping_of(drop, like, thin=thin, multiple=8)

    def stages_for(self, window_hw: tuple[int, int]) -> tuple[FastCoarse, FastFine | None]:
        """Both stages for a size of window, planned at its first use."""
        if window_hw not in self.stages:
            coarse, fine = self.generator.coarse_generator, self.generator.fine_generator
            sizes = (window_hw, self.mask_hw, self.arithmetic)
            self.stages[window_hw] = (
                FastCoarse(coarse, *sizes),
                FastFine(fine, *sizes) if fine is not None else None,
            )
            if self.compiled and fine is not None:
                stage = self.stages[window_hw][1]
                stage.attend = torch.compile(stage.attend)
        return self.stages[window_hw]

    def prepare(self, windows: Tensor, live: frozenset[str]) -> Prepared:
        """What the completions of a batch share; live: the layers that drop.

        On a CPU the last batch's is kept: where nothing around the holes differs, as in an even
        background, it serves again. (A GPU would have to wait for the comparison.)
        """
        coarse, fine = self.stages_for((windows.shape[2], windows.shape[3]))
        self.current = (coarse, fine)
        known = windows.clone()
        centre_crop(known, self.mask_hw).zero_()
        if live in self.prepared and torch.equal(self.prepared[live].known, known):
            return self.prepared[live]
        self.prepared.pop(live, None)  # its memory is free before the next one is made
        around = fine.surroundings(known, live) if fine is not None else None
        prepared = Prepared(known, coarse.prefix(known, live), around)
        if windows.device.type == "cpu":
            self.prepared[live] = prepared
        return prepared

    def complete(self, prepared: Prepared, live: frozenset[str], dropping: Dropping) -> Tensor:
        """One completion of every window's hole, (N, C, h, w) in [-1, 1], fp32 or wider."""
        coarse, fine = self.current
        if prepared.coarse is None or live & set(coarse.chain.names):
            prepared.coarse = coarse.complete(prepared.prefix, dropping)
        if fine is None:
            return at_least_fp32(prepared.coarse)
        return at_least_fp32(fine.complete(prepared.around, prepared.coarse, dropping))

    def represent(self, holes: Tensor) -> dict[str, Tensor]:
        """Holes (N, C, h, w) as the metrics' spaces see them: pixels, critic features, or both."""
        spaces = {}
        if "image" in self.spaces:
            spaces["image"] = holes
        if "feature" in self.spaces:
            spaces["feature"] = self.features(holes)
        return spaces

    def features(self, holes: Tensor) -> Tensor:
        """The critic's features of holes, in the arithmetic's type: (N, 4d, h/16, w/16)."""
        x = to_channels(holes, self.critic.channels).to(self.arithmetic.dtype)
        for block in self.critic.dis_conv_module.children():
            conv = block.conv
            weight, bias = conv.weight.to(x.dtype), conv.bias.to(x.dtype)
            x = F.leaky_relu_(F.conv2d(x, weight, bias, stride=2, padding=2), 0.2)
        return x
