"""Loading the next item while the present one is worked on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def prefetched(
    items: Iterable[Item], load: Callable[[Item], Loaded]
) -> Iterator[tuple[Item, Callable[[], Loaded]]]:
    """Yields (item, get); one thread loads ahead, by one item.

    get() returns what load(item) returned, or raises what it raised.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = None
        for item in items:
            coming = (item, pool.submit(load, item))
            if ahead is not None:
                yield ahead[0], ahead[1].result
            ahead = coming
        if ahead is not None:
            yield ahead[0], ahead[1].result
