"""The images of one folder, scored and written one after the other, shared with other processes."""

import logging
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

from common.annotations import Annotations, Box
from common.cli import first_line, is_lack_of_memory
from common.errors import UserError
from common.files import escaped
from common.images import ImageError
from common.volumes import split_slice
from inpainter.findings import Verdicts
from inpainter.heatmap import Heatmaps, ScoreError, Workers, one_worker
from inpainter.heatmap_folder import Content, FailureKind, HeatmapFolder
from inpainter.heatmap_tables import FAILURES
from inpainter.predictor import Predictor
from inpainter.sharing import NotNeededError, SharedFolder, SharedWindows, in_turn
from inpainter.windows import WindowError, leaves_border

LOG = logging.getLogger(__name__)
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


class TooManyFailuresError(UserError):
    """More images could not be scored than the user allows."""


@dataclass
class PredictionResult:
    """Where the heatmaps lie and what became of the images, by name."""

    folder: Path
    finished: list[str] = field(default_factory=list)
    """Scored now, by this process or another one at work in the folder."""
    here: list[str] = field(default_factory=list)
    """Those that this process scored."""
    helped: dict[str, int] = field(default_factory=dict)
    """Image of another process -> windows that this one computed of it."""
    already_there: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    """Image -> why it was left out."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know, a sentence each."""


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
    max_failures: int | None = None
    """Images that may fail, of all processes together; None = all."""
    true: list[str] = field(default_factory=list)
    """Sentences that are true of the image that is being scored."""
    todo: list[str] = field(default_factory=list)
    """Images that were not finished, in the order in which this process looks for work."""
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
        self.todo = [name for name in order if name not in finished]
        with tqdm(total=len(self.todo), unit="image", disable=self.silent) as bar:
            free = (name for name in self.todo if self.shared.is_free(name))
            for name, read in prefetched(free, self.read):
                self.take(name, read)
                bar.update(self.shared.n_done() - bar.n)
            for name in self.shared.left(self.todo):
                if not self.take(name, partial(self.read, name)):
                    self.help(name)
                bar.update(self.shared.n_done() - bar.n)

    def take(self, name: str, read: Callable[[], tuple[Tensor, Content]]) -> bool:
        """Scores and writes an image if nobody else does, and says so; whether it did."""
        with self.shared.turn(name) as is_ours:
            if not is_ours:
                return False
            self.true, reason = [], None
            try:
                pixels, content = read()
                started = time.monotonic()
                heatmaps = self.score(name, pixels, self.workers(name, content))
                seconds = time.monotonic() - started
            except NotNeededError:  # this process stood still, and another one took the image over
                return False
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
                self.shared.write_news(self.output)
        self.require_few_failures()
        return True

    def require_few_failures(self) -> None:
        """Raises TooManyFailuresError where more images than allowed are known to have failed."""
        failed = [each.image for each in self.shared.done.values() if each.left_out is not None]
        if self.max_failures is not None and len(failed) > self.max_failures:
            (said,) = with_names({"{} could not be scored": failed})
            raise TooManyFailuresError(
                f"{said}. That is more than --max_failures {self.max_failures}; see "
                f"{self.output.folder / FAILURES}. What is finished is kept: mend the cause, or "
                "raise the limit, and run the same command again."
            )

    def help(self, name: str) -> None:
        """Computes windows of an image that another process writes, once, until all are there.

        What is wrong with the image is for that process to say.
        """
        if name in self.result.helped or not self.shared.is_offered(name):
            return
        self.result.helped[name] = 0
        try:
            pixels, content = self.read(name)
            windows = SharedWindows(self.shared, name, content.sha256)
            for _ in self.predictor.score_image(pixels, name, windows.run):
                self.result.helped[name] = windows.n_computed
        except NotNeededError:
            pass
        except UserError as error:
            LOG.info("No help with %s: %s", escaped(name), error)
        except (MemoryError, RuntimeError) as error:
            if not is_lack_of_memory(error):
                raise
            LOG.warning("No help with %s: not enough memory (%s)", escaped(name), first_line(error))

    def sum_up(self) -> None:
        """Completes the tables, and tells what became of all images. Under shared.tables."""
        self.shared.write_news(self.output)
        self.output.complete()
        self.require_few_failures()
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

    def workers(self, name: str, content: Content) -> Workers:
        """Who computes the windows of an image: this process, of the last images others, too."""
        if self.shared.is_running_out(self.todo):
            self.shared.offer(name)
        elif not self.shared.is_offered(name):  # by a process that has died
            return one_worker
        return SharedWindows(self.shared, name, content.sha256).run

    def score(self, name: str, pixels: Tensor, workers: Workers) -> Heatmaps:
        """The heatmaps of an image, with a progress bar and, if wanted, pictures meanwhile."""
        draws = self.predictor.config.test.save_progressive_heatmap
        due = time.monotonic()  # the first picture at once
        with tqdm(unit="window", desc=escaped(name), leave=False, disable=self.silent) as bar:
            for heatmaps in self.predictor.score_image(pixels, name, workers):
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
        self.output.write_left_out(name, failure_kind(error), message)
        return message


def failure_kind(error: BaseException) -> FailureKind:
    """What to mend, in a word."""
    match error:
        case WindowError():
            return "window"
        case ScoreError():
            return "scores"
        case UserError():
            return "image"
        case _:
            return "memory"


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


def with_names(sentences: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences on images, {} standing for their number, with the first names; none on no image."""
    notes = []
    for sentence, images in sentences.items():
        names = ", ".join(map(escaped, images[:MOST_NAMES]))
        more = f" and {len(images) - MOST_NAMES} more" if len(images) > MOST_NAMES else ""
        if images:
            notes.append(f"{sentence.format(len(images))}: {names}{more}")
    return notes
