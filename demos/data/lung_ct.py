"""Two public lung CTs with tumour masks, as 16-bit PNG slices for training and testing.

The volumes are test data of pyradiomics 3.0.1 (BSD-3-Clause; van Griethuysen et al. 2017): one
patient each, 512 x 512 pixels of 0.57 and 0.63 mm, slices 5 mm apart, in Hounsfield units (HU).
They are two patients with one tumour each: enough for a demonstration, not for a benchmark.

K slices of H x W pixels.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import nrrd
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

from common.checkpoint import content_hash
from common.errors import UserError
from common.images import read_image, write_image, write_image16
from demos.picard_report import Case

PACKAGE = "pyradiomics==3.0.1"
WINDOW_HU = (-1000.0, 400.0)
BODY_HU = -500.0
VOLUMES = ("lung1", "lung2")
SHA256 = {
    "lung1_image.nrrd": "379fa48bf34cfa961e6f5ec19c0c38757a30b9aa884212ef28dc29b5061c64ed",
    "lung1_label.nrrd": "e9d9a88054d7bc1d3034193ff907ce6b8c6ba28a7bc3a16f23728982d1b6b50a",
    "lung2_image.nrrd": "aa2b94eec79127ed786798ac8dc3c013010e1692d5787bebfae1a1e9685a4651",
    "lung2_label.nrrd": "cef52738dc51aab69a48fe30639da956d2b911b1c2920439c091fab84727657a",
}
FILES = tuple(SHA256)


class LungCTError(UserError):
    """The volumes cannot be fetched or are not what they should be."""


class Volume(NamedTuple):
    """One patient's CT."""

    hu: NDArray[np.int16]
    """(K, H, W) Hounsfield units."""
    tumour: NDArray[np.bool_]
    """(K, H, W), True in the tumour."""
    pixel_mm: float
    """Side of a pixel."""


class Slices(NamedTuple):
    """A volume's slices at the size that is trained on."""

    images: NDArray[np.float32]
    """(K, h, w) in [0, 1]: WINDOW_HU, air outside the body included."""
    tumour: NDArray[np.bool_]
    """(K, h, w), True in the tumour."""
    body: NDArray[np.bool_]
    """(K, h, w), True inside the body: the pixels that are evaluated."""


def fetch_volumes(folder: Path, archive: Path | None = None) -> Path:
    """Puts the four NRRD files of FILES into the folder, unless they are there, and returns it.

    archive: the source distribution where it was already downloaded; none fetches it with pip from
    the package index (34 MB; nothing is installed). Raises LungCTError, and leaves nothing
    half-written, where that fails.
    """
    if all((folder / name).is_file() for name in FILES):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching_") as scratch:
        ready = Path(scratch, "volumes")
        ready.mkdir()
        if archive is not None:
            take_from_archive(archive, ready)
        else:
            download(Path(scratch), ready)
            check_hashes(ready)
        folder.mkdir(exist_ok=True)
        for name in FILES:
            (ready / name).replace(folder / name)
    return folder


def download(scratch: Path, target: Path) -> None:
    """Fetches the source distribution with pip and moves its NRRD files to `target`.

    pip insists on running the package's set-up script for metadata, which fails without numpy and
    setuptools and on Python 3.12. The archive is unpacked by then, and --no-clean leaves it there.
    """
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-clean", "--no-binary", "pyradiomics"]
    command += [PACKAGE, "--dest", str(scratch)]
    result = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(scratch)}, capture_output=True, text=True
    )
    unpacked = {name: next(scratch.glob(f"pip-*/*/data/{name}"), None) for name in FILES}
    archive = next(scratch.glob("pyradiomics-*.tar.gz"), None)
    if archive is not None:
        take_from_archive(archive, target)
    elif all(unpacked.values()):
        for name, path in unpacked.items():
            path.replace(target / name)
    else:
        reason = (result.stderr or result.stdout).strip().splitlines()[-6:]
        raise LungCTError(
            f"Could not fetch {PACKAGE} from the package index (exit status "
            f"{result.returncode}). pip's output ended with:\n  "
            + "\n  ".join(reason)
            + "\nThis needs "
            "network access or a mirror that carries source distributions; with a copy of "
            "pyradiomics-3.0.1.tar.gz pass --archive FILE."
        )


def check_hashes(folder: Path) -> None:
    """Raises LungCTError where a fetched file is not the one that the demo was made with."""
    for name, expected in SHA256.items():
        found = content_hash(folder / name)
        if found != expected:
            raise LungCTError(
                f"{name} of {PACKAGE} has SHA-256 {found}, expected {expected}: the package index "
                "answered with another file. Nothing was kept."
            )


def take_from_archive(archive: Path, target: Path) -> None:
    """Copies the files of FILES out of a pyradiomics source distribution (.tar.gz).

    Raises LungCTError for a missing, broken or different archive.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = {Path(member.name).name: member for member in tar if member.isfile()}
            missing = [name for name in FILES if name not in members]
            if missing:
                raise LungCTError(
                    f"{archive} does not hold data/{', data/'.join(missing)}; expected the source "
                    f"distribution of {PACKAGE}"
                )
            for name in FILES:
                content = tar.extractfile(members[name])
                assert content is not None  # a regular file, see above
                (target / name).write_bytes(content.read())
    except (OSError, EOFError, tarfile.TarError) as error:
        raise LungCTError(
            f"{archive} cannot be read ({error}); expected pyradiomics-3.0.1.tar.gz, which "
            f"`pip download --no-deps --no-binary :all: {PACKAGE}` fetches"
        ) from error


def read_volume(folder: Path, name: str) -> Volume:
    """Reads `<name>_image.nrrd` and `<name>_label.nrrd`; raises LungCTError if they do not fit.

    NRRD stores the fastest axis first, (x, y, slice); the result is (slice, y, x).
    """
    arrays, headers = [], []
    for kind in ("image", "label"):
        path = folder / f"{name}_{kind}.nrrd"
        try:
            array, header = nrrd.read(str(path))
        except (OSError, EOFError, ValueError, nrrd.NRRDError) as error:
            raise LungCTError(
                f"{path} cannot be read ({error}); delete it to fetch it anew"
            ) from error
        arrays.append(array)
        headers.append(header)
    image, label = arrays
    if image.shape != label.shape or image.ndim != 3:
        raise LungCTError(
            f"{folder}: {name}'s image is {image.shape} and its label {label.shape}; expected two "
            "equal (x, y, slice). Delete the folder to fetch it anew"
        )
    spacing = np.linalg.norm(headers[0].get("space directions", np.zeros((3, 3))), axis=1)
    if not (spacing[0] > 0 and np.isclose(spacing[0], spacing[1])):
        raise LungCTError(
            f"{folder}: {name}'s 'space directions' give pixels of {spacing[:2]} "
            "mm; expected square ones"
        )
    return Volume(image.transpose(2, 1, 0), label.transpose(2, 1, 0) > 0, float(spacing[0]))


def body_mask(hu: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Inside of the body: the largest piece above BODY_HU in each slice, its holes filled.

    hu: (K, H, W)   returns: (K, H, W). Opening takes off the table and thin bridges to it.
    """
    inside = np.zeros(hu.shape, bool)
    for number, plane in enumerate(hu):
        solid = ndimage.binary_opening(plane > BODY_HU, iterations=3)
        pieces, count = ndimage.label(solid)
        if count:
            largest = 1 + np.argmax(np.bincount(pieces.ravel())[1:])
            inside[number] = ndimage.binary_fill_holes(pieces == largest)
    return inside


def prepare(volume: Volume, pixel_mm: float) -> Slices:
    """Windows the grey values to [0, 1], finds the body, and resamples to pixels of pixel_mm.

    Masks are True where they cover half of a pixel. Raises LungCTError for a pixel_mm finer than
    scanned.
    """
    if pixel_mm < volume.pixel_mm:
        raise LungCTError(f"pixels of {pixel_mm} mm are finer than the scan's {volume.pixel_mm} mm")
    height, width = (max(1, round(n * volume.pixel_mm / pixel_mm)) for n in volume.hu.shape[1:])

    def shrink(array: NDArray) -> NDArray[np.float32]:
        planes = torch.from_numpy(array.astype(np.float32))[:, None]
        small = F.interpolate(planes, size=(height, width), mode="bilinear", antialias=True)
        return small[:, 0].numpy()

    low, high = WINDOW_HU
    images = shrink(np.clip((volume.hu - low) / (high - low), 0, 1))
    return Slices(images, shrink(volume.tumour) >= 0.5, shrink(body_mask(volume.hu)) >= 0.5)


def split(tumour: NDArray[np.bool_], gap: int = 2) -> tuple[list[int], list[int]]:
    """Numbers of the training slices, at least `gap` from any tumour, and of the tumour slices.

    tumour: (K, h, w)
    """
    with_tumour = [int(k) for k in np.flatnonzero(tumour.any((1, 2)))]
    normal = [k for k in range(len(tumour)) if all(abs(k - other) >= gap for other in with_tumour)]
    return normal, with_tumour


def write_slices(slices: Slices, numbers: list[int], folder: Path, *, masks: bool) -> list[Path]:
    """Writes images/slice_###.png of 16 bits and, with masks, tumour/ and outside/ as 8-bit masks.

    outside is True outside the body: the pixels to ignore. Returns the images' paths.
    """
    paths = []
    for number in numbers:
        name = f"slice_{number:03d}.png"
        write_image16(folder / "images" / name, torch.from_numpy(slices.images[number]))
        if masks:
            tumour, outside = slices.tumour[number], ~slices.body[number]
            write_image(folder / "tumour" / name, torch.from_numpy(tumour).float())
            write_image(folder / "outside" / name, torch.from_numpy(outside).float())
        paths.append(folder / "images" / name)
    return paths


def read_cases(folder: Path, group: str) -> list[Case]:
    """The tumour slices below a folder that write_slices wrote."""
    cases = []
    for path in sorted((folder / "images").iterdir()):
        truth = read_image(folder / "tumour" / path.name)[0].numpy() > 0
        outside = read_image(folder / "outside" / path.name)[0].numpy() > 0
        cases.append(Case(path.name, read_image(path), truth, ~outside, group))
    return cases
