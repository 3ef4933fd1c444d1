"""Decoded images by number, kept in memory as far as a budget reaches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.images import read_image


class StoredImage(NamedTuple):
    """A decoded image, in a type that holds its values exactly."""

    values: np.ndarray
    """(C, H, W) uint8, uint16 or float32."""
    scale: float
    """The value that means 1.0."""


class ImageStore:
    """Reads image files, once each as long as there is room.

    channels: 1 or 3, as read_image takes them. prepare: applied to each image (C, H, W) in [0, 1]
    after reading, for example a resize. cache_mb: MiB for decoded images; those read first stay.
    white_value: as read_image takes it.
    What is returned has the same values whether it was kept or not.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        channels: int,
        cache_mb: int = 0,
        prepare: Callable[[Tensor], Tensor] | None = None,
        white_value: int | None = None,
    ) -> None:
        self.paths = list(paths)
        self.channels = channels
        self.prepare = prepare
        self.white_value = white_value
        self._room = cache_mb * 2**20  # bytes
        self._kept: dict[int, StoredImage] = {}

    def __getitem__(self, index: int) -> StoredImage:
        """The image with this number. Raises ImageError where its file cannot be read."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        image = read_image(self.paths[index], self.channels, white_value=self.white_value)
        if self.prepare is not None:
            image = self.prepare(image)
        stored = StoredImage(image.numpy(), 1.0)
        if self._room > 0:
            smallest = smallest_exact(stored.values, self.white_value)
            if smallest.values.nbytes <= self._room:
                self._room -= smallest.values.nbytes
                self._kept[index] = smallest
                return smallest
        return stored


def smallest_exact(values: np.ndarray, white_value: int | None = None) -> StoredImage:
    """Stores float32 in [0, 1] as 8 or 16 bits where dividing those gives the same floats.

    white_value: the value by which they were divided, if it was not 255 or 65535.
    """
    tops = [(np.uint8, 255), (np.uint16, 65535)]
    if white_value is not None and white_value <= 65535:
        tops.insert(0, (np.min_scalar_type(white_value).type, white_value))
    for dtype, top in tops:
        scale = np.float32(top)
        levels = np.rint(values * scale)
        if np.array_equal(levels / scale, values):
            return StoredImage(levels.astype(dtype), float(scale))
    return StoredImage(values, 1.0)
