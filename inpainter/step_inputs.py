"""What one training step draws: boxes, holes, points of the gradient penalty, dropout.

All of it follows from (seed, step) alone, for the whole batch; each process takes its rows. So a
resumed run and a run of several processes see what the uninterrupted run of one process sees.
"""

import torch
from torch import Tensor

from common.runtime import Processes, generator_for
from inpainter.masks import discount_weights, random_boxes, shrunken_masks
from inpainter.networks.dropout import (
    ChannelDropout,
    Drop,
    ElementDropout,
    active_dropout_layers,
    draw_keep_masks,
)
from inpainter.networks.generator import Generator
from inpainter.settings import PicardConfig
from inpainter.step import StepInputs


class InputMaker:
    """Draws the inputs of each step, on the device of the crops it is given."""

    def __init__(
        self, config: PicardConfig, generator: Generator, processes: Processes | None = None
    ) -> None:
        self.config = config
        self.processes = processes or Processes()
        train = config.train
        gamma = train.spatial_discounting_gamma if train.discounted_mask else 1.0
        self.discount = discount_weights(train.mask_shape, gamma)
        layers = generator.droppable_layers()
        names = list(layers)
        if config.netG.train_drop_layers == "as_in_test":
            names = active_dropout_layers(config.netG, names)
        self.layers = {name: layers[name] for name in names}

    def make(self, step: int, real: Tensor) -> StepInputs:
        """Inputs of step number `step`, counted from 0.

        real: (n, C, H, W) in [-1, 1], this process's share of the batch.
        """
        train, device = self.config.train, real.device
        total = len(real) * self.processes.world_size
        first = len(real) * self.processes.rank
        mine = range(first, first + len(real))
        generator = generator_for(self.config.seed, "step", step)
        image_hw = train.image_shape[:2]
        boxes = random_boxes(
            total, image_hw, train.mask_shape, train.margin, train.mask_batch_same, generator
        )
        mask = shrunken_masks(boxes, image_hw, train.max_delta_shape, generator)
        alphas = torch.rand(2, total, generator=generator)
        rows = slice(mine.start, mine.stop)
        self.discount = self.discount.to(device)
        return StepInputs(
            real=real,
            boxes=boxes[rows],
            mask=mask[rows].to(device),
            discount=self.discount,
            alpha_local=alphas[0, rows].to(device),
            alpha_global=alphas[1, rows].to(device),
            drop=self.dropout(step, total, mine, generator, device),
        )

    def dropout(
        self,
        step: int,
        total: int,
        mine: range,
        generator: torch.Generator,
        device: torch.device,
    ) -> Drop | None:
        """Training-time dropout of samples `mine` of the batch; none where netG.droprate is 0."""
        p = self.config.netG.droprate
        if not p or not self.layers:
            return None
        if self.config.netG.dropout_type == "1D":
            drops = [generator_for(self.config.seed, "elements", step, i) for i in mine]
            return ElementDropout(list(self.layers), p, drops)
        keep = draw_keep_masks(self.layers, total, p, generator)
        rows = slice(mine.start, mine.stop)
        return ChannelDropout({name: drawn[rows].to(device) for name, drawn in keep.items()}, p)
