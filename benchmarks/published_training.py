"""A PICARD training step as the published trainer takes it, as a yardstick: the same numbers.

Every step builds the generator's graph, whether or not it is updated; attention is a loop over
samples made of convolutions; Adam goes through the weights one by one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam

from benchmarks.published_heatmap import coarse, fine
from inpainter.masks import crop_boxes
from inpainter.networks import Networks
from inpainter.networks.critic import Critic
from inpainter.networks.generator import Completion
from inpainter.settings import PicardConfig
from inpainter.step import Optimisers, StepInputs, reconstruction_terms


def published_optimisers(networks: Networks, config: PicardConfig) -> Optimisers:
    """Adam as torch has it by default."""
    options = {"lr": config.train.lr, "betas": (config.train.beta1, config.train.beta2)}
    parts = (networks.generator, networks.critics())
    return Optimisers(*(Adam(part.parameters(), **options) for part in parts))


def published_step(
    networks: Networks,
    optimisers: Optimisers,
    inputs: StepInputs,
    config: PicardConfig,
    *,
    with_generator: bool,
) -> dict[str, float]:
    """One step on inputs that are drawn; returns its losses by published name.

    For generators with plain convolutions, both stages and no dropout, and a critic of as many
    channels.
    """
    known = inputs.real * (1 - inputs.mask)
    completion = complete(networks, known, inputs.mask)
    fake = completion.fine * inputs.mask + known
    terms = critic_terms(networks, inputs, fake.detach(), config.global_wgan_loss_alpha)
    optimisers.dis.zero_grad()
    (terms["wgan_d"] + config.wgan_gp_lambda * terms["wgan_gp"]).backward()
    if with_generator:
        terms |= reconstruction_terms(inputs, completion, known, config.coarse_l1_alpha)
        local = scores(networks.local_critic, crop_boxes(fake, inputs.boxes)).mean()
        whole = scores(networks.global_critic, fake).mean()
        terms["wgan_g"] = -local - config.global_wgan_loss_alpha * whole
        g = config.l1_loss_alpha * terms["l1"] + config.ae_loss_alpha * terms["ae"]
        optimisers.gen.zero_grad()
        (g + config.gan_loss_alpha * terms["wgan_g"]).backward()
        optimisers.gen.step()
    optimisers.dis.step()
    return {name: value.item() for name, value in terms.items()}


def complete(networks: Networks, known: Tensor, mask: Tensor) -> Completion:
    """Both stages, with gradients."""
    generator = networks.generator
    first = coarse(generator.coarse_generator, known, mask, None).clamp(-1, 1)
    filled = known * (1 - mask) + first * mask
    return Completion(first, fine(generator.fine_generator, filled, mask, None).clamp(-1, 1))


def critic_terms(
    networks: Networks, inputs: StepInputs, fake: Tensor, global_alpha: float
) -> dict[str, Tensor]:
    """The Wasserstein term and the gradient penalty of both critics."""
    boxes = [crop_boxes(images, inputs.boxes) for images in (inputs.real, fake)]
    parts = [
        (networks.local_critic, *boxes, inputs.alpha_local),
        (networks.global_critic, inputs.real, fake, inputs.alpha_global),
    ]
    (local, local_gp), (whole, whole_gp) = (critic_term(*part) for part in parts)
    return {"wgan_d": local + global_alpha * whole, "wgan_gp": local_gp + whole_gp}


def critic_term(critic: Critic, real: Tensor, fake: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """One critic's Wasserstein term and its gradient penalty."""
    real_scores, fake_scores = scores(critic, torch.cat([real, fake])).chunk(2)
    alpha = alpha.view(-1, 1, 1, 1)
    between = (alpha * real + (1 - alpha) * fake).requires_grad_()
    judged = scores(critic, between)
    (gradient,) = torch.autograd.grad(
        judged, between, torch.ones_like(judged), create_graph=True, retain_graph=True
    )
    penalty = (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()
    return (fake_scores - real_scores).mean(), penalty


def scores(critic: Critic, x: Tensor) -> Tensor:
    """What a critic makes of x (N, C, h, w), layer by layer: (N, 1)."""
    for block in critic.dis_conv_module.children():
        x = F.leaky_relu(block.conv(x), 0.2, inplace=True)
    return critic.linear(x.flatten(1))
