"""A prediction run: heatmaps of every image in a folder, from one checkpoint.

With findings and verdicts where the checkpoint has an operating point.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from common.annotations import Annotations, Box, read_annotations
from common.checkpoint import save_text_atomic
from common.cli import (
    add_common_arguments,
    first_line,
    is_lack_of_memory,
    load_from_arguments,
)
from common.config import REPOSITORY, ConfigError, config_to_yaml
from common.errors import UserError
from common.files import escaped
from common.image_folders import list_images, with_slices
from common.images import ImageError
from common.run_log import write_run_record
from common.volumes import split_slice
from inpainter.export import EXPORT_KINDS, Exporter, ExportKind, require_heatmaps_kept
from inpainter.findings import Verdicts, operating_point_for
from inpainter.heatmap import Heatmaps
from inpainter.heatmap_folder import Content, HeatmapFolder, PastWork, remove_partial_files
from inpainter.predictor import Predictor, open_checkpoint, settings_beside_checkpoint
from inpainter.run_identity import RUN_NAME, output_folder, run_identity
from inpainter.settings import PicardConfig, input_path
from inpainter.windows import leaves_border

LOG = logging.getLogger(__name__)
DEFAULT_CONFIG = "configs/default.yaml"
SECONDS_BETWEEN_PICTURES = 10.0
MOST_NAMES = 5
"""Images that a message names at most."""
WITHOUT_TISSUE = "{} without tissue: no window of it was scored, its heatmap is 0"
UNCOVERED = (
    "{} with pixels at the right or lower border that no window covers: they are 0, as published; "
    "test.heatmap_alignment: centred covers all"
)
BAD_ANNOTATION = "{} with an annotation that is not drawn"
NO_PLOT = "{} without a plot, its heatmap is kept"
NO_HEATMAP = "{} finished before without a verdict: test.save_heatmap_data: false kept no heatmap"


@dataclass(frozen=True)
class PredictionOptions:
    """What the command line says beside the settings."""

    checkpoint_dir: Path
    checkpoint_iter: int | str = "latest"
    """A step, `latest` or `best`."""
    images: Sequence[Path] = ()
    """Files, and folders of images, to score; none = those of image_dir."""
    image_dir: Path | None = None
    """Folder of images; None = test_data_path."""
    output_dir: Path | None = None
    """None = <heatmaps_dir>/<dataset_name>/dropout/<time>, an unfinished run's if there is one."""
    annotations: Path | None = None
    """Boxes or masks, drawn into the plots."""
    overwrite: bool = False
    """Redo images that are finished."""
    export: Sequence[ExportKind] = ()
    """Formats in which heatmaps are written besides."""
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


def export_kinds(text: str) -> tuple[ExportKind, ...]:
    """What --export names, separated by commas; an argparse type."""
    kinds = tuple(part.strip() for part in text.split(","))
    if unknown := [kind for kind in kinds if kind not in EXPORT_KINDS]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)!r} is unknown; expected some of {','.join(EXPORT_KINDS)}"
        )
    return kinds


def add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of predict_heatmap.py."""
    add, folder = parser.add_argument, {"type": Path, "metavar": "DIR"}
    add("images", nargs="*", type=Path, metavar="FILE|DIR",
        help="images, and folders of images, to score (default: --image_dir); without --config by "
             "the config.yaml that training wrote to --checkpoint_dir")  # fmt: skip
    add("--checkpoint_dir", **folder,
        help="folder with gen_%%08d.pt and dis_%%08d.pt (default: the settings' run "
             "folder)")  # fmt: skip
    add("--checkpoint_iter", default="latest", metavar="N",
        help="a step, latest, or best = lowest completion error on training crops (default: "
             "latest)")  # fmt: skip
    add("--image_dir", **folder, help="images to score (default: test_data_path)")
    add("--output_dir", **folder,
        help="where to write (default: <heatmaps_dir>/<dataset_name>/dropout/<time>; a run with "
             "the same settings and checkpoint goes on where it stopped)")  # fmt: skip
    add("--annotations", type=Path, metavar="FILE|DIR",
        help="boxes (CSV: image,top,left,height,width) or a folder of masks, drawn into the "
             "plots")  # fmt: skip
    add("--calibrate", action="store_true",
        help="first measure normal images (calibration_data_path, else train_data_path) for "
             "test.calibration and keep that beside the checkpoint")  # fmt: skip
    add("--explain", nargs=3, metavar=("IMAGE", "X", "Y"),
        help="instead draw why the heatmap is as it is at column X, row Y of an image: its window "
             "and completions, into --output_dir (default: here)")  # fmt: skip
    add("--overwrite", action="store_true", help="redo images that are finished")
    add("--export", type=export_kinds, default=(), metavar="KIND,…",
        help=f"also write the heatmaps as {', '.join(EXPORT_KINDS)} to export/")  # fmt: skip
    add_common_arguments(parser, PicardConfig, default_config=DEFAULT_CONFIG)
    parser.set_defaults(config=None)


def settings_of(arguments: argparse.Namespace) -> PicardConfig:
    """The settings that the flags ask for. Raises ConfigError.

    Without --config: the checkpoint's where images are named or one is to be explained, else those
    of configs/default.yaml.
    """
    if arguments.images or arguments.explain:
        settings_beside_checkpoint(arguments)
    arguments.config = arguments.config or REPOSITORY / DEFAULT_CONFIG
    return load_from_arguments(PicardConfig, arguments)


def predict(config: PicardConfig, options: PredictionOptions) -> PredictionResult:
    """Scores every image of the folder and writes its heatmaps.

    Raises ConfigError, CheckpointError, ImageError (with test.on_bad_image: error; else a bad image
    is noted and left out), AnnotationError and WindowError, all with their remedy.
    """
    require_heatmaps_kept(options.export, config.test)
    checkpoint = (options.checkpoint_dir, options.checkpoint_iter)
    predictor = open_checkpoint(config, *checkpoint, option="--checkpoint_iter")
    image_dir, images = images_to_score(config, options)
    annotations = None
    if options.annotations is not None:
        annotations = read_annotations(options.annotations, images, on_unknown="skip")
    identity = run_identity(predictor, image_dir, None if is_folder(options) else [*images])
    folder = output_folder(config, options.output_dir, identity, overwrite=options.overwrite)
    output = HeatmapFolder(folder, config.test, images, overwrite=options.overwrite)
    text = "".join(f"{key}: {value}\n" for key, value in identity.items())
    save_text_atomic(text, folder / RUN_NAME)
    command = [escaped(part) for part in options.command]
    write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
    past = output.sort_out()
    predictor.require_finite_weights()
    point, remarks = operating_point_for(predictor)
    verdicts = Verdicts(output, point)
    lost = verdicts.catch_up(past.finished)
    result = PredictionResult(folder, already_there=past.finished)
    result.notes += [*notes_on(past, annotations), *remarks, *with_names({NO_HEATMAP: lost})]
    run = FolderRun(predictor, images, output, verdicts, annotations, result)
    run.score_all()
    result.notes += with_names(run.notes | {NO_PLOT: list(output.not_drawn)})
    result.notes += with_names(Exporter(options.export, predictor, output, point).export_all())
    result.notes += verdicts.summary()
    output.write_volumes()
    remove_partial_files(folder)
    return result


def is_folder(options: PredictionOptions) -> bool:
    """Whether the images are those of one folder, not named one by one."""
    return len(options.images) < 2 and all(path.is_dir() for path in options.images)


def images_to_score(
    config: PicardConfig, options: PredictionOptions
) -> tuple[Path, dict[str, Path]]:
    """The folder that all images lie below, and the images by their names there.

    Raises ConfigError, and ImageError where there are none, or where what is named is not there.
    """
    if options.images and options.image_dir is not None:
        raise ConfigError("Name images, or give --image_dir, not both.")

    def listed(folder: Path) -> list[Path]:
        return list_images(
            folder,
            recursive=config.data_with_subfolder,
            on_bad=config.test.on_bad_image,
            remedy="set data_with_subfolder: true",
            slices=config.slices,
        )

    given = [path.absolute() for path in options.images]
    if is_folder(options):
        folder = options.images[0] if given else options.image_dir
        root = folder or input_path(config.test_data_path, "test_data_path")
        return root, {path.relative_to(root).as_posix(): path for path in listed(root)}
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            paths += listed(path)
            continue
        file, number = split_slice(path)
        if not file.is_file():
            raise ImageError(f"There is no file or folder {path}.")
        paths += with_slices([file], config.slices) if number is None else [path]
    root = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in given]))
    return root, {path.relative_to(root).as_posix(): path for path in paths}


def notes_on(past: PastWork, annotations: Annotations | None) -> list[str]:
    """What became of earlier work, and which annotations belong to no image."""
    notes = with_names({
        "{} scored again: the file has changed since": past.changed,
        "{} scored again: this folder does not record from which content": past.unrecorded,
        "{} no longer among the images, so no longer in the tables": past.vanished,
        "{} annotated, but not among the images": annotations.skipped if annotations else (),
    })  # fmt: skip
    for note in notes:
        LOG.warning("%s", note)
    return notes


def with_names(sentences: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences on images, {} standing for their number, with the first names; none on no image."""
    notes = []
    for sentence, images in sentences.items():
        names = ", ".join(map(escaped, images[:MOST_NAMES]))
        more = f" and {len(images) - MOST_NAMES} more" if len(images) > MOST_NAMES else ""
        if images:
            notes.append(f"{sentence.format(len(images))}: {names}{more}")
    return notes


@dataclass
class FolderRun:
    """Scores the images of a folder one after the other, and collects what there is to tell."""

    predictor: Predictor
    images: Mapping[str, Path]
    """Name -> file."""
    output: HeatmapFolder
    verdicts: Verdicts
    annotations: Annotations | None
    result: PredictionResult
    notes: dict[str, list[str]] = field(
        default_factory=lambda: {WITHOUT_TISSUE: [], UNCOVERED: [], BAD_ANNOTATION: []}
    )
    """Sentence -> the images that it is true of."""

    silent: bool = field(default_factory=lambda: not sys.stderr.isatty())
    """No progress bars."""

    def score_all(self) -> None:
        """Scores and writes the images that are not finished; notes what became of each."""
        finished = set(self.result.already_there)
        todo = [name for name in self.images if name not in finished]
        images = prefetched(todo, self.read)
        for name, read in tqdm(images, total=len(todo), unit="image", disable=self.silent):
            try:
                pixels, content = read()
                started = time.monotonic()
                heatmaps = self.score(name, pixels)
                seconds = time.monotonic() - started
            except (UserError, MemoryError, RuntimeError) as error:
                if not isinstance(error, UserError) and not is_lack_of_memory(error):
                    raise
                self.leave_out(name, error)
            else:
                self.write(name, pixels, content, heatmaps, seconds)

    def read(self, name: str) -> tuple[Tensor, Content]:
        """An image, (C, H, W) in [0, 1], and what its file held. Raises ImageError.

        The content is noted before: a file that is replaced meanwhile counts as changed next time.
        """
        path = self.images[name]
        if not split_slice(path)[
            0
        ].is_file():  # reading what is no file, a pipe for one, might wait for ever
            raise ImageError(f"{path} is no longer there, or no longer a file.")
        try:
            content = Content.of(path)
            return self.predictor.pixels_of(path), content
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror or error}.") from error

    def score(self, name: str, pixels: Tensor) -> Heatmaps:
        """The heatmaps of an image, with a progress bar and, if wanted, pictures meanwhile."""
        draws = self.predictor.config.test.save_progressive_heatmap
        due = time.monotonic()  # the first picture at once
        with tqdm(unit="window", desc=escaped(name), leave=False, disable=self.silent) as bar:
            for heatmaps in self.predictor.score_image(pixels, name):
                bar.total = heatmaps.n_windows
                bar.update(heatmaps.n_scored - bar.n)
                if draws and time.monotonic() >= due:
                    self.output.draw_progress(name, pixels, heatmaps)
                    due = time.monotonic() + SECONDS_BETWEEN_PICTURES
        return heatmaps

    def write(
        self, name: str, pixels: Tensor, content: Content, heatmaps: Heatmaps, seconds: float
    ) -> None:
        """Writes what was computed and says so."""
        image_hw = (pixels.shape[1], pixels.shape[2])
        self.output.write(name, pixels, content, heatmaps, self.boxes(name, image_hw))
        self.verdicts.write(name, {k: heat.numpy() for k, heat in heatmaps.heatmaps.items()})
        test = self.predictor.config.test
        if test.log_compute_times:
            self.output.write_time(name, seconds, heatmaps)
        counts = (heatmaps.n_scored, heatmaps.n_windows)
        LOG.info("%s: %d of %d windows in %.1f s", escaped(name), *counts, seconds)
        if heatmaps.n_scored == 0:
            self.notes[WITHOUT_TISSUE].append(name)
        if leaves_border(test, image_hw):
            self.notes[UNCOVERED].append(name)
        self.result.finished.append(name)

    def boxes(self, name: str, image_hw: tuple[int, int]) -> Sequence[Box]:
        """The image's boxes for its plots; none, with a word, where they do not fit it."""
        if self.annotations is None:
            return ()
        try:
            return self.annotations.boxes(name, image_hw)
        except (UserError, OSError, MemoryError) as error:
            LOG.warning("%s: its annotation is not drawn: %s", escaped(name), error)
            self.notes[BAD_ANNOTATION].append(name)
            return ()

    def leave_out(self, name: str, error: BaseException) -> None:
        """Notes an image that cannot be scored, or raises ImageError if that is to stop the run."""
        reason = str(error)
        if not isinstance(error, UserError):
            reason = f"not enough memory ({first_line(error)})"
        path = self.images[name]
        message = reason if str(path) in reason else f"{path}: {reason}"
        if self.predictor.config.test.on_bad_image == "error":
            raise ImageError(message) from error
        LOG.warning("Left out: %s", message)
        self.result.bad[name] = message
        self.output.write_left_out(name, message)


def prefetched(
    items: Sequence[Any], load: Callable[[Any], Any]
) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Yields (item, get), while one thread loads the next item.

    get() returns what load(item) returned, or raises what it raised.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(load, items[0]) if items else None
        for number, item in enumerate(items):
            present = ahead
            if number + 1 < len(items):
                ahead = pool.submit(load, items[number + 1])
            yield item, present.result
