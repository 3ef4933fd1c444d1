"""Devices, random streams, processes and evaluation mode."""

import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import runtime
from common.config import REPOSITORY
from common.runtime import (
    Processes,
    RuntimeSetupError,
    broadcast_weights,
    eval_mode,
    generator_for,
    joined_processes,
    resolve_device,
    seed_everything,
    seed_from,
    start_processes,
    stop_processes,
    tf32_products,
)
from common.training import joined_training
from dia.settings import DiaConfig
from diffusion_models.settings import DdpmConfig
from tests.tiny_runs import NEEDS_GPU, PATIENCE, ended, forked_pair

PROGRAMS = (
    *("inpainter/train.py", "predict_heatmap.py", "eval.py", "train_dia.py"),
    "diffusion_models/train_eval_ddpm.py",
)
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def draws(*parts: int | str) -> list[float]:
    return torch.rand(4, generator=generator_for(*parts)).tolist()


def test_cpu_is_always_there():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto", allow_gpu=False) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "auto:1", ""])
def test_unknown_device_is_refused_with_the_names_there_are(name):
    with pytest.raises(RuntimeSetupError, match=f"'{name}'. Expected auto, cpu, cuda"):
        resolve_device(name)


def test_gpu_number_beyond_those_there_is_refused():
    with pytest.raises(RuntimeSetupError, match=r"sees no GPU|GPU 99 was asked for"):
        resolve_device("cuda:99")


@NEEDS_GPU
def test_auto_takes_the_gpu_of_the_local_rank(alone):
    alone.setenv("LOCAL_RANK", "0")
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda") == torch.device("cuda", 0)


def test_same_parts_give_the_same_stream_and_others_another():
    assert draws(1, "crop", 7) == draws(1, "crop", 7)
    others = [draws(1, "crop", 8), draws(2, "crop", 7), draws(1, "box", 7), draws(1, "crop", "7")]
    assert draws(1, "crop", 7) not in others
    assert len({tuple(other) for other in others}) == 4


def test_numpy_integers_count_as_integers():
    assert seed_from(np.int64(5), "x") == seed_from(5, "x")


def test_random_stream_is_the_same_on_every_machine():
    # a change here changes every training run: the first 8 bytes of a SHA-256, halved
    assert seed_from(1337, "crop", 0) == 2831096545931675742


def test_parts_that_are_no_counters_are_refused():
    with pytest.raises(TypeError):
        seed_from(0.5)


def test_generators_leave_the_global_stream_alone():
    seed_everything(3)
    expected = torch.rand(1)
    seed_everything(3)
    draws("anything")
    assert torch.rand(1) == expected


def test_seeding_repeats_all_three_global_streams():
    def three() -> tuple[float, ...]:
        seed_everything(2**40 + 1)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert three() == three()


def test_evaluating_restores_the_flag_of_every_submodule():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1)))
    module[1][0].eval()
    before = [m.training for m in module.modules()]
    with eval_mode(module) as inside:
        assert not any(m.training for m in inside.modules())
    assert [m.training for m in module.modules()] == before == [True, True, True, False, True]


def fail_while_evaluating(module: nn.Module) -> None:
    with eval_mode(module):
        raise KeyError("inside")


def test_evaluating_restores_the_flags_after_an_error():
    module = nn.Dropout()
    with pytest.raises(KeyError, match="inside"):
        fail_while_evaluating(module)
    assert module.training


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
    alone.setattr(runtime, "meet", lambda *_: (None, None))
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


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_the_imports_ends_a_program_without_traceback(program: str) -> None:
    for pause in (0.5, 2, 8):  # long before it has imported torch, or soon after on a fast machine
        with subprocess.Popen(
            [sys.executable, REPOSITORY / program, "--dry_run"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE)
        if "Fatal Python error: init" not in errors:  # of Python's own start, on a busy machine
            break
    assert "Traceback" not in errors
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 0, 2)


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


@pytest.mark.parametrize("config", [DiaConfig, DdpmConfig])
@pytest.mark.parametrize(("precision", "rounds"), [("fp32", False), ("tf32", True)])
def test_products_are_rounded_to_tf32_only_where_it_is_asked_for(config, precision, rounds) -> None:
    with tf32_products(not rounds):
        with joined_training(config(device="cpu", precision=precision)):
            assert torch.backends.cudnn.allow_tf32 is rounds
            assert torch.backends.cuda.matmul.allow_tf32 is rounds
        assert torch.backends.cudnn.allow_tf32 is not rounds
