"""ONE training step, from a batch of crops to new weights, in the order in which it happens.

The objective is that of the paper's section on training, after Yu et al. 2018, section 3: WGAN-GP
with a critic of the box and one of the whole crop. All that is random follows from (seed, step)
alone, for the whole batch; each process takes its rows. So a resumed run and a run of several
processes see what the uninterrupted run of one process sees.
N samples, C channels, H x W crop, h x w box.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Adam

from common.processes import Processes, average_gradients, average_values
from common.random_numbers import generator_for
from common.training import autocast_to, require_finite, scale_of
from inpainter.fast.holes import HoleCompleter
from inpainter.masks import crop_boxes, discount_weights, random_boxes, shrunken_masks
from inpainter.networks import Networks, layout_of
from inpainter.networks.critic import Critic, to_channels
from inpainter.networks.dropout import (
    ChannelDropout,
    Drop,
    ElementDropout,
    active_dropout_layers,
    split_by_layer,
)
from inpainter.networks.generator import Completion, Generator
from inpainter.settings import PicardConfig, TrainConfig

ALONE = Processes()
UNSCALED = GradScaler(enabled=False)
LOWER_RATE = (
    "Go on from the last checkpoint with a lower train.lr (train.resume: FOLDER in a new run), or "
    "set train.warmup_steps and train.grad_clip_norm."
)


class Optimisers(NamedTuple):
    """Adam for the generator and for both critics."""

    gen: Adam
    dis: Adam


@dataclass(frozen=True)
class TrainState:
    """What one process trains, and with what; the weights and moments change, nothing else."""

    config: PicardConfig
    device: torch.device
    processes: Processes
    networks: Networks
    optimisers: Optimisers
    n_steps: int
    """Length of the whole run."""
    images: Mapping[str, Any]
    """Identity of the training images, by which a resumed run knows them again."""
    scaler: GradScaler = UNSCALED
    """Of the generator's gradients, in fp16."""
    completer: HoleCompleter | None = None
    """Completes holes for the critics' steps; None: the generator does."""


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
    """Training-time dropout of the generator; None where nothing drops."""
    attention_mask: Tensor | None = None
    """(1, 1, H, W): the one hole that the attention of all samples avoids; None, each its own."""


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


class StepResult(NamedTuple):
    """What became of one step."""

    terms: dict[str, float]
    """Losses by published name; the generator's only where it was updated."""
    rate: float
    """Learning rate."""
    inputs: StepInputs
    """Of the last part, where the batch was worked through in several."""
    composite: Tensor
    """(N, C, H, W): its crops with their holes completed."""


def training_step(state: TrainState, step: int, real: Tensor) -> StepResult:
    """Takes step number `step`, counted from 0. Raises TrainingError where a loss is not finite.

    real: (N, C, H, W) in [-1, 1], this process's share of the batch, on any device.
    """
    config, train, networks = state.config, state.config.train, state.networks

    # Learning rate.
    rate = learning_rate(train, step, state.n_steps)
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate

    # Gradients, part by part. Published iterations count from 1: the generator is updated at
    # n_critic, 2 n_critic, …
    with_generator = not train.critic or (step + 1) % train.n_critic == 0
    for optimiser in state.optimisers:
        optimiser.zero_grad()
    sums: dict[str, Tensor] = {}
    parts = real.to(state.device, non_blocking=True).chunk(train.accumulate)
    for number, crops in enumerate(parts):
        inputs, losses = part_losses(state, step, number, crops, with_generator)
        add_gradients(networks, losses, config, 1 / len(parts))
        for name, value in losses.named().items():
            sums[name] = sums.get(name, 0) + value.detach() / len(parts)

    # New weights.
    values = average_values(torch.stack(list(sums.values())), state.processes)
    terms = dict(zip(sums, values.tolist(), strict=True))  # one transfer
    require_finite(step + 1, terms, LOWER_RATE)
    take_step(
        networks,
        state.optimisers,
        train,
        with_generator=with_generator,
        processes=state.processes,
        scaler=state.scaler,
    )
    if with_generator and state.completer is not None:
        state.completer.forget()
    return StepResult(terms | scale_of(state.scaler), rate, inputs, losses.composite.detach())


def part_losses(
    state: TrainState, step: int, number: int, crops: Tensor, with_generator: bool
) -> tuple[StepInputs, StepLosses]:
    """Inputs and losses of one of the parts in which this process works through its share.

    number: of the part, from 0. crops: (n, C, H, W) in [-1, 1].
    """
    config, train, processes = state.config, state.config.train, state.processes
    # shares are contiguous, so a part's rows are those of one of more, smaller processes
    rank = processes.rank * train.accumulate + number
    share = Processes(rank, processes.world_size * train.accumulate)
    crops = crops.contiguous(memory_format=layout_of(train, state.device))
    inputs = draw_inputs(config, state.networks.generator, step, crops, share)
    losses = step_losses(
        state.networks,
        inputs,
        config,
        with_generator=with_generator,
        scaler=state.scaler,
        completer=state.completer,
    )
    return inputs, losses


def build_optimisers(networks: Networks, train: TrainConfig) -> Optimisers:
    """Adam(lr, (beta1, beta2)) twice, as published."""
    options = {"lr": train.lr, "betas": (train.beta1, train.beta2), "fused": True}
    return Optimisers(
        Adam(networks.generator.parameters(), **options),
        Adam(networks.critics().parameters(), **options),
    )


def learning_rate(train: TrainConfig, step: int, n_steps: int) -> float:
    """Rate of step number `step`, counted from 0: linear warm-up, then constant or cosine to 0."""
    warmup = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if train.lr_schedule == "constant":
        return train.lr * warmup
    return train.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_steps)))


def draw_inputs(
    config: PicardConfig,
    generator: Generator,
    step: int,
    real: Tensor,
    processes: Processes = ALONE,
) -> StepInputs:
    """Inputs of step number `step`, on the device of the crops.

    real: (N, C, H, W) in [-1, 1], this process's share of the batch.
    """
    train, device = config.train, real.device
    total = len(real) * processes.world_size
    rows = slice(len(real) * processes.rank, len(real) * (processes.rank + 1))
    draws = generator_for(config.seed, "step", step)
    crop_hw = train.image_shape[:2]
    boxes = random_boxes(
        total, crop_hw, train.mask_shape, train.margin, train.mask_batch_same, draws
    )
    mask = shrunken_masks(boxes, crop_hw, train.max_delta_shape, draws)
    alphas = torch.rand(2, total, generator=draws)
    gamma = train.spatial_discounting_gamma if train.discounted_mask else 1.0
    return StepInputs(
        real=real,
        boxes=boxes[rows],
        mask=mask[rows].to(device),
        discount=discount_weights(train.mask_shape, gamma, device),
        alpha_local=alphas[0, rows].to(device),
        alpha_global=alphas[1, rows].to(device),
        drop=draw_dropout(config, generator, step, rows, total, draws),
        attention_mask=mask[:1].to(device) if config.netG.attention_mask == "first" else None,
    )


def draw_dropout(
    config: PicardConfig,
    generator: Generator,
    step: int,
    rows: slice,
    total: int,
    draws: torch.Generator,
) -> Drop | None:
    """Training-time dropout of these rows of the batch of `total`; None where nothing drops."""
    netG, layers = config.netG, generator.droppable_layers()
    if netG.train_drop_layers == "as_in_test":
        layers = {name: layers[name] for name in active_dropout_layers(netG, list(layers))}
    if not netG.droprate or not layers:
        return None
    if netG.dropout_type == "1D":
        each = [generator_for(config.seed, "elements", step, i) for i in range(total)[rows]]
        return ElementDropout(list(layers), netG.droprate, each)
    random = torch.rand(total, sum(layers.values()), generator=draws)
    return ChannelDropout(split_by_layer(random[rows] >= netG.droprate, layers), netG.droprate)


def step_losses(
    networks: Networks,
    inputs: StepInputs,
    config: PicardConfig,
    *,
    with_generator: bool,
    scaler: GradScaler = UNSCALED,
    completer: HoleCompleter | None = None,
) -> StepLosses:
    """Every term of the objective for one batch, differentiable.

    with_generator: also the generator's terms; false leaves the generator without gradient.
    scaler: of the gradients that go into the generator; the losses and critics are not scaled.
    completer: completes the holes where the generator is not updated, for the same numbers sooner.
    """
    known = inputs.real * (1 - inputs.mask)
    holes = (inputs.mask, inputs.drop, inputs.attention_mask)
    if completer is not None and not with_generator and completer.suits(known, inputs.drop):
        composite = completer(known, *holes)
    else:
        autocast = autocast_to(config.train.precision, inputs.real.device)
        with torch.set_grad_enabled(with_generator), autocast:
            completion = networks.generator(known, *holes)
        completion = completion.in_fp32()
        if with_generator and scaler.is_enabled():
            for image in set(completion):
                image.register_hook(scaler.scale)
        composite = completion.fine * inputs.mask + known
    terms: dict[str, Tensor] = {}
    d = g = None
    if config.train.critic:
        terms |= critic_terms(networks, inputs, composite.detach(), config.global_wgan_loss_alpha)
        d = terms["wgan_d"] + config.wgan_gp_lambda * terms["wgan_gp"]
    if with_generator:
        terms |= reconstruction_terms(inputs, completion, known, config.coarse_l1_alpha)
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


def wasserstein_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean(D(fake) - D(real)); (N, 1) twice -> scalar, lower = the critic separates better."""
    return (fake_scores - real_scores).mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor
) -> Tensor:
    """mean((|grad D(x)| - 1)^2) at x between real and fake (Gulrajani et al. 2017, equation 3).

    real, fake: (N, C, h, w), constants; alpha: (N,) in [0, 1]. Returns a scalar >= 0 that can be
    differentiated by the critic's weights.
    """
    alpha = alpha.to(real).view(-1, *[1] * (real.ndim - 1))
    x = (alpha * real + (1 - alpha) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def reconstruction_terms(
    inputs: StepInputs, completion: Completion, known: Tensor, coarse_l1_alpha: float
) -> dict[str, Tensor]:
    """`l1` inside the box (whole box, weighted) and `ae` outside the hole, of both stages.

    known: (N, C, H, W), the crops with empty holes. A generator with one stage has one estimate,
    which counts once.
    """
    outside = 1 - inputs.mask
    real_box = crop_boxes(inputs.real, inputs.boxes)
    l1 = ae = inputs.real.new_zeros(())
    stages = [(1.0, completion.fine)]
    if completion.coarse is not completion.fine:
        stages.insert(0, (coarse_l1_alpha, completion.coarse))
    for weight, estimate in stages:
        box = crop_boxes(estimate * inputs.mask + known, inputs.boxes)
        l1 = l1 + weight * weighted_l1(box, real_box, inputs.discount)
        ae = ae + weight * weighted_l1(estimate, inputs.real, outside)
    return {"l1": l1, "ae": ae}


def weighted_l1(estimate: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Mean of |estimate - truth| * weights; (N, C, h, w), weights broadcast -> scalar >= 0."""
    return ((estimate - truth).abs() * weights).mean()


def adversarial_term(
    networks: Networks, inputs: StepInputs, fake: Tensor, config: PicardConfig
) -> Tensor:
    """-mean D_local(fake box) - global_wgan_loss_alpha * mean D_global(fake)."""
    local = networks.local_critic(crop_boxes(fake, inputs.boxes)).mean()
    return -local - config.global_wgan_loss_alpha * networks.global_critic(fake).mean()


def add_gradients(
    networks: Networks, losses: StepLosses, config: PicardConfig, weight: float = 1.0
) -> None:
    """Backward passes of a batch, or of a part of it with its weight, in the published order."""
    if losses.d is not None:
        (losses.d * weight).backward()
    if losses.g is None:
        return
    # As published, the generator's backward also adds its adversarial gradient to those of the
    # critics (P6), unless train.clean_critic_gradients.
    only_generator = config.train.clean_critic_gradients or losses.d is None
    inputs = list(networks.generator.parameters()) if only_generator else None
    (losses.g * weight).backward(inputs=inputs)


def take_step(
    networks: Networks,
    optimisers: Optimisers,
    train: TrainConfig,
    *,
    with_generator: bool,
    processes: Processes = ALONE,
    scaler: GradScaler = UNSCALED,
) -> None:
    """Optimiser steps down the gradients at hand, averaged over the processes."""
    if with_generator:
        of_generator = list(networks.generator.parameters())
        average_gradients(of_generator, processes)
        scaler.unscale_(optimisers.gen)
        if train.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(of_generator, train.grad_clip_norm)
        scaler.step(optimisers.gen)
        scaler.update()
    if train.critic:
        average_gradients(list(networks.critics().parameters()), processes)
        optimisers.dis.step()
