"""The U-Net, the diffusion process, dissolving and its checkpoints."""

from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError
from diffusion_models.diffusion import GaussianDiffusion, gaussian_noise, schedule_buffers
from diffusion_models.dissolve import Dissolver, load_dissolver
from diffusion_models.unet import Unet


@pytest.fixture
def diffusion() -> GaussianDiffusion:
    torch.manual_seed(0)
    return GaussianDiffusion(Unet(8, (1, 2)), steps=100).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


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


def test_noise_predicted_exactly_gives_the_image_back(images) -> None:
    diffusion = GaussianDiffusion(torch.nn.Identity(), steps=100)
    t, noise = torch.tensor([0, 40, 99]), torch.randn_like(images)
    noisy = diffusion.q_sample(images, t, noise)
    estimate = diffusion.predict_start_from_noise(noisy, t, noise)
    torch.testing.assert_close(estimate[:2], images[:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_go_from_image_to_noise(schedule: str) -> None:
    kept = schedule_buffers(schedule, 50)["alphas_cumprod"]
    assert (kept.diff() < 0).all()
    assert kept[0] > 0.9
    assert kept[-1] < 1e-3


def test_ddim_samples_are_images_and_repeat_with_the_seed(diffusion) -> None:
    first, again = (
        diffusion.ddim_sample(
            (2, 3, 16, 16), sampling_steps=3, generator=torch.Generator().manual_seed(7)
        )
        for _ in range(2)
    )
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, again)


def test_local_noise_is_a_small_field_enlarged() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = gaussian_noise(
        (1, 1, 128, 128), device=torch.device("cpu"), local=True, generator=generator
    )
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / (noise**2).mean()
    assert neighbours > 0.9


@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
def test_dilated_networks_return_the_size_they_were_given(dilation: int) -> None:
    side = 2 * (2 * dilation) ** 2
    unet = Unet(8, (1, 1, 2), dilation=dilation)
    with torch.no_grad():
        noise = unet(torch.rand(1, 3, side, side), torch.tensor([5]))
    assert noise.shape == (1, 3, side, side)


def test_image_size_that_the_network_cannot_halve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 8 pixels, got \(1, 3, 28, 28\)"):
        Unet(8)(torch.rand(1, 3, 28, 28), torch.tensor([0]))


def test_checkpoint_of_either_kind_of_weights_loads(diffusion, images, tmp_path: Path) -> None:
    state = diffusion.state_dict()
    averaged = {f"ema_model.{name}": values * 0.5 for name, values in state.items()}
    path = tmp_path / "model-1.pt"
    torch.save({"model": state, "ema": averaged, "step": 1}, path)
    raw, ema = load_dissolver(path), load_dissolver(path, weights="ema")
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
