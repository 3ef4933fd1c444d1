"""Checkpoints that survive kills, and errors that say what is there."""

import itertools
import os
import random
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    load_tensors,
    require_state_dict,
    save_atomic,
    save_text_atomic,
    steps_in,
)
from common.random_numbers import random_state, restore_random_state
from tests.tiny_runs import ended, forked, wait_until


def save_steps(folder: Path, *steps: int, role: str = "gen") -> None:
    for step in steps:
        save_atomic({"step": step}, checkpoint_path(folder, role, step))


def test_what_was_saved_is_loaded_on_the_cpu(tmp_path):
    path = checkpoint_path(tmp_path / "new folder", "gen", 5000)
    save_atomic({"w": torch.arange(3.0), "step": 5000, "names": ["a"]}, path)
    loaded = load_tensors(path)
    assert path.name == "gen_00005000.pt"
    assert torch.equal(loaded["w"], torch.arange(3.0))
    assert (loaded["step"], loaded["names"]) == (5000, ["a"])


class Unsavable:
    def __reduce__(self):
        raise RuntimeError("disk full, say")


def test_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(RuntimeError, match="disk full"):
        save_atomic([torch.zeros(9), Unsavable()], checkpoint_path(tmp_path, "gen", 1))
    assert load_tensors(checkpoint_path(tmp_path, "gen", 1)) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["gen_00000001.pt"]


def test_leftover_of_a_killed_save_is_no_step_and_the_next_save_removes_it(tmp_path):
    (tmp_path / "gen_00000007.pt.tmp").write_bytes(b"half a file")
    save_steps(tmp_path, 3)
    assert steps_in(tmp_path, "gen") == [3]
    save_steps(tmp_path, 7)
    assert {path.name for path in tmp_path.iterdir()} == {"gen_00000003.pt", "gen_00000007.pt"}


def save_endlessly(folder: Path) -> None:
    for step in itertools.count(1):
        for role in ("gen", "state"):
            weights = {"step": step, "w": torch.full((200_000,), float(step))}
            save_atomic(weights, checkpoint_path(folder, role, step % 5))


def test_kill_in_the_middle_of_saving_leaves_only_whole_files(tmp_path):
    child = forked(partial(save_endlessly, tmp_path))
    wait_until(lambda: len(steps_in(tmp_path, "state")) == 5)
    os.kill(child.pid, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    steps = steps_in(tmp_path, "gen")
    assert steps == [0, 1, 2, 3, 4]
    for step in steps:
        loaded = load_tensors(checkpoint_path(tmp_path, "gen", step))
        assert bool((loaded["w"] == loaded["step"]).all())


def test_text_is_replaced_as_a_whole(tmp_path):
    save_text_atomic("grün\n", tmp_path / "config.yaml")
    save_text_atomic("b\n", tmp_path / "config.yaml")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.yaml", "b\n")]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_truncated_checkpoint_is_refused_with_the_steps_there(tmp_path, share):
    save_steps(tmp_path, 1, 2, 3)
    path = checkpoint_path(tmp_path, "gen", 2)
    save_atomic({"w": torch.rand(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        CheckpointError,
        match=r"gen_00000002.pt \(\d+ bytes\) is truncated.*Other steps there: 1, 3",
    ):
        load_tensors(path)


def test_missing_checkpoint_is_refused_with_the_steps_there(tmp_path):
    save_steps(tmp_path, 1000, 2000)
    with pytest.raises(CheckpointError, match=r"No gen_00005000.pt in .* there: 1000, 2000\."):
        load_tensors(checkpoint_path(tmp_path, "gen", 5000))
    with pytest.raises(CheckpointError, match="The folder does not exist"):
        load_tensors(tmp_path / "no" / "gen_00005000.pt")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "no/gen_00000020.pt",
            r"does not exist\. Correct the path, or train first \(inpainter/tra",
        ),
        ("no/model-1.pt", r"does not exist\. Correct the path, or train first \(diffusion_models/"),
        ("no/last.model", r"does not exist\. Correct the path, or train first \(train_dia\.py\)"),
        (
            "last.model",
            r"No last\.model in .*\. Correct the path, or train first \(train_dia\.py\)",
        ),
        ("no", r"No no in .*\. Correct the path, or train first \(.* made by train_dia\.py or"),
        ("no/features.pth", r"does not exist\. Correct the path, or put the file there\."),
    ],
)
def test_missing_checkpoint_is_answered_with_how_it_is_made(tmp_path, name, remedy):
    with pytest.raises(CheckpointError, match=remedy):
        load_tensors(tmp_path / name)


def test_checkpoint_that_could_run_code_is_refused(tmp_path):
    torch.save({"path": Path("x")}, tmp_path / "gen_00000001.pt")
    with pytest.raises(CheckpointError, match=r"holds a Python object \(pathlib\.\w+\)"):
        load_tensors(tmp_path / "gen_00000001.pt")


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "weights.pt").write_text("a page of text\n")
    with pytest.raises(CheckpointError, match=r"weights.pt .* is truncated or no checkpoint"):
        load_tensors(tmp_path / "weights.pt")


def test_names_of_other_files_are_no_steps(tmp_path):
    for name in (
        "gen_1.pt",
        "gen_00000001.pth",
        "gen_00000001.pt.tmp",
        "optimizer.pt",
        "log.jsonl",
    ):
        (tmp_path / name).touch()
    assert steps_in(tmp_path, "gen") == []
    assert steps_in(tmp_path / "no", "gen") == []


def test_prefix_of_data_parallel_is_stripped_from_names_that_have_it():
    weight = torch.zeros(1)
    stripped = require_state_dict({"module.a.module.b": weight, "c": weight}, "gen.pt")
    assert set(stripped) == {"a.module.b", "c"}


def test_random_state_survives_a_file(tmp_path):
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.randn(), torch.rand(1).item()  # noqa: NPY002

    draw()
    save_atomic(random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    restore_random_state(load_tensors(tmp_path / "state.pt"), "state.pt")
    assert draw() == expected
