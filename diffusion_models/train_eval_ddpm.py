"""Command line: train a diffusion model, dissolve images with one, or draw samples from it."""

import signal

if __name__ == "__main__":  # not in reading processes, which import this file under spawn
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

from common.cli import (
    PROFILE_HELP,
    add_common_arguments,
    add_flags,
    load_from_arguments,
    run_script,
)
from common.config import config_to_yaml
from common.devices import tf32_products
from diffusion_models.pictures import draw_dissolved, draw_samples
from diffusion_models.settings import DdpmConfig
from diffusion_models.training import train

OTHER_SECTIONS = ("contrastive", "evaluation")
"""Sections of configs/dia.yaml that are train_dia.py's and eval.py's."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=("train", "eval", "sample"), required=True)
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with this run")
    parser.add_argument("--profile", action="store_true", help=PROFILE_HELP)
    add_common_arguments(parser, DdpmConfig)
    add_flags(parser, DdpmConfig)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    config = load_from_arguments(DdpmConfig, arguments, other_sections=OTHER_SECTIONS)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return 0
    if arguments.mode == "train":
        trained = train(
            config, command=sys.argv, resume=arguments.resume, profile=arguments.profile
        )
        print(f"Checkpoints up to step {trained.step} are in {trained.folder}")
        return trained.exit_status
    draw = draw_dissolved if arguments.mode == "eval" else draw_samples
    with tf32_products(config.precision == "tf32"):
        for path in draw(config):
            print(path)
    return 0


if __name__ == "__main__":
    run_script(
        main, interrupted="Interrupted; a training goes on with --resume FOLDER, pictures anew."
    )
