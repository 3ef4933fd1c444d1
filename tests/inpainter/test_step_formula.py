"""A training step against the objective written out: every term by passes of its own."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from inpainter.masks import discount_weights, masks_from_deltas
from inpainter.networks import Networks, build_networks
from inpainter.networks.dropout import ChannelDropout
from inpainter.networks.generator import Generator
from inpainter.settings import PicardConfig
from inpainter.step import (
    StepInputs,
    add_gradients,
    build_optimisers,
    step_losses,
    take_step,
)
from tests.inpainter.weights import TRAINING, random_window

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = dataclasses.replace(
    TRAINING,
    gan_loss_alpha=0.5,  # published 0.001, which would hide a wrong adversarial gradient
    global_wgan_loss_alpha=0.7,
)


def changed(section: str, **values: object) -> PicardConfig:
    return dataclasses.replace(
        PLAIN, **{section: dataclasses.replace(getattr(PLAIN, section), **values)}
    )


def inputs(generator: Generator) -> StepInputs:
    """Three crops with boxes in different places, masks in different places of these, dropout."""
    boxes = torch.tensor([[8, 4, 16, 16], [0, 16, 16, 16], [5, 9, 16, 16]])
    draws = torch.Generator().manual_seed(4)
    keep = {
        name: torch.rand(3, width, generator=draws) >= 0.3
        for name, width in generator.droppable_layers().items()
    }
    return StepInputs(
        real=random_window(3, (32, 32)).double(),
        boxes=boxes,
        mask=masks_from_deltas(boxes, torch.tensor([[1, 2], [0, 4], [3, 0]]), (32, 32)).double(),
        discount=discount_weights((16, 16), 0.9).double(),
        alpha_local=torch.tensor([0.1, 0.5, 0.8]).double(),
        alpha_global=torch.tensor([0.9, 0.3, 0.6]).double(),
        drop=ChannelDropout(keep, 0.3),
    )


def networks(config: PicardConfig) -> Networks:
    """In float64: rounding of fp32 can put a critic's activation on the other side of its kink."""
    torch.manual_seed(0)
    return Networks(*(part.double() for part in build_networks(config, torch.device("cpu"))))


def written_out(
    nets: Networks, given: StepInputs, config: PicardConfig
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """The terms by name, the gradients of the generator and those that the critics' step uses."""
    real, mask = given.real, given.mask

    def box(x: Tensor) -> Tensor:
        corners = zip(x, given.boxes.tolist(), strict=True)
        return torch.stack(
            [y[:, top : top + h, left : left + w] for y, (top, left, h, w) in corners]
        )

    def penalty(critic: nn.Module, a: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
        alpha = alpha[:, None, None, None]
        x = (alpha * a + (1 - alpha) * b).requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return ((slope.square().sum(dim=(1, 2, 3)).sqrt() - 1) ** 2).mean()

    hole = real * (1 - mask)
    coarse, fine = nets.generator(hole, mask, given.drop)
    first, second = coarse * mask + hole, fine * mask + hole
    l1_coarse = ((box(first) - box(real)).abs() * given.discount).mean()
    l1_fine = ((box(second) - box(real)).abs() * given.discount).mean()
    ae_coarse = ((coarse - real).abs() * (1 - mask)).mean()
    ae_fine = ((fine - real).abs() * (1 - mask)).mean()
    fake, local, whole = second.detach(), nets.local_critic, nets.global_critic
    share = config.global_wgan_loss_alpha
    terms = {
        "l1": config.coarse_l1_alpha * l1_coarse + l1_fine,
        "ae": config.coarse_l1_alpha * ae_coarse + ae_fine,
        "wgan_d": (local(box(fake)) - local(box(real))).mean()
        + share * (whole(fake) - whole(real)).mean(),
        "wgan_gp": penalty(local, box(real), box(fake), given.alpha_local)
        + penalty(whole, real, fake, given.alpha_global),
        "wgan_g": -local(box(second)).mean() - share * whole(second).mean(),
    }
    d = terms["wgan_d"] + config.wgan_gp_lambda * terms["wgan_gp"]
    g = config.l1_loss_alpha * terms["l1"] + config.ae_loss_alpha * terms["ae"]
    g = g + config.gan_loss_alpha * terms["wgan_g"]
    critics = list(nets.critics().parameters())
    of_critics = torch.autograd.grad(d, critics)
    if not config.train.clean_critic_gradients:  # P6
        leaked = torch.autograd.grad(g, critics, retain_graph=True)
        of_critics = [a + b for a, b in zip(of_critics, leaked, strict=True)]
    of_generator = torch.autograd.grad(g, list(nets.generator.parameters()))
    return terms | {"d": d, "g": g}, list(of_generator), list(of_critics)


def taken(
    config: PicardConfig, given: StepInputs
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """The same three of the step that trains."""
    nets = networks(config)
    losses = step_losses(nets, given, config, with_generator=True)
    add_gradients(nets, losses, config)
    take_step(
        nets,
        build_optimisers(nets, config.train),
        config.train,
        with_generator=True,
    )
    grads = [[p.grad for p in part.parameters()] for part in (nets.generator, nets.critics())]
    return losses.named(), *grads


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative to each tensor's norm; where that is next to nothing, to the largest one's."""
    largest = max(x.norm() for x in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * torch.maximum(b.norm(), 0.01 * largest)


@pytest.mark.parametrize("clean", [False, True], ids=["leaky", "clean"])
@pytest.mark.parametrize("conv_type", ["plain", "gated"])
def test_losses_and_gradients_are_those_of_the_objective_written_out(conv_type, clean) -> None:
    config = dataclasses.replace(
        changed("netG", conv_type=conv_type),
        train=dataclasses.replace(PLAIN.train, clean_critic_gradients=clean),
    )
    nets = networks(config)
    given = inputs(nets.generator)
    terms, of_generator, of_critics = written_out(nets, given, config)
    found, found_of_generator, found_of_critics = taken(config, given)
    assert found.keys() == terms.keys()
    for name, value in terms.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert_same(found_of_generator, of_generator, 1e-9)
    assert_same(found_of_critics, of_critics, 1e-9)


def test_channels_last_and_fast_elu_take_the_same_step() -> None:
    fast = dataclasses.replace(
        changed("netG", elu="fast"), train=dataclasses.replace(PLAIN.train, channels_last=True)
    )
    given = inputs(networks(PLAIN).generator)
    last = given._replace(real=given.real.contiguous(memory_format=torch.channels_last))
    expected, found = taken(PLAIN, given), taken(fast, last)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert_same(found[1], expected[1], 1e-9)
    assert_same(found[2], expected[2], 1e-9)
