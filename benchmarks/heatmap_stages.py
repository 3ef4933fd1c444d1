"""Where the time of one window goes, by stage; timers are put around functions and taken off again.

Stages: prepare (what completions share), coarse, fine, attention, critic, and the rest.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks import published_heatmap
from benchmarks.heatmap_subject import Subject
from inpainter.fast.scorer import FastScorer

REPEATS = 3


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
            ("critic", scorer, "features"),
        ]
        if fine is not None:
            stages += [
                ("prepare", fine, "surroundings"),
                ("fine", fine, "complete"),
                ("attention", fine, "attend"),
            ]
    else:
        stages = [
            ("coarse", subject.generator.coarse_generator, "forward"),
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
