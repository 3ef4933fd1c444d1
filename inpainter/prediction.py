"""A prediction run: heatmaps of every image in a folder, from one checkpoint."""

import dataclasses
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.annotations import Annotations, read_annotations
from common.checkpoint import CheckpointError, resolve_step, save_text_atomic
from common.config import REPOSITORY, config_to_yaml, resolve_path
from common.images import ImageError, list_images, read_image
from common.prefetch import prefetched
from common.run_log import write_run_record
from common.runtime import resolve_device, tf32_products
from inpainter.completion import WindowScorer, dropout_of
from inpainter.fast.scorer import FastScorer
from inpainter.heatmap import score_image, stitch
from inpainter.heatmap_output import HeatmapFolder, plot_heatmap, remove_partial_files
from inpainter.networks import load_generator, load_local_critic
from inpainter.scores import spaces_of
from inpainter.settings import Metric, PicardConfig, TestConfig
from inpainter.windows import WindowError, WindowGrid

LOG = logging.getLogger(__name__)
SECONDS_BETWEEN_PICTURES = 10.0
FREE = (
    "parallel_batchsize",
    "save_heatmap_data",
    "save_heatmap_plots",
    "save_progressive_heatmap",
    "log_compute_times",
    "on_bad_image",
    "engine",
    "compile",
)
"""Test settings that may change between parts of one run: they do not change a heatmap."""


@dataclass(frozen=True)
class PredictionOptions:
    """What the command line says beside the settings."""

    checkpoint_dir: Path
    checkpoint_iter: int | str = "latest"
    """A step, `latest` or `best`."""
    image_dir: Path | None = None
    """Folder of images; none = test_data_path."""
    output_dir: Path | None = None
    """None = <heatmaps_dir>/<dataset_name>/dropout/<time>, an unfinished run's if there is one."""
    annotations: Path | None = None
    """Boxes or masks, drawn into the plots."""
    overwrite: bool = False
    """Redo images that are finished."""
    command: Sequence[str] = ()
    """What the user typed, for the record."""


@dataclass
class PredictionResult:
    """Where the heatmaps lie and what became of the images, by name."""

    folder: Path
    finished: list[str] = field(default_factory=list)
    already_there: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    """Image -> why it was left out."""


def predict(config: PicardConfig, options: PredictionOptions) -> PredictionResult:
    """Scores every image of the folder and writes its heatmaps.

    Raises ConfigError, CheckpointError, ImageError (with test.on_bad_image: error; else a bad image
    is noted and left out) and AnnotationError, all with their remedy.
    """
    device = resolve_device(config.device, allow_gpu=config.cuda)
    scorer, step = load_scorer(config, options, device)
    image_dir = image_folder(config, options)
    paths = list_images(image_dir, recursive=config.data_with_subfolder)
    names = {path.relative_to(image_dir).as_posix(): path for path in paths}
    annotations = None
    if options.annotations is not None:
        annotations = read_annotations(options.annotations, names, on_unknown="skip")
    identity = run_identity(config, options, step)
    result = PredictionResult(output_folder(config, options, identity))
    output = HeatmapFolder(result.folder, config.test, names, overwrite=options.overwrite)
    save_text_atomic(identity, result.folder / "run.txt")
    write_run_record(result.folder, config_yaml=config_to_yaml(config), command=options.command)
    result.already_there += [name for name in names if output.is_finished(name)]
    todo = [name for name in names if name not in set(result.already_there)]
    images = prefetched(todo, lambda name: read_image(names[name], config.netG.input_dim))
    bar = tqdm(images, total=len(todo), unit="image", disable=not sys.stderr.isatty())
    for name, read in bar:
        path = names[name]
        try:
            with tf32_products(config.test.precision == "tf32"):
                one_image(name, read, config, scorer, device, output, annotations)
        except (ImageError, WindowError) as error:
            message = str(error) if str(path) in str(error) else f"{path}: {error}"
            if config.test.on_bad_image == "error":
                raise ImageError(message) from error
            LOG.warning("Left out: %s", message)
            result.bad[name] = message
            continue
        result.finished.append(name)
    remove_partial_files(result.folder)
    return result


def image_folder(config: PicardConfig, options: PredictionOptions) -> Path:
    """--image_dir, or test_data_path of the settings."""
    return options.image_dir or resolve_path(config.test_data_path, "test_data_path")


def load_scorer(
    config: PicardConfig, options: PredictionOptions, device: torch.device
) -> tuple[WindowScorer | FastScorer, int]:
    """The networks of the wanted checkpoint as a window scorer, and its step."""
    needs_critic = "feature" in spaces_of(config.test.heatmap_metrics)
    roles = ("gen", "dis") if needs_critic else ("gen",)
    step = resolve_step(options.checkpoint_dir, options.checkpoint_iter, roles)
    generator = load_generator(options.checkpoint_dir, step, config.netG)
    critic = load_local_critic(options.checkpoint_dir, step, config) if needs_critic else None
    layout, test = torch.channels_last, config.test
    generator = generator.to(device, memory_format=layout)
    critic = critic.to(device, memory_format=layout) if critic is not None else None
    parts = (
        generator,
        critic,
        test.heatmap_metrics,
        test.mask_shape,
    )
    if test.engine == "plain":
        return WindowScorer(*parts), step
    return FastScorer(*parts, precision=test.precision, compiled=test.compile), step


def one_image(
    name: str,
    read: Callable[[], Tensor],
    config: PicardConfig,
    scorer: WindowScorer | FastScorer,
    device: torch.device,
    output: HeatmapFolder,
    annotations: Annotations | None,
) -> None:
    """Reads, scores and writes one image."""
    image = read()
    dropout = dropout_of(scorer.generator, config.netG, config.test, config.seed, name)
    started = time.monotonic()
    with WindowBar(name, image, config, output) as bar:
        scored = score_image(image, scorer, config.test, dropout, device, bar.note)
    seconds = time.monotonic() - started
    size = (image.shape[1], image.shape[2])
    boxes = annotations.boxes(name, size) if annotations is not None else ()
    output.write(name, image, scored.heatmaps, boxes)
    if config.test.log_compute_times:
        output.write_time(name, seconds, scored.n_windows, scored.n_scored)
    LOG.info("%s: %d of %d windows in %.1f s", name, scored.n_scored, scored.n_windows, seconds)


class WindowBar:
    """Progress over one image's windows: a bar, and its heatmap so far as a picture if wanted."""

    def __init__(
        self, name: str, image: Tensor, config: PicardConfig, output: HeatmapFolder
    ) -> None:
        self.name, self.image, self.test, self.output = name, image, config.test, output
        self.drawn = -SECONDS_BETWEEN_PICTURES  # the first at once
        self.bar = tqdm(unit="window", desc=name, leave=False, disable=not sys.stderr.isatty())

    def __enter__(self) -> "WindowBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def note(self, scores: dict[Metric, Tensor], grid: WindowGrid, done: int) -> None:
        """Called by score_image after each batch."""
        if self.bar.total is None:
            self.bar.reset(total=len(grid))
        self.bar.update(done)
        due = time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES
        if self.test.save_progressive_heatmap and due:
            for metric, values in scores.items():
                heat = stitch(values.view(grid.grid_hw), grid, self.test)
                path = self.output.progress_path(self.name, metric)
                plot_heatmap(path, self.name, self.image, metric, heat)
            self.drawn = time.monotonic()


def output_folder(config: PicardConfig, options: PredictionOptions, identity: str) -> Path:
    """The run's folder; a run of the same settings and checkpoint goes on in the one it had.

    Raises CheckpointError where --output_dir holds heatmaps of other settings or checkpoint.
    """
    folder = options.output_dir
    if folder is not None:
        if not options.overwrite and identity_of(folder) not in (None, identity):
            raise CheckpointError(
                f"{folder} holds heatmaps made with other settings or another checkpoint. Pass "
                "another --output_dir, or --overwrite to replace them."
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    base = REPOSITORY / config.heatmaps_dir / (config.dataset_name or "unnamed") / "dropout"
    same = [run.parent for run in base.glob("*/run.txt") if identity_of(run.parent) == identity]
    return max(same) if same else new_folder(base / time.strftime("%Y-%m-%d_%H-%M-%S"))


def new_folder(path: Path) -> Path:
    """Makes the folder, with a number behind its name where another run has just taken it."""
    folder, number = path, 1
    while folder.exists():
        number += 1
        folder = path.with_name(f"{path.name}_{number}")
    folder.mkdir(parents=True)
    return folder


def run_identity(config: PicardConfig, options: PredictionOptions, step: int) -> str:
    """What heatmaps depend on: checkpoint, images, and settings but for what is merely written."""
    test = dataclasses.replace(config.test, **{name: getattr(TestConfig, name) for name in FREE})
    settings = repr((test, config.netG, config.netD, config.seed))
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return (
        f"checkpoint {options.checkpoint_dir.resolve()} step {step}\n"
        f"images {image_folder(config, options).resolve()}\nsettings {digest}\n"
    )


def identity_of(folder: Path) -> str | None:
    """The identity that a folder was written with; none for a new one."""
    path = folder / "run.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else None
