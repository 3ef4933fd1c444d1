"""Batches of crops by step: no state, so that a resumed run goes on with the very next batch.

B batch, C H W crop, in pixels.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.image_batches import read_ahead
from common.images import ImageError
from common.runtime import RuntimeSetupError, generator_for, leave_signals_to_main
from inpainter.patches import NormalPatches


def batches(
    dataset: NormalPatches,
    batch_size: int,
    start_step: int,
    n_steps: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Generator[Tensor, None, None]:
    """Yields batches start_step, start_step + 1, ..., n_steps - 1; (B, C, H, W) in [-1, 1].

    Batch s holds the crops s * batch_size ... (s + 1) * batch_size - 1; of several processes each
    gets its equal, contiguous share, so B = batch_size / world_size.
    num_workers: processes that read ahead; 0 reads in this one. Use it in `with reading(…)`, which
    ends them. PyTorch's global random generator
    is left as it is. Raises RuntimeSetupError where the batch cannot be shared out, ImageError as
    the dataset does.
    """
    share, rest = divmod(batch_size, world_size)
    if rest or share == 0:
        raise RuntimeSetupError(
            f"train.batch_size {batch_size} cannot be shared by {world_size} processes; make it a "
            f"multiple of {world_size}, for example {max(share, 1) * world_size}"
        )
    numbered = _Batches(dataset, batch_size, rank * share, share)
    steps = range(start_step, n_steps)
    if num_workers == 0:
        for step in steps:
            batch = numbered.read(step)
            yield batch.pin_memory() if pin_memory else batch
        return
    loader = DataLoader(
        numbered,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_main,
        generator=generator_for(dataset.seed, "workers"),  # else it draws from the global one
    )
    with contextlib.closing(read_ahead(loader)) as stream:
        for batch, skipped, error in stream:
            dataset.note_skipped(skipped)
            if error is not None:
                raise ImageError(error)
            yield batch


class _Batches(Dataset):
    """This process's share of each batch, by step, for a DataLoader that does no collating."""

    def __init__(self, patches: NormalPatches, batch_size: int, first: int, share: int) -> None:
        self.patches = patches
        self.batch_size = batch_size
        self.first = first
        self.share = share

    def read(self, step: int) -> Tensor:
        """Batch number step, (B, C, H, W)."""
        start = step * self.batch_size + self.first
        return self.patches.crops(range(start, start + self.share))

    def __getitem__(self, step: int) -> tuple[Tensor | None, dict[Path, str], str | None]:
        """Batch, images skipped so far, error: what a worker has to say."""
        try:
            return self.read(step), self.patches.skipped, None
        except ImageError as error:
            # handed over, not raised: a DataLoader would put its traceback into the message
            return None, self.patches.skipped, str(error)
