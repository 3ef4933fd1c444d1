"""Dissolving from Python, and the checkpoints it reads."""

from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError
from diffusion_models import training
from diffusion_models.dissolve import Dissolver, load_dissolver
from diffusion_models.settings import DataConfig, DdpmConfig
from tests.tiny_dia import tiny_diffusion
from tests.tiny_runs import write_images


def test_dissolving_at_step_zero_nearly_returns_the_image(diffusion, images) -> None:
    # At step 0 of the cosine schedule the noise has 1e-3 of the image's weight.
    dissolved = Dissolver(diffusion)(images, 0)
    assert (dissolved - images).abs().max() < 0.1


def test_each_image_is_dissolved_at_its_own_step(diffusion, images) -> None:
    dissolver, steps = Dissolver(diffusion), (3, 50, 99)
    together = dissolver(images, torch.tensor(steps))
    for i, t in enumerate(steps):
        alone = dissolver(images[i : i + 1], t)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_signed_range_keeps_images_in_zero_one(diffusion, images) -> None:
    dissolved = Dissolver(diffusion, dissolve_range="signed")(images, 80)
    assert 0 <= dissolved.min() <= dissolved.max() <= 1


def test_run_folder_is_loaded_in_one_line_with_its_newest_weights(images, tmp_path: Path) -> None:
    settings = tiny_diffusion(tmp_path / "run", train_num_steps=2, train_lr=0.01)
    (tmp_path / "data").mkdir()
    data = DataConfig(data_root=str(write_images(tmp_path / "data")))
    training.train(DdpmConfig(device="cpu", data=data, diffusion=settings))
    dissolver = load_dissolver(str(tmp_path / "run"), device="cpu", dissolve_range="signed")
    dissolved = dissolver(images, step=50)
    assert (dissolver.image_size, dissolved.shape) == (16, images.shape)
    assert 0 <= dissolved.min() < dissolved.max() <= 1
    first, second = (
        load_dissolver(tmp_path / "run" / f"model-{n}.pt", device="cpu", dissolve_range="signed")
        for n in (1, 2)
    )
    assert torch.equal(dissolved, second(images, step=50))
    assert not torch.equal(dissolved, first(images, step=50))


def test_folder_without_checkpoints_and_impossible_steps_are_refused(
    diffusion, images, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no model-N\.pt in .* Pass the run folder"):
        load_dissolver(tmp_path)
    with pytest.raises(ValueError, match=r"must be in 0 … 99, got 100"):
        Dissolver(diffusion)(images, step=100)


def test_checkpoint_of_either_kind_of_weights_loads(diffusion, images, tmp_path: Path) -> None:
    state = diffusion.state_dict()
    averaged = {f"ema_model.{name}": values * 0.5 for name, values in state.items()}
    path = tmp_path / "model-1.pt"
    torch.save({"model": state, "ema": averaged, "step": 1}, path)
    raw, ema = (load_dissolver(path, device="cpu", weights=name) for name in ("raw", "ema"))
    assert torch.equal(raw(images, 9), Dissolver(diffusion)(images, 9))
    assert not torch.equal(raw(images, 9), ema(images, 9))


def test_checkpoint_that_contradicts_the_settings_is_refused(diffusion, tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    torch.save({"model": diffusion.state_dict(), "dilation": 2, "image_size": 64}, path)
    with pytest.raises(CheckpointError, match=r"trained with image size 64, but 32"):
        load_dissolver(path, image_size=32)
    with pytest.raises(CheckpointError, match=r"trained with dilation 2, but 1"):
        load_dissolver(path, dilation=1)
    assert load_dissolver(path).diffusion.model.dilation == 2


def test_file_that_is_no_diffusion_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.model"
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r'expected a dict with an entry "model"'):
        load_dissolver(path)
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, path)
    with pytest.raises(CheckpointError, match="published U-Net"):
        load_dissolver(path)
