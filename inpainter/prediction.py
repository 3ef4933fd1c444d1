"""A prediction run: heatmaps of every image in a folder, from one checkpoint.

run.txt in the folder of the run holds what its heatmaps depend on beside their images, one
`key: value` a line: the identity of the run.
"""

import dataclasses
import logging
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
from common.checkpoint import CheckpointError, save_text_atomic
from common.cli import first_line, is_lack_of_memory
from common.config import REPOSITORY, config_to_yaml
from common.errors import UserError
from common.files import escaped
from common.image_folders import list_images
from common.images import ImageError
from common.run_log import write_run_record
from inpainter.heatmap import Heatmaps
from inpainter.heatmap_folder import Content, HeatmapFolder, PastWork, remove_partial_files
from inpainter.predictor import Predictor, open_checkpoint
from inpainter.settings import PicardConfig, input_path
from inpainter.windows import leaves_border

LOG = logging.getLogger(__name__)
SECONDS_BETWEEN_PICTURES = 10.0
MOST_NAMES = 5
"""Images that a message names at most."""
MOST_DIFFERENCES = 4
"""Settings that a message names at most."""
WITHOUT_TISSUE = "{} without tissue: no window of it was scored, its heatmap is 0"
UNCOVERED = (
    "{} with pixels at the right or lower border that no window covers: they are 0, as published; "
    "test.heatmap_alignment: centred covers all"
)
BAD_ANNOTATION = "{} with an annotation that is not drawn"
NO_PLOT = "{} without a plot, its heatmap is kept"

RUN_NAME = "run.txt"
NO_INFLUENCE = frozenset({
    *("dataset_name", "expname", "train_data_path", "test_data_path", "data_with_subfolder"),
    # What was measured is in the hash of the calibration's file; a pretrained network has its own.
    *("calibration_data_path", "test.calibration_windows", "test.feature_space"),
    *("checkpoints_dir", "logs_dir", "heatmaps_dir"),
    *("cuda", "gpu_ids", "device", "num_workers", "train"),
    *("coarse_l1_alpha", "l1_loss_alpha", "ae_loss_alpha", "global_wgan_loss_alpha"),
    *("gan_loss_alpha", "wgan_gp_lambda"),
    *("test.parallel_batchsize", "test.save_heatmap_data", "test.save_heatmap_plots"),
    *("test.save_progressive_heatmap", "test.log_compute_times", "test.on_bad_image"),
    *("test.engine", "test.compile"),
})  # fmt: skip
"""Settings, or whole sections, that change no heatmap; every other one, new ones too, does."""
FOR_THE_READER = "checkpoint"
"""The line that is not compared: the weights' hashes stand for the file that they came from."""

Identity = dict[str, str]


@dataclass(frozen=True)
class PredictionOptions:
    """What the command line says beside the settings."""

    checkpoint_dir: Path
    checkpoint_iter: int | str = "latest"
    """A step, `latest` or `best`."""
    image_dir: Path | None = None
    """Folder of images; None = test_data_path."""
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


def predict(config: PicardConfig, options: PredictionOptions) -> PredictionResult:
    """Scores every image of the folder and writes its heatmaps.

    Raises ConfigError, CheckpointError, ImageError (with test.on_bad_image: error; else a bad image
    is noted and left out), AnnotationError and WindowError, all with their remedy.
    """
    checkpoint = (options.checkpoint_dir, options.checkpoint_iter)
    predictor = open_checkpoint(config, *checkpoint, option="--checkpoint_iter")
    image_dir = options.image_dir or input_path(config.test_data_path, "test_data_path")
    paths = list_images(
        image_dir,
        recursive=config.data_with_subfolder,
        on_bad=config.test.on_bad_image,
        remedy="set data_with_subfolder: true",
    )
    images = {path.relative_to(image_dir).as_posix(): path for path in paths}
    annotations = None
    if options.annotations is not None:
        annotations = read_annotations(options.annotations, images, on_unknown="skip")
    identity = run_identity(predictor, image_dir)
    folder = output_folder(config, options.output_dir, identity, overwrite=options.overwrite)
    output = HeatmapFolder(folder, config.test, images, overwrite=options.overwrite)
    text = "".join(f"{key}: {value}\n" for key, value in identity.items())
    save_text_atomic(text, folder / RUN_NAME)
    command = [escaped(part) for part in options.command]
    write_run_record(folder, config_yaml=config_to_yaml(config), command=command)
    past = output.sort_out()
    predictor.require_finite_weights()
    result = PredictionResult(folder, already_there=past.finished)
    result.notes += notes_on(past, annotations)
    run = FolderRun(predictor, images, output, annotations, result)
    run.score_all()
    result.notes += with_names(run.notes | {NO_PLOT: list(output.not_drawn)})
    remove_partial_files(folder)
    return result


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
        if not path.is_file():  # reading what is no file, a pipe for one, might wait for ever
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


def run_identity(predictor: Predictor, image_dir: Path) -> Identity:
    """What heatmaps depend on: the weights, the folder of images, the settings."""
    lines = {FOR_THE_READER: predictor.source, **predictor.weights}
    lines |= {"images": str(image_dir.resolve()), **influential_settings(predictor.config)}
    return {key: escaped(value) for key, value in lines.items()}


def influential_settings(section: Any, prefix: str = "") -> Identity:
    """The settings that may change a heatmap, by dotted key."""
    settings: Identity = {}
    for setting in dataclasses.fields(section):
        key, value = prefix + setting.name, getattr(section, setting.name)
        if key in NO_INFLUENCE:
            continue
        if dataclasses.is_dataclass(value):
            settings |= influential_settings(value, f"{key}.")
        else:
            settings[key] = repr(value)
    return settings


def read_identity(folder: Path) -> Identity | None:
    """The identity that a folder's heatmaps were made with; None for a new folder.

    Raises CheckpointError where run.txt cannot be read.
    """
    path = folder / RUN_NAME
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise CheckpointError(
            f"{path} is no UTF-8 text, so it does not say how the heatmaps there were made. Pass "
            "another --output_dir, or --overwrite to replace them."
        ) from None
    return {key: value for key, _, value in (line.partition(": ") for line in lines)}


def differences(old: Identity, new: Identity) -> list[str]:
    """What differs, in words; a setting that the old one lacks had the published value."""
    published = influential_settings(PicardConfig())
    words = []
    for key in dict.fromkeys([*new, *old]):
        before, now = (str(which.get(key, published.get(key, "none"))) for which in (old, new))
        if key != FOR_THE_READER and before != now:
            words.append(f"{key} {_brief(before)} there, {_brief(now)} now")
    return words


def _brief(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:12]}...{value[-12:]}"


def output_folder(
    config: PicardConfig, given: Path | None, identity: Identity, *, overwrite: bool
) -> Path:
    """The run's folder, made where it is missing: the given one, or else one below heatmaps_dir.

    There a run of the same identity goes on in the folder it had. Raises CheckpointError where the
    given folder is a file or holds heatmaps of another identity that are not to be overwritten.
    """
    if given is None:
        name = config.dataset_name or "unnamed"
        base = REPOSITORY / config.heatmaps_dir / name / "dropout"
        same = [run.parent for run in base.glob(f"*/{RUN_NAME}") if _is_of(run.parent, identity)]
        return max(same) if same else new_folder(base / time.strftime("%Y-%m-%d_%H-%M-%S"))
    if given.exists() and not given.is_dir():
        raise CheckpointError(f"--output_dir {given} is a file. Pass a folder, or a new name.")
    old = read_identity(given) if not overwrite and holds_scores(given) else None
    differing = [] if old is None or _is_earlier(old, identity) else differences(old, identity)
    if differing:
        unnamed = len(differing) - MOST_DIFFERENCES
        more = f" and {unnamed} more" if unnamed > 0 else ""
        raise CheckpointError(
            f"{given} holds heatmaps made with other settings or another checkpoint: "
            f"{'; '.join(differing[:MOST_DIFFERENCES])}{more}. Pass another --output_dir, or "
            "--overwrite to replace them."
        )
    given.mkdir(parents=True, exist_ok=True)
    return given


def holds_scores(folder: Path) -> bool:
    """Whether any image was scored into this folder."""
    path = folder / "scores.csv"
    return path.is_file() and len(path.read_bytes().splitlines()) > 1


def _is_earlier(old: Identity, identity: Identity) -> bool:
    """Whether run.txt is of the time before contents were recorded, of the same step and images.

    There images.csv is missing too, so that every image is scored anew.
    """
    lines = {f"{key} {identity[key]}" for key in (FOR_THE_READER, "images")}
    return "gen" not in old and lines <= set(old)


def _is_of(folder: Path, identity: Identity) -> bool:
    try:
        return not differences(read_identity(folder) or {}, identity)
    except CheckpointError as error:
        LOG.warning("%s", error)
        return False


def new_folder(path: Path) -> Path:
    """Makes the folder, with a number behind its name where another run has just taken it."""
    folder, number = path, 1
    while folder.exists():
        number += 1
        folder = path.with_name(f"{path.name}_{number}")
    folder.mkdir(parents=True)
    return folder
