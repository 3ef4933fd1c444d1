"""Memory that layers use one after the other, so that the allocator is not asked at every call."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from torch import Tensor

Plan = TypeVar("Plan")
MOST_PLANS = 1024


class Workspace:
    """Named scratch memory that grows to the largest request; not to be shared by threads."""

    def __init__(self) -> None:
        self.blocks: dict[tuple, Tensor] = {}
        self.plans: dict[Hashable, object] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised contiguous memory of the type and device of `like`.

        Whatever was taken under the same name before is overwritten by whoever writes to it.
        """
        numel = math.prod(shape)
        key = (name, like.dtype, like.device)
        block = self.blocks.get(key)
        if block is None or block.numel() < numel:
            block = like.new_empty(numel)
            self.blocks[key] = block
            self.plans.clear()  # they hold parts of the block that this one replaces
        return block[:numel].view(*shape)

    def planned(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """What `make` made for this key: views of taken memory, worth keeping for the next call."""
        if key in self.plans:
            return self.plans[key]
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        plan = make()
        plan = make()  # now that all blocks are large enough, so that none is held twice
        self.plans[key] = plan
        return plan
