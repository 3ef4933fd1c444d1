"""Boxes, masks and weights of holes, against values worked out by hand."""

import pytest
import torch

from common.random_numbers import generator_for
from inpainter.masks import (
    crop_boxes,
    discount_weights,
    masks_from_deltas,
    random_boxes,
    shrunken_masks,
)
from inpainter.windows import centre_crop, centre_mask


def box_mask(boxes: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
    return masks_from_deltas(boxes, boxes.new_zeros(len(boxes), 2), image_hw)


def boxes_of(n: int, *, image=(40, 48), mask=(16, 32), margin=(2, 3), same=False) -> torch.Tensor:
    return random_boxes(n, image, mask, margin, same, generator_for("boxes"))


def test_corners_cover_every_position_but_the_last_that_fits():
    boxes = boxes_of(2000)
    assert boxes.dtype == torch.int64
    # height: corners 2 .. 22 fit inside the margin, 22 is never drawn
    assert set(boxes[:, 0].tolist()) == set(range(2, 22))
    assert set(boxes[:, 1].tolist()) == set(range(3, 13))
    assert boxes[:, 2:].unique(dim=0).tolist() == [[16, 32]]


def test_box_without_room_sits_at_the_margin():
    assert boxes_of(2, image=(20, 38)).tolist() == [[2, 3, 16, 32]] * 2


def test_same_gives_one_position_for_all_samples():
    assert len(boxes_of(50, same=True).unique(dim=0)) == 1
    assert len(boxes_of(50, same=False).unique(dim=0)) > 1


@pytest.mark.parametrize("change", [{"mask": (38, 32)}, {"margin": (-1, 0)}, {"mask": (0, 8)}])
def test_box_that_does_not_fit_is_refused(change):
    with pytest.raises(ValueError, match=r"does not fit into an image of height 40"):
        boxes_of(1, **change)


def test_mask_is_one_inside_the_box_and_zero_outside():
    mask = box_mask(torch.tensor([[1, 2, 2, 3]]), (4, 6))
    expected = [[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert mask.shape == (1, 1, 4, 6)
    assert mask.dtype == torch.float32
    assert mask[0, 0].tolist() == expected


def test_delta_shrinks_its_axis_on_both_sides_for_each_sample():
    boxes = torch.tensor([[0, 0, 6, 6], [1, 2, 6, 6]])
    masks = masks_from_deltas(boxes, torch.tensor([[1, 2], [0, 0]]), (8, 8))
    assert torch.equal(masks[:1], box_mask(torch.tensor([[1, 2, 4, 2]]), (8, 8)))
    assert masks[1].sum() == 36


def test_random_shrinking_takes_every_amount_up_to_half_of_max_delta():
    boxes = torch.tensor([[0, 0, 20, 30]]).expand(500, 4)
    masks = shrunken_masks(boxes, (20, 30), (5, 4), generator_for("deltas"))
    heights = masks[:, 0].amax(2).sum(1)
    widths = masks[:, 0].amax(1).sum(1)
    assert set(heights.tolist()) == {20.0, 18.0, 16.0}
    assert set(widths.tolist()) == {30.0, 28.0, 26.0}
    assert len(torch.stack([heights, widths], 1).unique(dim=0)) == 9


def test_centre_crop_is_what_the_centre_mask_covers():
    x = torch.rand(2, 3, 10, 12)
    mask = centre_mask((10, 12), (4, 6)).bool()
    assert mask.shape == (1, 1, 10, 12)
    assert torch.equal(centre_crop(x, (4, 6)).flatten(), x.masked_select(mask))


def test_centre_of_an_image_smaller_than_the_hole_is_refused():
    with pytest.raises(ValueError, match=r"hole of \(4, 6\) does not fit"):
        centre_crop(torch.zeros(1, 1, 4, 5), (4, 6))


@pytest.mark.parametrize("corners", [[(0, 1), (2, 3)], [(1, 1), (1, 1)]])
def test_crop_boxes_cuts_each_samples_own_box(corners):
    x = torch.rand(2, 3, 6, 7, requires_grad=True)
    boxes = torch.tensor([[*corner, 3, 4] for corner in corners])
    crops = crop_boxes(x, boxes)
    assert crops.shape == (2, 3, 3, 4)
    for crop, image, (top, left) in zip(crops, x, corners, strict=True):
        assert torch.equal(crop, image[:, top : top + 3, left : left + 4])
    crops.sum().backward()
    assert torch.equal(x.grad, box_mask(boxes, (6, 7)).expand_as(x))


def test_discount_is_the_published_asymmetric_one():
    weights = discount_weights((4, 3), 0.5)
    # powers: rows 0 1 2 1, columns 0 1 1 (the last is as near as the first but one)
    expected = [[1, 1, 1], [1, 0.5, 0.5], [1, 0.5, 0.5], [1, 0.5, 0.5]]
    assert weights.shape == (1, 1, 4, 3)
    assert weights[0, 0].tolist() == expected


def test_discount_of_gamma_one_weighs_all_pixels_the_same():
    assert torch.equal(discount_weights((8, 8), 1.0), torch.ones(1, 1, 8, 8))
