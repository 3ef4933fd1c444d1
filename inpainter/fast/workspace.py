"""Memory that layers use one after the other, so that the allocator is not asked at every call."""

import math
from collections.abc import Sequence

from torch import Tensor


class Workspace:
    """Named scratch memory that grows to the largest request; not to be shared by threads."""

    def __init__(self) -> None:
        self.blocks: dict[tuple, Tensor] = {}

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
        return block[:numel].view(*shape)
