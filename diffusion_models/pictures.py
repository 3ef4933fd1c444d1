"""Pictures of a diffusion model: what --mode eval and --mode sample write, and training shows.

B images, C channels, H W pixels; a picture is a grid of images, (3, height, width) in [0, 1].
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.config import resolve_path
from common.config_types import require
from common.image_batches import BadImages, ordered_batches, reading
from common.images import write_image
from common.random_numbers import generator_for
from diffusion_models.diffusion import GaussianDiffusion, gaussian_noise
from diffusion_models.dissolve import Dissolver, ImagesAtSide, load_dissolver
from diffusion_models.settings import DdpmConfig, DiffusionConfig

EVAL_IMAGES = 64
STRIP_IMAGES = 8


def draw_dissolved(config: DdpmConfig) -> list[Path]:
    """Writes input, x0 estimate and one-step sample at `steps`, and the dissolving strip: paths."""
    settings = config.diffusion
    dissolver, side = load_configured(config)
    images = random_training_images(config, EVAL_IMAGES, side).to(dissolver.device)
    generator = generator_for(config.seed, "eval noise")
    noise = gaussian_noise(
        tuple(images.shape), device=images.device, local=settings.local_randn, generator=generator
    )
    x = dissolver.to_model_range(images)
    previous, x0 = dissolver.diffusion.p_sample(x, settings.steps, noise)
    grids = {"input": images, "x_start": dissolver.from_model_range(x0)}
    grids["pred_img"] = dissolver.from_model_range(previous)
    stem = f"ddpm_p_sample-{config.data.dataset}"
    pictures = {f"{stem}-step_{settings.steps}-{n}.png": image_grid(g) for n, g in grids.items()}
    strip = dissolving_strip(dissolver, images[:STRIP_IMAGES], settings.strip_steps)
    return _write(config, pictures | {f"{stem}-strip.png": strip})


def draw_samples(config: DdpmConfig) -> list[Path]:
    """Writes a grid of new images: its path."""
    dissolver, side = load_configured(config)
    generator = generator_for(config.seed, "samples")
    picture = sample_picture(dissolver.diffusion, config.diffusion, side, generator)
    return _write(config, {"ddpm_samples.png": picture})


def load_configured(config: DdpmConfig) -> tuple[Dissolver, int]:
    """The configured checkpoint as a dissolver on the configured device, and its image side.

    Raises CheckpointError for a checkpoint of other than colour images, and ConfigError where it
    has no such steps or cannot take the image size.
    """
    settings = config.diffusion
    dissolver = load_dissolver(
        resolve_path(settings.state_dict_path, "diffusion.state_dict_path"),
        device=config.device,
        weights=settings.ddpm_weights,
        dissolve_range=settings.strip_range,
        dilation=settings.dilation_factor if settings.dilation else None,
        image_size=settings.image_size,
    )
    total, side = dissolver.diffusion.steps, dissolver.image_size or settings.side
    dissolver.require_fitting(settings.state_dict_path, side, "diffusion.image_size")
    for name, steps in (("steps", (settings.steps,)), ("strip_steps", settings.strip_steps)):
        wrong = [t for t in steps if t >= total]
        what = f"must be below {total}, the steps of {settings.state_dict_path}"
        require(not wrong, f"diffusion.{name}", wrong, what)
    return dissolver, side


def random_training_images(config: DdpmConfig, count: int, side: int) -> Tensor:
    """Up to `count` images of any class of the training split: (B, 3, side, side) in [0, 1]."""
    images, data = config.data.images("train"), config.data
    order = torch.randperm(len(images), generator=generator_for(config.seed, "eval"))[:count]
    drawn = ImagesAtSide(images.subset(order.numpy()), side, data.row.fit)
    bad = BadImages(data.on_bad_image)
    with reading(ordered_batches(drawn, count, data.num_workers, bad)) as batches:
        return next(batches).images


def dissolving_strip(dissolver: Dissolver, images: Tensor, steps: Sequence[int]) -> Tensor:
    """One row per image (B, C, H, W), dissolved at each of the steps."""
    columns = [dissolver(images, t) for t in steps]
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (B·steps, C, H, W)
    return image_grid(rows, len(steps))


def sample_picture(
    diffusion: GaussianDiffusion, settings: DiffusionConfig, side: int, generator: torch.Generator
) -> Tensor:
    """`num_samples` new images of side² pixels."""
    images = diffusion.ddim_sample(
        (settings.num_samples, diffusion.model.channels, side, side),
        sampling_steps=min(settings.sampling_timesteps, diffusion.steps),
        local_noise=settings.local_randn,
        generator=generator,
    )
    return image_grid(images)


def image_grid(images: Tensor, per_row: int | None = None) -> Tensor:
    """Lays out (B, C, H, W) in rows of per_row, None = a square; values are cut to [0, 1]."""
    from torchvision.utils import make_grid  # slow to import

    per_row = per_row or max(1, int(len(images) ** 0.5))
    return make_grid(images.clamp(0, 1).cpu(), nrow=per_row)


def _write(config: DdpmConfig, pictures: dict[str, Tensor]) -> list[Path]:
    """Into output_dir, or the working directory."""
    folder = config.diffusion.output_dir
    folder = Path.cwd() if folder is None else resolve_path(folder, "diffusion.output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_image(folder / name, picture)
    return [folder / name for name in pictures]
