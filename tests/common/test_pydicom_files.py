"""Every file that comes with pydicom: read with the value of pydicom's functions, or refused.

Values are compared with pydicom's own pixel_array, apply_modality_lut, apply_windowing and
apply_color_lut. A file that is not in REFUSED must be read.
"""

import re
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi_lut,
    apply_windowing,
    pixel_array,
)

from common.image_folders import find_images, with_slices
from common.images import ImageError, read_image
from common.notices import forget
from common.volumes import split_slice

ROOT = Path(pydicom.data.__file__).parent / "test_files"
FILES = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.suffix != ".json"
)
FILES = [name for name in FILES if (ROOT / name).is_file()]
NO_IMAGE = "holds no image"
NO_FORMAT = "no image format recognised"
REFUSED = {
    # of other kinds: plans, reports, waveforms, indices of media, texts
    "ExplVR_BigEndNoMeta.dcm": NO_IMAGE,
    "ExplVR_LitEndNoMeta.dcm": NO_IMAGE,
    "UN_sequence.dcm": NO_IMAGE,
    "empty_charset_LEI.dcm": NO_IMAGE,
    "meta_missing_tsyntax.dcm": NO_IMAGE,
    "nested_priv_SQ.dcm": NO_IMAGE,
    "no_meta_group_length.dcm": NO_IMAGE,
    "priv_SQ.dcm": NO_IMAGE,
    "reportsi.dcm": NO_IMAGE,
    "reportsi_with_empty_number_tags.dcm": NO_IMAGE,
    "rtplan.dcm": NO_IMAGE,
    "rtplan_truncated.dcm": NO_IMAGE,
    "rtstruct.dcm": NO_IMAGE,
    "test-SR.dcm": NO_IMAGE,
    "waveform_ecg.dcm": NO_IMAGE,
    "dicomdirtests/DICOMDIR-empty.dcm": NO_IMAGE,
    "dicomdirtests/**DICOMDIR*": NO_FORMAT,
    "dicomdirtests/TINY_ALPHA/PT000000/*": NO_IMAGE,  # headers alone
    "**README*": NO_FORMAT,
    "**.dump": NO_FORMAT,
    "crayons.icc": NO_FORMAT,
    "zipMR.gz": NO_FORMAT,
    "no_meta.dcm": "File is missing DICOM File Meta Information header",
    # damaged
    "MR_truncated.dcm": r"less than expected \(8130 vs 8192 bytes\)",
    "badVR.dcm": "invalid literal for int",
    "JPEG2000-embedded-sequence-delimiter.dcm": "Unable to decode",  # of 250 bytes, by no decoder
}


def reason_to_refuse(name: str) -> str | None:
    for pattern, reason in REFUSED.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", ".*"), name):
            return reason
    return None


READ = [name for name in FILES if reason_to_refuse(name) is None]


def shown_by_pydicom(dataset: Dataset, stored: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """What a viewer shows of a frame by pydicom's functions, (H, W) or (H, W, 3) in [0, 1].

    stored, whole: the stored values of the frame, and of all frames.
    """
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        return apply_color_lut(stored, dataset) / 65535
    if stored.ndim == 3:
        return stored / (2.0**dataset.BitsStored - 1)
    values = apply_modality_lut(stored, dataset).astype(float)
    if dataset.get("WindowWidth"):
        ends = np.array([-1e9, 1e9])
        low, high = apply_windowing(ends, dataset, index=0)
        unit = (apply_windowing(values, dataset, index=0) - low) / (high - low)
    elif "VOILUTSequence" in dataset:
        unit = apply_voi_lut(values.astype(int), dataset) / (2.0**8 - 1)
    else:
        ends = [dataset.get(f"{which}ImagePixelValue") for which in ("Smallest", "Largest")]
        if None in ends or not ends[0] <= stored.min() <= stored.max() <= ends[1]:
            low = np.percentile(whole, 0.1, method="lower")
            ends = low, np.percentile(whole, 99.9, method="higher")
        low, high = apply_modality_lut(np.array(ends), dataset)
        unit = ((values - low) / (high - low)).clip(0, 1)
    return 1 - unit if kind == "MONOCHROME1" else unit


@pytest.fixture(autouse=True)
def _anew():
    forget()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READ)
def test_bundled_file_is_read_with_the_values_of_pydicoms_functions(name: str) -> None:
    path = ROOT / name
    dataset = pydicom.dcmread(path)
    images = with_slices([path])
    assert len(images) == int(dataset.get("NumberOfFrames") or 1)
    for image in (images[0], images[-1]):
        number = split_slice(image)[1] or 0
        stored = pixel_array(dataset, index=number)
        grey_stack = len(images) > 1 and stored.ndim == 2
        whole = pixel_array(dataset) if grey_stack else stored
        expected = shown_by_pydicom(dataset, stored, whole)
        found = read_image(image).permute(1, 2, 0).squeeze(2).numpy()
        padding = dataset.get("PixelPaddingValue")
        counts = np.ones(expected.shape[:2], dtype=bool)
        if padding is not None and found.ndim == 2:
            counts = stored != padding
            assert not found[~counts].any()
        np.testing.assert_allclose(found[counts], expected[counts], atol=2e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FILES if name not in READ])
def test_bundled_file_that_is_no_image_or_damaged_is_refused_by_name(name: str) -> None:
    path = ROOT / name
    assert with_slices([path]) == [path]
    with pytest.raises(ImageError, match=reason_to_refuse(name)) as raised:
        read_image(path)
    assert str(path) in str(raised.value)


def test_bundled_files_without_suffix_are_found_by_their_content() -> None:
    found = find_images(ROOT / "dicomdirtests", recursive=True)
    names = {path.relative_to(ROOT).as_posix() for path in found.files}
    assert "dicomdirtests/77654033/CR1/6154" in names
    assert not [name for name in names if "DICOMDIR" in name and not name.endswith(".dcm")]
    kinds = {kind: len(paths) for kind, paths in found.passed_over.items()}
    assert kinds["made by the system"] == 2
