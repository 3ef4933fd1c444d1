"""What others do to the files of a program at work: delete them, replace them, put a pipe there."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.disks import assert_named
from tests.faults.programs import PROGRAMS, Running, assert_whole, place, run, started, undisturbed
from tests.tiny_runs import assert_equal_states, wait_until

A_DAY = 24 * 3600


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replaced_by_text(path: Path) -> None:
    path.write_text("other")


def deleted(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


REPLACEMENTS = (deleted, replaced_by_text, replaced_by_pipe, replaced_by_folder, replaced_by_device)
BEGUN = {
    "inpainter/train.py": "checkpoints/**/gen_*.pt",
    "predict_heatmap.py": "out/data/*.pt",
    "diffusion_models/train_eval_ddpm.py": "run/model-*.pt",
    "train_dia.py": "run/state.pt",
}
"""What is there when the program is at work."""
READ = {
    "inpainter/train.py": ("train/1.png", "tiny.yaml"),
    "predict_heatmap.py": ("test/3.png", "model/gen_00000001.pt", "tiny.yaml"),
    "diffusion_models/train_eval_ddpm.py": ("data/train/normal/1.png", "tiny.yaml"),
    "train_dia.py": ("data/train/normal/1.png", "tiny.yaml"),
}
WRITTEN = {
    "inpainter/train.py": (
        *("checkpoints/*/*/log.jsonl", "checkpoints/*/*/config.yaml", "logs/**/events*"),
        *("checkpoints/*/*/gen_*.pt", "logs/*", "checkpoints/*/*"),
    ),
    "predict_heatmap.py": (
        *("out/scores.csv", "out/heatmaps.csv", "out/images.csv", "out/compute_times.csv"),
        *("out/run.txt", "out/plots/0*.png", "out/plots", "out/data/0*.pt"),
    ),
    "diffusion_models/train_eval_ddpm.py": (
        *("run/log.jsonl", "run/events/events*", "run/events", "run/model-*.pt"),
    ),
    "train_dia.py": (
        *("run/log.jsonl", "run/events/events*", "run/state.pt", "run/last.model", "run"),
    ),
}


def stopped_at_work(name: str, folder: Path) -> Running:
    """The program, standing still after its first result."""
    program = PROGRAMS[name]
    running = started(program, folder)
    wait_until(lambda: [*folder.glob(BEGUN[name])] or not running.child.is_alive())
    os.kill(running.child.pid, signal.SIGSTOP)
    return running


def change(name: str, root: Path, number: int, pattern: str, how: Callable[[Path], object]) -> None:
    """The change is made while the program stands still; it ends by itself, and damages nothing."""
    with place(root, f"changed {number}") as folder:
        PROGRAMS[name].prepare(folder)
        running = stopped_at_work(name, folder)
        try:
            for path in [*folder.glob(pattern)]:
                if how is deleted or path.is_file():
                    how(path)
        finally:
            os.kill(running.child.pid, signal.SIGCONT)
        assert_named(running.done())
        if how is deleted:
            assert_whole(folder, at_rest=True)


def input_changed(name: str, root: Path, number: int) -> int:
    """One of the files that it reads."""
    patterns = READ[name]
    how = REPLACEMENTS[number % len(REPLACEMENTS)]
    change(name, root, number, patterns[number % len(patterns)], how)
    return 1


def output_changed(name: str, root: Path, number: int) -> int:
    """One of those that it writes."""
    patterns = WRITTEN[name]
    how = REPLACEMENTS[number % len(REPLACEMENTS)]
    change(name, root, number, patterns[number % len(patterns)], how)
    return 1


def clock_set_back(name: str, root: Path, number: int) -> int:
    """All files of a killed program are of tomorrow when it is started again."""
    program, whole = PROGRAMS[name], undisturbed(name, root)
    with place(root, f"tomorrow {number}") as folder:
        program.prepare(folder)
        inputs = {path for path in folder.rglob("*")}
        running = stopped_at_work(name, folder)
        running.kill()
        running.done()
        tomorrow = time.time() + A_DAY
        for path in {path for path in folder.rglob("*")} - inputs:
            os.utime(path, (tomorrow, tomorrow))
        done = run(program, folder)
        assert done.status == 0, done.said
        assert_whole(folder, at_rest=True)
        assert_equal_states(dict(program.results(folder)), dict(whole))
    return 1
