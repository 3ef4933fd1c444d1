"""Checkpoints that survive kills, and errors that say what is there."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    load_tensors,
    resolve_step,
    save_atomic,
    save_text_atomic,
    selection_errors,
    steps_in,
    strip_module_prefix,
)
from common.config import REPOSITORY
from common.random_state import random_state, restore_random_state
from tests.tiny_runs import wait_until


def save_steps(folder: Path, *steps: int, role: str = "gen") -> None:
    for step in steps:
        save_atomic({"step": step}, checkpoint_path(folder, role, step))


def write_log(folder: Path, *records: dict) -> None:
    folder.joinpath("log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


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
    assert steps_in(tmp_path) == [3]
    save_steps(tmp_path, 7)
    assert {path.name for path in tmp_path.iterdir()} == {"gen_00000003.pt", "gen_00000007.pt"}


ENDLESS_SAVES = """
import itertools, sys, torch
from pathlib import Path
from common.checkpoint import checkpoint_path, save_atomic
for step in itertools.count(1):
    for role in ("gen", "state"):
        save_atomic({"step": step, "w": torch.full((200_000,), float(step))},
                    checkpoint_path(Path(sys.argv[1]), role, step % 5))
"""


def test_kill_in_the_middle_of_saving_leaves_only_whole_files(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_SAVES, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    wait_until(lambda: len(steps_in(tmp_path, "state")) == 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
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


def test_checkpoint_that_could_run_code_is_refused(tmp_path):
    torch.save({"path": Path("x")}, tmp_path / "gen_00000001.pt")
    with pytest.raises(CheckpointError, match=r"holds a Python object \(pathlib\.\w+\)"):
        load_tensors(tmp_path / "gen_00000001.pt")


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "weights.pt").write_text("a page of text\n")
    with pytest.raises(CheckpointError, match=r"weights.pt .* is truncated or no checkpoint"):
        load_tensors(tmp_path / "weights.pt")


def test_latest_is_the_newest_step_with_the_files_of_all_roles(tmp_path):
    save_steps(tmp_path, 10, 20, 30)
    save_steps(tmp_path, 10, 20, role="state")
    assert resolve_step(tmp_path, "latest") == 30
    assert resolve_step(tmp_path, "latest", ("gen", "state")) == 20


def test_best_is_the_lowest_selection_error_of_a_step_still_there(tmp_path):
    save_steps(tmp_path, 10, 20, 30, 40)
    write_log(
        tmp_path,
        {"step": 5, "select_l1": 0.01},  # its files are gone
        {"step": 10, "select_l1": 0.05},  # of a run that was stopped; the resumed one wrote again
        {"step": 10, "select_l1": 0.5},
        {"step": 15, "train/l1": 0.001},
        {"step": 20, "select_l1": 0.2},
        {"step": 30, "select_l1": 0.2},
        {"step": 40, "select_l1": None},
    )
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 30, "select_l')  # killed while writing
    assert resolve_step(tmp_path, "best") == 20
    assert selection_errors(tmp_path) == {5: 0.01, 10: 0.5, 20: 0.2, 30: 0.2}


def test_best_without_recorded_errors_is_refused(tmp_path):
    save_steps(tmp_path, 10, 20)
    write_log(tmp_path, {"step": 30, "select_l1": 0.1})
    with pytest.raises(CheckpointError, match=r"no selection error.*Steps there: 10, 20"):
        resolve_step(tmp_path, "best")


@pytest.mark.parametrize("wanted", [20, "20", "00000020"])
def test_step_can_be_given_as_number_or_digits(tmp_path, wanted):
    save_steps(tmp_path, 10, 20)
    assert resolve_step(tmp_path, wanted) == 20


def test_wanted_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    save_steps(tmp_path, 1000, 2000)
    message = (
        r"No gen_00005000.pt in .*\. Steps there: 1000, 2000\. Pass one with --checkpoint_iter"
    )
    with pytest.raises(CheckpointError, match=message):
        resolve_step(tmp_path, 5000, option="--checkpoint_iter")


def test_step_without_its_state_is_refused_by_the_missing_files_name(tmp_path):
    save_steps(tmp_path, 10, 20)
    save_steps(tmp_path, 10, role="state")
    with pytest.raises(CheckpointError, match=r"No state_00000020.pt in .*Steps there: 10\."):
        resolve_step(tmp_path, 20, ("gen", "state"))


def test_word_that_means_no_step_is_refused(tmp_path):
    save_steps(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"'newest' is no step. Expected a number, latest or"):
        resolve_step(tmp_path, "newest")


def test_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"No checkpoint \(gen_<step>.pt\) in"):
        resolve_step(tmp_path, "latest")
    with pytest.raises(CheckpointError, match="The folder does not exist"):
        resolve_step(tmp_path / "no", "latest")


def test_long_list_of_steps_is_shortened(tmp_path):
    save_steps(tmp_path, *range(1, 31))
    with pytest.raises(CheckpointError, match=r"1, 2, 3, 4, \.\.\. 27, 28, 29, 30\."):
        resolve_step(tmp_path, 99)


def test_names_of_other_files_are_no_steps(tmp_path):
    for name in (
        "gen_1.pt",
        "gen_00000001.pth",
        "gen_00000001.pt.tmp",
        "optimizer.pt",
        "log.jsonl",
    ):
        (tmp_path / name).touch()
    assert steps_in(tmp_path) == []
    assert steps_in(tmp_path / "no") == []


def test_prefix_of_data_parallel_is_stripped_from_names_that_have_it():
    stripped = strip_module_prefix({"module.a.module.b": 1, "c": 2})
    assert stripped == {"a.module.b": 1, "c": 2}


def test_random_state_survives_a_file(tmp_path):
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.randn(), torch.rand(1).item()  # noqa: NPY002

    draw()
    save_atomic(random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    restore_random_state(load_tensors(tmp_path / "state.pt"), "state.pt")
    assert draw() == expected
