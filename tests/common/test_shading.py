"""Slow changes of brightness taken off: what is left, and what it does not depend on."""

import pytest
import torch
from scipy.ndimage import gaussian_filter

from common.shading import DARKEST, GAIN, Flattening
from tests.tiny_runs import texture


def ramp(height: int, width: int) -> torch.Tensor:
    """Brighter to the right, (1, H, W)."""
    return torch.linspace(0.3, 0.7, width).expand(1, height, width).clone()


def test_an_even_image_becomes_the_middle_grey_and_background_stays_black() -> None:
    image = torch.zeros(3, 40, 60)
    image[:, :, 20:] = torch.tensor([0.8, 0.5, 0.2])[:, None, None]
    flat = Flattening(0.1, 0.1)(image)
    assert (flat[:, :, :20] == 0).all()
    torch.testing.assert_close(flat[:, :, 20:], torch.full((3, 40, 40), 0.5))


def test_a_spot_keeps_its_contrast_and_the_slope_below_it_goes() -> None:
    image = ramp(96, 160)
    image[:, 40:44, 100:104] += 0.1
    flat = Flattening(0.125, 0.1)(image)[0]
    inside = flat[:, 40:120]  # the borders, mirrored, keep some of the slope
    assert inside[42, 62] - inside[42, 50] == pytest.approx(0.1 * GAIN, abs=0.02)
    inside[40:44, 60:64] = 0.5
    assert (inside - 0.5).abs().max() < 0.06
    assert ramp(96, 160)[0, :, 40:120].sub(0.5).abs().max() > 0.09


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_blur_is_the_gaussian_of_the_tissue_alone(share: float) -> None:
    image = texture(200, 260)
    image[:, :, :90] = 0
    tissue = (image > 0.1).double()
    weighted, weight = (
        gaussian_filter(plane.numpy(), share * 200)
        for plane in ((image * tissue)[0].double(), tissue[0])
    )
    exact = 0.5 + GAIN * (image[0] - torch.from_numpy(weighted / weight.clip(1e-6)))
    exact = exact.clamp(DARKEST, 1) * tissue[0]
    flat = Flattening(share, 0.1)(image)[0]
    torch.testing.assert_close(flat.double(), exact, atol=0.03, rtol=0)


def test_tissue_is_never_as_black_as_background() -> None:
    image = ramp(40, 60)
    image[:, 10:12, 10:12] = 0.11
    flat = Flattening(0.2, 0.1)(image)
    assert flat.min() == pytest.approx(DARKEST)
    assert (Flattening(0.2, 0.1)(torch.zeros(1, 40, 60)) == 0).all()
