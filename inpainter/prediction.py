"""A prediction run: heatmaps of every image in a folder, from one checkpoint.

With findings and verdicts where the checkpoint has an operating point.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from common.annotations import Annotations, Box, read_annotations
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
from common.runtime import Processes
from common.volumes import split_slice
from inpainter.export import EXPORT_KINDS, Exporter, ExportKind, require_heatmaps_kept
from inpainter.findings import Verdicts, operating_point_for
from inpainter.heatmap import Heatmaps
from inpainter.heatmap_folder import Content, HeatmapFolder, PastWork
from inpainter.predictor import Predictor, open_checkpoint, settings_beside_checkpoint
from inpainter.run_identity import (
    Identity,
    differences_in_words,
    is_of,
    output_folder,
    read_identity,
    run_identity,
    write_identity,
)
from inpainter.settings import PicardConfig, input_path
from inpainter.sharing import SharedFolder, in_turn, require_welcome, shard
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
    processes: Processes = field(default_factory=Processes)
    """Which of how many processes this is, that score the images together."""


@dataclass
class PredictionResult:
    """Where the heatmaps lie and what became of the images, by name."""

    folder: Path
    finished: list[str] = field(default_factory=list)
    """Scored now, by this process or another one at work in the folder."""
    here: list[str] = field(default_factory=list)
    """Those that this process scored."""
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
    add("--shard", type=shard, metavar="I/N",
        help="this is process I, from 0, of N that score the images together on a shared disk "
             "(default: what torchrun says, else 0/1)")  # fmt: skip
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
    if options.overwrite and options.processes.world_size > 1:
        raise ConfigError(
            "--overwrite is for one process: with several, one would delete what another has just "
            "written. Delete the folder, or pass another --output_dir."
        )
    checkpoint = (options.checkpoint_dir, options.checkpoint_iter)
    predictor = open_checkpoint(config, *checkpoint, option="--checkpoint_iter")
    image_dir, images = images_to_score(config, options)
    annotations = None
    if options.annotations is not None:
        annotations = read_annotations(options.annotations, images, on_unknown="skip")
    identity = run_identity(predictor, image_dir, None if is_folder(options) else [*images])
    folder = output_folder(config, options.output_dir, identity, overwrite=options.overwrite)
    with SharedFolder(folder, options.processes) as shared:
        with shared.tables():
            run = open_run(predictor, images, annotations, identity, options, shared)
        run.score_all()
        with shared.tables():
            run.sum_up()
    result, output = run.result, run.output
    if options.processes.is_main:
        exporter = Exporter(options.export, predictor, output, run.verdicts.point)
        result.notes += with_names(exporter.export_all())
    result.notes += run.verdicts.summary()
    return result


def open_run(
    predictor: Predictor,
    images: Mapping[str, Path],
    annotations: Annotations | None,
    identity: Identity,
    options: PredictionOptions,
    shared: SharedFolder,
) -> "FolderRun":
    """Sorts out what the folder has and joins the processes at work there. Under shared.tables."""
    config, folder = predictor.config, shared.folder
    others = shared.others()
    is_same = is_of(folder, identity)
    if others:
        differing = "" if is_same else differences_in_words(read_identity(folder) or {}, identity)
        require_welcome(folder, others, differing=differing, overwrite=options.overwrite)
    choices = {"overwrite": options.overwrite, "alone": not others}
    output = HeatmapFolder(folder, config.test, images, **choices)
    if is_same and not options.overwrite:
        absorb(shared, output)  # of processes that were killed, too
    if others:
        past = PastWork([i for i in images if i not in shared.done and output.is_complete(i)])
    else:
        write_identity(folder, identity)
        command = [escaped(part) for part in options.command]
        write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
        past = output.sort_out()
        shared.forget()
    predictor.require_finite_weights()
    point, remarks = operating_point_for(predictor)
    verdicts = Verdicts(output, point, alone=not others)
    lost = [] if others else verdicts.catch_up(past.finished)
    result = PredictionResult(folder, already_there=past.finished)
    result.notes += [*notes_on(past, annotations), *remarks, *with_names({NO_HEATMAP: lost})]
    shared.begin()
    return FolderRun(predictor, images, output, verdicts, annotations, result, shared)


def absorb(shared: SharedFolder, output: HeatmapFolder) -> None:
    """Writes into the tables what all processes have done since. Under shared.tables."""
    output.catch_up()
    news = shared.news()
    for done in news.values():
        output.put(done.image, done.rows)
    shared.accept(news)


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
    shared: SharedFolder
    true: list[str] = field(default_factory=list)
    """Sentences that are true of the image that is being scored."""
    silent: bool = field(init=False)
    """No progress bars."""

    def __post_init__(self) -> None:
        self.silent = not (sys.stderr.isatty() and self.shared.processes.is_main)

    def score_all(self) -> None:
        """Scores and writes the images that are not finished and that no other process scores.

        At the end every image is done: it waits for those of others, and does a dead one's.
        """
        finished = set(self.result.already_there)
        order = in_turn([*self.images], self.shared.processes)
        todo = [name for name in order if name not in finished]
        with tqdm(total=len(todo), unit="image", disable=self.silent) as bar:
            free = (name for name in todo if self.shared.is_free(name))
            for name, read in prefetched(free, self.read):
                self.take(name, read)
                bar.update(self.shared.n_done() - bar.n)
            for name in self.shared.left(todo):
                self.take(name, partial(self.read, name))
                bar.update(self.shared.n_done() - bar.n)

    def take(self, name: str, read: Callable[[], tuple[Tensor, Content]]) -> None:
        """Scores and writes an image if nobody else does, and says so."""
        with self.shared.turn(name) as is_ours:
            if not is_ours:
                return
            self.true, reason = [], None
            try:
                pixels, content = read()
                started = time.monotonic()
                heatmaps = self.score(name, pixels)
                seconds = time.monotonic() - started
            except (UserError, MemoryError, RuntimeError) as error:
                if not isinstance(error, UserError) and not is_lack_of_memory(error):
                    raise
                reason = self.leave_out(name, error)
            else:
                self.write(name, pixels, content, heatmaps, seconds)
            self.shared.finish(name, self.output.taken_rows(), self.true, reason)
        ours = self.shared.tables_if_free()
        if ours is not None:  # else it is written by who has them, or later
            with ours:
                absorb(self.shared, self.output)

    def sum_up(self) -> None:
        """Completes the tables, and tells what became of all images. Under shared.tables."""
        absorb(self.shared, self.output)
        self.output.complete()
        done = [self.shared.done[name] for name in self.images if name in self.shared.done]
        self.result.bad = {each.image: each.left_out for each in done if each.left_out is not None}
        scored = [each for each in done if each.left_out is None]
        self.result.finished = [each.image for each in scored]
        self.result.here = [each.image for each in scored if each.by == self.shared.name]
        sentences = (WITHOUT_TISSUE, UNCOVERED, BAD_ANNOTATION, NO_PLOT)
        self.result.notes += with_names(
            {s: [each.image for each in done if s in each.notes] for s in sentences}
        )

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
            self.true.append(WITHOUT_TISSUE)
        if leaves_border(test, image_hw):
            self.true.append(UNCOVERED)
        if name in self.output.not_drawn:
            self.true.append(NO_PLOT)

    def boxes(self, name: str, image_hw: tuple[int, int]) -> Sequence[Box]:
        """The image's boxes for its plots; none, with a word, where they do not fit it."""
        if self.annotations is None:
            return ()
        try:
            return self.annotations.boxes(name, image_hw)
        except (UserError, OSError, MemoryError) as error:
            LOG.warning("%s: its annotation is not drawn: %s", escaped(name), error)
            self.true.append(BAD_ANNOTATION)
            return ()

    def leave_out(self, name: str, error: BaseException) -> str:
        """Why an image cannot be scored; raises ImageError instead if that is to stop the run."""
        reason = str(error)
        if not isinstance(error, UserError):
            reason = f"not enough memory ({first_line(error)})"
        path = self.images[name]
        message = reason if str(path) in reason else f"{path}: {reason}"
        if self.predictor.config.test.on_bad_image == "error":
            raise ImageError(message) from error
        LOG.warning("Left out: %s", message)
        self.output.write_left_out(name, message)
        return message


def prefetched(
    items: Iterable[Any], load: Callable[[Any], Any]
) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Yields (item, get), while one thread loads the next item, which is asked for just then.

    get() returns what load(item) returned, or raises what it raised.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        loading = ((item, pool.submit(load, item).result) for item in items)
        present = next(loading, None)
        while present is not None:
            ahead = next(loading, None)
            yield present
            present = ahead
