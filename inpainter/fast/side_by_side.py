"""Windows scored at the same time, each by one core: no core waits for another within a layer."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from inpainter.settings import Metric

Score = Callable[..., dict[Metric, Tensor]]


class SideBySide:
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
