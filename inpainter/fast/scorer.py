"""Scores windows as `inpainter.completion.WindowScorer` does, without its waste.

N windows, M completions, C channels, H x W window, h x w hole.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.runtime import upcast_to_fp32
from inpainter.completion import WindowScorer, score_windows
from inpainter.fast.layers import NO_DROPOUT, Arithmetic, DropPlan, drop_plan
from inpainter.fast.stages import CoarsePrefix, FastCoarse, FastFine, Surroundings
from inpainter.fast.winograd import Workspace
from inpainter.networks.critic import Critic, to_channels
from inpainter.networks.dropout import ChannelMasks, ElementMasks, WindowMasks
from inpainter.networks.generator import Generator
from inpainter.settings import Metric
from inpainter.windows import centre_crop

Precision = Literal["fp32", "bf16", "tf32", "fp64"]
DTYPES = {"bf16": torch.bfloat16, "fp64": torch.float64}

THIN_FROM_PIXELS = 128 * 128
"""Windows of at least this size are thinned one by one on a CPU: below, gathering the weights of
every window costs more than the convolutions that it saves."""


class Prepared:
    """What all completions of a batch share, and what turned out to be the same for all so far.

    stages: those that complete it. known: the windows with the hole zeroed, (N, C, H, W), on which
    all of it depends. around: None where there is no fine stage.
    """

    def __init__(
        self,
        stages: tuple[FastCoarse, FastFine | None],
        known: Tensor,
        prefix: CoarsePrefix,
        around: Surroundings | None,
    ) -> None:
        self.stages = stages
        self.known = known
        self.prefix = prefix
        self.around = around
        self.coarse: Tensor | None = None


@dataclass(frozen=True)
class ScorerOptions:
    """How a FastScorer computes."""

    precision: Precision = "fp32"
    """bf16 rounds activations and weights, softmax and norms stay in fp32; fp64 goes with networks
    and windows of that type, and tells rounding from a difference in what is computed."""
    thin: bool | None = None
    """Leave dropped channels out window by window; None = where it is faster."""
    minimal_filtering: bool = True
    """See `inpainter.fast.winograd`."""
    compiled: bool = False
    """The attention goes through torch.compile."""


class FastScorer:
    """Scores windows by completion distance; called as WindowScorer is, with the same results.

    generator, critic, metrics, mask_hw: as of WindowScorer; options: fields of ScorerOptions. Where
    all windows of a batch drop the same channels (`masks.same`), these are left out of the
    convolutions. The weights are taken at the first call and not looked at again.
    """

    def __init__(
        self,
        generator: Generator,
        critic: Critic | None,
        metrics: tuple[Metric, ...],
        mask_hw: tuple[int, int],
        **options,
    ) -> None:
        self.plain = WindowScorer(generator, critic, metrics, mask_hw)
        self.generator, self.critic = generator, critic
        self.metrics, self.mask_hw = metrics, mask_hw
        self.spaces = self.plain.spaces
        self.options = ScorerOptions(**options)
        dtype = DTYPES.get(self.options.precision, torch.float32)
        self.arithmetic = Arithmetic(dtype, Workspace(), self.options.minimal_filtering)
        self.threads: WindowThreadPool | None = None
        self.stages: dict[tuple[int, int], tuple[FastCoarse, FastFine | None]] = {}
        self.prepared: dict[frozenset[str], Prepared] = {}

    @torch.inference_mode()
    def __call__(self, windows: Tensor, masks: WindowMasks | None) -> dict[Metric, Tensor]:
        """Scores of a batch: every metric's (N,) values, larger = more anomalous.

        windows: (N, C, H, W) in [-1, 1]; masks: what their completions drop, None = nothing.
        """
        if not self.one_by_one(windows):
            return self.score(windows, masks)
        tasks = [
            (windows[i : i + 1], None if masks is None else masks.of_window(i))
            for i in range(len(windows))
        ]
        workers = torch.get_num_threads() if windows.device.type == "cpu" else 1
        if workers > 1 and len(windows) > 1:
            if self.threads is None:
                self.threads = WindowThreadPool(lambda: self.twin().score, workers)
            single = self.threads.scores(tasks)
        else:
            single = [self.score(*task) for task in tasks]
        return {metric: torch.cat([s[metric] for s in single]) for metric in self.metrics}

    def twin(self) -> "FastScorer":
        """Another scorer of the same networks, with scratch memory of its own."""
        parts = (self.generator, self.critic, self.metrics, self.mask_hw)
        return FastScorer(*parts, **asdict(self.options))

    def one_by_one(self, windows: Tensor) -> bool:
        """Whether windows are completed one at a time, so that each is thinned by its own masks."""
        if self.options.thin is not None:
            return self.options.thin
        large = windows.shape[2] * windows.shape[3] >= THIN_FROM_PIXELS
        return windows.device.type == "cpu" and large

    def score(self, windows: Tensor, masks: WindowMasks | None) -> dict[Metric, Tensor]:
        """Scores of windows that are completed together."""
        return score_windows(self, windows, masks)

    def completions(self, windows: Tensor, masks: WindowMasks | None) -> Iterator[Tensor]:
        """The holes' completions, (N, C, h, w) each, one after the other; one if nothing drops."""
        if isinstance(masks, ElementMasks):
            yield from self.plain.completions(windows, masks)
            return
        active = frozenset() if masks is None else frozenset(masks.keep)
        prepared = self.prepare(windows, active)
        for m in range(1 if masks is None else masks.M):
            yield self.complete(prepared, active, self.drop_plan(masks, m, windows))

    def drop_plan(self, masks: ChannelMasks | None, m: int, windows: Tensor) -> DropPlan:
        """What the m-th completion drops, in the form that the layers take."""
        if masks is None:
            return NO_DROPOUT
        like = windows.new_empty(0, dtype=self.arithmetic.dtype)
        return drop_plan(masks.completion(m), like, thin=masks.same, multiple=8)

    def stages_for(self, window_hw: tuple[int, int]) -> tuple[FastCoarse, FastFine | None]:
        """Both stages for a size of window, planned at its first use."""
        if window_hw not in self.stages:
            coarse, fine = self.generator.coarse_generator, self.generator.fine_generator
            sizes = (window_hw, self.mask_hw, self.arithmetic)
            self.stages[window_hw] = (
                FastCoarse(coarse, *sizes),
                FastFine(fine, *sizes) if fine is not None else None,
            )
            if self.options.compiled and fine is not None:
                stage = self.stages[window_hw][1]
                stage.attend = torch.compile(stage.attend)
        return self.stages[window_hw]

    def prepare(self, windows: Tensor, active: frozenset[str]) -> Prepared:
        """What the completions of a batch share; active: the layers that drop.

        On a CPU the last batch's is kept: where nothing around the holes differs, as in an even
        background, it serves again. (A GPU would have to wait for the comparison.)
        """
        coarse, fine = stages = self.stages_for((windows.shape[2], windows.shape[3]))
        known = windows.clone()
        centre_crop(known, self.mask_hw).zero_()
        if active in self.prepared and torch.equal(self.prepared[active].known, known):
            return self.prepared[active]
        self.prepared.pop(active, None)  # its memory is free before the next one is made
        around = fine.surroundings(known, active) if fine is not None else None
        prepared = Prepared(stages, known, coarse.prefix(known, active), around)
        if windows.device.type == "cpu":
            self.prepared[active] = prepared
        return prepared

    def complete(self, prepared: Prepared, active: frozenset[str], plan: DropPlan) -> Tensor:
        """One completion of every window's hole, (N, C, h, w) in [-1, 1], fp32 or wider."""
        coarse, fine = prepared.stages
        if prepared.coarse is None or active & set(coarse.chain.names):
            prepared.coarse = coarse.complete(prepared.prefix, plan)
        if fine is None:
            return upcast_to_fp32(prepared.coarse)
        return upcast_to_fp32(fine.complete(prepared.around, prepared.coarse, plan))

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


Score = Callable[..., dict[Metric, Tensor]]


class WindowThreadPool:
    """Threads of one core each.

    make: gives a scoring function; each thread uses one of its own, as they hold scratch memory.
    """

    def __init__(self, make: Callable[[], Score], workers: int) -> None:
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self.idle: SimpleQueue[Score] = SimpleQueue()
        for _ in range(workers):
            self.idle.put(make())

    def scores(self, tasks: Sequence[tuple]) -> list[dict[Metric, Tensor]]:
        """The scoring function's results for each task's arguments, in order."""
        return list(self.pool.map(self._score, tasks))

    def _score(self, task: tuple) -> dict[Metric, Tensor]:
        score = self.idle.get()
        try:
            with torch.inference_mode():
                return score(*task)
        finally:
            self.idle.put(score)
