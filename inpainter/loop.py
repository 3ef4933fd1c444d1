"""The steps of a training, in one process of one or several."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from common.image_batches import reading
from common.runtime import Processes, StopRequest, any_asked_to_stop
from common.training import require_finite
from inpainter.batches import batches
from inpainter.networks import Networks
from inpainter.patches import NormalPatches
from inpainter.recorder import Recorder, StepResult
from inpainter.settings import PicardConfig
from inpainter.snapshots import LOWER_RATE
from inpainter.step import step_losses
from inpainter.step_inputs import InputMaker
from inpainter.updates import Optimisers, learning_rate, update

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainee:
    """What one process trains, and with what; the weights change, nothing else."""

    config: PicardConfig
    device: torch.device
    processes: Processes
    networks: Networks
    optimisers: Optimisers
    inputs: InputMaker
    n_steps: int


def train_steps(
    trainee: Trainee,
    dataset: NormalPatches,
    start: int,
    stop: StopRequest,
    recorder: Recorder | None,
) -> int:
    """Trains from step `start` to the last or until asked to stop; returns the steps done."""
    train, processes = trainee.config.train, trainee.processes
    stream = batches(
        dataset,
        train.batch_size,
        start,
        trainee.n_steps,
        trainee.config.num_workers,
        rank=processes.rank,
        world_size=processes.world_size,
        pin_memory=trainee.device.type == "cuda",
    )
    step = start
    with reading(stream) as crops:
        for real in crops:
            result = one_step(trainee, step, real)
            step += 1
            stopping = any_asked_to_stop(stop, processes, trainee.device)
            if recorder is not None:
                recorder.note(step, result, trainee.networks.generator)
                if step % train.snapshot_save_iter == 0 or step == trainee.n_steps or stopping:
                    recorder.snapshot(step, trainee.networks, trainee.optimisers)
            if stopping:
                LOG.warning("Asked to stop: saved step %d. Go on with --resume.", step)
                break
    return step


def one_step(trainee: Trainee, step: int, real: Tensor) -> StepResult:
    """Step number `step`, counted from 0: losses and update. Raises TrainingError.

    real: (n, C, H, W) in [-1, 1], this process's share of the batch, on any device.
    """
    config, train = trainee.config, trainee.config.train
    rate = learning_rate(train, step, trainee.n_steps)
    for optimiser in trainee.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    real = real.to(trainee.device, non_blocking=True).contiguous(memory_format=layout)
    inputs = trainee.inputs.make(step, real)
    # Published iterations count from 1: the generator is updated at n_critic, 2 n_critic, …
    with_generator = not train.critic or (step + 1) % train.n_critic == 0
    losses = step_losses(trainee.networks, inputs, config, with_generator=with_generator)
    named = losses.named()
    values = torch.stack([value.detach() for value in named.values()]).tolist()  # one transfer
    terms = dict(zip(named, values, strict=True))
    require_finite(step + 1, terms, LOWER_RATE)
    update(trainee.networks, trainee.optimisers, losses, config, trainee.processes)
    return StepResult(terms, rate, inputs, losses.composite.detach())
