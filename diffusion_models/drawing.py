"""What --mode eval and --mode sample write: pictures from a checkpoint."""

from pathlib import Path

import torch

from common.checkpoint import CheckpointError
from common.config import require, resolve_path
from common.datasets import dataset_row
from common.image_batches import BadImages, ordered_batches, reading
from common.image_sets import load_set
from common.images import write_image
from common.runtime import generator_for, resolve_device
from diffusion_models.data import NormalImages
from diffusion_models.dissolve import Dissolver, load_dissolver
from diffusion_models.pictures import dissolving_strip, one_step_pictures, sample_picture
from diffusion_models.settings import DdpmConfig, DiffusionConfig

IMAGE_CHANNELS = 3
EVAL_IMAGES = 64
STRIP_IMAGES = 8


def load(config: DdpmConfig) -> Dissolver:
    """The configured checkpoint as a dissolver, on the configured device."""
    settings = config.diffusion
    dissolver = load_dissolver(
        resolve_path(settings.state_dict_path, "diffusion.state_dict_path"),
        weights=settings.ddpm_weights,
        dissolve_range=settings.strip_range,
        dilation=settings.dilation_factor if settings.dilation else None,
        image_size=settings.image_size,
    )
    if dissolver.diffusion.model.channels != IMAGE_CHANNELS:
        raise CheckpointError(
            f"{settings.state_dict_path}: its diffusion model has "
            f"{dissolver.diffusion.model.channels} channels; images here have {IMAGE_CHANNELS}"
        )
    check_steps(settings, dissolver)
    return dissolver.to(resolve_device(config.device))


def check_steps(settings: DiffusionConfig, dissolver: Dissolver) -> None:
    """Raises ConfigError where the checkpoint has no such step, or cannot take the image size."""
    total, unet = dissolver.diffusion.steps, dissolver.diffusion.model
    for name, steps in (("steps", (settings.steps,)), ("strip_steps", settings.strip_steps)):
        wrong = [t for t in steps if t >= total]
        what = f"must be below {total}, the steps of {settings.state_dict_path}"
        require(not wrong, f"diffusion.{name}", wrong, what)
    require(bool(settings.strip_steps), "diffusion.strip_steps", (), "names no step")
    side = dissolver.image_size or settings.side
    what = f"must be a multiple of {unet.shrinks_by} pixels, which the checkpoint's U-Net halves"
    require(side % unet.shrinks_by == 0, "diffusion.image_size", side, what)


def output_folder(config: DdpmConfig) -> Path:
    """Where pictures go: output_dir, or beside the working directory's files."""
    folder = config.diffusion.output_dir
    return Path.cwd() if folder is None else resolve_path(folder, "diffusion.output_dir")


@torch.no_grad()
def draw_dissolved(config: DdpmConfig) -> list[Path]:
    """Writes input, x0 estimate and one-step sample at `steps`, and the dissolving strip: paths."""
    settings = config.diffusion
    dissolver = load(config)
    device = next(dissolver.parameters()).device
    data_root = resolve_path(config.data.data_root, "data.data_root")
    images = load_set(
        config.data.dataset,
        data_root,
        "train",
        refuse_grey=config.data.grey_images == "refuse",
        white_value=config.data.white_value,
    )
    images.size = None  # the files' own size, resized once
    side = dissolver.image_size or settings.side
    fit = dataset_row(config.data.dataset).fit
    count = min(EVAL_IMAGES, len(images))
    order = torch.randperm(len(images), generator=generator_for(config.seed, "eval"))[:count]
    chosen = NormalImages(images.subset(order.numpy()), side, fit)
    bad = BadImages(config.data.on_bad_image)
    with reading(ordered_batches(chosen, count, config.data.num_workers, bad)) as batches:
        shown = torch.cat([batch.images for batch in batches]).to(device)
    generator = generator_for(config.seed, "eval noise")
    pictures = one_step_pictures(
        dissolver, shown, settings.steps, local_noise=settings.local_randn, generator=generator
    )
    stem = f"ddpm_p_sample-{config.data.dataset}"
    named = {f"{stem}-step_{settings.steps}-{name}.png": p for name, p in pictures.items()}
    strip = dissolving_strip(dissolver, shown[:STRIP_IMAGES], settings.strip_steps)
    named[f"{stem}-strip.png"] = strip
    return _write(config, named)


def draw_samples(config: DdpmConfig) -> list[Path]:
    """Writes a grid of new images: its path."""
    settings = config.diffusion
    dissolver = load(config)
    picture = sample_picture(
        dissolver.diffusion,
        n=settings.num_samples,
        side=dissolver.image_size or settings.side,
        sampling_steps=settings.sampling_timesteps,
        local_noise=settings.local_randn,
        generator=generator_for(config.seed, "samples"),
    )
    return _write(config, {"ddpm_samples.png": picture})


def _write(config: DdpmConfig, pictures: dict[str, torch.Tensor]) -> list[Path]:
    folder = output_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_image(folder / name, picture)
    return [folder / name for name in pictures]
