"""A prediction run: heatmaps of every image in a folder, from one checkpoint.

With findings and verdicts where the checkpoint has an operating point.
"""

import argparse
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.annotations import Annotations, read_annotations
from common.cli import (
    add_common_arguments,
    load_from_arguments,
)
from common.config import REPOSITORY, ConfigError, config_to_yaml
from common.files import absolute, escaped
from common.image_folders import list_images, with_slices
from common.images import ImageError
from common.processes import Processes
from common.run_log import write_run_record
from common.volumes import split_slice
from inpainter.export import EXPORT_KINDS, Exporter, ExportKind, require_heatmaps_kept
from inpainter.findings import Verdicts, operating_point_for
from inpainter.folder_run import FolderRun, PredictionResult, with_names
from inpainter.heatmap_folder import HeatmapFolder, PastWork
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
from inpainter.sharing import SharedFolder, require_welcome, shard

LOG = logging.getLogger(__name__)
DEFAULT_CONFIG = "configs/default.yaml"
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
    """What common/annotations.py reads, drawn into the plots."""
    overwrite: bool = False
    """Redo images that are finished."""
    export: Sequence[ExportKind] = ()
    """Formats in which heatmaps are written besides."""
    max_failures: int | None = None
    """Stop when more images than these could not be scored; None = go through all."""
    command: Sequence[str] = ()
    """What the user typed, for the record."""
    processes: Processes = field(default_factory=Processes)
    """Which of how many processes this is, that score the images together."""


def export_kinds(text: str) -> tuple[ExportKind, ...]:
    """What --export names, separated by commas; an argparse type."""
    kinds = tuple(part.strip() for part in text.split(","))
    if unknown := [kind for kind in kinds if kind not in EXPORT_KINDS]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)!r} is unknown; expected some of {','.join(EXPORT_KINDS)}"
        )
    return kinds


def whole_number(text: str) -> int:
    """A number of --max_failures, 0 or more; an argparse type."""
    if re.fullmatch("[0-9]{1,9}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


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
        help="boxes as CSV with columns image,top,left,height,width[,label] in pixels, a folder of "
             "masks named like the images, or what COCO, LabelMe or YOLO write; drawn into the "
             "plots")  # fmt: skip
    add("--calibrate", action="store_true",
        help="first measure normal images (calibration_data_path, else train_data_path) for "
             "test.calibration and keep that beside the checkpoint; what is there of the same "
             "checkpoint, settings and images is used as it is")  # fmt: skip
    add("--explain", nargs=3, metavar=("IMAGE", "X", "Y"),
        help="instead draw why the heatmap is as it is at column X, row Y of an image: its window "
             "and completions, into --output_dir (default: here)")  # fmt: skip
    add("--overwrite", action="store_true", help="redo images that are finished")
    add("--export", type=export_kinds, default=(), metavar="KIND,…",
        help=f"also write the heatmaps as {', '.join(EXPORT_KINDS)} to export/")  # fmt: skip
    add("--max_failures", type=whole_number, metavar="N",
        help="stop when more than N images could not be scored (default: no limit)")  # fmt: skip
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
    is noted and left out), TooManyFailuresError, AnnotationError and WindowError, all with their
    remedy.
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
        annotations = read_annotations(options.annotations, images, on_unknown="skip", files=images)
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
) -> FolderRun:
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
        shared.write_news(output)  # of processes that were killed, too
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
    parts = (predictor, images, output, verdicts, annotations, result, shared)
    return FolderRun(*parts, options.max_failures)


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

    given = [absolute(path) for path in options.images]
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
