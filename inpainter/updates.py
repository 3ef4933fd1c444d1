"""Turning a step's losses into new weights: gradients, learning rate, optimisers."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Adam

from common.runtime import Processes, average_gradients
from inpainter.networks import Networks
from inpainter.settings import PicardConfig, TrainConfig
from inpainter.step import StepLosses

ALONE = Processes()


class Optimisers(NamedTuple):
    """Adam for the generator and for both critics."""

    gen: Adam
    dis: Adam


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


def update(
    networks: Networks,
    optimisers: Optimisers,
    losses: StepLosses,
    config: PicardConfig,
    processes: Processes = ALONE,
) -> None:
    """Backward passes and optimiser steps of one training step, in the published order.

    The critics' gradients are zeroed before d's backward only: on generator steps g's backward adds
    its adversarial gradient to them (P6), unless train.clean_critic_gradients.
    """
    critics, generator = networks.critics(), networks.generator
    if losses.d is not None:
        optimisers.dis.zero_grad()
        losses.d.backward()
    if losses.g is not None:
        optimisers.gen.zero_grad()
        only_generator = config.train.clean_critic_gradients or losses.d is None
        losses.g.backward(inputs=list(generator.parameters()) if only_generator else None)
        average_gradients(list(generator.parameters()), processes)
        if config.train.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(generator.parameters(), config.train.grad_clip_norm)
        optimisers.gen.step()
    if losses.d is not None:
        average_gradients(list(critics.parameters()), processes)
        optimisers.dis.step()


def broadcast_weights(module: nn.Module, processes: Processes) -> None:
    """Gives every process the first one's weights."""
    if processes.world_size > 1:
        with torch.no_grad():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)
