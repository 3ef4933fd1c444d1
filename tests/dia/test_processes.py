"""DIA's trainings in several processes, as torchrun starts them."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.checkpoint import load_tensors
from common.runtime import Processes, start_processes, stop_processes
from dia import training as contrastive
from dia.encoders import Heads
from dia.losses import contrastive_losses
from dia.settings import ContrastiveConfig, DiaConfig
from diffusion_models import training as ddpm
from diffusion_models.settings import DdpmConfig
from tests.tiny_dia import tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import ended, forked_pair, wait_for_text

pytestmark = pytest.mark.usefixtures("one_thread")

ENDLESS = 1_000_000


def encoder_training(folder: Path) -> Callable[[], object]:
    settings = tiny_contrastive(folder / "run", batch_size=3, epochs=ENDLESS, save_step=ENDLESS)
    config = DiaConfig(
        device="cpu", data=write_normals(folder / "data", count=6), contrastive=settings
    )
    return partial(contrastive.train, config)


def diffusion_training(folder: Path) -> Callable[[], object]:
    settings = tiny_diffusion(
        folder / "run",
        ddpm_batch_size=3,
        train_num_steps=ENDLESS,
        save_every=ENDLESS,
        log_every=1,
    )
    config = DdpmConfig(
        device="cpu", data=write_normals(folder / "data", count=6), diffusion=settings
    )
    return partial(ddpm.train, config)


@pytest.mark.parametrize(
    ("training", "saved", "counter"),
    [
        (encoder_training, "state.pt", "epoch"),
        (diffusion_training, "model-1.pt", "step"),
    ],
)
def test_signal_to_one_process_stops_all_together(
    training, saved: str, counter: str, tmp_path: Path
) -> None:
    children = forked_pair(training(tmp_path))
    log = tmp_path / "run" / "log.jsonl"
    wait_for_text(log, 200)
    os.kill(children[1].pid, signal.SIGTERM)
    assert [ended(child) for child in children] == [0, 0]
    last = json.loads(log.read_text().splitlines()[-1])[counter]
    assert load_tensors(tmp_path / "run" / saved)[counter] == last < ENDLESS


def one_update(rows: Tensor, labels: Tensor, processes: Processes) -> dict[str, Tensor]:
    """Heads after one step on rows (V·P, 5), view-major, of one process or all."""
    torch.manual_seed(0)
    heads = nn.ModuleDict({"simclr": nn.Linear(5, 4), "shift": nn.Linear(5, 4)})
    outputs = {name: head(rows) for name, head in heads.items()}
    settings = ContrastiveConfig(mode="simclr_DIA", shift_trans_type="rotation")
    losses = contrastive_losses(Heads(rows, rows, **outputs), labels, settings)
    contrastive.optimise(losses.total, torch.optim.SGD(heads.parameters(), lr=1.0), processes)
    return heads.state_dict()


def rows_and_labels() -> tuple[Tensor, Tensor]:
    """Three views of two processes' two rows each: (3, 2, 2, 5), and their shifts (3, 2, 2)."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 2, 2, 5, generator=generator)
    return rows, torch.randint(4, (3, 2, 2), generator=generator)


def update_of_one_share(folder: Path) -> None:
    processes = start_processes(torch.device("cpu"))
    rows, labels = (values[:, processes.rank].flatten(0, 1) for values in rows_and_labels())
    torch.save(one_update(rows, labels, processes), folder / f"{processes.rank}.pt")
    stop_processes(processes)


def test_two_processes_contrast_with_the_rows_of_both(tmp_path: Path) -> None:
    children = forked_pair(partial(update_of_one_share, tmp_path))
    assert [ended(child) for child in children] == [0, 0]
    rows, labels = (values.flatten(0, 2) for values in rows_and_labels())
    whole = one_update(rows, labels, Processes())
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole)
