import pytest
import torch

from inpainter.networks.attention import contextual_attention

SIZE = (16, 24)


def features(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 6, *SIZE, generator=torch.Generator().manual_seed(seed))


def hole(top: int, left: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, 4 * SIZE[0], 4 * SIZE[1])
    mask[:, :, top : top + 16, left : left + 16] = 1
    return mask


def test_a_batch_gives_what_its_samples_give_alone() -> None:
    f, b = features(3), features(3, seed=1)
    masks = torch.cat([hole(8, 8), hole(32, 40), hole(0, 70)])
    together = contextual_attention(f, b, masks).output
    alone = [contextual_attention(f[i : i + 1], b[i : i + 1], masks[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat([a.output for a in alone]))


def test_keys_that_touch_the_hole_are_never_copied() -> None:
    mask = hole(16, 16)
    x = features(1) * 0.1
    weights = contextual_attention(x, x, mask).weights
    weights = weights.unflatten(1, (SIZE[0] // 2, SIZE[1] // 2))
    # the hole covers rows and columns 2 and 3 of the keys' grid; a 3x3 patch reaches one further
    assert (weights[:, 1:5, 1:5] == 0).all()
    assert (weights[:, 5:] > 0).all()


def test_unusable_keys_stay_in_the_denominator() -> None:
    x = features(1) * 0.1
    weights = contextual_attention(x, x, hole(16, 16)).weights
    sums = weights.sum(dim=1)
    assert (sums <= 1 + 1e-6).all()
    assert (sums < 1 - 1e-6).any()


def test_without_a_mask_every_position_copies_itself() -> None:
    x = features(1) * 3
    best = contextual_attention(x, x).weights.argmax(dim=1)  # (1, queries): number of a key
    assert (best == torch.arange(best.shape[1])).float().mean() > 0.99


def test_one_mask_serves_the_whole_batch() -> None:
    x = features(2)
    one = contextual_attention(x, x, hole(8, 8)).output
    each = contextual_attention(x, x, hole(8, 8).expand(2, -1, -1, -1)).output
    torch.testing.assert_close(one, each)


def test_odd_sides_and_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="even height and width"):
        contextual_attention(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"the mask must be \(_, 1, 64, 96\)"):
        contextual_attention(features(1), features(1), torch.zeros(1, 1, 32, 32))
