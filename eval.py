"""Command line: how well heatmaps find what was annotated, and how well DIA tells classes apart.

Writes results.json, one line per image as CSV and plots, and prints a table.
"""

import signal

if __name__ == "__main__":  # not in reading processes, which import this file under spawn
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import sys
from pathlib import Path

from common.cli import add_common_arguments, load_from_arguments, run_script
from common.config import config_to_dict, config_to_yaml
from dia.evaluation import EVAL_MODES, add_evaluation_flags, evaluate, evaluation_config
from inpainter.evaluation import EvaluationSettings, evaluate_heatmaps
from inpainter.evaluation_report import result_table, write_plots, write_report
from inpainter.heatmap_folder import EvaluationError
from inpainter.settings import PicardConfig, input_path


def heatmap_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_mode(parser)
    add_common_arguments(parser, PicardConfig, default_config="configs/default.yaml")
    add = parser.add_argument
    add("--heatmap_dir", type=Path, metavar="DIR",
        help="required: folder that predict_heatmap.py wrote, with heatmaps.csv")  # fmt: skip
    add("--annotations", type=Path, metavar="FILE|DIR",
        help="required: boxes as CSV with columns image,top,left,height,width[,label] in pixels, "
             "or a folder of masks named like the images (above 0 = lesion); an image without "
             "annotation is normal")  # fmt: skip
    add("--ignore_masks", type=Path, metavar="DIR",
        help="folder of masks; pixels above 0 do not count")  # fmt: skip
    add("--image_dir", type=Path, metavar="DIR",
        help="folder of the images: draws a contact sheet; for --inside_tissue (there: "
             "test_data_path if not given)")  # fmt: skip
    add("--inside_tissue", type=float, nargs="?", const=True, metavar="GREY",
        help="count only pixels brighter than this, in [0, 1) (without a number: "
             "test.tissue_threshold)")  # fmt: skip
    add("--output_dir", type=Path, metavar="DIR",
        help="where to write (default: <heatmap_dir>/evaluation)")  # fmt: skip
    add("--on_bad_image", choices=("skip", "error"),
        help="an image that cannot be evaluated is left out, counted and named, or stops the run "
             "(default: test.on_bad_image)")  # fmt: skip
    add("--on_unknown_image", choices=("error", "skip"), default="error",
        help="the same for an annotation of an image without heatmap (default: error)")  # fmt: skip
    add("--bootstrap", type=int, default=1000, metavar="N",
        help="draws for 95 %% intervals over images, 0 = no intervals (default: 1000)")  # fmt: skip
    return parser


def heatmap_settings(config: PicardConfig, arguments: argparse.Namespace) -> EvaluationSettings:
    """The settings that flags and config ask for. Raises ConfigError."""
    image_dir, inside_tissue = arguments.image_dir, arguments.inside_tissue
    if inside_tissue is not None:
        if inside_tissue is True:
            inside_tissue = config.test.tissue_threshold
        image_dir = image_dir or input_path(config.test_data_path, "test_data_path")
    return EvaluationSettings(
        heatmap_dir=arguments.heatmap_dir,
        annotations=arguments.annotations,
        ignore_masks=arguments.ignore_masks,
        image_dir=image_dir,
        inside_tissue=inside_tissue,
        white_value=config.white_value,
        on_bad_image=arguments.on_bad_image or config.test.on_bad_image,
        on_unknown_image=arguments.on_unknown_image,
        n_resamples=arguments.bootstrap,
        seed=config.seed,
    )


def evaluate_heatmap_folder() -> int:
    """--mode heatmap."""
    parser = heatmap_parser()
    arguments = parser.parse_args()
    config = load_from_arguments(PicardConfig, arguments)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return 0
    if arguments.heatmap_dir is None or arguments.annotations is None:
        parser.error("--heatmap_dir and --annotations are required")
    folder = arguments.output_dir or arguments.heatmap_dir / "evaluation"
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"--output_dir {folder} is a file. Pass a folder, or a new name.")
    evaluation = evaluate_heatmaps(heatmap_settings(config, arguments))
    write_report(evaluation, folder, record={"command": sys.argv, "config": config_to_dict(config)})
    write_plots(evaluation, folder / "plots")
    print(result_table(evaluation.results))
    print(f"Numbers and plots are in {folder}")
    return 0


def evaluate_dia() -> int:
    """--mode ood_pre, ood, test_acc and test_marginalized_acc."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_mode(parser)
    add_evaluation_flags(parser)
    arguments = parser.parse_args()
    config = evaluation_config(arguments)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return 0
    print(evaluate(config, arguments.mode, sys.argv))
    return 0


MODES = {"heatmap": evaluate_heatmap_folder, **dict.fromkeys(EVAL_MODES, evaluate_dia)}
"""Each parses its own flags: the modes share only --mode."""


def add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=MODES, default="heatmap", help="what to evaluate")


def main() -> int:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_mode(first)
    return MODES[first.parse_known_args()[0].mode]()


if __name__ == "__main__":
    run_script(main, interrupted="Interrupted; nothing of this evaluation was kept.")
