"""Snapshots that hold something else, readers that die, disks that fill, records that are gone."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from common.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    checkpoint_path,
    load_tensors,
    save_atomic,
)
from common.devices import RuntimeSetupError
from common.errors import UserError
from common.processes import Processes
from common.training import TrainingError
from inpainter.networks import build_networks
from inpainter.networks.loading import critic_weights, generator_weights
from inpainter.settings import PicardConfig
from inpainter.snapshots import Progress, run_folder, save_snapshot
from inpainter.step import TrainState, build_optimisers
from inpainter.training import train
from tests.tiny_runs import (
    TRAIN,
    as_flags,
    ended,
    forked,
    run_script,
    settings,
    tiny_config,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "coarse_generator.conv1.conv.weight"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run that has snapshots of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "train")
    train(tiny_config(folder, "train.snapshot_save_iter=2"))
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def longer(folder: Path, *more: str) -> PicardConfig:
    return tiny_config(folder, "train.snapshot_save_iter=2", "train.n_steps=6", *more)


def change(path: Path, edit: Callable[[dict], object]) -> None:
    """Replaces what a file holds by what edit returns, or by what it has made of it."""
    value = load_tensors(path)
    edited = edit(value)
    save_atomic(value if edited is None else edited, path)


def remove(values: dict, key: str) -> None:
    del values[key]


def fill(state: dict[str, torch.Tensor], name: str, value: str) -> None:
    state[name].fill_(float(value))


DAMAGES = {
    "gen list": ("gen", lambda v: [1, 2], "expected the weights of a network .* found list"),
    "gen None": ("gen", lambda v: {"a": None}, r"found a = nothing \(None\)"),
    "gen tensor": ("gen", lambda v: torch.zeros(3), r"found a tensor \(3,\)"),
    "gen empty": ("gen", lambda v: {}, "found an empty dict"),
    "gen int keys": ("gen", lambda v: {1: torch.zeros(3)}, "found the name '1'"),
    "gen texts": ("gen", lambda v: {"a": "b"}, "found a = str 'b'"),
    "gen complex": ("gen", lambda v: {k: t.to(torch.complex64) for k, t in v.items()}, "complex64"),
    "gen sparse": ("gen", lambda v: {k: t.to_sparse() for k, t in v.items()}, "torch.sparse_coo"),
    "gen scalars": (
        "gen",
        lambda v: {k: torch.tensor(1.0) for k in v},
        r"of another shape \(\S+: \(\) for \(4, ",
    ),
    "gen integers": ("gen", lambda v: {k: t.long() for k, t in v.items()}, "torch.int64 for torch"),
    "gen lacks one": ("gen", lambda v: remove(v, LAYER), rf"1 missing \({LAYER}\)"),
    "gen has more": ("gen", lambda v: v.update(x=torch.ones(1)), r"1 unknown \(x\)"),
    "gen NaN": ("gen", lambda v: fill(v, LAYER, "nan"), "not finite .*" + LAYER),
    "dis inf": (
        "dis",
        lambda v: fill(v["globalD"], "linear.weight", "inf"),
        "globalD: weights that are not finite .*linear.weight",
    ),
    "dis list": ("dis", lambda v: [], "expected a dict with localD, globalD, found list"),
    "dis without localD": ("dis", lambda v: remove(v, "localD"), "no entry localD"),
    "localD list": ("dis", lambda v: v.update(localD=[]), "localD: expected the weights"),
    "state list": ("state", lambda v: [], "expected a dict with step, config, .*found list"),
    "state without config": ("state", lambda v: remove(v, "config"), "no entry config"),
    "state without random": ("state", lambda v: remove(v, "random"), "no entry random"),
    "config list": ("state", lambda v: v.update(config=[]), "config: expected a dict, found list"),
    "step text": ("state", lambda v: v.update(step="4"), "of step 4, its name says 4"),
    "step negative": ("state", lambda v: v.update(step=-4), "of step -4, its name says 4"),
    "step of another": ("state", lambda v: v.update(step=2), "of step 2, its name says 4"),
    "optimiser empty": ("state", lambda v: v.update(optimizer_gen={}), "no entry state, param_gr"),
    "optimiser None": ("state", lambda v: v.update(optimizer_gen=None), "found nothing"),
    "optimiser without moments": (
        "state",
        lambda v: v["optimizer_gen"].update(state={}),
        "keeps nothing, as before the first step",
    ),
    "optimiser of another kind": (
        "state",
        lambda v: v.update(optimizer_gen=torch.optim.SGD([torch.zeros(1)]).state_dict()),
        "its groups of parameters differ",
    ),
    "moment of another shape": (
        "state",
        lambda v: v["optimizer_gen"]["state"][0].update(exp_avg=torch.zeros(7)),
        r"exp_avg of parameter 0 is a tensor \(7,\)",
    ),
    "random garbage": ("state", lambda v: v.update(random=5), "state of the random generators"),
    "random too short": (
        "state",
        lambda v: v["random"].update(torch=torch.zeros(3, dtype=torch.uint8)),
        "state of the random generators",
    ),
    "losses text": ("state", lambda v: v.update(losses="x"), "losses .* are no numbers"),
}


@pytest.mark.parametrize(("role", "edit", "message"), DAMAGES.values(), ids=DAMAGES)
def test_snapshot_that_holds_something_else_is_refused_in_one_line(folder, role, edit, message):
    path = checkpoint_path(run_folder(longer(folder)), role, 4)
    change(path, edit)
    with pytest.raises(CheckpointError, match=message) as refused:
        train(longer(folder), resume="latest")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("role", ["gen", "dis"])
def test_weights_of_another_step_under_this_ones_name_are_refused(folder, role) -> None:
    checkpoints = run_folder(longer(folder))
    shutil.copy(checkpoint_path(checkpoints, role, 2), checkpoint_path(checkpoints, role, 4))
    with pytest.raises(CheckpointError, match=rf"{role}_00000004.pt holds other weights than were"):
        train(longer(folder), resume="latest")


def test_file_whose_number_no_training_reaches_is_no_step(folder) -> None:
    checkpoints = run_folder(longer(folder))
    for role in ("gen", "dis", "state"):
        shutil.copy(
            checkpoint_path(checkpoints, role, 4),
            checkpoints / f"{role}_99999999999999999999999.pt",
        )
    assert train(longer(folder), resume="latest").step == 6


@pytest.mark.parametrize("wanted", ["²", "-1", "1" * 5000, "4 ", ""])
def test_word_that_is_no_step_is_refused_with_the_flag_of_this_program(folder, wanted) -> None:
    with pytest.raises(CheckpointError, match=r"is no step.*2, 4\. Pass one with --resume STEP\."):
        train(longer(folder), resume=wanted)


@pytest.mark.parametrize("role", ["gen", "dis", "state"])
def test_one_flipped_bit_anywhere_is_refused(folder, role) -> None:
    path = checkpoint_path(run_folder(longer(folder)), role, 4)
    data = path.read_bytes()
    for number in range(50):
        place = number * (len(data) - 1) // 49
        damaged = bytearray(data)
        damaged[place] ^= 1 << number % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError):
            load_tensors(path)


def test_non_finite_weights_do_not_go_into_a_training(tmp_path) -> None:
    config = tiny_config(tmp_path)
    write_checkpoint(tmp_path, config)
    change(tmp_path / "gen_00000001.pt", lambda v: fill(v, LAYER, "inf"))
    change(tmp_path / "dis_00000001.pt", lambda v: fill(v["localD"], "linear.bias", "nan"))
    with pytest.raises(CheckpointError, match=rf"gen_00000001.pt: weights .* not finite .*{LAYER}"):
        generator_weights(tmp_path / "gen_00000001.pt")
    with pytest.raises(CheckpointError, match=r"dis_00000001.pt: localD: weights .* not finite"):
        critic_weights(tmp_path / "dis_00000001.pt")


@pytest.mark.parametrize(
    ("change_of", "key"),
    [
        ("train.lr=0.01", r"train\.lr: 0\.001 when it was saved, 0\.01 now"),
        ("seed=3", r"seed: 1337 when it was saved, 3 now"),
        ("train.batch_size=3", r"train\.batch_size: 2 "),
        ("wgan_gp_lambda=1.0", r"wgan_gp_lambda: 10\.0 "),
        ("train.flip=true", r"train\.flip: False "),
        ("train.precision=bf16", r"train\.precision: 'fp32' "),
    ],
)
def test_setting_that_decides_what_is_learnt_is_refused_on_resume(folder, change_of, key) -> None:
    with pytest.raises(CheckpointError, match=key):
        train(longer(folder, change_of), resume="latest")


def test_setting_that_may_change_is_named_on_resume(folder, caplog) -> None:
    moved = folder / "moved"
    (folder / "train").rename(moved)
    config = longer(folder, f"train_data_path={moved}", "num_workers=1", "test.patch_stride=8")
    assert train(config, resume="latest").step == 6
    for key in ("train_data_path", "num_workers: 0 when", "test.patch_stride: 16 when", "n_steps"):
        assert key in caplog.text


def test_other_training_images_are_refused_on_resume_and_named_in_a_new_run(folder, caplog):
    write_images(folder / "train", n=4)
    with pytest.raises(CheckpointError, match="3 training images when it was saved, 4 now"):
        train(longer(folder), resume="latest")
    (folder / "train" / "3.png").unlink()
    shutil.copy(folder / "train" / "1.png", folder / "train" / "0.png")
    with pytest.raises(CheckpointError, match="of the 3 training images some have other contents"):
        train(longer(folder), resume="latest")
    new = longer(
        folder, f"train.resume={run_folder(longer(folder))}", "expname=on", "train.lr=0.01"
    )
    assert train(new).step == 6
    assert "some have other contents" in caplog.text
    assert "train.lr: 0.001 when it was saved, 0.01 now" in caplog.text


def test_log_of_a_run_that_was_stopped_between_its_lines_equals_the_uninterrupted_ones(tmp_path):
    write_images(tmp_path / "train")
    options = ("train.print_iter=3", "train.n_critic=2", "train.snapshot_save_iter=2")
    whole = tiny_config(tmp_path, "train.n_steps=6", *options, "expname=whole")
    train(whole)
    train(tiny_config(tmp_path, "train.n_steps=2", *options))
    halves = tiny_config(tmp_path, "train.n_steps=6", *options)
    train(halves, resume="latest")

    def lines(config: PicardConfig) -> list[dict]:
        text = (run_folder(config) / "log.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in line.items() if "per_second" not in k} for line in records]

    assert "train/l1" in lines(halves)[2]
    assert lines(halves) == lines(whole)


@pytest.mark.parametrize("network", ["generator", "local_critic", "global_critic"])
def test_weights_that_became_infinite_are_not_saved(tmp_path, network) -> None:
    config = tiny_config(tmp_path)
    cpu = torch.device("cpu")
    networks = build_networks(config, cpu)
    optimisers = build_optimisers(networks, config.train)
    state = TrainState(config, cpu, Processes(), networks, optimisers, n_steps=4, images={})
    next(getattr(networks, network).parameters()).data.fill_(float("inf"))
    with pytest.raises(TrainingError, match=rf"weights of the {network} are not finite at step 3"):
        save_snapshot(tmp_path / "new", Progress(3, {}, 0), state)
    assert not (tmp_path / "new").exists()


def test_products_on_a_gpu_are_not_rounded_and_the_record_says_so(folder) -> None:
    environment = json.loads((run_folder(longer(folder)) / "env.json").read_text())
    assert environment["tf32"] is False
    train(longer(folder, "train.precision=tf32", "expname=rounded"))
    rounded = run_folder(longer(folder, "expname=rounded")) / "env.json"
    assert json.loads(rounded.read_text())["tf32"] is True


def damaged_records(folder: Path) -> None:
    checkpoints = run_folder(longer(folder))
    (checkpoints / "command.txt").write_bytes(b"train.py \xff\n")
    (checkpoints / "env.json").write_bytes(b"{\xff")
    (checkpoints / "config.yaml").write_bytes(b"[\t")
    with (checkpoints / "log.jsonl").open("a") as log:
        log.write("[" * 100_000 + "\n" + '{"step": ' + "9" * 5000 + '}\n{"step": true}\n')


def test_resume_survives_damaged_records(folder, caplog) -> None:
    damaged_records(folder)
    assert train(longer(folder), resume="latest", command=["train.py", "a\udcff"]).step == 6
    assert "3 lines are no records and were passed over" in caplog.text
    command = (run_folder(longer(folder)) / "command.txt").read_bytes()
    assert command == b"train.py \xff\ntrain.py 'a\xff'\n"


def test_deleting_the_events_costs_a_warning(tmp_path, caplog) -> None:
    write_images(tmp_path / "train")
    config = tiny_config(tmp_path, "train.n_steps=40", "train.snapshot_save_iter=40")

    def delete() -> None:
        while not (run_folder(config) / "log.jsonl").exists():
            time.sleep(0.001)
        shutil.rmtree(tmp_path / "logs")

    deleting = threading.Thread(target=delete)
    deleting.start()
    assert train(config).step == 40
    deleting.join()
    assert caplog.text.count("TensorBoard's events end here") <= 1
    assert len((run_folder(config) / "log.jsonl").read_text().splitlines()) == 41


def test_file_where_the_events_should_go_costs_a_warning(tmp_path, caplog) -> None:
    write_images(tmp_path / "train")
    (tmp_path / "logs").write_text("a file")
    assert train(tiny_config(tmp_path)).step == 4
    assert "No curves for TensorBoard, log.jsonl has the numbers" in caplog.text


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("train.batch_size=65536", "The crops of a step"),
        ("train.select_crops=65536", "train.select_crops"),
        ("netG.ngf=4096", "The networks"),
        ("netD.ndf=4096", "The networks"),
        ("train.image_shape=[8192, 8192, 1]", "The networks and one step|The crops of a step"),
    ],
)
def test_size_that_no_memory_holds_is_refused_before_it_is_allocated(
    tmp_path, monkeypatch, setting, what
):
    write_images(tmp_path / "train")
    monkeypatch.setattr("common.devices.memory_of", lambda _: 2**26)
    with pytest.raises(RuntimeSetupError, match=rf"({what}).*at least .* GiB.* Lower "):
        train(tiny_config(tmp_path, setting))


def test_warm_up_beyond_the_run_is_said(tmp_path, caplog) -> None:
    write_images(tmp_path / "train")
    train(tiny_config(tmp_path, "train.warmup_steps=9"))
    assert "train.warmup_steps: 9 is more than the 4 steps of the run" in caplog.text


ENDLESS = ("num_workers=2", "train.n_steps=100000", "train.snapshot_save_iter=2")


def train_with_a_reader_killed(config: PicardConfig) -> None:
    """Ends with status 0 where the right error comes, and 1 else."""

    def kill() -> None:
        while not list(run_folder(config).glob("gen_*.pt")):
            time.sleep(0.02)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(UserError, match="A process that reads images ended unexpectedly"):
        train(config)


def train_on_a_full_disk(config: PicardConfig) -> None:
    """The same; files of more than 10 kB cannot be written, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(OSError, match=r"File too large: .*_00000002\.pt"):
        train(config)
    assert not list(run_folder(config).glob("*.tmp"))


@pytest.mark.parametrize("failing", [train_with_a_reader_killed, train_on_a_full_disk])
def test_training_that_fails_ends_with_its_readers(tmp_path, failing) -> None:
    write_images(tmp_path / "train")
    child = forked(partial(failing, tiny_config(tmp_path, *ENDLESS)))
    assert ended(child) == 0


def test_output_folder_that_is_a_file_is_named_with_the_remedy(tmp_path) -> None:
    write_images(tmp_path / "train")
    (tmp_path / "checkpoints").write_text("a file")
    done = run_script(TRAIN, *as_flags(settings(tmp_path)))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "not a folder" in done.stderr or "where a folder is needed" in done.stderr


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"])
def test_environment_of_torchrun_that_is_no_number_is_named(tmp_path, name, monkeypatch) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}
    for key, value in {**whole, "MASTER_PORT": "1", name: "²"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        RuntimeSetupError, match=rf"variable {name} is '²', expected a whole number"
    ):
        train(tiny_config(tmp_path))
