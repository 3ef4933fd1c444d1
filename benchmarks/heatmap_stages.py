"""What a window costs: seconds by stage, and multiplications.

Stages are prepare (what completions share), coarse, fine, attention, critic, and the rest; timers
are put around functions and taken off again. Multiplications are those of direct convolutions
(minimal filtering makes do with fewer), as if half of the coarse trunk's channels were dropped.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks import published_heatmap
from benchmarks.heatmap_subject import Subject
from inpainter.fast.attention import PATCH_MARGIN, FastAttention
from inpainter.fast.geometry import Region
from inpainter.fast.layers import FastLayer
from inpainter.fast.scorer import FastScorer
from inpainter.fast.stages import Chain

REPEATS = 3
PUBLISHED_LIVE = 9  # coarse conv2 … conv10


class StageClock:
    """Seconds by stage; a stage within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = [0.0]

    def timed(self, stage: str, function: Callable) -> Callable:
        """The function, its time noted under the stage's name."""

        def run(*arguments: object, **options: object) -> object:
            self.inner.append(0.0)
            started = _now()
            result = function(*arguments, **options)
            seconds = _now() - started
            alone = seconds - self.inner.pop()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + alone
            self.inner[-1] += seconds
            return result

        return run


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def stage_seconds(subject: Subject, scorer: Callable) -> dict[str, float]:
    """Seconds by stage of one window, on one CPU thread: the fastest of some runs."""
    window, threads = subject.batches[0][:1], torch.get_num_threads()
    best: dict[str, float] = {}
    torch.set_num_threads(1)
    try:
        for _ in range(REPEATS):
            clock = StageClock()
            with torch.inference_mode(), clocked(clock, subject, scorer, window):
                clock.timed("rest", scorer)(window, subject.masks(1, seed=0))
            if not best or sum(clock.seconds.values()) < sum(best.values()):
                best = clock.seconds
    finally:
        torch.set_num_threads(threads)
    return best


@contextmanager
def clocked(clock: StageClock, subject: Subject, scorer: Callable, window: Tensor) -> Iterator:
    """Puts the clock around the engine's stages."""
    if isinstance(scorer, FastScorer):
        coarse, fine = scorer.stages_for((window.shape[2], window.shape[3]))
        stages = [
            ("prepare", coarse, "prefix"),
            ("coarse", coarse, "complete"),
            ("critic", scorer.feature_network, "features"),
        ]
        if fine is not None:
            stages += [
                ("prepare", fine, "surroundings"),
                ("fine", fine, "complete"),
                ("attention", fine, "attend"),
            ]
    else:
        stages = [
            ("coarse", published_heatmap, "coarse"),
            ("fine", published_heatmap, "fine"),
            ("attention", published_heatmap, "attention"),
            ("critic", subject.critic, "features"),
        ]
    with ExitStack() as stack:
        for stage, owner, name in stages:
            function = clock.timed(stage, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def report_stages(stages: dict[str, dict[str, float]]) -> None:
    """Prints seconds and shares by engine and stage."""
    print("\none window on one thread, seconds and share by stage:")
    names = ("prepare", "coarse", "fine", "attention", "critic", "rest")
    print(f"{'':12}" + "".join(f"{name:>15}" for name in names) + f"{'all':>10}")
    for engine, seconds in stages.items():
        total = sum(seconds.values())
        cells = (f"{seconds[n]:8.3f} {seconds[n] / total:6.1%}" if n in seconds else f"{'-':>15}"
                 for n in names)  # fmt: skip
        print(f"{engine:12}" + "".join(cells) + f"{total:10.3f}")


def completion_macs(scorer: FastScorer, windows: Tensor) -> float:
    """Multiply-adds of one completion of one window, critic included, p = 0.5."""
    coarse, fine = scorer.stages_for((windows.shape[2], windows.shape[3]))
    total = critic_macs(scorer)
    for i, layer in enumerate(coarse.chain.layers[2:], start=2):
        inputs = 0.5 if i <= PUBLISHED_LIVE + 1 else 1.0
        outputs = 0.5 if i <= PUBLISHED_LIVE else 1.0
        total += inputs * outputs * layer_macs(layer, coarse.chain.needed[i])
    if fine is None:
        return total
    for chain in fine.chains:
        changed, hw = fine.hole, (windows.shape[2], windows.shape[3])
        for layer, needed in zip(chain.layers, chain.needed, strict=True):
            changed, hw = layer.geometry.affected_outputs(changed, hw), layer.geometry.out_hw(hw)
            total += layer_macs(layer, changed.common(needed))
    total += chain_macs(fine.matched) + chain_macs(fine.decoder)
    return total + attention_macs(fine.attend)


def prepared_macs(scorer: FastScorer, windows: Tensor) -> float:
    """Multiply-adds that the completions of one window share."""
    coarse, fine = scorer.stages_for((windows.shape[2], windows.shape[3]))
    pairs = zip(coarse.chain.layers[:2], coarse.chain.needed[:2], strict=True)
    total = critic_macs(scorer) + sum(layer_macs(layer, region) for layer, region in pairs)
    return total if fine is None else total + sum(map(chain_macs, fine.chains))


def chain_macs(chain: Chain) -> float:
    pairs = zip(chain.layers, chain.needed, strict=True)
    return sum(layer_macs(layer, region) for layer, region in pairs)


def layer_macs(layer: FastLayer, region: Region) -> float:
    """Of a layer's output region; an upsampling layer's four phases have 2x2 kernels."""
    return layer.weight.numel() / layer.phases * math.prod(region.hw)


def attention_macs(attend: FastAttention) -> float:
    """Of its matrix products, for one window."""
    margin = PATCH_MARGIN if attend.inside else 0
    queries = [side + 2 * margin for side in attend.queries.hw]
    cells = [side - 2 * (margin > 0) for side in attend.queries.hw]
    keys = attend.grid[0] * attend.grid[1] * attend.channels
    return float(keys * (queries[0] * queries[1] + 4 * cells[0] * cells[1]))


def critic_macs(scorer: FastScorer) -> float:
    if scorer.feature_network is None:
        return 0.0
    h, w = scorer.mask_hw
    convs = [block.conv for block in scorer.feature_network.dis_conv_module.children()]
    sides = ((h >> i) * (w >> i) for i in range(1, len(convs) + 1))
    return float(sum(c.weight.numel() * area for c, area in zip(convs, sides, strict=True)))
