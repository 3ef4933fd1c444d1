"""Command line: train DIA's (or CSI's, or SimCLR's) encoder on normal images."""

import signal

if __name__ == "__main__":  # not in reading processes, which import this file under spawn
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import sys

from common.cli import (
    PROFILE_HELP,
    add_common_arguments,
    add_flags,
    load_from_arguments,
    run_script,
)
from common.config import config_to_yaml
from dia.macs import describe_macs
from dia.settings import DiaConfig
from dia.training import train


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--print_macs",
        action="store_true",
        help="print the multiply-accumulate operations of one image and stop",
    )
    parser.add_argument("--profile", action="store_true", help=PROFILE_HELP)
    add_common_arguments(parser, DiaConfig)
    add_flags(parser, DiaConfig)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    config = load_from_arguments(DiaConfig, arguments, other_sections=("diffusion",))
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return 0
    if arguments.print_macs:
        print(describe_macs(config))
        return 0
    trained = train(config, command=sys.argv, profile=arguments.profile)
    print(f"Checkpoints of epoch {trained.epoch} and before are in {trained.folder}")
    for name, value in trained.best.items():
        chooser = "training loss" if name == "loss" else config.contrastive.select_by
        print(f"best_{name}.model: {value:.4f} (chosen by: {chooser})")
    return trained.exit_status


if __name__ == "__main__":
    run_script(main, interrupted="Interrupted; go on from the last saved epoch with --resume_path.")
