"""Trainings that are stopped, killed, resumed or refused."""

import dataclasses
import os
import random
import shutil
import signal
import time
from functools import partial

import pytest

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    load_tensors,
    save_atomic,
    steps_in,
)
from inpainter.settings import PicardConfig
from inpainter.snapshots import run_folder
from inpainter.training import train
from tests.tiny_runs import (
    BOTH_STAGES,
    assert_equal_states,
    corrupt,
    ended,
    forked,
    read_log,
    tiny_config,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_snapshot(a: PicardConfig, b: PicardConfig, step: int) -> None:
    for role in ("gen", "dis", "state"):
        first, second = (
            load_tensors(run_folder(config) / f"{role}_{step:08d}.pt") for config in (a, b)
        )
        first.pop("config", None)
        second.pop("config", None)
        assert_equal_states(first, second, role)


def expname(config: PicardConfig, name: str) -> PicardConfig:
    return dataclasses.replace(config, expname=name)


@pytest.mark.parametrize(
    "changes",
    [
        BOTH_STAGES,
        ("train.critic=false", "num_workers=2", "train.channels_last=true"),
        ("num_workers=2", "netG.dropout_type=1D", "train.mask_batch_same=false"),
        ("train.precision=fp16", "train.accumulate=2"),
    ],
    ids=["critic", "reconstruction-workers", "critic-workers-1D", "fp16-in-parts"],
)
def test_resumed_run_equals_uninterrupted_run(train_folder, changes) -> None:
    whole = tiny_config(train_folder, "train.n_steps=8", *changes)
    train(whole)
    halves = expname(whole, "halves")
    assert train(expname(tiny_config(train_folder, *changes), "halves")).step == 4
    assert train(halves, resume="latest").step == 8
    assert_same_snapshot(whole, halves, 8)
    timeless = [
        [
            {k: v for k, v in line.items() if "per_second" not in k}
            for line in read_log(run_folder(config))
        ]
        for config in (whole, halves)
    ]
    assert timeless[0] == timeless[1]


def killed_after(seconds: float, config: PicardConfig, *, further: bool = True) -> None:
    """Trains in a child process that is killed; first it may save a snapshot further."""
    before = steps_in(run_folder(config), "gen")
    child = forked(partial(train, config, resume="latest"))
    wait_until(
        lambda: not (further and child.is_alive()) or steps_in(run_folder(config), "gen") != before
    )
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL, "the child ended before it was killed"


def test_killed_at_any_moment_a_run_can_be_resumed_and_equals_the_uninterrupted_one(train_folder):
    options = ("train.snapshot_save_iter=1", "train.keep_snapshots=2", "train.select_crops=1")
    endless = tiny_config(train_folder, "train.n_steps=100000", *options)
    train(
        tiny_config(train_folder, "train.n_steps=1", "expname=warm")
    )  # imports, once for all children
    draw = random.Random(5)
    killed_after(0.02, endless, further=False)
    for _ in range(5):
        killed_after(draw.uniform(0, 0.2), endless)
    checkpoints = run_folder(endless)
    (checkpoints / "gen_00000999.pt.tmp").write_bytes(b"half")
    reached = max([0, *steps_in(checkpoints, "gen")])
    assert reached > 0
    last = f"train.n_steps={reached + 2}"
    resumed = tiny_config(train_folder, last, *options)
    assert train(resumed, resume="latest").step == reached + 2
    assert not list(checkpoints.glob("*.tmp"))
    whole = expname(tiny_config(train_folder, last), "whole")
    train(whole)
    assert_same_snapshot(resumed, whole, reached + 2)


def test_resume_before_the_first_snapshot_starts_at_step_0(train_folder, caplog) -> None:
    config = tiny_config(train_folder)
    checkpoints = run_folder(config)
    checkpoints.mkdir(parents=True)
    (checkpoints / "log.jsonl").write_text('{"step": 1, "train/d": 0.5}\n{"step": 2, "tr')
    (checkpoints / "state_00000004.pt").write_bytes(b"written before the kill")
    (checkpoints / "dis_00000004.pt.tmp").write_bytes(b"half")
    assert train(config, resume="latest").step == 4
    assert "holds no snapshot yet: starting at step 0" in caplog.text
    assert [line["step"] for line in read_log(run_folder(config))] == [1, 2, 3, 4, 4]


def test_resuming_an_earlier_step_sets_the_later_snapshots_aside(train_folder, caplog) -> None:
    config = tiny_config(train_folder, "train.snapshot_save_iter=2")
    train(config)
    save_atomic({}, checkpoint_path(run_folder(config), "calibration", 4))
    longer = tiny_config(train_folder, "train.snapshot_save_iter=2", "train.n_steps=5")
    assert train(longer, resume="2").step == 5
    checkpoints = run_folder(config)
    assert "Snapshots after step 2 went to" in caplog.text
    assert "train.n_steps: 4 when it was saved, 5 now" in caplog.text
    names = [f"{role}_00000004.pt" for role in ("calibration", "dis", "gen", "state")]
    assert sorted(path.name for path in (checkpoints / "superseded").iterdir()) == names
    assert steps_in(checkpoints, "gen") == [2, 4, 5]


def test_settings_can_name_a_folder_to_resume_from(train_folder) -> None:
    config = tiny_config(train_folder)
    train(config)
    further = tiny_config(
        train_folder, "expname=further", "train.n_steps=6", f"train.resume={run_folder(config)}"
    )
    assert train(further).step == 6
    assert steps_in(run_folder(further), "gen") == [6]
    missing = tiny_config(train_folder, "expname=other", f"train.resume={train_folder / 'no'}")
    with pytest.raises(CheckpointError, match=r"No checkpoint .* The folder does not exist"):
        train(missing)


def test_resuming_with_other_networks_is_refused_with_both_values(train_folder) -> None:
    config = tiny_config(train_folder)
    train(config)
    other = tiny_config(train_folder, "netG.ngf=6", "netD.ndf=3", "train.lr=0.5")
    with pytest.raises(CheckpointError) as refused:
        train(other, resume="latest")
    message = str(refused.value)
    assert "state_00000004.pt was made with other settings" in message
    assert "netG.ngf: 4 when it was saved, 6 now" in message
    assert "netD.ndf: 2 when it was saved, 3 now" in message
    assert "train.lr: 0.001 when it was saved, 0.5 now" in message
    assert "a new run (another expname) with train.resume: FOLDER" in message


def test_published_files_without_optimiser_state_are_not_mistaken_for_a_run(train_folder) -> None:
    config = tiny_config(train_folder)
    train(config)
    (run_folder(config) / "state_00000004.pt").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint \(state_<step>.pt \+ dis"):
        train(config, resume="latest")


def test_truncated_snapshot_is_named(train_folder) -> None:
    config = tiny_config(train_folder)
    train(config)
    broken = corrupt(run_folder(config) / "gen_00000004.pt")
    with pytest.raises(CheckpointError, match=rf"{broken} .* is truncated"):
        train(config, resume="latest")


def test_starting_anew_over_checkpoints_is_refused(train_folder) -> None:
    config = tiny_config(train_folder)
    train(config)
    with pytest.raises(CheckpointError, match=r"up to step 4\. Go on with --resume, or change exp"):
        train(config)


def test_finished_run_resumed_trains_nothing(train_folder, caplog) -> None:
    config = tiny_config(train_folder)
    train(config)
    before = shutil.copy(run_folder(config) / "gen_00000004.pt", train_folder / "copy.pt")
    assert train(config, resume="latest").step == 4
    assert "Step 4 of 4 is done: nothing to train" in caplog.text
    assert (run_folder(config) / "gen_00000004.pt").read_bytes() == before.read_bytes()
