"""The U-Net and the diffusion process."""

import pytest
import torch

from diffusion_models.diffusion import GaussianDiffusion, gaussian_noise, schedule_buffers
from diffusion_models.unet import Unet


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
