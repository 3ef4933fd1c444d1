"""The command `python train.py`, as a user types it."""

import json
import os
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.checkpoint import load_tensors, steps_in
from common.config import REPOSITORY
from common.images import write_image
from inpainter.snapshots import run_folder
from inpainter.training import train
from tests.tiny_runs import (
    BOTH_STAGES,
    RGB,
    TRAIN,
    as_flags,
    assert_equal_states,
    corrupt,
    ended,
    forked_script,
    run_script,
    settings,
    texture,
    tiny_config,
    tiny_file,
    wait_for_text,
    wait_until,
    write_every_format,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_trains_on_a_flat_folder_of_every_format_from_the_root(tmp_path) -> None:
    data = tmp_path / "train"
    data.mkdir()
    names = write_every_format(data)
    assert len(names) == 7
    write_image(data / "broken.png", texture(40, 40))
    corrupt(data / "broken.png")
    write_image(data / "small.png", texture(20, 25))
    config = tiny_config(tmp_path, "train.n_steps=8", "train.viz_iter=4", "num_workers=2")
    done = run_script(
        TRAIN, "--config", tiny_file(tmp_path, "train.n_steps=8", "train.viz_iter=4"),
        "--set", "num_workers=2", "--print_net",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = run_folder(config)
    assert f"Checkpoints of step 8 and before are in {folder}" in done.stdout
    assert "(conv7_atrous): ConvBlock" in done.stdout
    assert "broken.png" in done.stderr
    assert "1 of 9 images were skipped" in done.stderr
    assert "step 8/8 wgan_d" in done.stderr
    assert steps_in(folder, "gen") == [4, 8]
    for name in ("config.yaml", "command.txt", "env.json"):
        assert (folder / name).is_file()
    check_records(folder, tmp_path / "logs")


def check_records(folder: Path, logs: Path) -> None:
    """Losses, rate, speed, selection errors and pictures of a run of 8 steps."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scalars = {
        "train/wgan_d", "train/wgan_gp", "train/d", "train/wgan_g", "train/l1", "train/ae",
        "train/g", "train/lr", "train/steps_per_second",
    }  # fmt: skip
    assert scalars <= set(lines[1])
    assert [line["step"] for line in lines if "select_l1" in line] == [4, 8]
    (run,) = {path.parent for path in logs.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(run))
    events.Reload()
    assert scalars | {"select_l1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/d")] == list(range(1, 9))
    (first, last) = events.Images("train/completions")
    assert (first.step, last.step) == (4, 8)
    assert (last.width, last.height) == (5 * 34 + 2, 2 * 34 + 2)  # 5 pictures a row, 2 samples


def test_trains_on_subfolders_of_colour_images_from_inside_inpainter(tmp_path) -> None:
    for patient in ("a", "b"):
        (tmp_path / "train" / patient).mkdir(parents=True)
        write_every_format(tmp_path / "train" / patient, channels=3)
    overrides = settings(
        tmp_path, *RGB, *BOTH_STAGES, "data_with_subfolder=true", "netD.input_dim=1",
        "train.n_steps=2", "train.n_critic=1", "train.warmup_steps=0",
    )  # fmt: skip
    done = run_script(
        "train.py", "--config", "../configs/default.yaml", *as_flags(overrides),
        cwd=REPOSITORY / "inpainter",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "skipped" not in done.stderr
    folder = tmp_path / "checkpoints" / "tiny" / "hole_PICARD-train"
    assert steps_in(folder, "gen") == [2]
    weights = load_tensors(folder / "gen_00000002.pt")
    assert weights["coarse_generator.conv17.conv.weight"].shape[0] == 3


ENDLESS = ("train.n_steps=100000", "train.snapshot_save_iter=100000")


def saved_step(errors: str, folder: Path) -> int:
    """The one step that a stopped run has saved and named."""
    (step,) = steps_in(folder, "gen")
    assert f"Asked to stop: saved step {step}. Go on with --resume." in errors
    assert "Traceback" not in errors
    return step


def test_ctrl_c_saves_and_ends_with_its_status(tmp_path) -> None:
    write_images(tmp_path / "train")
    folder = run_folder(tiny_config(tmp_path, *ENDLESS))
    child = forked_script(tmp_path, TRAIN, "--config", tiny_file(tmp_path, *ENDLESS))
    wait_for_text(folder / "log.jsonl", 200)
    os.kill(child.pid, signal.SIGINT)
    status, errors = ended(child), (tmp_path / "stderr").read_text()
    assert status == 130, errors
    assert saved_step(errors, folder) > 0


def test_sigterm_saves_and_the_resumed_run_equals_the_uninterrupted_one(tmp_path) -> None:
    write_images(tmp_path / "train")
    endless = tiny_config(tmp_path, *ENDLESS)
    log = run_folder(endless) / "log.jsonl"
    child = forked_script(tmp_path, TRAIN, "--config", tiny_file(tmp_path, *ENDLESS))
    wait_until(lambda: not child.is_alive() or (log.is_file() and log.stat().st_size > 200))
    child.terminate()
    status, errors = ended(child), (tmp_path / "stderr").read_text()
    assert status == 143, errors
    step = saved_step(errors, run_folder(endless))

    last = f"train.n_steps={step + 2}"
    assert train(tiny_config(tmp_path, last), resume="latest").step == step + 2
    train(tiny_config(tmp_path, last, "expname=whole"))
    for role in ("gen", "dis"):
        resumed, whole = (
            load_tensors(run_folder(config) / f"{role}_{step + 2:08d}.pt")
            for config in (endless, tiny_config(tmp_path, "expname=whole"))
        )
        assert_equal_states(resumed, whole, role)


def test_expected_errors_are_one_message_without_traceback(tmp_path) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text("train:\n  image_shap: [32, 32, 1]\n")
    done = run_script(TRAIN, "--config", config)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"train.py: {config}: unknown key 'train.image_shap'. Did you mean 'image_shape'?\n"
    )
