"""Command line: train the inpainter on a folder of normal images."""

import signal

if __name__ == "__main__":  # not in reading processes, which import this file under spawn
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import torch

from common.cli import PROFILE_HELP, add_common_arguments, load_from_arguments, run_script
from common.config import config_to_yaml
from inpainter.networks import build_networks
from inpainter.settings import PicardConfig
from inpainter.training import train


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, PicardConfig, default_config="configs/default.yaml")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="STEP",
        help="go on from the run's latest snapshot, or from that of the given step",
    )
    parser.add_argument("--profile", action="store_true", help=PROFILE_HELP)
    parser.add_argument("--print_net", action="store_true", help="print the networks' layers first")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    config = load_from_arguments(PicardConfig, arguments)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return 0
    if arguments.print_net:
        print(*build_networks(config, torch.device("cpu")), sep="\n")
    result = train(config, resume=arguments.resume, command=sys.argv, profile=arguments.profile)
    print(f"Checkpoints of step {result.step} and before are in {result.folder}")
    return result.exit_status


if __name__ == "__main__":
    run_script(
        main,
        interrupted="Interrupted; go on from the last snapshot with --resume.",
        unfinished="Then go on from the last snapshot with --resume.",
    )
