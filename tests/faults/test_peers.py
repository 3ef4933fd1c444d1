"""Processes that train together: where one dies, stands still, fails or never comes, all end."""

import itertools
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from common import peers
from common.cli import run_script
from common.errors import UserError
from common.processes import joined_processes
from tests.tiny_runs import ended, forked, forked_pair, free_port

KILLED = "has ended without a word: it was killed"
REMEDY = "start all of them again, going on from the last checkpoint"


def program(folder: Path, fate: str, unlucky: int, peer_timeout: float = 60.0) -> None:
    """A program of steps; in the fourth, something happens to one process.

    Its messages go to a file of the rank's number.
    """
    rank = int(os.environ["RANK"])
    os.dup2(os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    sys.argv = ["train.py"]
    peers.SILENCE_SECONDS, peers.GRACE_SECONDS = 3.0, 2.0

    def main() -> int:
        with joined_processes(torch.device("cpu"), peer_timeout):
            for step in itertools.count():
                torch.distributed.all_reduce(torch.ones(3))
                if step == 3:
                    happen(fate, is_here=rank == unlucky)

    run_script(main)


def happen(fate: str, *, is_here: bool) -> None:
    """What the fate of a process is, and what the other one does meanwhile."""
    if fate == "both err" or (fate == "errs" and is_here):
        raise UserError("scan.png is broken.")
    if is_here:
        os.kill(os.getpid(), signal.SIGSTOP if fate == "stands still" else signal.SIGKILL)
    if fate == "killed while the other computes":
        time.sleep(600)


def said(folder: Path, rank: int) -> list[str]:
    return (folder / str(rank)).read_text().splitlines()


@pytest.mark.parametrize(
    ("fate", "unlucky", "what"),
    [
        ("killed", 0, KILLED),
        ("killed", 1, KILLED),
        ("killed while the other computes", 1, KILLED),
        ("stands still", 1, "has not been heard of for 3 s: it was stopped"),
    ],
)
def test_where_one_process_is_gone_the_other_ends_with_its_name(tmp_path, fate, unlucky, what):
    children = forked_pair(partial(program, tmp_path, fate, unlucky))
    assert ended(children[1 - unlucky]) == 1
    (line,) = said(tmp_path, 1 - unlucky)
    pid = children[unlucky].pid
    assert line.startswith(f"train.py: Rank {unlucky} of 2 (process {pid} on ")
    assert what in line
    assert line.endswith(f"{REMEDY}.")
    children[unlucky].kill()


@pytest.mark.parametrize("unlucky", [0, 1])
def test_error_of_one_process_is_said_once_and_ends_all(tmp_path, unlucky: int) -> None:
    children = forked_pair(partial(program, tmp_path, "errs", unlucky))
    assert [ended(child) for child in children] == [1, 1]
    assert said(tmp_path, unlucky) == ["train.py: scan.png is broken."]
    (line,) = said(tmp_path, 1 - unlucky)
    assert f"Rank {unlucky} of 2 " in line
    assert "has met an error, which it says itself" in line


def test_error_that_both_meet_is_said_once(tmp_path) -> None:
    children = forked_pair(partial(program, tmp_path, "both err", 0))
    assert [ended(child) for child in children] == [1, 1]
    lines = [line for rank in range(2) for line in said(tmp_path, rank)]
    assert lines.count("train.py: scan.png is broken.") == 1
    assert len(lines) == 2


@pytest.mark.parametrize("missing", [0, 1])
def test_process_that_never_comes_is_named(tmp_path, missing: int) -> None:
    port = str(free_port())
    there = str(1 - missing)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = partial(program, tmp_path, "", 0, peer_timeout=1.0)
    assert ended(forked(start, RANK=there, LOCAL_RANK=there, **place)) == 1
    (line,) = said(tmp_path, 1 - missing)
    assert f"Rank {missing} of 2 has not come within 1 s (peer_timeout). Start all 2 " in line


def under_torchrun(folder: Path, fate: str) -> None:
    """What torchrun does, which keeps the store; its processes are forked and not started anew."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0, "timeout": 60},
        start_method="fork",
    )
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    with pytest.raises(ChildFailedError):
        elastic_launch(config, program)(folder, fate, 1)


def test_torchrun_finds_the_line_of_the_process_that_is_left(tmp_path) -> None:
    assert ended(forked(partial(under_torchrun, tmp_path, "killed"))) == 0
    (line,) = said(tmp_path, 0)
    assert line.startswith("train.py: Rank 1 of 2 (process ")
    assert KILLED in line
