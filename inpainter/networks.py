"""Building the networks from settings and loading them from published or own checkpoints."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.checkpoint import CheckpointError, checkpoint_path, load_tensors, strip_module_prefix
from common.config import load_config
from inpainter.critic import Critic
from inpainter.generator import Generator
from inpainter.settings import GeneratorConfig, PicardConfig
from inpainter.step import Networks


def build_networks(config: PicardConfig, device: torch.device) -> Networks:
    """Fresh generator and critics on the device, initialised as train.init says."""
    generator = Generator(config.netG)
    generator.initialise(config.train.init)
    critic = (config.netD.input_dim, config.netD.ndf)
    networks = Networks(
        generator,
        Critic(*critic, config.train.mask_shape),
        Critic(*critic, config.train.image_shape[:2]),
    )
    layout = torch.channels_last if config.train.channels_last else torch.preserve_format
    for network in networks:
        network.to(device, memory_format=layout)
    return networks


class Architecture(NamedTuple):
    """What the shapes of a generator's weights tell about its settings (`netG.<field>`)."""

    input_dim: int
    ngf: int
    conv_type: str
    stages: str


def architecture_of(state: dict[str, Tensor], source: Path) -> Architecture:
    """Reads the generator's settings off its weights; published files hold nothing else."""
    try:
        first = state["coarse_generator.conv1.conv.weight"].shape
        last = state["coarse_generator.conv17.conv.weight"].shape
    except KeyError as error:
        raise CheckpointError(
            f"{source}: no weight {error}: this is not a PICARD generator (gen_%08d.pt)"
        ) from None
    ngf = 2 * last[1]
    has_fine = any(key.startswith("fine_generator.") for key in state)
    return Architecture(
        input_dim=last[0],
        ngf=ngf,
        conv_type="gated" if first[0] == 2 * ngf else "plain",
        stages="coarse_fine" if has_fine else "coarse",
    )


def load_generator(folder: Path, step: int, config: GeneratorConfig) -> Generator:
    """The generator of `folder` at `step`, in evaluation mode on the CPU.

    Raises CheckpointError where the file's architecture, or the settings saved beside it, differ
    from `config`; the message has both values.
    """
    path = checkpoint_path(folder, "gen", step)
    state = strip_module_prefix(load_tensors(path))
    found = architecture_of(state, path)._asdict() | _saved_settings(folder)
    differing = {k: v for k, v in found.items() if getattr(config, k) != v}
    if differing:
        given = {f"netG.{k}": (v, getattr(config, k)) for k, v in differing.items()}
        raise CheckpointError(other_settings(path, given))
    generator = Generator(config)
    _load(generator, state, path)
    return generator.eval()


def _saved_settings(folder: Path) -> dict:
    """netG settings that weights do not show, from the config.yaml beside our own checkpoints."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    saved = load_config(PicardConfig, path).netG
    return {"dilations": saved.dilations, "output_clamp": saved.output_clamp}


def load_local_critic(folder: Path, step: int, config: PicardConfig) -> Critic:
    """The local critic of `folder` at `step`, for `MCD_feature`, in evaluation mode on the CPU."""
    path = checkpoint_path(folder, "dis", step)
    critics = load_tensors(path)
    if "localD" not in critics:
        raise CheckpointError(
            f"{path} has no entry localD but {sorted(critics)[:4]}: not a PICARD critic file"
        )
    state = strip_module_prefix(critics["localD"])
    critic = Critic(config.netD.input_dim, config.netD.ndf, config.test.mask_shape)
    first, linear = "dis_conv_module.conv1.conv.weight", "linear.weight"
    if first in state and linear in state:
        ndf, input_dim = state[first].shape[:2]
        positions = state[linear].shape[1] // (4 * ndf)
        h, w = config.test.mask_shape
        found = {
            "netD.input_dim": (input_dim, config.netD.input_dim),
            "netD.ndf": (ndf, config.netD.ndf),
            "test.mask_shape, pixels / 256": (positions, h * w // 256),
        }
        differing = {k: v for k, v in found.items() if v[0] != v[1]}
        if differing:
            raise CheckpointError(other_settings(path, differing))
    _load(critic, state, path)
    return critic.eval()


def other_settings(path: Path, differing: dict[str, tuple]) -> str:
    """Message for a checkpoint of other settings; differing: key -> (checkpoint's, given)."""
    lines = [
        f"{k}: checkpoint {found!r}, settings {given!r}" for k, (found, given) in differing.items()
    ]
    return f"{path} was made with other settings than the given ones:\n  " + "\n  ".join(lines)


def _load(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the settings: {error}") from None
