"""Random damage to small valid files: every reader gives a result or a named error.

hypothesis draws the damage; the short form draws the same few each time, the long form new ones for
`SECONDS`, in a process of its own whose memory is measured.
"""

import json
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import tifffile
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileMetaDataset

from common.annotations import read_annotations
from common.cohort import read_metadata
from common.config import config_to_yaml, load_config
from common.errors import UserError
from common.image_folders import with_slices
from common.images import read_image
from inpainter.heatmap_tables import list_heatmaps
from inpainter.settings import PicardConfig
from tests.faults.programs import place
from tests.image_files import values
from tests.tiny_runs import ended, forked

SECONDS = 30.0
"""For each kind of file, in the long form."""
EXAMPLES_AT_ONCE = 200
MOST_MEMORY = 2 * 2**30
IMAGE_NAMES = ["a.png", "sub/b.png"]


def of_image(path: Path) -> None:
    """Reads the first image of a file, with its 3 dimensions, in grey."""
    image = with_slices([path])[0]
    assert read_image(image, 1).ndim == 3


def of_annotations(path: Path) -> None:
    """Reads annotations and draws them."""
    found = read_annotations(path, IMAGE_NAMES, on_unknown="skip")
    found.labels("a.png", (40, 44))


def of_mask(path: Path) -> None:
    """The same of a folder with one mask."""
    of_annotations(path.parent)


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    """Of the file."""
    write: Callable[[Path], object]
    read: Callable[[Path], object]


GREY = values("uint8", 40, 44)


def write_nrrd(path: Path) -> None:
    nrrd.write(str(path), values("uint8", 6, 5, 2), compression_level=1)


def write_nifti(path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(values("int16", 6, 5, 2), np.eye(4)), path)


def write_text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def write_dicom(path: Path) -> None:
    from pydicom import Dataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    made.Rows, made.Columns, made.SamplesPerPixel = 8, 6, 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.WindowCenter, made.WindowWidth = "2000", "3000"
    made.RescaleSlope, made.RescaleIntercept, made.Modality = "1", "0", "MG"
    made.PixelData = (values("uint16", 8, 6) >> 4).tobytes()
    made.save_as(path, enforce_file_format=True)


COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 44}],
    "categories": [{"id": 1, "name": "mass"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4],
         "segmentation": [[4, 2, 7, 2, 4, 5]]},
    ],
}  # fmt: skip
LABELME = {
    "version": "5.4", "imagePath": "a.png", "imageHeight": 40, "imageWidth": 44, "imageData": None,
    "shapes": [{"label": "mass", "shape_type": "polygon", "points": [[1, 2], [9, 2], [4, 8]]}],
}  # fmt: skip
KINDS = {
    "settings file": Kind(
        "a.yaml",
        write_text(config_to_yaml(PicardConfig())),
        lambda path: load_config(PicardConfig, path),
    ),
    "boxes in CSV": Kind(
        "boxes.csv",
        write_text("image,top,left,height,width,label\na.png,1,2,2.5,3,mass\nb.png,,,,,\n"),
        of_annotations,
    ),
    "COCO": Kind("coco.json", write_text(json.dumps(COCO)), of_annotations),
    "LabelMe": Kind("a.json", write_text(json.dumps(LABELME)), of_mask),
    "YOLO": Kind("a.txt", write_text("0 0.5 0.5 0.2 0.1\n1 0.1 0.2 0.3 0.1 0.2 0.2\n"), of_mask),
    "mask": Kind("a.png", lambda p: Image.fromarray((GREY > 128) * np.uint8(255)).save(p), of_mask),
    "metadata": Kind(
        "meta.csv",
        write_text("image,patient,age\na.png,p1,3\nsub/b.png,p2,4\n"),
        lambda path: read_metadata(path, IMAGE_NAMES),
    ),
    "list of heatmaps": Kind(
        "heatmaps.csv",
        write_text("image,metric,file\na.png,MCD_image,data/a_MCD_image.pt\n"),
        lambda path: list_heatmaps(path.parent),
    ),
    "PNG": Kind("x.png", lambda path: Image.fromarray(GREY).save(path), of_image),
    "JPEG": Kind("x.jpg", lambda path: Image.fromarray(GREY).save(path), of_image),
    "BMP": Kind("x.bmp", lambda path: Image.fromarray(GREY).save(path), of_image),
    "PGM": Kind("x.pgm", lambda path: Image.fromarray(GREY).save(path, "PPM"), of_image),
    "TIFF": Kind(
        "x.tif",
        lambda p: tifffile.imwrite(p, values("uint16", 16, 16), compression="deflate"),
        of_image,
    ),
    "DICOM": Kind("x.dcm", write_dicom, of_image),
    "NIfTI": Kind("x.nii.gz", write_nifti, of_image),
    "NIfTI, not compressed": Kind("x.nii", write_nifti, of_image),
    "NRRD": Kind("x.nrrd", write_nrrd, of_image),
}
"""By what they are."""
PIECES = (
    *(b"", b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"),
    *(b"nan", b"inf", b"1e308", b"-1", b"99999999999999999999", b"0x10", b"\xef\xbb\xbf"),
    *(b'"', b",", b";", b"\t", b"\r\n", b"\n", b"[", b"{", b"}", b"]", b":", b"- ", b"#", b"$"),
    *(b"*a", b"&a ", b"!!int ", b"../", b"/", b"\\", b"\xc3\xa9", b"e\xcc\x81", b"null", b"true"),
)
EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 8),
    st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)),
)
"""Where, how many bytes go, what comes instead."""
EDITS = st.lists(EDIT, min_size=1, max_size=6)


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """The bytes with these edits, one after the other."""
    for where, gone, new in edits:
        start = int(where * len(data))
        data = data[:start] + new + data[start + gone :]
    return data


def check(kind: str, folder: Path, examples: int, number: int | None = None) -> int:
    """Reads so many damaged files of a kind; number: None draws the same each time."""
    made, count = KINDS[kind], 0
    path = folder / made.name
    made.write(path)
    whole = path.read_bytes()
    made.read(path)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(EDITS)
    def read(edits: list[tuple[float, int, bytes]]) -> None:
        nonlocal count
        count += 1
        path.write_bytes(edited(whole, edits))
        try:
            made.read(path)
        except UserError as error:
            named.add(str(error))

    named: set[str] = set()
    (read if number is None else seed(number)(read))()
    assert "" not in named
    return count


def for_seconds(kind: str, folder: Path, seconds: float) -> None:
    """New damages for so long; writes how many into the folder `count`."""
    begun, count = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        count += check(kind, folder, EXAMPLES_AT_ONCE, random.randrange(2**32))
        (folder.parent / "count").write_text(str(count))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < MOST_MEMORY, f"{peak / 2**30:.2f} GiB"


def mutated(kind: str, root: Path, number: int) -> int:
    """The long form, in a process of its own."""
    with place(root, f"fuzz {number}") as around:
        folder = around / "files"
        folder.mkdir()
        status = ended(forked(partial(for_seconds, kind, folder, SECONDS)))
        assert status == 0, [path.read_bytes() for path in folder.iterdir()]
        return int((around / "count").read_text())
