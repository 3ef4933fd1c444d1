"""The data of a training: batches of useful crops of normal images.

Each crop is a pure function of the seed and its index: it depends neither on the crops drawn
before, nor on the process, nor on what is cached. So a resumed run goes on with the very next batch
and sees exactly the crops that the uninterrupted one sees.
B batch, C H W image, h w crop, in pixels.
"""

import contextlib
import logging
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.devices import RuntimeSetupError
from common.grey_range import Window
from common.image_batches import read_batches
from common.images import ImageError, largest_stored, read_image
from common.notices import notice
from common.random_numbers import generator_for
from common.shading import Flattening
from common.volumes import split_slice
from inpainter.windows import resized, scaled_hw

LOG = logging.getLogger(__name__)
TRIES = 50
"""Crops drawn from one image before it is given up."""
BACKGROUND_MAX = 0.005
"""A crop is background if its maximum is below this: -0.99 in [-1, 1], as published."""


class StoredImage(NamedTuple):
    """A decoded image, in a type that holds its values exactly."""

    values: np.ndarray
    """(C, H, W) uint8, uint16 or float32."""
    scale: float
    """The value that means 1.0."""


def crop_batches(
    crops: "NormalCrops",
    batch_size: int,
    start_step: int,
    n_steps: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    parts: int = 1,
) -> Generator[Tensor, None, None]:
    """Yields batches start_step, start_step + 1, ..., n_steps - 1; (B, C, h, w) in [-1, 1].

    Batch s holds the crops s * batch_size ... (s + 1) * batch_size - 1; of several processes each
    gets its equal, contiguous share, so B = batch_size / world_size.
    parts: number of equal parts that each share has to have.
    num_workers: processes that read ahead; 0 reads in this one. Use it in `with reading(…)`, which
    ends them. PyTorch's global random generator is left as it is. Raises RuntimeSetupError where
    the batch cannot be shared out, ImageError as NormalCrops does.
    """
    share, multiple = batch_size // world_size, world_size * parts
    if batch_size % multiple:
        each = f", each in {parts} parts (train.accumulate)" if parts > 1 else ""
        raise RuntimeSetupError(
            f"train.batch_size {batch_size} cannot be shared by {world_size} processes{each}; make "
            f"it a multiple of {multiple}, for example {max(batch_size // multiple, 1) * multiple}"
        )
    numbered = _Batches(crops, batch_size, rank * share, share)
    stream = read_batches(numbered, range(start_step, n_steps), num_workers, pin_memory=pin_memory)
    with contextlib.closing(stream):
        for batch, skipped, error in stream:
            crops.note_skipped(skipped)
            if error is not None:
                raise ImageError(error)
            yield batch


class _Batches(Dataset):
    """This process's share of each batch, by step, for a DataLoader that does no collating."""

    def __init__(self, crops: "NormalCrops", batch_size: int, first: int, share: int) -> None:
        self.crops, self.batch_size, self.first, self.share = crops, batch_size, first, share

    def __getitem__(self, step: int) -> tuple[Tensor | None, dict[Path, str], str | None]:
        """Runs in a DataLoader's worker; returns (batch, images skipped so far, error or None)."""
        start = step * self.batch_size + self.first
        try:
            return self.crops.crops(range(start, start + self.share)), self.crops.skipped, None
        except ImageError as error:
            # handed over, not raised: a DataLoader would put its traceback into the message
            return None, self.crops.skipped, str(error)


class NormalCrops(Dataset):
    """Random useful crops of normal images, by their number; see the module.

    paths: image files. rule: where crops may lie, and what they must show. channels: 1 or 3.
    Crops are drawn again, 50 times per image at most, while they show too little. An image that is
    unreadable or gives no crop is replaced by the next one in order and listed in `skipped`
    (on_bad_image "skip"), or raises ImageError ("error").
    cache_mb: MiB of decoded images kept in memory, in each process; those read first stay.
    subset_frac: use this fraction of the files, drawn from the seed.
    white_value: the stored value that means white, and window: what is shown black and white, as
    read_image takes them. flattening: what is done to images once read. scales: the factors at
    which each image is shown; every epoch has each image at each of them.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        rule: "CropRule",
        *,
        channels: int,
        seed: int,
        on_bad_image: Literal["skip", "error"] = "skip",
        cache_mb: int = 0,
        subset_frac: float | None = None,
        white_value: int | None = None,
        window: Window = "auto",
        flattening: Flattening | None = None,
        scales: Sequence[float] = (1.0,),
    ) -> None:
        if not paths:
            raise ImageError("No training images were given; expected at least one path.")
        self.paths = subset_of([Path(path) for path in paths], subset_frac, seed)
        self.shape = (channels, *rule.crop_hw)  # (C, h, w)
        self.seed, self.rule = seed, rule
        self.on_bad_image = on_bad_image
        self.skipped: dict[Path, str] = {}
        """Why an image was passed over, at least once; by worker processes, too."""
        self._unusable: set[int] = set()
        self._usable: set[int] = set()
        self.white_value, self.window, self.flattening = white_value, window, flattening
        self.scales = tuple(scales)
        self._room = cache_mb * 2**20  # bytes
        self._cached: dict[int, StoredImage] = {}

    def __len__(self) -> int:
        """Crops in an epoch, one of each image and scale; indices beyond are later epochs."""
        return len(self.paths) * len(self.scales)

    def __getitem__(self, i: int) -> Tensor:
        """Crop number i >= 0, (C, h, w) float32 in [-1, 1], of epoch i // len(self)."""
        return self.crops([i])[0]

    def crops(self, indices: Sequence[int], stream: str = "crop") -> Tensor:
        """The crops of these indices, (len(indices), C, h, w) float32 in [-1, 1].

        stream: name of the random stream; other names give other crops.
        """
        batch = np.empty((len(indices), *self.shape), dtype=np.float32)
        for row, i in zip(batch, indices, strict=True):
            self._draw(row, i, stream)
        batch *= 2
        batch -= 1
        return torch.from_numpy(batch)

    def _draw(self, row: np.ndarray, i: int, stream: str) -> None:
        """Writes crop i, in [0, 1], into row (C, h, w)."""
        if i < 0:
            raise IndexError(f"Crop numbers start at 0, got {i}")
        n = len(self)
        epoch, position = divmod(i, n)
        order = _order(n, self.seed, epoch)
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
        raise ImageError(
            f"None of the {len(self.paths)} training images gives a crop. For example: {examples}"
        )

    def decoded(self, index: int) -> StoredImage:
        """The image with this number, at least as large as a crop; the same, cached or not.

        index: image * number of scales + scale. Raises ImageError where its file cannot be read.
        """
        if index in self._cached:
            return self._cached[index]
        scale = self.scales[index % len(self.scales)]
        shown = {"white_value": self.white_value, "window": self.window}
        image = read_image(self.path_of(index), self.shape[0], **shown)
        if self.flattening is not None:
            image = self.flattening(image)
        if scale < 1:
            image = resized(image, scaled_hw((image.shape[1], image.shape[2]), scale)).clamp(0, 1)
        fitting = self.rule.fit(image)
        if self.rule.random_crop and fitting.shape != image.shape:
            (h, w), (H, W) = image.shape[1:], fitting.shape[1:]
            message = f"{self.path_of(index)}: {h} x {w} pixels are enlarged to {H} x {W} for crops"
            notice("image smaller than a crop enlarged", message)
        stored = StoredImage(fitting.numpy(), 1.0)
        smallest = smallest_exact(stored.values, self.white_value) if self._room > 0 else stored
        if smallest.values.nbytes > self._room:
            return stored
        self._room -= smallest.values.nbytes
        self._cached[index] = smallest
        return smallest

    def path_of(self, index: int) -> Path:
        """The file of an image at one of its scales; see decoded."""
        return self.paths[index // len(self.scales)]

    def _image(self, index: int) -> StoredImage | None:
        """The decoded image; None where no crop of it can ever be used."""
        try:
            image = self.decoded(index)
        except ImageError as error:
            reason = str(error)
        else:
            if index in self._usable or image.values.max() >= BACKGROUND_MAX * image.scale:
                self._usable.add(index)
                return image
            reason = "the whole image is black"
            if image.values.max() > 0:
                largest = largest_stored(self.path_of(index), self.white_value)
                reason += f": {largest}, below {BACKGROUND_MAX}"
        self._unusable.add(index)
        self._skip(index, reason)
        return None

    def _no_crop(self) -> str:
        """Reason for passing over an image that has tissue, but not in the crops drawn."""
        share = self.rule.min_tissue_fraction
        missing = f"tissue on {share:.0%} of its pixels" if share > 0 else "anything but background"
        return f"no crop of {TRIES} shows {missing}; train.min_tissue_fraction is {share:g}"

    def _skip(self, index: int, reason: str) -> None:
        """Lists an image as passed over, or raises."""
        path = self.path_of(index)
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


def fixed_crops(dataset: NormalCrops, n: int) -> Tensor:
    """n crops for comparing checkpoints: (n, C, h, w) in [-1, 1], the same for one seed.

    Drawn from another random stream than the training crops, over as many images as there are.
    """
    return dataset.crops(range(n), stream="select")


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    """The images' order in an epoch."""
    return torch.randperm(n, generator=generator_for(seed, "order", epoch)).tolist()


def subset_of(paths: list[Path], fraction: float | None, seed: int) -> list[Path]:
    """A random fraction of the files, at least one, in their order."""
    if fraction is None:
        return paths
    count = max(1, round(fraction * len(paths)))
    order = torch.randperm(len(paths), generator=generator_for(seed, "subset")).tolist()
    return [paths[index] for index in sorted(order[:count])]


def split_held_out(paths: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Images to train on, and the share that is kept from training; both in the given order.

    At least one of each, where there are two files or more and share > 0. Slices of one file stay
    together.
    """
    number = {
        file: i for i, file in enumerate(dict.fromkeys(split_slice(path)[0] for path in paths))
    }
    count = min(max(1, round(share * len(number))), len(number) - 1) if share > 0 else 0
    order = torch.randperm(len(number), generator=generator_for(seed, "held out")).tolist()
    kept = set(order[:count])
    parts: tuple[list[Path], list[Path]] = ([], [])
    for path in paths:
        parts[number[split_slice(path)[0]] in kept].append(path)
    return parts


@dataclass(frozen=True)
class CropRule:
    """How crops are taken from an image; the settings of the same names under `train:`."""

    crop_hw: tuple[int, int]
    """Height and width of a crop."""
    random_crop: bool = True
    """Crop at random, or resize the whole image to crop_hw."""
    flip: bool = False
    """Mirror left to right with probability 1/2."""
    min_tissue_fraction: float = 0.0
    """Smallest useful share of pixels that are brighter than tissue_threshold."""
    tissue_threshold: float = 0.005
    """Grey value (of RGB the largest) above which a pixel is tissue."""
    max_rotation: float = 0.0
    """Turn each crop about its centre by up to this many degrees, either way."""
    max_scale: float = 1.0
    """Show each crop larger or smaller by up to this factor, >= 1."""

    def fit(self, image: Tensor) -> Tensor:
        """Resizes (C, H, W), bilinear, as far as needed for a crop to fit; keeps the aspect ratio.

        Without random_crop: to the crop's size whatever the aspect ratio.
        """
        size = tuple(image.shape[1:])
        target = self.crop_hw
        if self.random_crop:
            factor = max(1.0, self.crop_hw[0] / size[0], self.crop_hw[1] / size[1])
            target = tuple(
                max(crop, round(side * factor))
                for crop, side in zip(self.crop_hw, size, strict=True)
            )
        if target == size:
            return image
        resized = F.interpolate(image[None], size=target, mode="bilinear", antialias=True)[0]
        return resized.clamp(0, 1)

    def draw(self, image: StoredImage, generator: torch.Generator) -> np.ndarray | None:
        """The first useful crop of TRIES, (C, h, w); None where none is.

        In the image's own type and range; float32 where crops are turned or scaled. The image must
        be as large as the crop (see fit). Each try draws three numbers, or five.
        """
        height, width = self.crop_hw
        rows, columns = image.values.shape[1] - height + 1, image.values.shape[2] - width + 1
        warps = self.max_rotation > 0 or self.max_scale > 1
        for _ in range(TRIES):
            u = torch.rand(5 if warps else 3, generator=generator, dtype=torch.float64).tolist()
            top, left = int(u[0] * rows), int(u[1] * columns)
            if warps:
                angle = math.radians((2 * u[3] - 1) * self.max_rotation)
                factor = self.max_scale ** (2 * u[4] - 1)
                crop = warped_crop(image.values, (top, left), self.crop_hw, angle, factor)
            else:
                crop = image.values[:, top : top + height, left : left + width]
            if self.is_useful(crop, image.scale):
                return crop[:, :, ::-1] if self.flip and u[2] < 0.5 else crop
            if rows == columns == 1 and not warps:
                break
        return None

    def is_useful(self, crop: np.ndarray, scale: float) -> bool:
        """False for background and for too small a share of tissue. scale: the value of 1.0."""
        if crop.max() < BACKGROUND_MAX * scale:
            return False
        if self.min_tissue_fraction <= 0:
            return True
        grey = crop[0] if len(crop) == 1 else crop.max(axis=0)
        tissue = np.count_nonzero(grey > self.tissue_threshold * scale)
        return tissue >= self.min_tissue_fraction * grey.size


def warped_crop(
    values: np.ndarray,
    corner: tuple[int, int],
    crop_hw: tuple[int, int],
    angle: float,
    factor: float,
) -> np.ndarray:
    """A crop turned and scaled about its centre, (C, h, w) float32, bilinear.

    values: image (C, H, W); beyond its border it goes on mirrored. corner: top, left of the crop
    before it is turned, in pixels. angle: radians. factor: > 1 shows things larger.
    """
    height, width = crop_hw
    down, right = np.meshgrid(
        np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij"
    )
    cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
    rows = corner[0] + (height - 1) / 2 + cosine * down - sine * right
    columns = corner[1] + (width - 1) / 2 + sine * down + cosine * right
    planes = [
        map_coordinates(plane, (rows, columns), output=np.float32, order=1, mode="reflect")
        for plane in values
    ]
    return np.stack(planes)


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
