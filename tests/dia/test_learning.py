"""Encoders, losses, LARS and the learning rate."""

import math

import pytest
import torch

from common.checkpoint import CheckpointError
from dia.encoders import ENCODER_NAMES, build_encoder, load_weights
from dia.losses import (
    contrastive_losses,
    gathered_similarity,
    heads_for,
    nt_xent,
    nt_xent_with_negatives,
    simsiam_loss,
)
from dia.optim import Lars, learning_rate
from dia.settings import ContrastiveConfig


def test_every_published_model_is_built_with_its_heads() -> None:
    for name in ENCODER_NAMES:
        with torch.device("meta"):
            encoder = build_encoder(name, n_classes=2, n_shifts=4)
        assert encoder.width == (2048 if "50" in name else 512)
        assert hasattr(encoder, "predictor") == name.endswith("simsiam")


@pytest.mark.parametrize("side", [16, 28, 32, 64])
def test_small_image_encoder_takes_images_of_several_sizes(side: int) -> None:
    encoder = build_encoder("resnet18", n_classes=2, n_shifts=4, width=8).eval()
    with torch.no_grad():
        heads = encoder(torch.rand(1, 3, side, side), "simclr", "shift", "joint")
    assert heads.penultimate.shape == (1, 64)
    assert (heads.simclr.shape, heads.shift.shape, heads.joint.shape) == ((1, 128), (1, 4), (1, 8))


def test_unknown_model_and_head_are_refused() -> None:
    with pytest.raises(ValueError, match="'resnet19' is unknown; choose from resnet18"):
        build_encoder("resnet19", n_classes=2, n_shifts=4)
    with pytest.raises(ValueError, match="width"):
        build_encoder("resnet18_imagenet", n_classes=2, n_shifts=4, width=8)
    with pytest.raises(ValueError, match="no head predictor"):
        build_encoder("resnet18", n_classes=2, n_shifts=4, width=8)(
            torch.rand(1, 3, 16, 16), "predictor"
        )


def test_weights_of_another_architecture_are_refused() -> None:
    two, four = (build_encoder("resnet18", n_classes=2, n_shifts=k, width=8) for k in (1, 4))
    with pytest.raises(CheckpointError, match=r"shift_cls_layer.weight: \(1, 64\) for \(4, 64\)"):
        load_weights(four, two.state_dict(), source="last.model")
    state = two.state_dict()
    del state["linear.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(linear\.bias\)"):
        load_weights(two, state, source="last.model")
    load_weights(two, state, source="last.model", strict=False)


def test_what_fits_of_other_weights_is_taken_and_the_rest_named(caplog) -> None:
    two, three = (build_encoder("resnet18", n_classes=n, n_shifts=4, width=8) for n in (2, 3))
    before = three.linear.weight.clone()
    load_weights(three, two.state_dict(), source="last.model", strict=False)
    assert torch.equal(three.conv1.weight, two.conv1.weight)
    assert torch.equal(three.linear.weight, before)
    assert "last.model: not taken, of another shape: joint_distribution_layer.bias" in caplog.text
    assert "linear.weight: (2, 64) for (3, 64)" in caplog.text


def test_perfect_pairs_lose_less_than_swapped_ones() -> None:
    features = torch.eye(4)
    pairs = gathered_similarity(torch.cat([features, features]), 2)
    swapped = gathered_similarity(torch.cat([features, features.flip(0)]), 2)
    assert nt_xent(pairs) < nt_xent(swapped)


def test_own_dissolved_copy_counts_in_naive_mode_alone() -> None:
    features = torch.eye(3)
    similarity = gathered_similarity(torch.cat([features] * 3), 3)
    naive, removed = (
        nt_xent_with_negatives(similarity, 0.5, m) for m in ("naive", "shifted_removed")
    )
    assert naive > removed
    # Each row keeps its positive (similarity 1) and six others (0); 2 of 3 views are summed.
    expected = 2 / 3 * math.log((math.exp(2) + 6) / math.exp(2))
    assert removed.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="loss_mode must be"):
        nt_xent_with_negatives(similarity, 0.5, "other")
    with pytest.raises(ValueError, match="3 views"):
        nt_xent_with_negatives(torch.eye(4))


def test_simsiam_loss_of_equal_views_is_minus_one_and_spares_the_projector() -> None:
    predictor = torch.rand(2, 5).repeat(3, 1).requires_grad_()
    projector = predictor.detach().clone().requires_grad_()
    loss = simsiam_loss(predictor, projector)
    assert loss.item() == pytest.approx(-1.0, abs=1e-6)
    loss.backward()
    assert projector.grad is None


@pytest.mark.parametrize("mode", ["simclr", "simclr_CSI", "simclr_DIA"])
def test_every_mode_has_a_finite_loss_that_reaches_the_stem(mode: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", n_classes=2, n_shifts=4, width=8)
    rows = {"simclr": 4, "simclr_CSI": 16, "simclr_DIA": 24}[mode]
    objective = ContrastiveConfig(mode=mode, shift_trans_type="rotation")
    heads = encoder(torch.rand(rows, 3, 16, 16), *heads_for(objective, simsiam=False))
    losses = contrastive_losses(heads, torch.arange(rows) % 4, objective)
    losses.total.backward()
    assert losses.total.isfinite()
    assert encoder.conv1.weight.grad.norm() > 0
    assert (losses.shift == 0) == (mode == "simclr")


def test_lars_steps_by_a_fraction_of_the_weights_norm() -> None:
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    param.grad = torch.tensor([100.0, 0.0])
    Lars([param], lr=2.0, momentum=0.0, trust=0.001).step()
    moved = torch.tensor([3.0, 4.0]) - param.detach()
    assert moved.tolist() == pytest.approx([2.0 * 0.001 * 5.0, 0.0], rel=1e-5)


def test_lars_state_can_be_saved_and_restored() -> None:
    def run(steps: int, restart_at: int | None) -> torch.Tensor:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = Lars([param], lr=1.0, trust=0.1)
        for step in range(steps):
            if step == restart_at:
                saved = optimizer.state_dict()
                optimizer = Lars([param], lr=1.0, trust=0.1)
                optimizer.load_state_dict(saved)
            param.grad = torch.tensor([1.0, 2.0, 3.0]) * (step + 1)
            optimizer.step()
        return param.detach()

    assert torch.equal(run(6, None), run(6, 3))


def test_learning_rate_climbs_to_ten_times_and_never_ends() -> None:
    def rate(epoch: float, schedule: str = "cosine") -> float:
        return learning_rate(
            epoch, initial=0.1, warmup=10, epochs=30, batches=10, schedule=schedule
        )

    assert rate(0) == pytest.approx(0.1)
    assert rate(5) == pytest.approx(0.55)
    assert rate(10) == rate(10.1) == pytest.approx(1.0)
    assert rate(30) == pytest.approx((1 + math.cos(math.pi * 20 / 30)) / 2)
    assert [rate(e, "step_decay") for e in (24, 26, 39)] == pytest.approx([1.0, 0.1, 0.01])
    with pytest.raises(ValueError, match="lr_scheduler must be"):
        rate(20, "linear")
