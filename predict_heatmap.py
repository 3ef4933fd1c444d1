"""Command line: anomaly heatmaps of images, from a trained inpainter.

Exit status 0 if all images have their heatmaps, 3 if some were left out, which are named and in
failures.csv. 1 if none has, or the run could not go on; 2 for wrong settings; 130 after Ctrl-C, 143
after SIGTERM. What is finished is kept.
"""

import signal

if __name__ == "__main__":  # not in reading processes, which import this file under spawn
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import sys

from common.cli import run_script
from common.config import config_to_yaml
from common.errors import ExitStatus
from common.files import escaped
from inpainter.calibrate import calibrate_once, whole_step
from inpainter.prediction import PredictionOptions, add_prediction_flags, predict, settings_of
from inpainter.sharing import processes_of
from inpainter.snapshots import run_folder

OPTIONS = (
    *("checkpoint_iter", "images", "image_dir", "output_dir", "annotations", "overwrite"),
    *("export", "max_failures"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_prediction_flags(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    config = settings_of(arguments)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return 0
    given = {name: getattr(arguments, name) for name in OPTIONS}
    given["processes"] = processes_of(arguments)
    checkpoint_dir = arguments.checkpoint_dir or run_folder(config)
    if arguments.explain:
        from inpainter.explain import explain_from_arguments  # which draws, and is slow to import

        print(explain_from_arguments(config, checkpoint_dir, arguments))
        return 0
    if arguments.calibrate:
        given["checkpoint_iter"] = whole_step(config, checkpoint_dir, arguments.checkpoint_iter)
        print(f"Calibration: {calibrate_once(config, checkpoint_dir, given['checkpoint_iter'])}")
    result = predict(config, PredictionOptions(checkpoint_dir, **given, command=sys.argv))
    done, before, bad = result.finished, result.already_there, result.bad
    whole = ExitStatus.DONE if done or before else ExitStatus.NOTHING_DONE
    if not given["processes"].is_main:
        helped = sum(result.helped.values())
        windows = f", and {helped} windows of others' images" if helped else ""
        here = f"{len(result.here)} of {len(done) + len(before)} images scored here{windows}"
        print(f"{here}; process 0 tells of all.")
        return whole
    counts = f"{len(done)} images scored, {len(before)} were finished before, {len(bad)} left out"
    left_out = [f"left out: {escaped(message)}" for message in bad.values()]
    print(f"{counts}. Heatmaps: {result.folder}", *left_out, *result.notes, sep="\n")
    return ExitStatus.SOME_FAILED if whole is ExitStatus.DONE and bad else whole


if __name__ == "__main__":
    run_script(main, interrupted="Interrupted; run the same command again to go on.")
