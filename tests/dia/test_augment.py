"""SimCLR augmentation and the three sources of its parameters."""

from dataclasses import replace

import numpy as np
import torch

from dia.augment import (
    DRAWS,
    augment,
    augmentation_from_uniforms,
    crop,
    flip,
    hsv_to_rgb,
    keyed_uniforms,
    published_crop_boxes,
    random_augmentation,
    rgb_to_hsv,
)
from dia.features import ViewSettings, per_image_draws, published_draws, shifted_rows

CROPS = (0.08, 1.0)
SHIFTED = ViewSettings("rotation", 4, 2, CROPS, "per_image", seed=0, batch_size=4)


def sample_images(n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_crop_of_the_whole_image_is_the_image() -> None:
    images = sample_images()
    whole = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(4, 4)
    torch.testing.assert_close(crop(images, whole), images, rtol=0, atol=1e-5)


def test_hsv_of_grey_has_no_hue_and_comes_back() -> None:
    grey = torch.full((1, 3, 2, 2), 0.4)
    hsv = rgb_to_hsv(grey)
    assert hsv[:, :2].eq(0).all()
    torch.testing.assert_close(hsv_to_rgb(hsv), grey)
    assert rgb_to_hsv(torch.zeros(1, 3, 2, 2)).isfinite().all()


def test_flip_mirrors_only_negative_signs() -> None:
    images = sample_images(2)
    flipped = flip(images, torch.tensor([-1.0, 1.0]))
    assert torch.equal(flipped[0], images[0].flip(2))
    assert torch.equal(flipped[1], images[1])


def test_batch_draws_share_one_order_and_repeat_with_the_generator() -> None:
    draws = [
        random_augmentation(64, (16, 16), CROPS, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0].crop, draws[1].crop)
    assert not torch.equal(draws[0].crop, draws[2].crop)
    assert draws[0].jitter.contrast_first.unique().numel() == 1
    assert 0.6 < draws[0].jitter.apply.float().mean() < 0.95


def test_crops_lie_inside_the_image_and_have_the_wanted_area() -> None:
    uniforms = torch.rand(200, DRAWS, generator=torch.Generator().manual_seed(0)).double()
    width, height, right, down = augmentation_from_uniforms(uniforms, (64, 64), (0.54, 0.54))[2].T
    assert (right.abs() <= 1 - width + 1e-6).all()
    assert (down.abs() <= 1 - height + 1e-6).all()
    assert ((width * height - 0.54).abs() < 0.02).all()


def test_our_crops_are_distributed_as_the_published_ones() -> None:
    ours = random_augmentation(4000, (32, 32), CROPS, torch.Generator().manual_seed(0)).crop
    theirs = published_crop_boxes(4000, 32, CROPS, np.random.RandomState(0))
    for moment in (torch.mean, torch.std):
        assert (moment(ours, 0) - moment(theirs, 0)).abs().max() < 0.02


def test_keyed_numbers_depend_on_the_key_alone_and_are_uniform() -> None:
    keys = [3, 2**63 + 5, 17]
    numbers = keyed_uniforms(keys, 1000)
    assert torch.equal(numbers[1:2], keyed_uniforms(keys[1:2], 1000))
    assert 0 <= numbers.min() < numbers.max() < 1
    assert (numbers.mean(dim=1) - 0.5).abs().max() < 0.05
    assert not torch.equal(numbers[0], numbers[1])


def test_per_image_views_do_not_depend_on_the_batch() -> None:
    images, names = sample_images(), ["a", "b", "c", "d"]
    drawn = [per_image_draws(SHIFTED, 1, n, (16, 16)) for n in (names, ["c"])]
    together = shifted_rows(images, "rotation", 4, drawn[0])
    alone = shifted_rows(images[2:3], "rotation", 4, drawn[1])
    torch.testing.assert_close(together[2::4], alone, rtol=0, atol=1e-6)


def test_published_views_depend_on_the_place_in_the_batch() -> None:
    images = sample_images(1).expand(3, -1, -1, -1)
    drawn = published_draws(SHIFTED, 0, 3, (16, 16))
    rows = shifted_rows(images, "rotation", 4, drawn)
    assert not torch.allclose(rows[0], rows[2], atol=1e-3)


def test_unshifted_features_are_not_flipped() -> None:
    unshifted = replace(SHIFTED, n_shifts=1)
    assert per_image_draws(unshifted, 0, ["a"], (16, 16)).signs is None
    assert published_draws(unshifted, 0, 1, (16, 16)).signs is None


def test_augmented_images_keep_their_shape_and_are_finite() -> None:
    images = sample_images() * 2 - 1  # dissolved images may be negative
    parameters = random_augmentation(4, (16, 16), CROPS, torch.Generator().manual_seed(5))
    augmented = augment(images, parameters)
    assert augmented.shape == images.shape
    assert augmented.isfinite().all()
