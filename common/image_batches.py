"""Batches of an image set, the same after a resume and in every process.

B images per batch and process, C H W image.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.image_sets import ImageSet, Sample
from common.runtime import Processes, generator_for


class Batch(NamedTuple):
    """Images with what is known of them."""

    images: Tensor
    """(B, C, H, W) in [0, 1]."""
    labels: Tensor
    """(B,) int64."""
    names: list[str]


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples; ValueError where their sizes differ."""
    shapes = {tuple(sample.image.shape) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f"images of different sizes in one batch: {sorted(shapes)}; set a size")
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
        [sample.name for sample in samples],
    )


def batches_per_epoch(n_images: int, batch_size: int, processes: Processes) -> int:
    """Batches of one process in one pass; the last may be smaller.

    ValueError where there are fewer images than processes.
    """
    if n_images < processes.world_size:
        raise ValueError(
            f"{n_images} training images cannot be shared out among {processes.world_size} "
            "processes; start fewer with torchrun --nproc_per_node"
        )
    return -(-(n_images // processes.world_size) // batch_size)


def epoch_batches(
    images: ImageSet,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    processes: Processes,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """One process's batches of one pass, in an order that depends on seed and epoch alone.

    Images that cannot be shared out evenly among the processes are left out of that pass.
    """
    order = torch.randperm(len(images), generator=generator_for(seed, "order", epoch))
    share = order[processes.rank :: processes.world_size][: len(images) // processes.world_size]
    yield from DataLoader(
        images,
        batch_sampler=[part.tolist() for part in share.split(batch_size)],
        collate_fn=collate,
        num_workers=num_workers,
    )


def ordered_batches(images: ImageSet, batch_size: int, num_workers: int = 0) -> Iterator[Batch]:
    """All images once, in their order."""
    yield from DataLoader(
        images, batch_size=batch_size, collate_fn=collate, num_workers=num_workers
    )
