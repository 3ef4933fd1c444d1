"""Which snapshot of a training is meant by a number, `latest` or `best`."""

import json
from pathlib import Path

import pytest

from common.checkpoint import CheckpointError, checkpoint_path, save_atomic
from inpainter.snapshots import resolve_step, selection_errors


def save_steps(folder: Path, *steps: int, role: str = "gen") -> None:
    for step in steps:
        save_atomic({"step": step}, checkpoint_path(folder, role, step))


def write_log(folder: Path, *records: dict) -> None:
    folder.joinpath("log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


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
