import dataclasses

import pytest
import torch

from common.training import TrainingError, require_finite
from inpainter.masks import discount_weights, masks_from_deltas
from inpainter.networks import build_networks, layout_of
from inpainter.recorder import CollapseWatch
from inpainter.settings import PicardConfig, TrainConfig
from inpainter.step import (
    StepInputs,
    add_gradients,
    build_optimisers,
    gradient_penalty,
    learning_rate,
    step_losses,
    take_step,
    wasserstein_critic_loss,
    weighted_l1,
)
from tests.inpainter.weights import TRAINING, random_window

CONFIG = dataclasses.replace(TRAINING, train=dataclasses.replace(TRAINING.train, lr=1e-3))


def inputs(n: int = 3) -> StepInputs:
    boxes = torch.tensor([[8, 4, 16, 16]]).expand(n, 4)
    return StepInputs(
        real=random_window(n, (32, 32)),
        boxes=boxes,
        mask=masks_from_deltas(boxes, torch.tensor([[1, 2]]).expand(n, 2), (32, 32)),
        discount=discount_weights((16, 16), 0.9),
        alpha_local=torch.linspace(0, 1, n),
        alpha_global=torch.linspace(1, 0, n),
        drop=None,
    )


def networks(config: PicardConfig = CONFIG):
    torch.manual_seed(0)
    return build_networks(config, torch.device("cpu"))


def test_channels_last_is_for_gpus() -> None:
    train = TrainConfig(channels_last=True)
    assert layout_of(train, torch.device("cuda")) == torch.channels_last
    assert layout_of(train, torch.device("cpu")) == torch.contiguous_format
    assert layout_of(TrainConfig(), torch.device("cuda")) == torch.contiguous_format


def test_l1_weighs_each_pixel() -> None:
    weights = torch.tensor([[1.0, 0.5]])
    assert weighted_l1(torch.tensor([[3.0, -1.0]]), torch.zeros(1, 2), weights) == 1.75


def test_critics_loss_falls_as_real_scores_rise_above_fake_ones() -> None:
    real, fake = torch.tensor([[2.0], [4.0]]), torch.tensor([[1.0], [1.0]])
    assert wasserstein_critic_loss(real, fake) == -2.0


def test_gradient_penalty_of_a_linear_critic_is_its_slopes_distance_from_one() -> None:
    slope = torch.tensor([3.0, 4.0])  # norm 5
    real, fake = torch.randn(4, 2), torch.randn(4, 2)
    penalty = gradient_penalty(lambda x: (x * slope).sum(dim=1), real, fake, torch.rand(4))
    torch.testing.assert_close(penalty, torch.tensor(16.0))


def test_totals_are_the_weighted_terms() -> None:
    losses = step_losses(networks(), inputs(), CONFIG, with_generator=True)
    t = losses.terms
    torch.testing.assert_close(losses.d, t["wgan_d"] + 10 * t["wgan_gp"])
    torch.testing.assert_close(losses.g, 1.2 * t["l1"] + 1.2 * t["ae"] + 0.001 * t["wgan_g"])


def test_steps_between_generator_steps_leave_the_generator_without_gradient() -> None:
    nets = networks()
    losses = step_losses(nets, inputs(), CONFIG, with_generator=False)
    losses.d.backward()
    assert losses.g is None
    assert all(p.grad is None for p in nets.generator.parameters())
    assert all(p.grad is not None for p in nets.local_critic.parameters())


@pytest.mark.parametrize("clean", [False, True])
def test_adversarial_gradient_leaks_into_the_critics_step_unless_told_not_to(clean) -> None:
    train = dataclasses.replace(CONFIG.train, clean_critic_gradients=clean)
    config = dataclasses.replace(CONFIG, train=train, gan_loss_alpha=1.0)
    nets = networks(config)
    losses = step_losses(nets, inputs(), config, with_generator=True)
    parameters = list(nets.critics().parameters())
    only_d = torch.autograd.grad(losses.d, parameters, retain_graph=True, allow_unused=True)
    add_gradients(nets, losses, config)
    take_step(
        nets,
        build_optimisers(nets, config.train),
        config.train,
        with_generator=True,
    )
    same = [
        torch.allclose(p.grad, g, rtol=1e-4, atol=1e-7)
        for p, g in zip(parameters, only_d, strict=True)
        if g is not None
    ]
    assert all(same) == clean


def test_reconstruction_alone_trains_no_critic() -> None:
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, critic=False))
    nets = networks(config)
    before = [p.clone() for p in nets.critics().parameters()]
    losses = step_losses(nets, inputs(), config, with_generator=True)
    add_gradients(nets, losses, config)
    take_step(
        nets,
        build_optimisers(nets, config.train),
        config.train,
        with_generator=True,
    )
    assert set(losses.terms) == {"l1", "ae"}
    assert all(torch.equal(a, b) for a, b in zip(before, nets.critics().parameters(), strict=True))


def test_learning_rate_warms_up_then_stays_or_falls_to_zero() -> None:
    train = TrainConfig(lr=1.0, warmup_steps=10)
    assert learning_rate(train, 0, 100) == pytest.approx(0.1)
    assert learning_rate(train, 50, 100) == 1.0
    cosine = dataclasses.replace(train, lr_schedule="cosine", warmup_steps=0)
    assert learning_rate(cosine, 50, 100) == pytest.approx(0.5)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.0)


def test_a_loss_that_is_not_finite_stops_with_step_and_terms() -> None:
    require_finite(3, {"l1": 0.5})
    with pytest.raises(TrainingError, match=r"not finite at step 7: l1 nan, d 2"):
        require_finite(7, {"l1": float("nan"), "d": 2.0})


def test_an_output_stuck_at_the_clamp_is_recognised() -> None:
    watch = CollapseWatch()
    real, mask = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    assert watch.check(0, torch.zeros_like(real), real, mask) == 0
    stuck = torch.ones_like(real)
    assert [watch.check(step, stuck, real, mask) for step in range(1, 5)] == [1] * 4
    with pytest.raises(TrainingError, match="generator collapsed: at step 5, 100%"):
        watch.check(5, stuck, real, mask)


def test_a_hole_that_really_is_black_is_no_collapse() -> None:
    watch = CollapseWatch()
    black, mask = -torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    shares = [watch.check(step, black, black, mask) for step in range(20)]
    assert shares == [0] * 20


@pytest.mark.parametrize("stages", ["coarse", "coarse_fine"])
def test_bf16_changes_a_step_by_rounding_only_and_leaves_losses_and_gradients_fp32(stages) -> None:
    generator = dataclasses.replace(CONFIG.netG, stages=stages)
    found = {}
    for precision in ("fp32", "bf16"):
        train = dataclasses.replace(CONFIG.train, precision=precision)
        config = dataclasses.replace(CONFIG, train=train, netG=generator)
        nets = networks(config)
        losses = step_losses(nets, inputs(), config, with_generator=True)
        losses.g.backward()
        gradients = [weight.grad for weight in nets.generator.parameters()]
        assert all(tensor.dtype == torch.float32 for tensor in [losses.composite, *gradients])
        found[precision] = {name: value.item() for name, value in losses.named().items()}
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.03, abs=1e-3)
