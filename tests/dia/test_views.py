"""Shifts, blurs, dissolving steps and the views of a training batch."""

import pytest
import torch

from common.config import ConfigError
from dia.shifts import (
    SHIFT_NAMES,
    median_blur,
    parse_shift,
    shift,
    shift_each,
)
from dia.views import (
    BetaParameters,
    Draws,
    NegativeViewConfig,
    beta_parameters,
    draw_views,
    make_views,
    sample_beta,
    shift_labels,
    timestep_from_uniform,
)
from diffusion_models.dissolve import from_dissolving_size, to_dissolving_size


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def no_flips(n: int, k: int, t: int = 50) -> Draws:
    return Draws(torch.ones(2 * n), torch.ones(k, n), torch.full((k,), t))


def test_twelve_published_names_and_the_readmes_spellings_are_accepted() -> None:
    assert len(SHIFT_NAMES) == 15
    assert parse_shift("blurgaussian_rotation") == parse_shift("blurgaussian")
    assert parse_shift("diffusion") == parse_shift("diffusion_rotation")
    assert parse_shift("none").count == 1
    with pytest.raises(ValueError, match="'rotate' is unknown"):
        parse_shift("rotate")


@pytest.mark.parametrize("base", ["rotation", "cutperm"])
def test_four_shifts_of_an_image_differ_and_the_first_is_the_image(images, base: str) -> None:
    views = [shift(images, k, base) for k in range(4)]
    assert torch.equal(views[0], images)
    different = {tuple(view.flatten().tolist()) for view in views}
    assert len(different) == 4


def test_rotating_images_that_are_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="square images, got 8×6"):
        shift_each([torch.zeros(1, 3, 8, 6)] * 4, "rotation")


def test_median_blur_removes_a_single_speck() -> None:
    image = torch.full((1, 1, 9, 9), 0.5)
    image[0, 0, 4, 4] = 1.0
    assert median_blur(image, 3)[0, 0, 1:-1, 1:-1].eq(0.5).all()


@pytest.mark.parametrize(("size", "fit"), [(28, "pad"), (32, "none"), (48, "resize")])
def test_dissolving_size_is_reached_and_left_again(size: int, fit: str) -> None:
    images = torch.rand(1, 3, size, size)
    small = to_dissolving_size(images, 32, fit)
    assert small.shape[-2:] == (32, 32)
    back = from_dissolving_size(small, (size, size), fit)
    assert back.shape == images.shape
    assert fit == "resize" or torch.equal(back, images)


def test_own_size_that_is_not_the_dissolving_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="own size, 48×48, but the diffusion model works at 32"):
        to_dissolving_size(torch.zeros(1, 3, 48, 48), 32, "none")


def test_steps_are_cut_off_as_published() -> None:
    assert timestep_from_uniform(torch.tensor([0.0, 0.999]), 0.3, 1.0).tolist() == [30, 99]


def test_reversed_schedulers_swap_the_parameters() -> None:
    for name in ("beta_skewed", "beta_by_epoch"):
        assert beta_parameters(name, 7) == beta_parameters(f"{name}_reversed", 7)[::-1]
    with pytest.raises(ValueError, match="diffusion_scheduler must be"):
        beta_parameters("cosine", 1)


def test_draws_follow_the_distribution_and_the_generator() -> None:
    strong, weak = BetaParameters(20.0, 2.0), BetaParameters(2.0, 20.0)
    draws = [sample_beta(p, 100, torch.Generator().manual_seed(3)) for p in (strong, strong, weak)]
    assert torch.equal(draws[0], draws[1])
    assert draws[0].mean() > 0.8 > 0.2 > draws[2].mean()


def test_all_shifts_of_a_step_are_dissolved_in_one_call(images) -> None:
    calls = []

    def dissolve(batch: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append((batch.shape[0], t.tolist()))
        return batch - 2

    draws = no_flips(2, 4)._replace(t=torch.tensor([30, 40, 50, 60]))
    negatives = NegativeViewConfig(dissolve=dissolve, resolution=8, fit="none")
    views = make_views(images, "simclr_DIA", parse_shift("diffusion_rotation"), draws, negatives)
    assert calls == [(8, [30, 30, 40, 40, 50, 50, 60, 60])]
    assert views.shape == (24, 3, 8, 8)
    assert torch.equal(views[:8], views[8:16])
    torch.testing.assert_close(views[16:], views[:8] - 2)
    labels = shift_labels(2, 4, 3, images.device)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 3


def test_blur_types_blur_all_views_as_published_or_the_negatives_alone(images) -> None:
    kind = parse_shift("blurgaussian_cutperm")
    for all_views in (True, False):
        negatives = NegativeViewConfig(blur_all_views=all_views, kernel_size=3)
        views = make_views(images, "simclr_DIA", kind, no_flips(2, 4), negatives)
        assert torch.equal(views[:2], images) != all_views
        assert not torch.equal(views[16:18], images)


def test_simclr_has_two_unshifted_views_and_csi_two_shifted_ones(images) -> None:
    kind = parse_shift("diffusion_rotation")
    assert make_views(images, "simclr", kind, no_flips(2, 1), NegativeViewConfig()).shape[0] == 4
    assert (
        make_views(images, "simclr_CSI", kind, no_flips(2, 4), NegativeViewConfig()).shape[0] == 16
    )


def test_diffusion_type_without_a_model_says_how_to_give_one(images) -> None:
    kind = parse_shift("diffusion_rotation")
    with pytest.raises(ValueError, match="--diffusion_model_path"):
        make_views(images, "simclr_DIA", kind, no_flips(2, 4), NegativeViewConfig())


def test_steps_drawn_stay_within_the_offsets() -> None:
    draws = draw_views(
        4,
        4,
        beta=BetaParameters(1.0, 1.0),
        offset=0.3,
        upper=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert draws.signs12.shape == (8,)
    assert draws.signs3.shape == (4, 4)
    assert 30 <= draws.t.min() <= draws.t.max() < 100
