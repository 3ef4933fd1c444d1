"""Boxes and masks of holes: pure functions of their arguments and a random generator.

N samples, H W image and h w box in pixels. A box is (top, left, height, width); in a mask 1 = hole,
0 = known. Results lie on the device of the boxes.
"""

import torch
from torch import Tensor


def random_boxes(
    n: int,
    image_hw: tuple[int, int],
    mask_hw: tuple[int, int],
    margin: tuple[int, int],
    same: bool,
    generator: torch.Generator,
) -> Tensor:
    """Draws n boxes of mask_hw uniformly inside the image, at least margin from its border.

    The corner is uniform in [margin, size - margin - mask): as in the published code the last
    position that fits is never drawn; where no other fits, the corner is the margin.
    same: one position for all n.
    Returns (n, 4) int64: top, left, height, width in pixels, on the generator's device.
    Raises ValueError where box and margins do not fit into the image.
    """
    corners = []
    for size, mask, gap, axis in zip(image_hw, mask_hw, margin, ("height", "width"), strict=True):
        room = size - 2 * gap - mask
        if room < 0 or gap < 0 or mask < 1:
            raise ValueError(
                f"A box of {axis} {mask} with a margin of {gap} on both sides does not fit into an "
                f"image of {axis} {size} (pixels); make the box or the margin smaller"
            )
        draws = (1 if same else n,)
        corner = torch.randint(
            gap, gap + max(room, 1), draws, generator=generator, device=generator.device
        )
        corners.append(corner.expand(n))
    sides = [torch.full_like(corners[0], side) for side in mask_hw]
    return torch.stack([*corners, *sides], dim=1)  # (n, 4)


def shrunken_masks(
    boxes: Tensor, image_hw: tuple[int, int], max_delta: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Masks of the boxes, each shrunk on every side by a random amount.

    The amount is uniform in {0, ..., max_delta // 2} pixels, drawn per sample and axis: the same at
    top and bottom, and the same at left and right.
    boxes: (N, 4)   returns: (N, 1, H, W) float, 1 = hole.
    """
    draws = {"size": (len(boxes),), "generator": generator, "device": generator.device}
    deltas = [torch.randint(most // 2 + 1, **draws) for most in max_delta]
    return masks_from_deltas(boxes, torch.stack(deltas, dim=1), image_hw)


def masks_from_deltas(boxes: Tensor, deltas: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Masks of the boxes shrunk by given amounts.

    boxes: (N, 4)   deltas: (N, 2) pixels off each side, vertical and horizontal
    returns: (N, 1, H, W) float, 1 = hole.
    """
    deltas = deltas.to(boxes.device)
    inside = []
    for axis, size in enumerate(image_hw):
        first = boxes[:, axis] + deltas[:, axis]
        end = boxes[:, axis] + boxes[:, axis + 2] - deltas[:, axis]
        at = torch.arange(size, device=boxes.device)
        inside.append((at >= first[:, None]) & (at < end[:, None]))  # (N, size)
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[:, None].float()  # (N, 1, H, W)


def crop_boxes(x: Tensor, boxes: Tensor) -> Tensor:
    """Cuts each sample's box out of it.

    x: (N, C, H, W)   boxes: (N, 4), all of one height and width   returns: (N, C, h, w).
    Keep the boxes on the CPU: their numbers are read here.
    """
    corners = boxes.tolist()
    # unbind, so that the gradient of one crop is as large as one sample and not as the batch
    return torch.stack(
        [
            sample[:, top : top + height, left : left + width]
            for sample, (top, left, height, width) in zip(x.unbind(0), corners, strict=True)
        ]
    )


def discount_weights(
    mask_hw: tuple[int, int], gamma: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Weights of the hole's L1, falling from its border to its centre (Yu et al. 2018).

    weight(i, j) = max(gamma^min(i, h - i), gamma^min(j, w - j)) with i, j from 0. As published this
    is not symmetric: the first row and column weigh gamma^0, the last gamma^1.
    gamma: in (0, 1]   returns: (1, 1, h, w) float32 in (0, 1].
    """
    powers = []
    for size in mask_hw:
        at = torch.arange(size, dtype=torch.float64)
        powers.append(gamma ** torch.minimum(at, size - at))
    weights = torch.maximum(powers[0][:, None], powers[1][None, :])
    return weights[None, None].float().to(device)
