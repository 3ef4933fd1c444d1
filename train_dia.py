"""Command line: train DIA's (or CSI's, or SimCLR's) encoder on normal images."""

import argparse
import logging
import sys
from pathlib import Path

from common.checkpoint import CheckpointError
from common.config import ConfigError, add_common_arguments, config_to_yaml
from common.datasets import DatasetError
from common.flags import add_flags, load_from_flags
from common.images import ImageError
from common.loops import TrainingError
from common.runtime import RuntimeSetupError
from dia.macs import describe_macs
from dia.settings import DiaConfig
from dia.training import train

EXPECTED = (
    *(CheckpointError, ConfigError, DatasetError, ImageError, RuntimeSetupError),
    *(TrainingError, OSError, ValueError),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--print_macs",
        action="store_true",
        help="print the multiply-accumulate operations of one image and stop",
    )
    add_common_arguments(parser, DiaConfig)
    add_flags(parser, DiaConfig)
    return parser.parse_args()


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    arguments = parse_arguments()
    try:
        config = load_from_flags(DiaConfig, arguments, other_sections=("diffusion",))
        if arguments.dry_run:
            print(config_to_yaml(config), end="")
            return 0
        if arguments.print_macs:
            print(describe_macs(config))
            return 0
        trained = train(config, command=sys.argv)
    except EXPECTED as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; go on from the last saved epoch with --resume_path.", file=sys.stderr)
        return 130
    print(f"Checkpoints of epoch {trained.epoch} and before are in {trained.folder}")
    for name, value in trained.best.items():
        chosen = config.contrastive.select_by
        print(f"best_{name}.model: {value:.4f} (chosen by: {chosen})")
    return trained.exit_status


if __name__ == "__main__":
    sys.exit(main())
