"""A prediction run: heatmaps of every image in a folder, from one checkpoint."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.annotations import Annotations, Box, read_annotations
from common.checkpoint import (
    CheckpointError,
    checkpoint_path,
    content_hash,
    require_finite_weights,
    save_text_atomic,
)
from common.cli import first_line, is_lack_of_memory
from common.config import config_to_yaml, resolve_path
from common.errors import UserError
from common.files import escaped
from common.image_folders import list_images
from common.images import ImageError, read_image
from common.prefetch import prefetched
from common.run_log import write_run_record
from common.runtime import resolve_device, tf32_products
from inpainter.completion import WindowScorer, dropout_of, spaces_of
from inpainter.fast.scorer import FastScorer
from inpainter.heatmap import Heatmaps, score_image, stitch
from inpainter.heatmap_folder import Content, HeatmapFolder, PastWork, remove_partial_files
from inpainter.networks.loading import load_generator, load_local_critic
from inpainter.run_identity import NAME as RUN_NAME
from inpainter.run_identity import as_text, output_folder, run_identity
from inpainter.settings import Metric, PicardConfig
from inpainter.snapshots import resolve_step
from inpainter.windows import WindowGrid, check_stride, leaves_border

LOG = logging.getLogger(__name__)
SECONDS_BETWEEN_PICTURES = 10.0
TRIES = 5
"""How often `latest` and `best` are looked up again beside a training that deletes old steps."""
NAMED = 5
"""Images that a message names at most."""


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
    notes: list[str] = field(default_factory=list)
    """What else the user should know, a sentence each."""


class ReadImage(NamedTuple):
    """An image with what its file held."""

    pixels: Tensor
    """(C, H, W) in [0, 1]."""
    content: Content


def predict(config: PicardConfig, options: PredictionOptions) -> PredictionResult:
    """Scores every image of the folder and writes its heatmaps.

    Raises ConfigError, CheckpointError, ImageError (with test.on_bad_image: error; else a bad image
    is noted and left out), AnnotationError and WindowError, all with their remedy.
    """
    check_stride(config.test)
    device = resolve_device(config.device, allow_gpu=config.cuda, gpu=config.gpu_ids[0])
    checkpoint = load_scorer(config, options, device)
    image_dir = image_folder(config, options)
    paths = list_images(
        image_dir,
        recursive=config.data_with_subfolder,
        on_bad=config.test.on_bad_image,
        remedy="set data_with_subfolder: true",
    )
    names = {path.relative_to(image_dir).as_posix(): path for path in paths}
    annotations = None
    if options.annotations is not None:
        annotations = read_annotations(options.annotations, names, on_unknown="skip")
    identity = run_identity(config, checkpoint.source, checkpoint.weights, image_dir)
    folder = output_folder(config, options.output_dir, identity, overwrite=options.overwrite)
    output = HeatmapFolder(folder, config.test, names, overwrite=options.overwrite)
    save_text_atomic(as_text(identity), folder / RUN_NAME)
    command = [escaped(part) for part in options.command]
    write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
    past = output.sort_out()
    checkpoint.require_finite()
    result = PredictionResult(folder, already_there=past.finished)
    result.notes += notes_on(past, annotations)
    run = Run(config, checkpoint.scorer, device, output, annotations)
    run.score_all(names, result)
    result.notes += run.notes()
    remove_partial_files(folder)
    return result


def notes_on(past: PastWork, annotations: Annotations | None) -> list[str]:
    """What became of earlier work, and which annotations belong to no image."""
    skipped = annotations.skipped if annotations is not None else ()
    sentences = {
        "{} scored again: the file has changed since": past.changed,
        "{} scored again: this folder does not record from which content": past.unrecorded,
        "{} no longer among the images, so no longer in the tables": past.vanished,
        "{} annotated, but not among the images": skipped,
    }
    notes = with_names(sentences)
    for note in notes:
        LOG.warning("%s", note)
    return notes


def with_names(sentences: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences on images, {} standing for their number, with the first names; none on no image."""
    return [f"{text.format(len(of))}: {listed(of)}" for text, of in sentences.items() if of]


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(escaped, names[:NAMED])) + more


def image_folder(config: PicardConfig, options: PredictionOptions) -> Path:
    """--image_dir, or test_data_path of the settings."""
    return options.image_dir or resolve_path(config.test_data_path, "test_data_path")


class LoadedCheckpoint(NamedTuple):
    """A scorer and where its weights came from."""

    scorer: WindowScorer | FastScorer
    source: str
    """Folder and step, in words."""
    weights: dict[str, str]
    """SHA-256 of the file by role."""

    def require_finite(self) -> None:
        """Raises CheckpointError where weights are NaN or infinite: every score would be."""
        for network in (self.scorer.generator, self.scorer.critic):
            if network is not None:
                require_finite_weights(network.state_dict(), self.source)


def load_scorer(
    config: PicardConfig, options: PredictionOptions, device: torch.device
) -> LoadedCheckpoint:
    """The networks of the wanted checkpoint as a window scorer.

    A training beside may delete the step that `latest` or `best` meant, or write it anew: then they
    are looked up again.
    """
    needs_critic = "feature" in spaces_of(config.test.heatmap_metrics)
    roles = ("gen", "dis") if needs_critic else ("gen",)
    folder = options.checkpoint_dir
    for tries_left in reversed(range(TRIES)):
        step = resolve_step(folder, options.checkpoint_iter, roles, option="--checkpoint_iter")
        paths = {role: checkpoint_path(folder, role, step) for role in roles}
        try:
            weights = {role: content_hash(path) for role, path in paths.items()}
            scorer = build_scorer(config, folder, step, device, with_critic=needs_critic)
            if weights == {role: content_hash(path) for role, path in paths.items()}:
                return LoadedCheckpoint(scorer, f"{folder.resolve()} step {step}", weights)
        except (CheckpointError, FileNotFoundError):
            vanished = not all(path.is_file() for path in paths.values())
            moving = options.checkpoint_iter in ("latest", "best")
            if not (vanished and moving and tries_left):
                raise
    raise CheckpointError(f"{paths['gen']} keeps changing. Wait until it is whole, and run again.")


def build_scorer(
    config: PicardConfig, folder: Path, step: int, device: torch.device, *, with_critic: bool
) -> WindowScorer | FastScorer:
    """The networks of a step, on the device, in the engine that the settings ask for."""
    generator = load_generator(folder, step, config.netG)
    critic = load_local_critic(folder, step, config) if with_critic else None
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
        return WindowScorer(*parts)
    return FastScorer(*parts, precision=test.precision, compiled=test.compile)


@dataclass
class Run:
    """What scoring the images one after the other needs, and what there is to tell about it."""

    config: PicardConfig
    scorer: WindowScorer | FastScorer
    device: torch.device
    output: HeatmapFolder
    annotations: Annotations | None
    without_tissue: list[str] = field(default_factory=list)
    """Images of which no window was scored."""
    uncovered: list[str] = field(default_factory=list)
    """Images with pixels that score 0 because no window reaches them."""
    bad_annotations: dict[str, str] = field(default_factory=dict)
    """Image -> why its annotation is not drawn."""

    def score_all(self, names: Mapping[str, Path], result: PredictionResult) -> None:
        """Scores and writes the images that are not finished; notes what became of each."""
        finished = set(result.already_there)
        todo = [name for name in names if name not in finished]
        channels, white = self.config.netG.input_dim, self.config.white_value
        images = prefetched(todo, lambda name: read_with_content(names[name], channels, white))
        bar = tqdm(images, total=len(todo), unit="image", disable=not sys.stderr.isatty())
        for name, read in bar:
            try:
                image = read()
                started = time.monotonic()
                scored = self.score(name, image.pixels)
                seconds = time.monotonic() - started
            except (UserError, MemoryError, RuntimeError) as error:
                if not isinstance(error, UserError) and not is_lack_of_memory(error):
                    raise
                self.leave_out(name, names[name], error, result)
                continue
            self.write(name, image, scored, seconds)
            result.finished.append(name)

    def score(self, name: str, image: Tensor) -> Heatmaps:
        """The heatmaps of an image. Raises ImageError where they are not finite."""
        config = self.config
        name_of_draws = escaped(name)  # random numbers depend on the name; it need not be UTF-8
        dropout = dropout_of(
            self.scorer.generator, config.netG, config.test, config.seed, name_of_draws
        )
        with (
            tf32_products(config.test.precision == "tf32"),
            WindowBar(name, image, config, self.output) as bar,
        ):
            scored = score_image(image, self.scorer, config.test, dropout, self.device, bar.note)
        for metric, grid in scored.grids.items():
            n_bad = int((~grid.isfinite()).sum())
            if n_bad:
                raise ImageError(
                    f"{metric} is NaN or infinite in {n_bad} of {grid.numel()} windows. Are the "
                    "checkpoint's weights finite? test.precision: fp32 has the largest range."
                )
        return scored

    def write(self, name: str, image: ReadImage, scored: Heatmaps, seconds: float) -> None:
        """Writes what was computed and says so."""
        self.output.write(name, image.pixels, image.content, scored, self.boxes(name, image.pixels))
        if self.config.test.log_compute_times:
            self.output.write_time(name, seconds, scored)
        counts = (scored.n_scored, scored.n_windows)
        LOG.info("%s: %d of %d windows in %.1f s", escaped(name), *counts, seconds)
        if scored.n_scored == 0:
            self.without_tissue.append(name)
        if leaves_border(self.config.test, (image.pixels.shape[1], image.pixels.shape[2])):
            self.uncovered.append(name)

    def boxes(self, name: str, pixels: Tensor) -> Sequence[Box]:
        """The image's boxes for its plots; none, with a word, where they do not fit it."""
        if self.annotations is None:
            return ()
        size = (pixels.shape[1], pixels.shape[2])
        try:
            return self.annotations.boxes(name, size)
        except (UserError, OSError, MemoryError) as error:
            LOG.warning("%s: its annotation is not drawn: %s", escaped(name), error)
            self.bad_annotations[name] = str(error)
            return ()

    def leave_out(
        self, name: str, path: Path, error: BaseException, result: PredictionResult
    ) -> None:
        """Notes an image that cannot be scored, or raises ImageError if that is to stop the run."""
        reason = str(error)
        if not isinstance(error, UserError):
            reason = f"not enough memory ({first_line(error)})"
        message = reason if str(path) in reason else f"{path}: {reason}"
        if self.config.test.on_bad_image == "error":
            raise ImageError(message) from error
        LOG.warning("Left out: %s", message)
        result.bad[name] = message
        self.output.write_left_out(name, message)

    def notes(self) -> list[str]:
        """What there is to tell at the end, a sentence per kind."""
        sentences = {
            "{} without tissue: no window of it was scored, its heatmap is 0": self.without_tissue,
            "{} with pixels at the right or lower border that no window covers: they are 0, as "
            "published; test.heatmap_alignment: centred covers all": self.uncovered,
            "{} with an annotation that is not drawn": list(self.bad_annotations),
            "{} without a plot, its heatmap is kept": list(self.output.not_drawn),
        }
        return with_names(sentences)


def read_with_content(path: Path, channels: int, white_value: int | None) -> ReadImage:
    """Reads an image as `read_image` does. Raises ImageError where it cannot be read.

    The content is noted before: a file that is replaced meanwhile counts as changed the next time.
    """
    if not path.is_file():  # reading what is no file, a pipe for one, might wait for ever
        raise ImageError(f"{path} is no longer there, or no longer a file.")
    try:
        content = Content.of(path)
        return ReadImage(read_image(path, channels, white_value=white_value), content)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}.") from error


class WindowBar:
    """Progress over one image's windows: a bar, and its heatmap so far as a picture if wanted."""

    def __init__(
        self, name: str, image: Tensor, config: PicardConfig, output: HeatmapFolder
    ) -> None:
        self.name, self.image, self.test, self.output = name, image, config.test, output
        self.drawn = -SECONDS_BETWEEN_PICTURES  # the first at once
        shown, silent = escaped(name), not sys.stderr.isatty()
        self.bar = tqdm(unit="window", desc=shown, leave=False, disable=silent)

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
                self.output.draw(path, self.name, self.image, metric, heat)
            self.drawn = time.monotonic()
