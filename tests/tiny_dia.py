"""Trainings of the diffusion model and of DIA's encoder that take a second."""

import dataclasses
import logging
import signal
from pathlib import Path
from typing import Any

from common.images import write_image
from dia.settings import ContrastiveConfig, DiaConfig
from dia.training import TrainResult, train
from diffusion_models.settings import DataConfig, DiffusionConfig
from tests.tiny_runs import texture

SIDE = 16


def write_normals(root: Path, count: int = 4, first: int = 0) -> DataConfig:
    """Normal images to train on, as a tree of class folders."""
    for number in range(count):
        image = texture(SIDE, SIDE, 3, seed=first + number)
        write_image(root / "train" / "normal" / f"{number}.png", image)
    return DataConfig(dataset="folder", data_root=str(root), one_class_idx=0, resize_to=SIDE)


def tiny_diffusion(folder: Path, **changes: Any) -> DiffusionConfig:
    """A diffusion model of one step, written to a folder."""
    small = DiffusionConfig(
        image_size=SIDE,
        dim=8,
        dim_mults=(1, 2),
        timesteps=100,
        ddpm_batch_size=2,
        gradient_accumulate_every=1,
        train_num_steps=1,
        save_every=1,
        sampling_timesteps=1,
        num_samples=1,
        steps=50,
        strip_steps=(0, 50),
        output_dir=str(folder),
    )
    return dataclasses.replace(small, **changes)


def tiny_contrastive(folder: Path, **changes: Any) -> ContrastiveConfig:
    """An encoder of one epoch of CSI, written to a folder."""
    small = ContrastiveConfig(
        model="resnet18",
        width=4,
        mode="simclr_CSI",
        shift_trans_type="rotation",
        batch_size=2,
        epochs=1,
        warmup=1,
        select_by="last",
        run_dir=str(folder),
    )
    return dataclasses.replace(small, **changes)


def changed(config, section: str, **values):
    """The settings with some of a section changed."""
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


class CtrlC(logging.Handler):
    """Asks to stop, as Ctrl-C does, when the log says that an epoch is done."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(f"epoch {self.epoch}:"):
            signal.raise_signal(signal.SIGINT)


def train_until(config: DiaConfig, epoch: int) -> TrainResult:
    """A training that is stopped in this epoch, whatever `epochs` says."""
    logger, handler = logging.getLogger("dia.training"), CtrlC(epoch)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return train(config)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
