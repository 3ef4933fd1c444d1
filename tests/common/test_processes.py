"""Processes that torchrun starts: what they read of its environment, and what they share."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from common import processes as processes_module
from common.devices import RuntimeSetupError, resolve_device
from common.processes import (
    Processes,
    broadcast_weights,
    joined_processes,
    start_processes,
    stop_processes,
)
from tests.tiny_runs import ended, forked_pair

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_process_alone_is_the_main_one(alone):
    assert start_processes(torch.device("cpu")) == Processes(0, 1)
    assert Processes().is_main
    assert not Processes(rank=1, world_size=2).is_main
    stop_processes(Processes())


def test_torchrun_with_one_process_needs_no_group(alone):
    for name in TORCHRUN[:3]:
        alone.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    assert start_processes(torch.device("cpu")) == Processes()


def test_half_a_torchrun_environment_is_refused_with_what_is_missing(alone):
    alone.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeSetupError, match="not RANK, LOCAL_RANK, MASTER_ADDR"):
        start_processes(torch.device("cpu"))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_processes_speak_by_nccl_on_nvidia_gpus_alone(alone, device: str, backend: str):
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    for name, value in {**torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        alone.setenv(name, value)
    chosen = []
    alone.setattr(processes_module, "meet", lambda *_: (None, None))
    alone.setattr(torch.cuda, "set_device", chosen.append)
    alone.setattr(torch.distributed, "init_process_group", lambda name, **_: chosen.append(name))
    start_processes(torch.device(device))
    assert chosen == [*([torch.device(device)] if backend == "nccl" else []), backend]


def test_several_processes_on_an_apple_gpu_are_refused(alone):
    for name in TORCHRUN:
        alone.setenv(name, "2")
    with pytest.raises(RuntimeSetupError, match="need device cpu or cuda, got 'mps'"):
        start_processes(torch.device("mps"))


def add_up_the_ranks(folder: Path) -> None:
    processes = start_processes(resolve_device("cpu"))
    number = torch.tensor([processes.rank + 1.0])
    torch.distributed.all_reduce(number)
    said = f"rank {processes.rank} of {processes.world_size}: {number.item()}"
    (folder / str(processes.rank)).write_text(said)
    stop_processes(processes)
    assert not torch.distributed.is_initialized()


def test_processes_in_torchruns_environment_reach_each_other(tmp_path):
    children = forked_pair(partial(add_up_the_ranks, tmp_path))
    assert [ended(child) for child in children] == [0, 0]
    said = [(tmp_path / rank).read_text() for rank in ("0", "1")]
    assert said == ["rank 0 of 2: 3.0", "rank 1 of 2: 3.0"]


def save_weights_of_the_main_process(folder: Path) -> None:
    """In one of two processes that drew other weights."""
    with joined_processes(torch.device("cpu")) as processes:
        torch.manual_seed(processes.rank)
        layer = nn.Linear(3, 2)
        broadcast_weights(layer, processes)
        torch.save(layer.state_dict(), folder / f"{processes.rank}.pt")


def test_every_process_starts_with_the_main_ones_weights(tmp_path) -> None:
    children = forked_pair(partial(save_weights_of_the_main_process, tmp_path))
    assert [ended(child) for child in children] == [0, 0]
    torch.manual_seed(0)
    expected = nn.Linear(3, 2).state_dict()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=0, atol=0)
