"""Features to scores."""

import math

import pytest
import torch

import dia.scoring
from dia.encoders import Heads
from dia.features import ViewSettings, draw_samples, image_features
from dia.scoring import (
    ScoreError,
    calibration_error,
    check_reference,
    csi_score,
    fit_csi,
    marginal_logits,
    mean_over_samples,
    top1_error,
)


def random_features(n: int, n_shifts: int = 4, n_samples: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    views = n_shifts * n_samples
    simclr = torch.randn(n, views, 8, generator=generator)
    return simclr, torch.randn(n, views, n_shifts, generator=generator) + 1


def test_score_by_hand_of_two_train_images_and_one_shift() -> None:
    train = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]])
    logits = torch.tensor([[[2.0]], [[6.0]]])
    reference = fit_csi(train, logits, n_shifts=1)
    assert reference.weight_sim.tolist() == pytest.approx([0.5])  # mean norm 2
    assert reference.weight_shift.tolist() == pytest.approx([0.25])  # mean logit 4
    score = csi_score(reference, torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[8.0]]]))
    assert score.tolist() == pytest.approx([5 * 0.5 + 8 * 0.25])


def test_blocks_of_the_bank_do_not_change_scores(monkeypatch) -> None:
    reference = fit_csi(*random_features(50), n_shifts=4)
    queries = random_features(7)
    whole = csi_score(reference, *queries)
    monkeypatch.setattr(dia.scoring, "BLOCK", (2, 16))
    torch.testing.assert_close(csi_score(reference, *queries), whole)


def test_train_images_score_above_noise() -> None:
    train = random_features(40)
    reference = fit_csi(*train, n_shifts=4)
    noise = torch.randn(40, 12, 8, generator=torch.Generator().manual_seed(99)) * 0.3
    assert csi_score(reference, *train).mean() > csi_score(reference, noise, train[1]).mean()


def test_simclr_score_of_a_shifted_model_uses_the_unshifted_view() -> None:
    train, queries = random_features(10), random_features(5)
    four = fit_csi(*train, n_shifts=4, score="simclr")
    first = [part[:, :3] for part in (*train, *queries)]
    one = fit_csi(first[0], first[1], n_shifts=1, score="simclr")
    torch.testing.assert_close(csi_score(four, *queries), csi_score(one, *first[2:]))


def test_shift_weights_of_the_wrong_sign_are_reported() -> None:
    simclr, logits = random_features(6)
    logits[:, 3:6, 1] = -5.0  # samples of shift 1
    (warning,) = check_reference(fit_csi(simclr, logits, n_shifts=4))
    assert "shift 1 is negative" in warning


def test_weights_that_are_not_finite_are_refused() -> None:
    simclr, logits = random_features(6)
    with pytest.raises(ScoreError, match="not finite"):
        check_reference(fit_csi(simclr, logits * 0, n_shifts=4))


def test_views_that_do_not_split_into_shifts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected features \(N, 4·samples, d\), got \(2, 6, 8\)"):
        mean_over_samples(torch.zeros(2, 6, 8), 4)


def test_marginal_logits_take_the_block_of_each_shift() -> None:
    joint = torch.zeros(4, 1, 8)
    for k in range(4):
        joint[k, 0, 2 * k + 1] = float(k)
    assert marginal_logits(joint).tolist() == [[0.0, 1.5]]


def test_error_and_calibration_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]))
    labels = torch.tensor([0, 1, 1, 0])
    assert top1_error(logits, labels) == pytest.approx(25.0)
    expected = (abs(1.8 - 1) + abs(0.8 - 1) + abs(0.6 - 1)) / 4  # three bins
    assert calibration_error(logits, labels) == pytest.approx(100 * expected, abs=1e-4)


def test_features_change_neither_with_batch_size_nor_with_order() -> None:
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    views = ViewSettings("cutperm", 4, 2, (0.08, 1.0), "per_image", seed=3, batch_size=5)

    def encoder(rows: torch.Tensor, *_: str) -> Heads:
        flat = rows.flatten(1)
        return Heads(flat, flat, flat, flat[:, :4])

    def features(order: list[int], size: int) -> torch.Tensor:
        parts = []
        for start in range(0, 5, size):
            numbers = order[start : start + size]
            draws = draw_samples(views, ["abcde"[i] for i in numbers], (8, 8))
            parts.append(image_features(encoder, images[numbers], "cutperm", 4, draws)[0])
        return torch.cat(parts)

    whole, shuffled = features([0, 1, 2, 3, 4], 5), features([4, 2, 0, 1, 3], 2)
    assert whole.shape == (5, 8, 192)
    torch.testing.assert_close(whole[[4, 2, 0, 1, 3]], shuffled, rtol=0, atol=1e-6)
    assert not math.isclose(whole[0, 0, 0].item(), whole[0, 1, 0].item())
