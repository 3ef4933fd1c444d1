"""How much faster than the published trainer PICARD trains: a cycle of its steps, and the data.

A cycle is n_critic steps, of which the last updates the generator, too. Both ways run in turn in
this process on the same crops, holes and first weights; the least processor seconds of each are
compared, so other programs matter little. The published code has plain convolutions: settings with
gates are compared with it all the same, though they compute twice the products.
Then how many crops a second are read from PNG, JPEG and DICOM, against what the steps take.
The encoder's step of DIA is measured by benchmarks/dia_speed.py.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by path, uninstalled

import numpy as np
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from torch import Tensor

from benchmarks.published_training import published_optimisers, published_step
from common.checkpoint import save_text_atomic
from common.config import REPOSITORY, load_config
from inpainter.data import CropRule, NormalCrops
from inpainter.fast.holes import HoleCompleter
from inpainter.networks import Networks, build_networks
from inpainter.settings import PicardConfig
from inpainter.step import ALONE, TrainState, build_optimisers, draw_inputs, training_step

CPU = torch.device("cpu")
PIXELS = (2000, 2500)
"""Height and width of the images that are read."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--batch", type=int, default=1, help="crops of a step (default: %(default)s)")
    add("--side", type=int, default=256, help="of the crops in pixels (default: %(default)s)")
    add("--pairs", type=int, default=2, help="cycles of each way (default: %(default)s)")
    add("--settings", nargs="*", default=["published", "default"], metavar="NAME",
        help="files in configs/ (default: published default)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of ours")
    add("--images", type=int, default=4, help="images of each kind to read; 0 = none (default: 4)")
    add("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    record: dict[str, object] = {"threads": arguments.threads, "torch": torch.__version__}
    for name in arguments.settings:
        record[name] = found = measure_cycle(arguments, name)
        print(
            f"{name}: cycle {found['published_s']:.2f} s published, {found['ours_s']:.2f} s here: "
            f"{found['ratio']:.2f} times; critics' step {found['critic_ratio']:.2f}, generator's "
            f"{found['generator_ratio']:.2f}; losses differ by {found['difference']:.1e} at most"
        )
        per_second = arguments.batch * found["steps"] / found["ours_s"]
        print(f"{name}: the steps take {per_second:.1f} crops per second")
    if arguments.images:
        record["data"] = rates = measure_data(arguments)
        for kind, (read, cached) in rates.items():
            print(f"{kind}: {read:.1f} crops per second and process, {cached:.0f} from the cache")
    if arguments.json is not None:
        save_text_atomic(json.dumps(record, indent=2) + "\n", arguments.json)
    return 0


def measure_cycle(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """A cycle both ways: seconds, ratios, and how far the losses differ where nothing is gated."""
    side = arguments.side
    shapes = [
        f"train.image_shape=[{side}, {side}, 1]",
        f"train.mask_shape=[{side // 2}, {side // 2}]",
    ]
    shapes += [
        f"train.max_delta_shape=[{side // 8}, {side // 8}]",
        f"train.batch_size={arguments.batch}",
    ]
    theirs = load_config(PicardConfig, REPOSITORY / "configs" / "published.yaml", shapes)
    ours = load_config(
        PicardConfig, REPOSITORY / "configs" / f"{name}.yaml", [*shapes, *arguments.set]
    )
    torch.manual_seed(0)
    networks = build_networks(ours, CPU)
    same = ours.netG.conv_type == "plain"
    other = deepcopy(networks) if same else build_networks(theirs, CPU)
    crops = torch.rand(arguments.batch, 1, side, side) * 2 - 1
    ways = {
        "published": published_way(other, theirs, crops),
        "ours": our_way(networks, ours, crops),
    }
    n_steps = ours.train.n_critic
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
    difference = 0.0
    for cycle in range(arguments.pairs):
        losses = {}
        for way, take in ways.items():
            timed = [timed_step(take, cycle * n_steps + i) for i in range(n_steps)]
            seconds[way].append([spent for spent, _ in timed])
            losses[way] = [terms for _, terms in timed]
        if same and cycle == 0:  # later, training has amplified what rounding makes of them
            difference = largest_difference(losses["published"], losses["ours"])
    least = {way: np.min(found, axis=0) for way, found in seconds.items()}
    ratios = least["published"] / least["ours"]
    sums = {way: float(values.sum()) for way, values in least.items()}
    return {
        "published_s": sums["published"],
        "ours_s": sums["ours"],
        "ratio": sums["published"] / sums["ours"],
        "critic_ratio": float(np.median(ratios[:-1])),
        "generator_ratio": float(ratios[-1]),
        "steps": n_steps,
        "difference": difference,
    }


def timed_step(
    take: Callable[[int], dict[str, float]], step: int
) -> tuple[float, dict[str, float]]:
    """Processor seconds of a step, and its losses."""
    started = time.process_time()
    terms = take(step)
    return time.process_time() - started, terms


def largest_difference(first: list[dict[str, float]], second: list[dict[str, float]]) -> float:
    """Of the losses that both have, relative to the larger one."""
    pairs = [
        (a[name], b[name])
        for a, b in zip(first, second, strict=True)
        for name in a.keys() & b.keys()
    ]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-3) for a, b in pairs)


def published_way(
    networks: Networks, config: PicardConfig, crops: Tensor
) -> Callable[[int], dict[str, float]]:
    """The published step, by its number."""
    optimisers = published_optimisers(networks, config)

    def take(step: int) -> dict[str, float]:
        inputs = draw_inputs(config, networks.generator, step, crops)
        updates = (step + 1) % config.train.n_critic == 0
        return published_step(networks, optimisers, inputs, config, with_generator=updates)

    return take


def our_way(
    networks: Networks, config: PicardConfig, crops: Tensor
) -> Callable[[int], dict[str, float]]:
    """The step of inpainter/train.py, by its number."""
    optimisers = build_optimisers(networks, config.train)
    completer = HoleCompleter(networks.generator)
    state = TrainState(
        config, CPU, ALONE, networks, optimisers, n_steps=10**6, images={}, completer=completer
    )
    return lambda step: training_step(state, step, crops).terms


def measure_data(arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Crops per second of one process, from files and from its cache, by the kind of file."""
    rates = {}
    rule = CropRule((arguments.side, arguments.side), min_tissue_fraction=0.05)
    with tempfile.TemporaryDirectory() as folder:
        for kind, write in {
            "PNG": write_picture,
            "JPEG": write_picture,
            "DICOM": write_dicom,
        }.items():
            paths = [Path(folder, f"{i}.{kind.lower()}") for i in range(arguments.images)]
            for path in paths:
                write(path)
            crops = NormalCrops(paths, rule, channels=1, seed=0, cache_mb=4096)
            rates[kind] = (crops_per_second(crops), crops_per_second(crops))  # the second is cached
    return rates


def crops_per_second(crops: NormalCrops) -> float:
    """Crops of one pass over the images, by processor seconds."""
    started = time.process_time()
    crops.crops(range(len(crops)))
    return len(crops) / (time.process_time() - started)


def pixels() -> np.ndarray:
    """A smooth picture with noise, uint8."""
    y, x = np.mgrid[: PIXELS[0], : PIXELS[1]]
    noise = np.random.default_rng(0).integers(0, 20, PIXELS)
    return (100 + 60 * np.sin(y / 90) * np.cos(x / 70) + noise).astype(np.uint8)


def write_picture(path: Path) -> None:
    Image.fromarray(pixels()).save(path)


def write_dicom(path: Path) -> None:
    """16 bits, uncompressed."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    scan = Dataset()
    scan.file_meta = meta
    scan.SOPClassUID, scan.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    scan.Rows, scan.Columns = PIXELS
    scan.SamplesPerPixel, scan.PhotometricInterpretation = 1, "MONOCHROME2"
    scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation = 16, 12, 11, 0
    scan.PixelData = (pixels().astype(np.uint16) * 16).tobytes()
    scan.save_as(path, enforce_file_format=True)


if __name__ == "__main__":
    sys.exit(main())
