"""What a run leaves behind, and what a resumed run does with it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import run_log
from common.config import REPOSITORY
from common.run_log import RunLog, describe_environment, drop_later_lines, write_run_record


def start(folder: Path, *, resume_step: int = 0, command: Sequence[str] = ("train.py",)) -> RunLog:
    run = folder / "run"
    write_run_record(run, config_yaml="seed: 1\n", command=command, resume_step=resume_step)
    return RunLog(run, folder / "events", resume_step)


def lines(folder: Path) -> list[dict]:
    text = (folder / "run" / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_run_folder_holds_settings_command_and_environment(tmp_path):
    start(tmp_path, command=("train.py", "--config", "my file.yaml")).close()
    run = tmp_path / "run"
    assert (run / "config.yaml").read_text() == "seed: 1\n"
    assert (run / "command.txt").read_text() == "train.py --config 'my file.yaml'\n"
    environment = json.loads((run / "env.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["resume_step"] == 0
    assert {"started", "python", "torchvision", "numpy", "platform"} <= set(environment)
    assert {"gpus", "git_commit", "git_dirty"} <= set(environment)


def test_numbers_go_to_log_and_tensorboard(tmp_path):
    log = start(tmp_path)
    log.scalars(100, {"train/l1": torch.tensor(0.25), "train/lr": 1e-4})
    log.scalars(200, {"train/l1": 0.125})
    log.close()
    assert lines(tmp_path) == [
        {"step": 100, "train/l1": 0.25, "train/lr": 1e-4},
        {"step": 200, "train/l1": 0.125},
    ]
    assert curve(tmp_path, "train/l1") == [(100, 0.25), (200, 0.125)]


def test_line_is_on_disk_as_soon_as_it_is_recorded(tmp_path):
    log = start(tmp_path)
    log.scalars(1, {"a": 2.0})
    assert lines(tmp_path) == [{"step": 1, "a": 2.0}]
    log.close()


def test_not_a_number_is_null_since_json_knows_none(tmp_path):
    log = start(tmp_path)
    log.scalars(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]


def test_picture_reaches_tensorboard(tmp_path):
    log = start(tmp_path)
    log.image(7, "train/completions", torch.rand(3, 8, 12))
    log.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    (image,) = events.Images("train/completions")
    assert (image.step, image.height, image.width) == (7, 8, 12)


def test_resumed_run_drops_what_it_will_do_again(tmp_path):
    log = start(tmp_path)
    for step in (1, 2, 3, 4):
        log.scalars(step, {"a": float(step)})
    log.close()
    log = start(tmp_path, resume_step=2, command=("train.py", "--resume"))
    log.scalars(3, {"a": 30.0})
    log.close()
    assert [(line["step"], line["a"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    assert curve(tmp_path, "a") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert (tmp_path / "run" / "command.txt").read_text() == "train.py\ntrain.py --resume\n"
    assert json.loads((tmp_path / "run" / "env.json").read_text())["resume_step"] == 2


def test_new_run_in_an_old_folder_starts_with_empty_records(tmp_path):
    log = start(tmp_path)
    log.scalars(5, {"a": 1.0})
    log.close()
    log = start(tmp_path)
    log.scalars(1, {"a": 2.0})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "a": 2.0}]
    assert curve(tmp_path, "a") == [(1, 2.0)]
    assert (tmp_path / "run" / "command.txt").read_text() == "train.py\n"


def test_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "a": 1}\nno json\n{"a": 1}\n[]\n{"step": 2, "a"')
    drop_later_lines(path, 9)
    assert path.read_text() == '{"step": 1, "a": 1}\n'
    drop_later_lines(tmp_path / "none.jsonl", 9)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_record_of_a_run_can_be_written_without_a_log(tmp_path):
    write_run_record(tmp_path / "out", config_yaml="a: 1\n", command=["eval.py", "--mode", "x y"])
    assert (tmp_path / "out" / "command.txt").read_text() == "eval.py --mode 'x y'\n"
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_commit_and_changes_of_the_repository_are_recorded(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(run_log, "REPOSITORY", tmp_path)
    assert describe_environment()["git_commit"] is None  # no clone
    git("init", "--quiet")
    assert describe_environment()["git_commit"] is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "--message", "first")
    clean = describe_environment()
    assert (clean["git_commit"], clean["git_dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "a").write_text("2")
    assert describe_environment()["git_dirty"] is True


def test_environment_is_described_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = describe_environment()
    assert environment["git_commit"] is None
    assert environment["git_dirty"] is None


IMPORTS = """
import sys, common.checkpoint, common.images, common.run_log
rarely_needed = ("tensorboard", "pydicom", "tifffile", "matplotlib")
sys.stdout.write(str([name for name in rarely_needed if name in sys.modules]))
"""


def test_importing_does_not_load_what_few_runs_need():
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout == "[]"
