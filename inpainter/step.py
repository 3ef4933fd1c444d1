"""The arithmetic of one WGAN-GP training step. N samples, C channels, H x W crop, h x w box."""

from typing import NamedTuple

import torch
from torch import Tensor

from inpainter.losses import gradient_penalty, wasserstein_critic_loss, weighted_l1
from inpainter.masks import crop_boxes
from inpainter.networks import Networks
from inpainter.networks.critic import Critic, to_channels
from inpainter.networks.dropout import Drop
from inpainter.networks.generator import Completion
from inpainter.settings import PicardConfig


class StepInputs(NamedTuple):
    """All that one step is given, its random draws included."""

    real: Tensor
    """(N, C, H, W) normal crops in [-1, 1]."""
    boxes: Tensor
    """(N, 4) int64: top, left, height, width of the box, in pixels."""
    mask: Tensor
    """(N, 1, H, W): 1 in the hole, which is the box or smaller."""
    discount: Tensor
    """(1, 1, h, w): weights of the L1 inside the box."""
    alpha_local: Tensor
    """(N,) in [0, 1]: where between real and fake the local gradient penalty looks."""
    alpha_global: Tensor
    """(N,): the same for the global critic."""
    drop: Drop | None
    """Training-time dropout of the generator; none = nothing drops."""


class StepLosses(NamedTuple):
    """Scalar `terms` by published name; totals `d` (critics) and `g` (generator) where computed."""

    terms: dict[str, Tensor]
    d: Tensor | None
    g: Tensor | None
    composite: Tensor

    def named(self) -> dict[str, Tensor]:
        """Every computed term and total by its published name."""
        totals = {"d": self.d, "g": self.g}
        return self.terms | {name: value for name, value in totals.items() if value is not None}


def step_losses(
    networks: Networks, inputs: StepInputs, config: PicardConfig, *, with_generator: bool
) -> StepLosses:
    """Every term of the objective for one batch, differentiable (specification: the paper's
    section on training, after Yu et al. 2018, section 3).

    with_generator: also the generator's terms; false leaves the generator without gradient.
    """
    hole = inputs.real * (1 - inputs.mask)
    half = config.train.precision == "bf16"
    autocast = torch.autocast(inputs.real.device.type, torch.bfloat16, enabled=half)
    with torch.set_grad_enabled(with_generator), autocast:
        completion = networks.generator(hole, inputs.mask, inputs.drop)
    completion = completion.in_fp32()
    composite = completion.fine * inputs.mask + hole
    terms: dict[str, Tensor] = {}
    d = g = None
    if config.train.critic:
        terms |= critic_terms(networks, inputs, composite.detach(), config.global_wgan_loss_alpha)
        d = terms["wgan_d"] + config.wgan_gp_lambda * terms["wgan_gp"]
    if with_generator:
        terms |= reconstruction_terms(inputs, completion, hole, config.coarse_l1_alpha)
        g = config.l1_loss_alpha * terms["l1"] + config.ae_loss_alpha * terms["ae"]
        if config.train.critic:
            terms["wgan_g"] = adversarial_term(networks, inputs, composite, config)
            g = g + config.gan_loss_alpha * terms["wgan_g"]
    return StepLosses(terms, d, g, composite)


def critic_terms(
    networks: Networks, inputs: StepInputs, fake: Tensor, global_alpha: float
) -> dict[str, Tensor]:
    """`wgan_d` = local + global_alpha * global Wasserstein term; `wgan_gp` = sum of both penalties.

    fake: (N, C, H, W), the composites, detached.
    """
    real_boxes, fake_boxes = crop_boxes(inputs.real, inputs.boxes), crop_boxes(fake, inputs.boxes)
    local, local_gp = _one_critic(networks.local_critic, real_boxes, fake_boxes, inputs.alpha_local)
    whole, whole_gp = _one_critic(networks.global_critic, inputs.real, fake, inputs.alpha_global)
    return {"wgan_d": local + global_alpha * whole, "wgan_gp": local_gp + whole_gp}


def _one_critic(critic: Critic, real: Tensor, fake: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    real, fake = to_channels(real, critic.channels), to_channels(fake, critic.channels)
    loss = wasserstein_critic_loss(critic(real), critic(fake))
    return loss, gradient_penalty(critic, real, fake, alpha)


def reconstruction_terms(
    inputs: StepInputs, completion: Completion, hole: Tensor, coarse_l1_alpha: float
) -> dict[str, Tensor]:
    """`l1` inside the box (whole box, weighted) and `ae` outside the hole, of both stages.

    A generator with one stage has one estimate, which counts once.
    """
    outside = 1 - inputs.mask
    real_box = crop_boxes(inputs.real, inputs.boxes)
    l1 = ae = inputs.real.new_zeros(())
    two_stages = completion.coarse is not completion.fine
    stages = [(1.0, completion.fine)]
    if two_stages:
        stages.insert(0, (coarse_l1_alpha, completion.coarse))
    for weight, estimate in stages:
        box = crop_boxes(estimate * inputs.mask + hole, inputs.boxes)
        l1 = l1 + weight * weighted_l1(box, real_box, inputs.discount)
        ae = ae + weight * weighted_l1(estimate, inputs.real, outside)
    return {"l1": l1, "ae": ae}


def adversarial_term(
    networks: Networks, inputs: StepInputs, fake: Tensor, config: PicardConfig
) -> Tensor:
    """-mean D_local(fake box) - global_wgan_loss_alpha * mean D_global(fake)."""
    local = networks.local_critic(crop_boxes(fake, inputs.boxes)).mean()
    return -local - config.global_wgan_loss_alpha * networks.global_critic(fake).mean()
