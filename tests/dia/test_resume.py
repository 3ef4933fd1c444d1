"""Going on with a run: the same settings and images, or a named refusal."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError, UserError
from dia.settings import DiaConfig
from dia.training import train
from diffusion_models import training as ddpm
from diffusion_models.dissolve import read_newest
from diffusion_models.settings import DdpmConfig
from tests.tiny_dia import (
    changed,
    tiny_contrastive,
    tiny_diffusion,
    train_until,
    write_normals,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dia_run(tmp_path_factory) -> DiaConfig:
    """One of two epochs of CSI, stopped."""
    root = tmp_path_factory.mktemp("dia")
    settings = tiny_contrastive(root / "run", epochs=2)
    config = DiaConfig(device="cpu", data=write_normals(root / "data"), contrastive=settings)
    train_until(config, 1)
    return changed(config, "contrastive", run_dir=None, resume_path=str(root / "run"))


@pytest.fixture(scope="module")
def ddpm_run(tmp_path_factory) -> DdpmConfig:
    """One of two steps."""
    root = tmp_path_factory.mktemp("ddpm")
    config = DdpmConfig(
        device="cpu", data=write_normals(root / "data"), diffusion=tiny_diffusion(root / "run")
    )
    ddpm.train(config)
    return changed(config, "diffusion", train_num_steps=2)


def folder_of(config: DiaConfig | DdpmConfig) -> Path:
    if isinstance(config, DiaConfig):
        return Path(config.contrastive.resume_path)
    return Path(config.diffusion.output_dir)


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("contrastive", {"lr_init": 0.2}, "contrastive.lr_init: 0.1 when it was saved, 0.2 now"),
        ("contrastive", {"temperature": 0.1}, "contrastive.temperature: 0.5 .* 0.1 now"),
        ("contrastive", {"optimizer": "sgd"}, "contrastive.optimizer: 'lars' .* 'sgd' now"),
        ("contrastive", {"mode": "simclr_DIA", "shift_trans_type": "blurgaussian"}, "'simclr_CSI'"),
    ],
)
def test_dia_run_goes_on_with_no_other_settings(dia_run, section, values, named) -> None:
    with pytest.raises(CheckpointError, match=named):
        train(changed(dia_run, section, **values))


def test_diffusion_run_goes_on_with_no_other_rate(ddpm_run) -> None:
    with pytest.raises(CheckpointError, match=r"diffusion.train_lr: 8e-05 .* 0.1 now"):
        ddpm.train(changed(ddpm_run, "diffusion", train_lr=0.1), resume=folder_of(ddpm_run))


def test_diffusion_run_numbers_its_files_as_before(ddpm_run) -> None:
    folder = folder_of(ddpm_run)
    before = (folder / "model-1.pt").read_bytes()
    named = r"diffusion.save_every: 1 when it was saved, 5 now. Give the settings it was made with"
    with pytest.raises(CheckpointError, match=named):
        ddpm.train(changed(ddpm_run, "diffusion", save_every=5), resume=folder)
    assert (folder / "model-1.pt").read_bytes() == before


def test_runs_go_on_with_no_other_images(dia_run, ddpm_run, tmp_path: Path) -> None:
    write_normals(tmp_path, first=9)
    other = changed(dia_run, "data", data_root=str(tmp_path))
    with pytest.raises(CheckpointError, match="of the 4 training images some have other contents"):
        train(other)
    other = changed(ddpm_run, "data", data_root=str(tmp_path))
    with pytest.raises(CheckpointError, match="of the 4 training images some have other contents"):
        ddpm.train(other, resume=folder_of(ddpm_run))


def test_copied_images_and_a_longer_run_are_allowed_and_named(
    dia_run, tmp_path: Path, caplog
) -> None:
    write_normals(tmp_path)
    moved = changed(dia_run, "data", data_root=str(tmp_path))
    state = folder_of(dia_run) / "state.pt"
    before = state.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert train_until(changed(moved, "contrastive", epochs=3), 2).epoch == 2
    assert "contrastive.epochs: 2 when it was saved, 3 now" in caplog.text
    state.write_bytes(before)


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


BROKEN_DIA = {
    "a list": lambda state: [1, 2],
    "no model": lambda state: without(state, "model"),
    "no epoch": lambda state: without(state, "epoch"),
    "no optim": lambda state: without(state, "optim"),
    "empty optim": lambda state: state | {"optim": {}},
    "epoch as text": lambda state: state | {"epoch": "1"},
    "negative epoch": lambda state: state | {"epoch": -1},
    "epoch of 10^9": lambda state: state | {"epoch": 10**9},
    "best of None": lambda state: state | {"best": None},
    "config of None": lambda state: state | {"config": None},
    "model of NaN": lambda state: (
        state | {"model": {n: t * float("nan") for n, t in state["model"].items()}}
    ),
}
BROKEN_DDPM = {
    "a list": lambda state: [1, 2],
    "no ema": lambda state: without(state, "ema"),
    "no step": lambda state: without(state, "step"),
    "step as text": lambda state: state | {"step": "1"},
    "negative step": lambda state: state | {"step": -1},
    "step of 10^9": lambda state: state | {"step": 10**9},
    "empty opt": lambda state: state | {"opt": {}},
    "model of text": lambda state: state | {"model": {"a": "b"}},
    "ema of None": lambda state: state | {"ema": None},
}


def refusal(path: Path, edit: Callable[[dict], object], go_on: Callable[[], object]) -> str:
    """The one line with which a run does not go on while a file holds something else."""
    before = path.read_bytes()
    torch.save(edit(torch.load(path)), path)
    try:
        with pytest.raises(UserError) as caught:
            go_on()
    finally:
        path.write_bytes(before)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("kind", BROKEN_DIA)
def test_state_that_holds_something_else_is_named_in_one_line(dia_run, kind: str) -> None:
    state = folder_of(dia_run) / "state.pt"
    assert "run" in refusal(state, BROKEN_DIA[kind], lambda: train(dia_run))


@pytest.mark.parametrize("kind", BROKEN_DDPM)
def test_diffusion_checkpoint_that_holds_something_else_is_named(ddpm_run, kind: str) -> None:
    folder = folder_of(ddpm_run)
    model = folder / "model-1.pt"
    said = refusal(model, BROKEN_DDPM[kind], lambda: ddpm.train(ddpm_run, resume=folder))
    assert model.name in said


def test_resumed_diffusion_run_writes_its_curves_where_they_were(ddpm_run) -> None:
    folder = folder_of(ddpm_run)
    before = len(list((folder / "events").iterdir()))
    ddpm.train(changed(ddpm_run, "diffusion", output_dir=None), resume=folder)
    assert len(list((folder / "events").iterdir())) == before + 1


def test_run_goes_on_with_as_many_processes_alone(dia_run, ddpm_run) -> None:
    folder = folder_of(ddpm_run)
    runs = {
        folder_of(dia_run) / "state.pt": lambda: train(dia_run),
        read_newest(folder)[0]: lambda: ddpm.train(ddpm_run, resume=folder),
    }
    for path, go_on in runs.items():
        said = refusal(path, lambda state: state | {"processes": 2}, go_on)
        assert "processes: '2' when it was saved, '1' now" in said
        assert "batch_size is of each" in said
        assert "Start as many processes as before" in said


def test_old_state_of_two_processes_goes_on_and_keeps_its_log(tmp_path: Path) -> None:
    """It says neither how many there were nor its steps, but that an epoch had one."""
    settings = tiny_contrastive(tmp_path / "run", epochs=2)
    config = DiaConfig(device="cpu", data=write_normals(tmp_path / "data"), contrastive=settings)
    train_until(config, 1)
    path, log = tmp_path / "run" / "state.pt", tmp_path / "run" / "log.jsonl"
    state = without(without(torch.load(path), "processes"), "step")
    torch.save(state | {"steps_per_epoch": 1}, path)
    line = json.dumps({**json.loads(log.read_text()), "step": 1})
    log.write_text(line + "\n")
    train(changed(config, "contrastive", run_dir=None, resume_path=str(tmp_path / "run")))
    assert log.read_text().splitlines()[0] == line
    assert [json.loads(text)["step"] for text in log.read_text().splitlines()] == [1, 3]


def test_old_diffusion_checkpoint_without_the_number_of_processes_goes_on(tmp_path: Path) -> None:
    settings = tiny_diffusion(tmp_path / "run")
    config = DdpmConfig(device="cpu", data=write_normals(tmp_path / "data"), diffusion=settings)
    ddpm.train(config)
    path = tmp_path / "run" / "model-1.pt"
    torch.save(without(torch.load(path), "processes"), path)
    longer = changed(config, "diffusion", train_num_steps=2)
    assert ddpm.train(longer, resume=tmp_path / "run").step == 2


def test_run_that_goes_on_needs_no_more_the_weights_it_began_with(tmp_path: Path) -> None:
    settings = tiny_contrastive(tmp_path / "first")
    config = DiaConfig(device="cpu", data=write_normals(tmp_path / "data"), contrastive=settings)
    train(config)
    weights = tmp_path / "first" / "last.model"
    folder = str(tmp_path / "run")
    begun = changed(config, "contrastive", load_path=str(weights), run_dir=folder, epochs=2)
    train_until(begun, 1)
    weights.unlink()
    going_on = changed(begun, "contrastive", run_dir=None, resume_path=folder)
    assert train(going_on).epoch == 2
