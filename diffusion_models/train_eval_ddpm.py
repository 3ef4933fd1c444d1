"""Command line: train a diffusion model, dissolve images with one, or draw samples from it."""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

from common.checkpoint import CheckpointError
from common.config import ConfigError, add_common_arguments, config_to_yaml
from common.datasets import DatasetError
from common.flags import add_flags, load_from_flags
from common.images import ImageError
from common.loops import TrainingError
from common.runtime import RuntimeSetupError
from diffusion_models.drawing import draw_dissolved, draw_samples
from diffusion_models.settings import DdpmConfig
from diffusion_models.training import train

EXPECTED = (
    *(CheckpointError, ConfigError, DatasetError, ImageError, RuntimeSetupError),
    *(TrainingError, OSError, ValueError),
)
OTHER_SECTIONS = ("contrastive", "evaluation")
"""Sections of configs/dia.yaml that are train_dia.py's and eval.py's."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=("train", "eval", "sample"), required=True)
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with this run")
    add_common_arguments(parser, DdpmConfig)
    add_flags(parser, DdpmConfig)
    return parser.parse_args()


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    arguments = parse_arguments()
    try:
        config = load_from_flags(DdpmConfig, arguments, other_sections=OTHER_SECTIONS)
        if arguments.dry_run:
            print(config_to_yaml(config), end="")
            return 0
        if arguments.mode == "train":
            trained = train(config, command=sys.argv, resume=arguments.resume)
            print(f"Checkpoints up to step {trained.step} are in {trained.folder}")
            return trained.exit_status
        draw = draw_dissolved if arguments.mode == "eval" else draw_samples
        for path in draw(config):
            print(path)
    except EXPECTED as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; go on from the last checkpoint with --resume FOLDER.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
