"""Command line: anomaly heatmaps of a folder of images, from a trained inpainter.

Exit status 0 if at least one image has its heatmaps; images that were left out are named. 1 if none
has, or the run could not go on; 130 after Ctrl-C, 143 after SIGTERM. What is finished is kept.
"""

import signal

if __name__ == "__main__":  # not in reading processes, which import this file under spawn
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import sys
from pathlib import Path

from common.cli import add_common_arguments, load_from_arguments, run_script
from common.config import config_to_yaml
from common.files import escaped
from inpainter.calibrate import calibrate
from inpainter.prediction import PredictionOptions, predict
from inpainter.settings import PicardConfig
from inpainter.snapshots import run_folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add, folder = parser.add_argument, {"type": Path, "metavar": "DIR"}
    checkpoints = "folder with gen_%%08d.pt and dis_%%08d.pt (default: the settings' run folder)"
    steps = "a step, latest, or best = lowest completion error on training crops (default: latest)"
    boxes = "boxes (CSV: image,top,left,height,width) or a folder of masks, drawn into the plots"
    add("--checkpoint_dir", **folder, help=checkpoints)
    add("--checkpoint_iter", default="latest", metavar="N", help=steps)
    add("--image_dir", **folder, help="images to score (default: test_data_path)")
    add("--output_dir", **folder,
        help="where to write (default: <heatmaps_dir>/<dataset_name>/dropout/<time>; a run with "
             "the same settings and checkpoint goes on where it stopped)")  # fmt: skip
    add("--annotations", type=Path, metavar="FILE|DIR", help=boxes)
    add("--calibrate", action="store_true",
        help="first measure normal images (calibration_data_path, else train_data_path) for "
             "test.calibration and keep that beside the checkpoint")  # fmt: skip
    add("--overwrite", action="store_true", help="redo images that are finished")
    add_common_arguments(parser, PicardConfig, default_config="configs/default.yaml")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    config = load_from_arguments(PicardConfig, arguments)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return 0
    names = ("checkpoint_iter", "image_dir", "output_dir", "annotations", "overwrite")
    given = {name: getattr(arguments, name) for name in names}
    checkpoint_dir = arguments.checkpoint_dir or run_folder(config)
    if arguments.calibrate:
        print(f"Calibration: {calibrate(config, checkpoint_dir, arguments.checkpoint_iter)}")
    result = predict(config, PredictionOptions(checkpoint_dir, **given, command=sys.argv))
    done, before, bad = result.finished, result.already_there, result.bad
    counts = f"{len(done)} images scored, {len(before)} were finished before, {len(bad)} left out"
    left_out = [f"left out: {escaped(message)}" for message in bad.values()]
    print(f"{counts}. Heatmaps: {result.folder}", *left_out, *result.notes, sep="\n")
    return 0 if done or before else 1


if __name__ == "__main__":
    run_script(main, interrupted="Interrupted; run the same command again to go on.")
