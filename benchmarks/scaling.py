"""What prediction on several processes brings, and what many scans would cost on many GPUs.

Draws scans, makes networks with random weights, and runs predict_heatmap.py on them, in one process
and in several by turns; then the same command again, which finds all done: that is the start-up.
Besides the clock it counts processor time, which says what the clock would on a machine that does
nothing else, but for waiting. A model of the costs is made from the runs of one process, and
compared with those of several.
"""

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import torch
import torch.nn.functional as F

from common.checkpoint import checkpoint_path, save_atomic
from common.config import REPOSITORY, config_to_yaml, load_config
from common.images import read_image, write_image
from inpainter.heatmap import Heatmaps
from inpainter.heatmap_folder import Content, HeatmapFolder
from inpainter.networks import build_networks
from inpainter.settings import PicardConfig
from inpainter.windows import WindowGrid, window_grid

FIXED = ("device=cpu", "test.calibration=off", "test.scales=[1.0]", "test.refine=off")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Run:
    """Seconds of a run without its start-up, and of that: by the clock, and of each processor."""

    clock: float
    processor: float
    start_clock: float
    start_processor: float


@dataclass(frozen=True)
class Cost:
    """Seconds of one process: of its start, of a window, of reading and of writing an image."""

    start: float
    window: float
    read: float
    write: float
    """Heatmaps, plots and rows."""

    def seconds(self, n_images: int, n_windows: int, n_processes: int) -> float:
        """Of a run. An image is read while the one before is scored.

        n_windows: of an image. The windows of the last images are shared out, so that processes
        are as good as equally long at work.
        """
        scored = n_images / n_processes * max(n_windows * self.window, self.read)
        written = math.ceil(n_images / n_processes) * self.write
        return self.start + self.read + scored + written


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--images", type=int, default=2, help="scans of a run (default: %(default)s)")
    add("--size", type=int, nargs=2, default=(2000, 2500), metavar="PX",
        help="their height and width (default: 2000 2500)")  # fmt: skip
    add("--processes", type=int, default=2, metavar="K", help="against one (default: %(default)s)")
    add("--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    add("--config", type=Path, default=REPOSITORY / "configs" / "default.yaml", metavar="FILE",
        help="settings (default: configs/default.yaml)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change one: test.patch_stride=256 scores fewer windows")  # fmt: skip
    add("--scans", type=int, default=1000, help="of the model's table (default: %(default)s)")
    add("--gpu_rates", type=float, nargs="+", default=(10, 50, 200), metavar="N",
        help="windows per second of a GPU, in that table (default: 10 50 200)")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    size, several = tuple(arguments.size), arguments.processes
    config = load_config(PicardConfig, arguments.config, [*FIXED, *arguments.overrides])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, config, arguments.images, size)
        read, write = read_and_write(folder, config)
        rounds = [
            {n: run(folder, folder / f"out_{number}_{n}", n) for n in (1, several)}
            for number in range(arguments.rounds)
        ]
    print_gain(rounds, several)
    start = statistics.median(runs[1].start_processor for runs in rounds)
    of_image = statistics.median(runs[1].processor for runs in rounds) / arguments.images
    n_windows = len(grid_of(config, size))
    cost = Cost(start, (of_image - read - write) / n_windows, read, write)
    processor = [runs[several].processor + runs[several].start_processor for runs in rounds]
    print(
        f"one process, of processor time: start {start:.1f} s, a window {cost.window:.3f} s, per "
        f"image {n_windows} windows, read {read:.2f} s, write {write:.2f} s\n{several} processes: "
        f"{cost.seconds(arguments.images, n_windows, several):.1f} s by the model, "
        f"{statistics.median(processor):.1f} s of each processor"
    )
    print_table(cost, load_config(PicardConfig, arguments.config), arguments)
    return 0


def prepare(folder: Path, config: PicardConfig, n: int, size: tuple[int, int]) -> None:
    """Writes scans without background, networks and settings."""
    torch.manual_seed(0)
    networks = build_networks(config, torch.device("cpu"))
    critics = {"localD": networks.local_critic, "globalD": networks.global_critic}
    states = {name: critic.state_dict() for name, critic in critics.items()}
    save_atomic(networks.generator.state_dict(), checkpoint_path(folder / "model", "gen", 1))
    save_atomic(states, checkpoint_path(folder / "model", "dis", 1))
    (folder / "settings.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    for number in range(n):
        rough = torch.rand(1, 1, size[0] // 20 + 1, size[1] // 20 + 1)
        smooth = F.interpolate(rough, size=size, mode="bilinear")[0]
        scan = 0.2 + 0.7 * smooth + 0.1 * torch.rand(1, *size)
        write_image(folder / "scans" / f"{number}.png", scan)


def read_and_write(folder: Path, config: PicardConfig) -> tuple[float, float]:
    """Seconds of processor time for reading a scan, and for writing what is made of it."""
    path = folder / "scans" / "0.png"

    pixels = read_image(path, config.netG.input_dim)
    grid = grid_of(config, (pixels.shape[1], pixels.shape[2]))
    scores = {metric: torch.rand(grid.grid_hw) for metric in config.test.heatmap_metrics}
    output = HeatmapFolder(folder / "written", config.test, {"0.png": path})

    def read() -> None:
        Content.of(path)
        read_image(path, config.netG.input_dim)

    def write() -> None:
        heatmaps = Heatmaps(grid, config.test, scores)
        output.write("0.png", pixels, Content.of(path), heatmaps)

    seconds = processor_seconds(read)
    write()  # loads what draws
    return seconds, processor_seconds(write)


def processor_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def grid_of(config: PicardConfig, size: tuple[int, int]) -> WindowGrid:
    """The windows of a scan."""
    test = config.test
    return window_grid(size, test.patch_shape[:2], test.patch_stride, test.heatmap_alignment)


def run(folder: Path, output: Path, n_processes: int) -> Run:
    """Runs the command in several processes, and once more when all is done."""
    command = [
        *(sys.executable, str(REPOSITORY / "predict_heatmap.py")),
        *("--config", str(folder / "settings.yaml"), "--checkpoint_dir", str(folder / "model")),
        *("--image_dir", str(folder / "scans"), "--output_dir", str(output)),
    ]
    taken = []
    for _ in range(2):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with (folder / "said.txt").open("w", encoding="utf-8") as said:
            streams = {"stdout": said, "stderr": said, "env": ENVIRONMENT}
            shards = [f"{rank}/{n_processes}" for rank in range(n_processes)]
            children = [
                subprocess.Popen([*command, "--shard", shard], **streams) for shard in shards
            ]
            if any([child.wait() for child in children]):
                raise RuntimeError((folder / "said.txt").read_text(encoding="utf-8"))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        taken.append((time.perf_counter() - started, processor / n_processes))
    (clock, processor), (start_clock, start_processor) = taken
    print(
        f"{n_processes} processes: {clock:.1f} s, of each processor {processor:.1f} s; of that "
        f"start-up {start_clock:.1f} s and {start_processor:.1f} s",
        flush=True,
    )
    return Run(clock - start_clock, processor - start_processor, start_clock, start_processor)


def print_gain(rounds: list[dict[int, Run]], n: int) -> None:
    """Prints how many times as many images per second several processes score."""
    clock = [runs[1].clock / runs[n].clock for runs in rounds]
    processor = [runs[1].processor / runs[n].processor for runs in rounds]
    for by, ratios in {"the clock": clock, "processor time": processor}.items():
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        gain = statistics.median(ratios)
        print(f"{n} processes against one, without start-up, by {by}: {gain:.2f} ({each})")


def print_table(cost: Cost, config: PicardConfig, arguments: argparse.Namespace) -> None:
    """Prints what the scans cost with the settings as shipped, by GPUs and by their speed."""
    size, n = tuple(arguments.size), arguments.scans
    n_windows = len(grid_of(config, size))
    print(f"\n{n} scans of {size[0]}x{size[1]}, {n_windows} windows each, by the model:\n")
    heads = ["windows per second and GPU", *(f"{k} GPU{'s' * (k > 1)}" for k in GPUS)]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for rate in arguments.gpu_rates:
        fast = replace(cost, window=1 / rate)
        hours = [fast.seconds(n, n_windows, k) / 3600 for k in GPUS]
        print(f"| {rate:g} | " + " | ".join(f"{each:.3g} h" for each in hours) + " |")


if __name__ == "__main__":
    raise SystemExit(main())
