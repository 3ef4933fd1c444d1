"""Training crops: reproducible, useful, and never an endless loop."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.images import ImageError, read_image, to_signed, write_image, write_image16
from common.notices import counts, forget
from common.random_numbers import generator_for
from common.shading import Flattening
from inpainter.data import CropRule, NormalCrops, fixed_crops, split_held_out

SHAPE = (16, 16, 1)


def textured(number: int, *size: int) -> torch.Tensor:
    """An image whose every crop is recognisable, nowhere black."""
    return 0.1 + 0.9 * torch.rand(*size, generator=generator_for("texture", number))


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """Five images of 24 x 30 pixels: 8 and 16 bits, grey and colour."""
    for number in range(5):
        path = tmp_path / f"{number}.png"
        if number == 3:
            write_image16(path, textured(number, 24, 30))
        else:
            write_image(path, textured(number, 3 if number == 4 else 1, 24, 30))
    return sorted(tmp_path.iterdir())


def patches(paths: list[Path], **changes: object) -> NormalCrops:
    """Crops by the settings' names: those of CropRule, image_shape, and NormalCrops' own."""
    height, width, channels = changes.pop("image_shape", SHAPE)
    of_rule = {name: changes.pop(name) for name in CropRule.__annotations__ if name in changes}
    rule = CropRule((height, width), **of_rule)
    return NormalCrops(paths, rule, **{"channels": channels, "seed": 7} | changes)


def find(crop: torch.Tensor, image: torch.Tensor) -> tuple[int, int] | None:
    """Top and left of a crop (C, h, w) in an image (C, H, W)."""
    height, width = crop.shape[1:]
    corners = image[0, : image.shape[1] - height + 1, : image.shape[2] - width + 1]
    for top, left in (corners == crop[0, 0, 0]).nonzero().tolist():
        if torch.equal(image[:, top : top + height, left : left + width], crop):
            return top, left
    return None


def sources(dataset: NormalCrops, crops: torch.Tensor) -> list[int]:
    """Number of the image that each crop was cut from."""
    images = [to_signed(read_image(path, dataset.shape[0])) for path in dataset.paths]
    return [next(k for k, image in enumerate(images) if find(crop, image)) for crop in crops]


def test_crop_is_cut_out_of_an_image_in_the_networks_range(paths):
    dataset = patches(paths)
    crop = dataset[3]
    assert crop.shape == (1, 16, 16)
    assert crop.dtype == torch.float32
    assert sources(dataset, crop[None])[0] in range(5)


def test_crop_depends_on_seed_and_number_alone(paths):
    expected = [patches(paths)[i] for i in range(12)]
    dataset = patches(paths)
    for i in (11, 3, 3, 0, 7):
        assert torch.equal(dataset[i], expected[i])
    assert not torch.equal(patches(paths, seed=8)[3], expected[3])
    assert torch.equal(dataset.crops(range(12)), torch.stack(expected))


def test_every_epoch_shows_every_image_once_in_another_order(paths):
    dataset = patches(paths)
    orders = [sources(dataset, dataset.crops(range(5 * e, 5 * e + 5))) for e in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_crops_reach_every_corner_of_the_image(paths):
    dataset = patches(paths[:1])
    image = to_signed(read_image(paths[0]))
    corners = [find(crop, image) for crop in dataset.crops(range(600))]
    assert {top for top, _ in corners} == set(range(9))
    assert {left for _, left in corners} == set(range(15))


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_cache_does_not_change_a_bit(paths, cache_mb):
    dataset = patches(paths, cache_mb=cache_mb, flip=True)
    first, again = dataset.crops(range(20)), dataset.crops(range(20))
    assert torch.equal(first, again)
    assert torch.equal(first, patches(paths, flip=True).crops(range(20)))


def test_cached_images_are_not_read_again(paths):
    dataset = patches(paths, cache_mb=1)
    expected = dataset.crops(range(10))
    for path in paths:
        path.unlink()
    assert torch.equal(dataset.crops(range(10)), expected)


def test_flip_mirrors_about_half_of_the_crops(paths):
    plain, flipped = patches(paths).crops(range(200)), patches(paths, flip=True).crops(range(200))
    mirrored = [torch.equal(f, p.flip(2)) for f, p in zip(flipped, plain, strict=True)]
    kept = [torch.equal(f, p) for f, p in zip(flipped, plain, strict=True)]
    assert sum(mirrored) + sum(kept) == 200
    assert 60 < sum(mirrored) < 140


def test_image_smaller_than_the_crop_is_enlarged_until_it_fits(tmp_path):
    write_image(tmp_path / "a.png", textured(0, 8, 24))
    dataset = patches([tmp_path / "a.png"], image_shape=(32, 32, 1))
    assert dataset[0].shape == (1, 32, 32)
    assert dataset.rule.fit(read_image(tmp_path / "a.png")).shape == (1, 32, 96)


def test_without_random_crop_whole_images_are_resized(paths):
    dataset = patches(paths[:1], random_crop=False, image_shape=(32, 16, 1))
    expected = torch.nn.functional.interpolate(
        read_image(paths[0])[None], size=(32, 16), mode="bilinear", antialias=True
    )
    assert torch.allclose(dataset[0], to_signed(expected[0]))
    assert torch.equal(dataset[0], dataset[5])


def test_colour_crops_have_three_channels(paths):
    dataset = patches(paths, image_shape=(16, 16, 3))
    assert dataset.crops(range(5)).shape == (5, 3, 16, 16)
    assert sorted(sources(dataset, dataset.crops(range(5)))) == [0, 1, 2, 3, 4]


def half_black(folder: Path) -> Path:
    """An image with tissue in its right tenth alone."""
    image = torch.zeros(20, 100)
    image[:, 90:] = textured(0, 20, 10)
    write_image(folder / "half.png", image)
    return folder / "half.png"


def test_background_crops_are_drawn_again(tmp_path):
    crops = patches([half_black(tmp_path)]).crops(range(30))
    assert (crops.flatten(1).amax(1) >= -0.99).all()


def test_crops_with_too_little_tissue_are_drawn_again(tmp_path):
    dataset = patches([half_black(tmp_path)], min_tissue_fraction=0.3, tissue_threshold=0.05)
    tissue = (dataset.crops(range(30)) > 2 * 0.05 - 1).float().mean((1, 2, 3))
    assert tissue.min() >= 0.3


@pytest.fixture
def mixed(paths, tmp_path) -> list[Path]:
    """Two good images among one that is corrupt, one that is black and one that is missing."""
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    Image.new("L", (40, 40)).save(paths[2])
    return [*paths[:4], tmp_path / "gone.png"]


def test_bad_images_are_replaced_counted_and_named_once(mixed, caplog):
    dataset = patches(mixed)
    with caplog.at_level(logging.WARNING):
        crops = dataset.crops(range(40))
    good = patches([mixed[0], mixed[3]])
    assert set(sources(good, crops)) == {0, 1}
    assert set(dataset.skipped) == {mixed[1], mixed[2], mixed[4]}
    assert "Cannot read" in dataset.skipped[mixed[1]]
    assert dataset.skipped[mixed[2]] == "the whole image is black"
    assert "no such file" in dataset.skipped[mixed[4]]
    assert len(caplog.records) == 3


def test_crops_do_not_depend_on_when_a_bad_image_was_found(mixed):
    expected = patches(mixed).crops(range(30))
    dataset = patches(mixed)
    dataset.crops(range(100, 140))  # finds them all
    assert torch.equal(dataset.crops(range(30)), expected)


@pytest.mark.parametrize(
    ("number", "message"),
    [(1, r"1.png.*skip passes over"), (2, r"2.png: the whole image is black")],
)
def test_bad_image_stops_the_run_where_that_is_asked_for(mixed, number, message):
    with pytest.raises(ImageError, match=message):
        patches([mixed[number]], on_bad_image="error")[0]


def test_images_that_are_all_black_are_an_error_and_no_endless_loop(tmp_path):
    for number in range(3):
        Image.new("L", (40, 40)).save(tmp_path / f"{number}.png")
    with pytest.raises(ImageError, match=r"None of the 3 training images.*\d.png: the whole image"):
        patches(sorted(tmp_path.iterdir()))[0]


def test_tissue_fraction_that_no_crop_reaches_is_an_error_that_names_it(tmp_path):
    dataset = patches([half_black(tmp_path)], min_tissue_fraction=0.9)
    with pytest.raises(ImageError, match=r"tissue on 90% .*train.min_tissue_fraction is 0.9"):
        dataset[0]


def test_no_paths_at_all_are_refused():
    with pytest.raises(ImageError, match="No training images"):
        patches([])


def test_negative_crop_number_is_refused(paths):
    with pytest.raises(IndexError, match="start at 0, got -1"):
        patches(paths)[-1]


def test_subset_takes_its_fraction_by_seed(paths):
    assert len(patches(paths, subset_frac=0.4)) == 2
    assert len(patches(paths, subset_frac=0.01)) == 1
    assert patches(paths, subset_frac=0.4).paths == patches(paths, subset_frac=0.4).paths
    chosen = {tuple(patches(paths, subset_frac=0.4, seed=seed).paths) for seed in range(9)}
    assert len(chosen) > 1


def test_fixed_crops_are_others_than_those_trained_on_and_stay_the_same(paths):
    dataset = patches(paths)
    crops = fixed_crops(dataset, 7)
    assert crops.shape == (7, 1, 16, 16)
    assert torch.equal(crops, fixed_crops(patches(paths), 7))
    assert sorted(sources(dataset, crops[:5])) == [0, 1, 2, 3, 4]
    assert not any(torch.equal(a, b) for a, b in zip(crops, dataset.crops(range(7)), strict=True))


def test_nearly_black_image_is_passed_over_with_its_largest_value_and_range(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 299]] * 20, dtype=np.uint16).repeat(10, axis=1)).save(path)
    message = r"a.png: the whole image is black: its largest value is 299 of 65535 \(0.0046 of"
    with pytest.raises(ImageError, match=message):
        patches([path])[0]
    bright = patches([path], white_value=299)[0]
    assert bright.max() == 1


def test_every_epoch_shows_every_image_at_every_scale(tmp_path):
    for number in range(3):
        write_image(tmp_path / f"{number}.png", textured(number, 1, 40, 48))
    paths = sorted(tmp_path.iterdir())
    dataset = patches(paths, scales=[1, 0.5])
    images = [read_image(path, 1) for path in paths]
    halves = [F.interpolate(i[None], (20, 24), mode="bilinear", antialias=True)[0] for i in images]
    shown = [to_signed(image) for image in (*images, *halves)]
    crops = dataset.crops(range(len(dataset)))
    found = [next(k for k, image in enumerate(shown) if find(crop, image)) for crop in crops]
    assert sorted(found) == [0, 1, 2, 3, 4, 5]


def test_crops_are_those_of_the_flattened_image(paths):
    flattening = Flattening(0.2, 0.05)
    flat = [to_signed(flattening(read_image(path, 1))) for path in paths]
    for cached in (0, 64):
        dataset = patches(paths, flattening=flattening, cache_mb=cached)
        crops = dataset.crops(range(len(dataset)))
        found = [next(k for k, image in enumerate(flat) if find(crop, image)) for crop in crops]
        assert sorted(found) == [0, 1, 2, 3, 4]


def test_held_out_images_are_a_share_drawn_by_seed_and_never_all(paths):
    trained, held_out = split_held_out(paths, 0.4, seed=1)
    assert (len(trained), len(held_out)) == (3, 2)
    assert sorted([*trained, *held_out]) == paths
    assert split_held_out(paths, 0.4, seed=1) == (trained, held_out)
    assert any(split_held_out(paths, 0.4, seed)[1] != held_out for seed in range(2, 6))
    assert split_held_out(paths, 0, seed=1) == (paths, [])
    assert [len(part) for part in split_held_out(paths[:2], 0.01, seed=1)] == [1, 1]
    assert split_held_out(paths[:1], 0.5, seed=1) == (paths[:1], [])


def test_images_that_are_enlarged_for_crops_are_said_and_counted(paths) -> None:
    forget()
    fixed_crops(patches(paths, image_shape=(32, 32, 1)), 5)
    assert counts() == {"image smaller than a crop enlarged": 5}
    forget()
    fixed_crops(patches(paths), 5)
    assert counts() == {}
