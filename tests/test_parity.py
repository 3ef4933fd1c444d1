"""Each training gives the same losses and gradients in two processes as in one, and on a GPU.

The batch of one process is that of both together. Twenty steps in float64, because training
amplifies rounding: sums over rows are made in another order.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.image_batches import epoch_batches
from common.processes import Processes, joined_processes
from common.random_numbers import seed_everything
from dia import training as contrastive
from dia.building import initial_state as encoder_state
from dia.settings import DiaConfig
from diffusion_models import training as ddpm
from diffusion_models.settings import DdpmConfig
from inpainter.data import crop_batches
from inpainter.step import training_step
from inpainter.training import initial_state, training_crops
from tests.tiny_dia import tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import BOTH_STAGES, NEEDS_GPU, ended, forked_pair, tiny_config, write_images

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
N_STEPS = 20
Step = tuple[Tensor, Tensor]
"""Losses, gradients."""


def gradients(*modules: nn.Module) -> Tensor:
    """All gradients of the modules, one after the other."""
    found = [p.grad for module in modules for p in module.parameters()]
    return torch.cat([grad.flatten().cpu() for grad in found if grad is not None])


def picard_steps(
    folder: Path, processes: Processes, device: torch.device = CPU, parts: int = 1
) -> Iterator[Step]:
    """The published attention, whose hole is that of the first sample, in whichever process."""
    options = (
        *("netG.attention_mask=first", "train.mask_batch_same=false", "train.batch_size=4"),
        *("train.grad_clip_norm=0.1", f"train.accumulate={parts}"),
    )
    config = tiny_config(folder, *BOTH_STAGES, *options)
    crops = training_crops(config)
    state = initial_state(config, device, processes, crops)
    share = {"rank": processes.rank, "world_size": processes.world_size}
    for step, real in enumerate(crop_batches(crops, 4, 0, N_STEPS, 0, **share)):
        terms = training_step(state, step, real.double()).terms
        yield torch.tensor(list(terms.values())), gradients(*state.networks)


def diffusion_steps(
    folder: Path, processes: Processes, device: torch.device = CPU
) -> Iterator[Step]:
    size = 4 // processes.world_size
    settings = tiny_diffusion(folder, image_size=8, ddpm_batch_size=size)
    data = write_normals(folder / str(processes.rank), count=8)
    config = DdpmConfig(device="cpu", data=data, diffusion=settings)
    state = ddpm.initial_state(config, device, processes)
    batches = (batch.double() for batch in ddpm.endless_batches(state))
    for _ in range(N_STEPS):
        yield torch.tensor(ddpm.training_step(state, batches)), gradients(state.model)


def encoder_steps(folder: Path, processes: Processes, device: torch.device = CPU) -> Iterator[Step]:
    """Batch norm over the rows of both, and a contrast with them, dissolved equally far."""
    settings = tiny_contrastive(
        folder,
        mode="simclr_DIA",
        shift_trans_type="diffusion_rotation",
        diffusion_model_path=str(folder / "model" / "model-1.pt"),
        diff_resolution=8,
        batch_size=4 // processes.world_size,
        lr_init=0.01,
    )
    data = write_normals(folder / str(processes.rank), count=8)
    config = DiaConfig(device="cpu", data=data, contrastive=settings)
    state = encoder_state(config, device, processes)
    for epoch in range(1, N_STEPS // 2 + 1):
        batches = epoch_batches(
            state.images,
            batch_size=settings.batch_size,
            epoch=epoch,
            seed=config.seed,
            processes=processes,
        )
        for number, batch in enumerate(batches):
            batch = batch._replace(images=batch.images.double())
            losses = contrastive.training_step(state, epoch, number, batch)
            yield torch.tensor(list(losses.values())), gradients(state.encoder)


Training = Callable[..., Iterator[Step]]
TRAININGS = (picard_steps, diffusion_steps, encoder_steps)


def steps_taken(training: Training, folder: Path, processes: Processes) -> list[Step]:
    seed_everything(0)
    torch.set_default_dtype(torch.float64)
    try:
        return list(training(folder, processes))
    finally:
        torch.set_default_dtype(torch.float32)


def in_two(training: Training, folder: Path) -> None:
    with joined_processes(CPU) as processes:
        steps = steps_taken(training, folder, processes)
        torch.save(steps, folder / f"rank{processes.rank}.pt")


def prepare(training: Training, folder: Path) -> None:
    write_images(folder / "train")
    if training is encoder_steps:
        data = write_normals(folder / "normal")
        settings = tiny_diffusion(folder / "model", image_size=8)
        ddpm.train(DdpmConfig(device="cpu", data=data, diffusion=settings))


@pytest.mark.parametrize("training", TRAININGS)
def test_losses_and_gradients_of_two_processes_are_those_of_one(training, tmp_path: Path) -> None:
    prepare(training, tmp_path)
    children = forked_pair(partial(in_two, training, tmp_path))
    assert [ended(child) for child in children] == [0, 0]
    alone = steps_taken(training, tmp_path, Processes())
    assert len(alone) == N_STEPS
    for rank in range(2):
        assert_same_steps(torch.load(tmp_path / f"rank{rank}.pt"), alone)


def test_losses_and_gradients_of_a_batch_in_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    prepare(picard_steps, tmp_path)
    whole = steps_taken(picard_steps, tmp_path, Processes())
    assert_same_steps(steps_taken(partial(picard_steps, parts=2), tmp_path, Processes()), whole)


@NEEDS_GPU
@pytest.mark.parametrize("training", TRAININGS)
def test_losses_and_gradients_on_a_gpu_are_those_on_the_cpu(training, tmp_path: Path) -> None:
    prepare(training, tmp_path)
    on_gpu = partial(training, device=torch.device("cuda"))
    expected = steps_taken(training, tmp_path, Processes())
    assert_same_steps(steps_taken(on_gpu, tmp_path, Processes()), expected)


def assert_same_steps(found: list[Step], expected: list[Step]) -> None:
    for (losses, grads), (losses_expected, grads_expected) in zip(found, expected, strict=True):
        torch.testing.assert_close(losses, losses_expected, rtol=1e-6, atol=1e-9)
        atol = 1e-6 * grads_expected.abs().max().item()
        torch.testing.assert_close(grads, grads_expected, rtol=1e-6, atol=atol)
