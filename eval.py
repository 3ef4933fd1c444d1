"""Command line: how well heatmaps find what was annotated, and how well DIA tells classes apart.

Writes results.json, one line per image as CSV and plots, and prints a table.
"""

import signal

if __name__ == "__main__":  # not in reading processes, which import this file under spawn
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import sys

from common.cli import load_from_arguments, run_script
from common.config import config_to_yaml
from dia import evaluation as dia
from inpainter import evaluation_settings as heatmaps
from inpainter.evaluation_report import evaluate
from inpainter.settings import PicardConfig


def parse_arguments() -> argparse.Namespace:
    """The modes share only --mode; the others are their packages' own flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=__doc__)
    modes = ("heatmap", *dia.EVAL_MODES)
    for each in (first, parser):
        each.add_argument("--mode", choices=modes, default="heatmap", help="what to evaluate")
    of_heatmaps = first.parse_known_args()[0].mode == "heatmap"
    (heatmaps if of_heatmaps else dia).add_evaluation_flags(parser)
    arguments = parser.parse_args()
    if (
        of_heatmaps
        and not arguments.dry_run
        and not (arguments.heatmap_dir and arguments.annotations)
    ):
        parser.error("--heatmap_dir and --annotations are required")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    of_heatmaps = arguments.mode == "heatmap"
    if of_heatmaps:
        config = load_from_arguments(PicardConfig, arguments)
    else:
        config = dia.evaluation_config(arguments)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
    elif of_heatmaps:
        print(evaluate(config, arguments, sys.argv))
    else:
        print(dia.evaluate(config, arguments.mode, sys.argv))
    return 0


if __name__ == "__main__":
    run_script(main, interrupted="Interrupted; nothing of this evaluation was kept.")
