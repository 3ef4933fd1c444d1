"""Random useful crops of normal images, each a pure function of the seed and its index.

Nothing about the crop with index i depends on which crops were drawn before, by which process or
with what cache, so a resumed run sees exactly the crops that the uninterrupted one sees.
B batch, C H W crop, in pixels.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.image_store import ImageStore, StoredImage
from common.images import ImageError, largest_stored
from common.runtime import generator_for
from inpainter.crops import BACKGROUND_MAX, TRIES, CropRule, is_black

LOG = logging.getLogger(__name__)


class NormalPatches(Dataset):
    """Crops of normal images for training; see the module for what makes them reproducible.

    paths: image files. image_shape: height, width, channels of a crop.
    random_crop: crop at random, or resize the whole image to image_shape. A smaller image is first
    resized up (bilinear, same aspect) until the crop fits.
    flip: mirror left to right with probability 1/2. max_rotation, max_scale: see CropRule.
    Crops are redrawn, 50 times per image at most, while they are background (maximum below -0.99 in
    [-1, 1]) or less than min_tissue_fraction of their pixels is brighter than tissue_threshold
    (in [0, 1]). An image that is unreadable or gives no crop is replaced by the next one in order
    and noted in `skipped` (on_bad_image "skip"), or raises ImageError ("error").
    cache_mb: MiB of decoded images kept in memory, in each process.
    subset_frac: use this fraction of the files, drawn from the seed.
    white_value: the stored value that means white, as read_image takes it.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        image_shape: tuple[int, int, int],
        seed: int,
        random_crop: bool = True,
        flip: bool = False,
        min_tissue_fraction: float = 0.0,
        tissue_threshold: float = 0.005,
        max_rotation: float = 0.0,
        max_scale: float = 1.0,
        on_bad_image: Literal["skip", "error"] = "skip",
        cache_mb: int = 0,
        subset_frac: float | None = None,
        white_value: int | None = None,
    ) -> None:
        if not paths:
            raise ImageError("No training images were given; expected at least one path.")
        self.paths = _subset([Path(path) for path in paths], subset_frac, seed)
        self.shape = (image_shape[2], *image_shape[:2])  # (C, H, W)
        self.seed = seed
        self.rule = CropRule(
            tuple(image_shape[:2]),
            random_crop,
            flip,
            min_tissue_fraction,
            tissue_threshold,
            max_rotation,
            max_scale,
        )
        self.on_bad_image = on_bad_image
        self.skipped: dict[Path, str] = {}
        """Why an image was passed over, at least once. Filled by `batches` for its workers too."""
        self._unusable: set[int] = set()
        self._usable: set[int] = set()
        self.white_value = white_value
        self._images = ImageStore(
            self.paths, image_shape[2], cache_mb, prepare=self.rule.fit, white_value=white_value
        )
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Number of images, that is of crops in an epoch; indices beyond are later epochs."""
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        """Crop number i >= 0, (C, H, W) float32 in [-1, 1], of epoch i // number of images."""
        return self.crops([i])[0]

    def crops(self, indices: Sequence[int], stream: str = "crop") -> Tensor:
        """The crops of these indices, (len(indices), C, H, W) float32 in [-1, 1].

        stream: name of the random stream; other names give other crops.
        """
        batch = np.empty((len(indices), *self.shape), dtype=np.float32)
        for row, i in zip(batch, indices, strict=True):
            self._draw(row, i, stream)
        batch *= 2
        batch -= 1
        return torch.from_numpy(batch)

    def _draw(self, row: np.ndarray, i: int, stream: str) -> None:
        """Writes crop i, in [0, 1], into row (C, H, W)."""
        if i < 0:
            raise IndexError(f"Crop numbers start at 0, got {i}")
        n = len(self.paths)
        epoch, position = divmod(i, n)
        order = self._order(epoch)
        generator = generator_for(self.seed, stream, i)
        for offset in range(n):
            index = order[(position + offset) % n]
            if index in self._unusable:
                continue
            image = self._image(index)
            if image is None:
                continue
            crop = self.rule.draw(image, generator)
            if crop is not None:
                np.divide(crop, image.scale, out=row, dtype=np.float32)
                return
            self._skip(index, self._no_crop())
        examples = "; ".join(f"{path}: {why}" for path, why in list(self.skipped.items())[:3])
        raise ImageError(f"None of the {n} training images gives a crop. For example: {examples}")

    def _order(self, epoch: int) -> list[int]:
        """The files' order in an epoch; the last two are remembered."""
        if epoch not in self._orders:
            generator = generator_for(self.seed, "order", epoch)
            order = torch.randperm(len(self.paths), generator=generator).tolist()
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = order
        return self._orders[epoch]

    def _image(self, index: int) -> StoredImage | None:
        """The decoded image; None where no crop of it can ever be used."""
        try:
            image = self._images[index]
        except ImageError as error:
            reason = str(error)
        else:
            if index in self._usable or not is_black(image):
                self._usable.add(index)
                return image
            reason = "the whole image is black"
            if image.values.max() > 0:
                largest = largest_stored(self.paths[index], self.white_value)
                reason += f": {largest}, below {BACKGROUND_MAX}"
        self._unusable.add(index)
        self._skip(index, reason)
        return None

    def _no_crop(self) -> str:
        """Reason for passing over an image that has tissue, but not in the crops drawn."""
        share = self.rule.min_tissue_fraction
        wanted = f"tissue on {share:.0%} of its pixels" if share > 0 else "anything but background"
        return f"no crop of {TRIES} shows {wanted}; train.min_tissue_fraction is {share:g}"

    def _skip(self, index: int, reason: str) -> None:
        """Notes that an image was passed over, or raises."""
        path = self.paths[index]
        if self.on_bad_image == "error":
            named = reason if str(path) in reason else f"{path}: {reason}"
            raise ImageError(f"{named} (train.on_bad_image: skip passes over such images)")
        self.note_skipped({path: reason})

    def note_skipped(self, skipped: dict[Path, str]) -> None:
        """Adds to `skipped`, with one warning per image (none in a reading process)."""
        for path, reason in skipped.items():
            if path not in self.skipped:
                self.skipped[path] = reason
                if get_worker_info() is None:
                    LOG.warning("Training image skipped: %s: %s", path, reason)


def fixed_crops(dataset: NormalPatches, n: int) -> Tensor:
    """n crops for comparing checkpoints: (n, C, H, W) in [-1, 1], the same for one seed.

    Drawn from another random stream than the training crops, over as many images as there are.
    """
    return dataset.crops(range(n), stream="select")


def _subset(paths: list[Path], fraction: float | None, seed: int) -> list[Path]:
    """A random fraction of the files, at least one, in their order."""
    if fraction is None:
        return paths
    count = max(1, round(fraction * len(paths)))
    order = torch.randperm(len(paths), generator=generator_for(seed, "subset")).tolist()
    return [paths[index] for index in sorted(order[:count])]
