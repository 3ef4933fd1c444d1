"""Damaged files of tensors, and processes of a training that are killed."""

import os
import random
import signal
from pathlib import Path

import pytest

from common.checkpoint import DamagedCheckpointError, load_tensors
from inpainter.snapshots import run_folder
from inpainter.training import train
from tests.faults.disks import assert_named
from tests.faults.programs import PROGRAMS, Running, assert_whole, place, run
from tests.tiny_runs import (
    TRAIN,
    as_flags,
    free_port,
    tiny_config,
    tiny_file,
    wait_until,
    write_images,
)

FLIPS = 50
KINDS = {
    "generator": ("inpainter/train.py", "checkpoints/**/gen_*.pt"),
    "critics": ("inpainter/train.py", "checkpoints/**/dis_*.pt"),
    "state": ("inpainter/train.py", "checkpoints/**/state_*.pt"),
    "heatmap": ("predict_heatmap.py", "out/data/*.pt"),
    "diffusion model": ("diffusion_models/train_eval_ddpm.py", "run/model-*.pt"),
    "encoder": ("train_dia.py", "run/last.model"),
    "encoder's state": ("train_dia.py", "run/state.pt"),
}
"""Program that writes it, and where."""


def damaged(kind: str, root: Path, number: int) -> int:
    """A file cut at every 10 %, and with one bit flipped, is refused by name each time."""
    name, pattern = KINDS[kind]
    program, chance = PROGRAMS[name], random.Random(number)
    with place(root, f"damaged {number}") as folder:
        program.prepare(folder)
        assert run(program, folder).status == 0
        path = max(folder.glob(pattern))
        whole = path.read_bytes()
        bad = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
        for _ in range(FLIPS):
            data = bytearray(whole)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            bad.append(bytes(data))
        for data in bad:
            path.write_bytes(data)
            with pytest.raises(DamagedCheckpointError, match=path.name):
                load_tensors(path)
        path.write_bytes(whole)
        load_tensors(path)
    return len(bad)


LONG = ("train.n_steps=100000", "train.snapshot_save_iter=2", "train.keep_snapshots=2")


def training(folder: Path, *more: str, **environment: str) -> Running:
    """A PICARD training without end; go on with `assert_goes_on`."""
    command = [TRAIN, "--config", str(folder / "tiny.yaml"), *as_flags(list(more))]
    streams = folder / environment.get("RANK", "0")
    streams.mkdir(exist_ok=True)
    return Running(command, streams, **environment)


def snapshots(folder: Path) -> list[Path]:
    """Those that are there."""
    return [*run_folder(tiny_config(folder)).glob("gen_*.pt")]


def assert_goes_on(folder: Path) -> None:
    """The training that was ended can be gone on with."""
    assert_whole(folder, at_rest=True)
    reached = max(int(path.stem[4:]) for path in snapshots(folder))
    config = tiny_config(folder, *LONG, f"train.n_steps={reached + 1}")
    assert train(config, resume="latest").step == reached + 1


def reader_killed(root: Path, number: int) -> int:
    """As the system does for want of memory."""
    with place(root, f"reader {number}") as folder:
        write_images(folder / "train")
        tiny_file(folder, *LONG)
        running = training(folder, "num_workers=1")
        wait_until(lambda: snapshots(folder) or not running.child.is_alive())
        pid = running.child.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        readers = [p for p in map(int, children) if b"resource_tracker" not in command_of(p)]
        os.kill(readers[-1], signal.SIGKILL)
        done = running.done()
        assert_named(done)
        assert "A process that reads images ended unexpectedly" in done.said, done.said
        assert_goes_on(folder)
    return 1


def command_of(pid: int) -> bytes:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def rank_killed(root: Path, number: int) -> int:
    """The other one ends with its name."""
    with place(root, f"rank {number}") as folder:
        write_images(folder / "train")
        tiny_file(folder, *LONG)
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [training(folder, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)]
        wait_until(lambda: snapshots(folder) or not ranks[0].child.is_alive())
        ranks[number % 2].kill()
        assert ranks[number % 2].done().status == -signal.SIGKILL
        done = ranks[1 - number % 2].done()
        assert_named(done)
        assert f"Rank {number % 2} of 2 " in done.said, done.said
        assert_goes_on(folder)
    return 1
