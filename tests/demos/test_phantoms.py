"""Phantoms: reproducible, with lesions that fit the hole and that brightness does not give away."""

import numpy as np
import pytest

from common.annotations import boxes_to_labels, read_annotations
from common.images import read_image
from common.metrics import score_heatmap
from demos.data.lesions import MAX_LESION_PX
from demos.data.phantoms import LESION_KINDS, PhantomStyle, draw_phantom, write_phantoms

SEEDS = range(700, 706)


def test_equal_seeds_give_equal_phantoms_and_other_seeds_others():
    first, again = (draw_phantom(3, lesions=("mass",)) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert first.lesions == again.lesions
    assert not np.array_equal(first.image, draw_phantom(4, lesions=("mass",)).image)


def test_image_is_in_range_and_black_exactly_outside_the_body():
    phantom = draw_phantom(5)
    assert phantom.image.dtype == np.float32
    assert phantom.image.min() >= 0
    assert phantom.image.max() <= 1
    assert np.array_equal(phantom.image > 0, phantom.body)
    assert 0.5 < phantom.body.mean() < 0.95
    assert not phantom.lesion_mask.any()


@pytest.mark.parametrize("kind", LESION_KINDS)
def test_lesion_fits_the_hole_and_its_box_is_that_of_its_mask(kind):
    for seed in SEEDS:
        phantom = draw_phantom(seed, lesions=(kind, kind))
        assert [lesion.kind for lesion in phantom.lesions] == [kind, kind]
        boxes = [(box.top, box.left, box.height, box.width) for box in phantom.lesions]
        labels = boxes_to_labels(boxes, phantom.image.shape)
        assert not (phantom.lesion_mask & ~labels).any()
        for top, left, height, width in boxes:
            assert max(height, width) <= MAX_LESION_PX
            inside = phantom.lesion_mask[top : top + height, left : left + width]
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)


@pytest.mark.parametrize("kind", LESION_KINDS)
def test_lesion_changes_the_image_at_its_place_only(kind):
    for seed in SEEDS:
        normal, phantom = draw_phantom(seed), draw_phantom(seed, lesions=(kind,))
        change = np.abs(phantom.image - normal.image)
        (box,) = phantom.lesions
        near = boxes_to_labels(
            [(box.top - 4, box.left - 4, box.height + 8, box.width + 8)], change.shape
        )
        assert change[~near].max() < 0.02
        assert change[phantom.lesion_mask].max() > 0.02


def test_brightness_does_not_find_masses():
    scores = []
    for seed in range(800, 816):
        phantom = draw_phantom(seed, lesions=("mass", "mass"))
        scores.append(score_heatmap(phantom.image, phantom.lesion_mask, ~phantom.body).auroc)
    assert 0.3 < np.mean(scores) < 0.7


def test_unknown_lesion_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown lesion kind 'cyst'.*mass"):
        draw_phantom(0, lesions=("cyst",))


def test_mass_larger_than_the_hole_is_refused():
    with pytest.raises(ValueError, match="mass_radius"):
        PhantomStyle(mass_radius=(5, 12))


def test_written_folder_reads_back_with_boxes_and_masks(tmp_path):
    n_test = {"mass": 2, "calcifications": 1}
    data = write_phantoms(tmp_path, 1, n_train=2, n_held_out=1, n_test=n_test)
    held_out = [read_image(path) for path in (tmp_path / "held_out").iterdir()]
    assert len(held_out) == 1
    for path in (tmp_path / "train").iterdir():
        assert not read_image(path).equal(held_out[0])
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == sorted(data.train)
    boxes = read_annotations(tmp_path / "boxes.csv", list(data.test))
    masks = read_annotations(tmp_path / "masks", list(data.test))
    for name, phantom in data.test.items():
        image = read_image(tmp_path / "test" / name, channels=1)[0].numpy()
        assert np.abs(image - phantom.image).max() <= 0.5 / 255 + 1e-6
        size = phantom.image.shape
        assert np.array_equal(masks.labels(name, size), phantom.lesion_mask)
        assert not (phantom.lesion_mask & ~boxes.labels(name, size)).any()
