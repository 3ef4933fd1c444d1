"""Command line: how well heatmaps find what was annotated, and how well DIA tells classes apart.

Writes results.json, one line per image as CSV and plots, and prints a table. --mode calibrate
instead measures normal images: which score means abnormal.
"""

import signal

if __name__ == "__main__":  # not in reading processes, which import this file under spawn
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import sys

from common.cli import load_from_arguments, run_script
from common.config import config_to_yaml
from common.processes import launched
from dia import evaluation as dia
from inpainter import evaluation_report, evaluation_settings, normal_scores
from inpainter.predictor import settings_beside_checkpoint
from inpainter.settings import PicardConfig

FLAGS = {
    "heatmap": (evaluation_settings.add_evaluation_flags, ("heatmap_dir", "annotations")),
    "calibrate": (normal_scores.add_calibration_flags, ("checkpoint_dir", "image_dir")),
}
"""By mode of PICARD, what adds its flags, and which of them are required."""


def parse_arguments() -> argparse.Namespace:
    """The modes share only --mode; the others are their packages' own flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=__doc__)
    modes = (*FLAGS, *dia.EVAL_MODES)
    for each in (first, parser):
        each.add_argument("--mode", choices=modes, default="heatmap", help="what to evaluate")
    mode = first.parse_known_args()[0].mode
    add_flags, required = FLAGS.get(mode, (dia.add_evaluation_flags, ()))
    add_flags(parser)
    arguments = parser.parse_args()
    if not arguments.dry_run and not all(getattr(arguments, name) for name in required):
        parser.error(f"{' and '.join(f'--{name}' for name in required)} are required")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    mode = arguments.mode
    process = launched()
    if not process.is_main and (mode != "ood_pre" or arguments.dry_run):
        print(f"Process {process.rank} has nothing to do: eval.py works in process 0 alone.")
        return 0
    if mode == "calibrate":
        settings_beside_checkpoint(arguments)
    if mode in FLAGS:
        config = load_from_arguments(PicardConfig, arguments)
    else:
        config = dia.evaluation_config(arguments)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
    elif mode == "calibrate":
        print(normal_scores.calibrate_from_arguments(config, arguments))
    else:
        if mode == "heatmap":
            done = evaluation_report.evaluate(config, arguments, sys.argv)
        else:
            done = dia.evaluate(config, mode, sys.argv)
        print(done.text)
        return done.status
    return 0


if __name__ == "__main__":
    run_script(main, interrupted="Interrupted; nothing of this evaluation was kept.")
