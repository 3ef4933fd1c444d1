"""Loading networks from published or own checkpoints, checked against the settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    load_module,
    load_tensors,
    require_finite_weights,
    require_mapping,
    require_state_dict,
)
from common.config import load_config
from inpainter.networks.critic import Critic
from inpainter.networks.generator import Generator
from inpainter.settings import GeneratorConfig, PicardConfig


def architecture_of(state: dict[str, Tensor], source: Path) -> dict[str, int | str]:
    """Reads the generator's settings off its weights; published files hold nothing else."""
    shapes = []
    for layer in ("conv1", "conv17"):
        name = f"coarse_generator.{layer}.conv.weight"
        shape = tuple(state[name].shape) if name in state else None
        if shape is None or len(shape) != 4:
            raise CheckpointError(
                f"{source}: the weight {name} has shape {shape}, expected (out, in, h, w): this is "
                "not a PICARD generator (gen_%08d.pt). Pass another checkpoint folder."
            )
        shapes.append(shape)
    first, last = shapes
    ngf = 2 * last[1]
    has_fine = any(key.startswith("fine_generator.") for key in state)
    return {
        "input_dim": last[0],
        "ngf": ngf,
        "conv_type": "gated" if first[0] == 2 * ngf else "plain",
        "stages": "coarse_fine" if has_fine else "coarse",
    }


def load_generator(
    folder: Path, step: int, config: GeneratorConfig, file: BinaryIO | None = None
) -> Generator:
    """The generator of `folder` at `step`, in evaluation mode on the CPU.

    file: that of its weights, if it is open already. Raises CheckpointError where the file's
    architecture, or the settings saved beside it, differ from `config`; the message has both
    values. Whether the weights are finite is left to the caller; see
    `common.checkpoint.require_finite_weights`.
    """
    path = checkpoint_path(folder, "gen", step)
    state = require_state_dict(load_tensors(path, file), str(path))
    saved = architecture_of(state, path) | _saved_settings(folder)
    _require_equal(path, {f"netG.{k}": (value, getattr(config, k)) for k, value in saved.items()})
    generator = Generator(config)
    load_module(generator, state, str(path))
    return generator.eval()


def generator_weights(path: Path, file: BinaryIO | None = None) -> dict[str, Tensor]:
    """The finite weights in a gen_%08d.pt. Raises CheckpointError for anything else.

    file: the same, if it is open already.
    """
    state = require_state_dict(load_tensors(path, file), str(path))
    require_finite_weights(state, str(path))
    return state


def critic_weights(path: Path, file: BinaryIO | None = None) -> dict[str, dict[str, Tensor]]:
    """The finite weights in a dis_%08d.pt: localD, globalD. Raises CheckpointError otherwise.

    file: the same, if it is open already.
    """
    critics = require_mapping(load_tensors(path, file), str(path), ("localD", "globalD"))
    weights = {}
    for name in ("localD", "globalD"):
        source = f"{path}: {name}"
        weights[name] = require_state_dict(critics[name], source)
        require_finite_weights(weights[name], source)
    return weights


def _saved_settings(folder: Path) -> dict:
    """netG settings that weights do not show, from the config.yaml beside our own checkpoints."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    saved = load_config(PicardConfig, path).netG
    return {"dilations": saved.dilations, "output_clamp": saved.output_clamp}


def load_local_critic(
    folder: Path, step: int, config: PicardConfig, file: BinaryIO | None = None
) -> Critic:
    """The local critic of `folder` at `step`, for `MCD_feature`, in evaluation mode on the CPU.

    file: that of its weights, if it is open already.
    """
    path = checkpoint_path(folder, "dis", step)
    source = f"{path}: localD"
    critics = require_mapping(load_tensors(path, file), str(path), ("localD",))
    state = require_state_dict(critics["localD"], source)
    critic = Critic(config.netD.input_dim, config.netD.ndf, config.test.mask_shape)
    nothing = torch.empty(0)
    first = state.get("dis_conv_module.conv1.conv.weight", nothing)
    linear = state.get("linear.weight", nothing)
    if first.ndim == 4 and len(first) > 0 and linear.ndim == 2:
        ndf, input_dim = first.shape[:2]
        positions = linear.shape[1] // (4 * ndf)
        h, w = config.test.mask_shape
        settings = {
            "netD.input_dim": (input_dim, config.netD.input_dim),
            "netD.ndf": (ndf, config.netD.ndf),
            "test.mask_shape, pixels / 256": (positions, h * w // 256),
        }
        _require_equal(path, settings)
    load_module(critic, state, source)
    return critic.eval()


def _require_equal(path: Path, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises CheckpointError, with both values, where a checkpoint was made with other settings.

    settings: key -> (the checkpoint's value, the value asked for).
    """
    differing = [
        f"{key}: checkpoint {saved!r}, settings {asked!r}"
        for key, (saved, asked) in settings.items()
        if saved != asked
    ]
    if differing:
        raise CheckpointError(
            f"{path} was made with other settings than the given ones: {'; '.join(differing)}. "
            "Give the settings it was made with, or another checkpoint."
        )
