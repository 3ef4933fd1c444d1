"""Several processes that score the images of one folder: the same files, each image once."""

import argparse
import json
import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from common.checkpoint import CheckpointError
from common.claims import claim, holder_of
from common.config import ConfigError, load_config
from common.errors import ExitStatus, UserError
from common.processes import Processes
from inpainter import calibrate as calibrating
from inpainter import folder_run
from inpainter.calibrate import calibrate, calibrate_once
from inpainter.settings import PicardConfig
from inpainter.sharing import SharedFolder, in_turn, shard
from tests.tiny_runs import (
    PREDICT,
    corrupt,
    ended,
    forked,
    predicted,
    run_script,
    tiny_config,
    tiny_file,
    wait_until,
    with_test,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
RECORD = ("config.yaml", "command.txt", "env.json")
ALL_SCORED = ["0.png", "1.png", "2.png", "3.png", "5.png"]


@pytest.fixture
def shared(folder: Path) -> Path:
    """Five images, and a sixth that cannot be read."""
    tiny_file(folder)
    write_images(folder / "test", n=6)
    corrupt(folder / "test" / "4.png")
    return folder


def work(folder: Path, name: str, processes: Processes, stop_at: str = "", **options) -> None:
    """Predicts and notes in `name`.json what this process scored; hangs at the image stop_at."""
    score = folder_run.FolderRun.score

    def score_or_hang(run: folder_run.FolderRun, image: str, *rest: object) -> object:
        if image == stop_at:
            time.sleep(600)
        return score(run, image, *rest)

    folder_run.FolderRun.score = score_or_hang
    config = load_config(PicardConfig, folder / "tiny.yaml")
    result = predicted(folder, config, processes=processes, **options)
    finished = sorted([*result.finished, *result.already_there])  # by others before this one came
    told = {"here": result.here, "finished": finished, "bad": [*result.bad]}
    told |= {"helped": sum(result.helped.values()), "folder": str(result.folder)}
    (folder / f"{name}.json").write_text(json.dumps(told))


def run_together(folder: Path, count: int, output: Path) -> list[dict]:
    """What each of `count` processes tells."""
    jobs = [
        partial(work, folder, f"{output.name}{n}", Processes(n, count), output_dir=output)
        for n in range(count)
    ]
    assert [ended(child) for child in [forked(job) for job in jobs]] == [0] * count
    return [json.loads((folder / f"{output.name}{n}.json").read_text()) for n in range(count)]


def contents(output: Path) -> dict[str, bytes]:
    """The files of an output folder, without the record of how it was made."""
    files = [path for path in output.rglob("*") if path.is_file() and path.name not in RECORD]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def test_one_two_and_three_processes_write_the_same_files(shared) -> None:
    alone, *others = ([*run_together(shared, n, shared / f"by{n}")] for n in (1, 2, 3))
    assert alone[0]["here"] == ALL_SCORED
    expected = contents(shared / "by1")
    assert {"images.csv", "scores.csv", "heatmaps.csv", "failures.csv"} < set(expected)
    for told in others:
        assert contents(shared / f"by{len(told)}") == expected
        assert all(each["finished"] == ALL_SCORED for each in told)
        assert all(each["bad"] == ["4.png"] for each in told)
        assert sorted(image for each in told for image in each["here"]) == ALL_SCORED


@pytest.fixture
def forty(folder: Path) -> Path:
    """Forty images, 10.png to 49.png."""
    tiny_file(folder, "test.heatmap_metrics=[MCD_image]")
    for path in write_images(folder / "test", n=50).glob("?.png"):
        path.unlink()
    return folder


FORTY = [f"{number}.png" for number in range(10, 50)]


def test_two_runs_of_the_same_command_score_every_image_once_in_one_folder(forty) -> None:
    children = [forked(partial(work, forty, f"run{n}", Processes())) for n in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    told = [json.loads((forty / f"run{n}.json").read_text()) for n in range(2)]
    assert told[0]["folder"] == told[1]["folder"]
    assert sorted(told[0]["here"] + told[1]["here"]) == FORTY


@pytest.mark.parametrize("n_killed", [1, 2])
def test_half_of_forty_images_are_scored_after_a_kill(forty, n_killed: int) -> None:
    """By the process that lives, or by the next run."""
    output = forty / "out"
    jobs = [partial(work, forty, f"run{n}", Processes(), output_dir=output) for n in range(2)]
    children = [forked(job) for job in jobs]
    wait_until(lambda: len([*(output / "data").glob("*.pt")]) >= 20)
    killed = random.sample(range(2), n_killed)
    for number in killed:
        os.kill(children[number].pid, signal.SIGKILL)
    assert [ended(child) != 0 for child in children] == [number in killed for number in range(2)]
    if n_killed == 2:
        work(forty, "next", Processes(), output_dir=output)
    (told,) = (json.loads(path.read_text()) for path in forty.glob("*.json"))
    assert told["finished"] == FORTY
    assert not (output / "sharing").exists()
    run_together(forty, 1, forty / "whole")
    assert contents(output) == contents(forty / "whole")


def claimed(output: Path) -> list[Path]:
    """The claims of images that are being scored."""
    paths = (output / "sharing").glob("*.claim")
    return [path for path in paths if re.fullmatch("[0-9a-f]{32}", path.stem)]


@pytest.mark.parametrize("finisher", ["the other one", "the next run"])
def test_image_of_a_killed_process_is_scored_by(shared, finisher: str) -> None:
    output = shared / "mine"
    first = partial(work, shared, "killed", Processes(), stop_at="2.png", output_dir=output)
    child = forked(first)
    wait_until(lambda: claimed(output) and len([*(output / "data").glob("*.pt")]) == 4)
    other = None
    if finisher == "the other one":
        other = forked(partial(work, shared, "other", Processes(), output_dir=output))
        wait_until(lambda: len([*(output / "data").glob("*.pt")]) == 8)
    os.kill(child.pid, signal.SIGKILL)
    ended(child)
    if other is None:
        work(shared, "other", Processes(), output_dir=output)
    else:
        assert ended(other) == 0
    told = json.loads((shared / "other.json").read_text())
    assert "2.png" in told["here"]
    run_together(shared, 1, shared / "whole")
    assert contents(output) == contents(shared / "whole")


LARGE = (  # two scales, each in two passes of several blocks, windows described and localised
    *("test.patch_stride=6", "test.parallel_batchsize=1", "test.refine=2", "test.scales=[1, 0.8]"),
    *("test.heatmap_alignment=centred", "test.calibration=knn", "test.calibration_windows=24"),
    *("test.heatmap_type=averaged_hole", "test.heatmap_localise=0.5", "test.heatmap_smooth=0.1"),
)


@pytest.fixture
def large(folder: Path) -> Path:
    """One image of many windows."""
    tiny_file(folder, *LARGE)
    write_images(folder / "train", n=4, size=(64, 64))
    calibrate(tiny_config(folder, *LARGE), folder / "model", 1)
    for number in (1, 2):
        (folder / "test" / f"{number}.png").unlink()
    return folder


def test_windows_of_one_image_are_shared_out_and_give_the_same_files(large) -> None:
    run_together(large, 1, large / "by1")
    told = run_together(large, 3, large / "by3")
    assert contents(large / "by3") == contents(large / "by1")
    assert sorted(image for each in told for image in each["here"]) == ["0.png"]
    assert sum(each["helped"] for each in told) > 0


def test_windows_are_scored_by_who_is_left_when_the_image_s_own_process_is_killed(large) -> None:
    output = large / "mine"
    children = [
        forked(partial(work, large, f"{n}", Processes(n, 2), output_dir=output)) for n in range(2)
    ]
    wait_until(lambda: len([*(output / "sharing").glob("*.pt")]) > 1)
    os.kill(holder_of(claimed(output)[0]).pid, signal.SIGKILL)
    assert sorted(ended(child) == 0 for child in children) == [False, True]
    run_together(large, 1, large / "whole")
    assert contents(output) == contents(large / "whole")


def test_folder_in_use_takes_neither_other_settings_nor_overwriting(folder) -> None:
    config, output = tiny_config(folder), folder / "mine"
    predicted(folder, config, output_dir=output)
    with SharedFolder(output, Processes()) as shared:
        with shared.tables():
            shared.begin()
        with pytest.raises(CheckpointError, match=r"mine is in use: process .*--overwrite would"):
            predicted(folder, config, output_dir=output, overwrite=True)
        for table in ("scores.csv", "images.csv", "heatmaps.csv"):  # nothing is scored yet
            (output / table).unlink()
        other = with_test(config, patch_stride=8)
        with pytest.raises(CheckpointError, match=r"in use.*test\.patch_stride 16 there, 8 now"):
            predicted(folder, other, output_dir=output)
        assert "patch_stride: 16" in (output / "run.txt").read_text()
    assert not (output / "sharing").exists()
    with pytest.raises(ConfigError, match="--overwrite is for one process"):
        predicted(folder, config, processes=Processes(0, 2), overwrite=True)


def test_a_process_begins_with_its_own_part_and_ends_at_the_ends_of_others() -> None:
    images = [*"abcdefg"]
    assert in_turn(images, Processes(0, 1)) == images
    assert "".join(in_turn(images, Processes(0, 3))) == "abdcgfe"
    assert "".join(in_turn(images, Processes(2, 3))) == "efgbadc"


def test_part_is_counted_from_0() -> None:
    assert shard("0/2") == Processes(0, 2)
    for text in ("2/2", "1", "-1/2", "0/0", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="i counted from 0"):
            shard(text)


def test_first_process_tells_of_all_and_the_others_of_their_own(shared) -> None:
    """As torchrun starts them, by its environment; here one after the other."""
    flags = ["--config", tiny_file(shared), "--checkpoint_dir", shared / "model"]
    second = run_script(PREDICT, *flags, RANK="1", WORLD_SIZE="2")
    assert (second.returncode, "5 of 5 images scored here" in second.stdout) == (0, True)
    first = run_script(PREDICT, *flags, "--shard", "0/2")
    assert first.returncode == ExitStatus.SOME_FAILED, first.stderr
    assert "0 images scored, 5 were finished before, 1 left out" in first.stdout
    both = run_script(PREDICT, *flags, "--shard", "0/2", RANK="1", WORLD_SIZE="2")
    assert both.returncode == 2
    assert "torchrun shares the images out by itself: leave --shard away." in both.stderr
    idle = run_script("eval.py", "--heatmap_dir", shared, "--annotations", shared,
                      RANK="1", WORLD_SIZE="2")  # fmt: skip
    assert (idle.returncode, "works in process 0 alone" in idle.stdout) == (0, True)


def test_one_process_calibrates_for_all(folder, monkeypatch) -> None:
    config = tiny_config(
        folder, "test.calibration=knn", "test.calibration_windows=24", "test.patch_stride=4"
    )
    write_images(folder / "train", n=6, size=(64, 64))
    path = calibrate_once(config, folder / "model", 1)
    before = path.stat().st_mtime_ns
    assert calibrate_once(config, folder / "model", 1) == path
    assert path.stat().st_mtime_ns == before
    calibrate_once(with_test(config, calibration_windows=23), folder / "model", 1)
    assert path.stat().st_mtime_ns != before
    assert not [*path.parent.glob("*.claim")]
    monkeypatch.setattr(calibrating, "WAIT_SECONDS", 0)
    with claim(path.with_name(f"{path.name}.claim")) as held:
        assert holder_of(held.path) == held.holder
        with pytest.raises(UserError, match="was held for 0 minutes by others, now by process"):
            calibrate_once(config, folder / "model", 1)
