"""Flipped bits and cut files: noticed wherever they are, and `latest` goes back to a whole step."""

import shutil
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
from dia import training as contrastive
from dia.settings import DiaConfig
from diffusion_models import training as ddpm
from diffusion_models.dissolve import load_dissolver
from diffusion_models.settings import DdpmConfig
from inpainter.calibrate import calibrate_once
from inpainter.predictor import load_predictor
from inpainter.snapshots import prune_snapshots, resolve_step, run_folder, use_step
from inpainter.training import train
from tests.tiny_dia import changed, tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import assert_equal_states, tiny_config, write_checkpoint, write_images

pytestmark = pytest.mark.usefixtures("one_thread")


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Turns one bit of a file round; place counts from the end where it is negative."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def flip_the_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def test_every_flipped_bit_of_the_end_and_every_lost_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_atomic({"w": torch.arange(5.0)}, path)
    whole = path.read_bytes()
    for place in range(-100, 0):
        for bit in range(8):
            flip(path, place, bit)
            with pytest.raises(DamagedCheckpointError):
                load_tensors(path)
            path.write_bytes(whole)
        path.write_bytes(whole[:place])
        with pytest.raises(DamagedCheckpointError):
            load_tensors(path)
        path.write_bytes(whole)
    assert torch.equal(load_tensors(path)["w"], torch.arange(5.0))
    assert torch.equal(torch.load(path)["w"], torch.arange(5.0))  # without this project


def test_files_of_others_carry_no_checksum_and_load(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_tensors(tmp_path / "a.pt")["w"], torch.ones(2))


@pytest.mark.parametrize("role", ["gen", "dis", "state"])
def test_training_goes_on_from_the_newest_whole_step(tmp_path, caplog, role) -> None:
    write_images(tmp_path / "train")
    often = "train.snapshot_save_iter=2"
    train(tiny_config(tmp_path, often))
    folder = run_folder(tiny_config(tmp_path))
    damaged = checkpoint_path(folder, role, 4)
    straight = shutil.copy(checkpoint_path(folder, "gen", 4), tmp_path / "straight.pt")
    flip_the_middle(damaged)
    with pytest.raises(DamagedCheckpointError, match=rf"{damaged}: damaged \(its SHA-256.*: 2\."):
        train(tiny_config(tmp_path, often), resume="4")
    assert train(tiny_config(tmp_path, often), resume="latest").step == 4
    assert f"{damaged}: damaged" in caplog.text
    assert "`latest` is the step before it" in caplog.text
    assert checkpoint_path(folder, "gen", 4).read_bytes() == straight.read_bytes()


def test_prediction_falls_back_and_without_another_step_ends_with_the_name(
    tmp_path, caplog
) -> None:
    folder, config = tmp_path, tiny_config(tmp_path)
    write_checkpoint(folder / "model", config)
    write_checkpoint(folder / "model", config, step=2)
    flip_the_middle(checkpoint_path(folder / "model", "dis", 2))
    assert load_predictor(folder / "model", config=config).step == 1
    assert "dis_00000002.pt: damaged (its SHA-256 does not fit its contents)" in caplog.text
    with pytest.raises(DamagedCheckpointError, match=r"dis_00000002\.pt"):
        load_predictor(folder / "model", 2, config)
    flip_the_middle(checkpoint_path(folder / "model", "gen", 1))
    with pytest.raises(DamagedCheckpointError, match=r"gen_00000001\.pt"):
        load_predictor(folder / "model", config=config)


def test_diffusion_model_of_a_folder_is_the_newest_whole_one(tmp_path: Path, caplog) -> None:
    settings = tiny_diffusion(tmp_path / "run", train_num_steps=2)
    data = write_normals(tmp_path / "data")
    config = DdpmConfig(device="cpu", data=data, diffusion=settings)
    ddpm.train(config)
    second = tmp_path / "run" / "model-2.pt"
    whole = load_tensors(second)["model"]
    flip_the_middle(second)
    load_dissolver(tmp_path / "run", device="cpu")
    assert f"{second}: damaged" in caplog.text
    assert ddpm.train(config, resume=tmp_path / "run").step == 2
    torch.testing.assert_close(load_tensors(second)["model"], whole, rtol=0, atol=0)
    for path in (tmp_path / "run").glob("model-*.pt"):
        flip_the_middle(path)
    with pytest.raises(DamagedCheckpointError, match=r"model-1\.pt"):
        load_dissolver(tmp_path / "run", device="cpu")


def test_step_that_was_deleted_after_it_was_opened_is_read_to_the_end(tmp_path: Path) -> None:
    for step in (1, 2):
        for role in ("state", "dis", "gen"):
            save_atomic({"step": step, "role": role}, checkpoint_path(tmp_path, role, step))

    def read(step, files):
        for other in (3, 4):  # a training goes on meanwhile
            for role in ("state", "dis", "gen"):
                save_atomic({}, checkpoint_path(tmp_path, role, other))
        prune_snapshots(tmp_path, keep=1)
        assert resolve_step(tmp_path, "latest") == 4
        path = checkpoint_path(tmp_path, "gen", step)
        assert not path.exists()
        return [load_tensors(path, file) for file in files.values()]

    found = use_step(tmp_path, "latest", ("gen", "dis"), read)
    assert found == [{"step": 2, "role": "gen"}, {"step": 2, "role": "dis"}]


def test_encoder_goes_on_from_the_save_before_a_damaged_one(tmp_path: Path, caplog) -> None:
    data, run = write_normals(tmp_path / "data"), tmp_path / "run"
    settings = tiny_contrastive(run, epochs=2, save_step=1)
    config = DiaConfig(device="cpu", data=data, contrastive=settings)
    contrastive.train(config)
    whole = (run / "state.pt").read_bytes()
    flip_the_middle(run / "state.pt")
    go_on = changed(config, "contrastive", resume_path=str(run))
    assert contrastive.train(go_on).epoch == 2
    assert f"{run / 'state.pt'}: damaged" in caplog.text
    assert "Going on from state.previous.pt, the save before it." in caplog.text
    (tmp_path / "whole.pt").write_bytes(whole)
    saved, straight = load_tensors(run / "state.pt"), load_tensors(tmp_path / "whole.pt")
    for name in ("model", "optim", "probe", "epoch"):
        assert_equal_states(saved[name], straight[name])
    (run / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="already holds a run"):
        contrastive.train(config)
    flip_the_middle(run / "state.previous.pt")
    with pytest.raises(DamagedCheckpointError, match=r"state\.previous\.pt: damaged"):
        contrastive.train(go_on)


def test_several_processes_calibrate_the_newest_whole_step(tmp_path: Path, caplog) -> None:
    few = ("test.calibration_windows=24", "test.patch_stride=4")
    config = tiny_config(tmp_path, "test.calibration=knn", *few)
    write_images(tmp_path / "train", n=6, size=(64, 64))
    for step in (1, 2):
        write_checkpoint(tmp_path / "model", config, step=step)
    flip_the_middle(checkpoint_path(tmp_path / "model", "gen", 2))
    path = calibrate_once(config, tmp_path / "model", "latest")
    assert path == checkpoint_path(tmp_path / "model", "calibration", 1)
    assert "gen_00000002.pt: damaged" in caplog.text
    whole = path.read_bytes()
    flip_the_middle(path)
    calibrate_once(config, tmp_path / "model", "latest")
    assert path.read_bytes() == whole
    assert "Measured anew." in caplog.text
