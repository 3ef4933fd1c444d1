"""DICOM files shown as a viewer would, worked out by hand on four pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.images import ImageError, read_image

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless  # noqa: E402


def write_dicom(path: Path, stored: np.ndarray, **attributes: object) -> Path:
    """A DICOM file of these stored values, 12 bits in 16; attributes by keyword."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 1 if stored.ndim == 2 else stored.shape[2]
    dataset.PhotometricInterpretation = "MONOCHROME2" if stored.ndim == 2 else "RGB"
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored = 12 if stored.dtype.itemsize == 2 else 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def shown(path: Path) -> list[float]:
    image = read_image(path)
    assert image.dtype == torch.float32
    assert image.shape == (1, 1, 4)
    return image.flatten().tolist()


STORED = np.array([[0, 1000, 3000, 4095]], dtype=np.uint16)
FULL = [0, 1000 / 4095, 3000 / 4095, 1]


def test_without_a_window_the_stored_bits_are_the_range(tmp_path):
    assert shown(write_dicom(tmp_path / "a.dcm", STORED)) == pytest.approx(FULL)


def test_signed_values_without_a_window_have_their_bits_as_range(tmp_path):
    stored = np.array([[-2048, 0, 1000, 2047]], dtype=np.int16)
    expected = [0, 2048 / 4095, 3048 / 4095, 1]
    assert shown(write_dicom(tmp_path / "a.dcm", stored)) == pytest.approx(expected)


def test_rescaling_alone_does_not_change_what_is_shown(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", STORED, RescaleSlope=2, RescaleIntercept=-1024)
    assert shown(path) == pytest.approx(FULL)


def test_first_window_is_applied_to_rescaled_values(tmp_path):
    path = write_dicom(
        tmp_path / "a.dcm",
        STORED,
        RescaleSlope=1,
        RescaleIntercept=-1000,
        WindowCenter=[1000.5, 7],
        WindowWidth=[4001, 9],
    )
    # values -1000, 0, 2000, 3095; the standard's linear window reaches from -1000 to 3000
    assert shown(path) == pytest.approx([0, 0.25, 0.75, 1])


@pytest.mark.parametrize(
    ("function", "expected"),
    [("LINEAR_EXACT", [0, 0.25, 0.75, 1]), ("SIGMOID", [0.1192, 0.2689, 0.7311, 0.8904])],
)
def test_other_window_functions_follow_the_standard(tmp_path, function, expected):
    path = write_dicom(
        tmp_path / "a.dcm", STORED, WindowCenter=2000, WindowWidth=4000, VOILUTFunction=function
    )
    assert shown(path) == pytest.approx(expected, abs=1e-4)


def test_table_of_values_of_interest_is_applied(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4, 0, 8]
    table.add_new("LUTData", "OW", np.array([0, 51, 102, 255], dtype="<u2").tobytes())
    stored = np.array([[0, 1, 2, 900]], dtype=np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[table])
    assert shown(path) == pytest.approx([0, 0.2, 0.4, 1])


def test_monochrome1_is_inverted(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", STORED, PhotometricInterpretation="MONOCHROME1")
    assert shown(path) == pytest.approx([1 - value for value in FULL], abs=1e-6)


def test_colour_is_read(tmp_path):
    stored = np.array([[[255, 0, 51], [0, 102, 255]]], dtype=np.uint8)
    image = read_image(write_dicom(tmp_path / "a.dicom", stored))
    assert image.permute(1, 2, 0).flatten().tolist() == pytest.approx([1, 0, 0.2, 0, 0.4, 1])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_several_frames_are_refused(tmp_path):
    stored = np.zeros((2, 4), dtype=np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, NumberOfFrames=2, Rows=1)
    with pytest.raises(ImageError, match=r"a.dcm has 2 frames; expected 1"):
        read_image(path)


def test_unknown_photometry_is_refused(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", STORED, PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(ImageError, match=r"a.dcm: cannot show PALETTE COLOR"):
        read_image(path)


@pytest.mark.parametrize("share", [0, 0.2, 0.6])
def test_truncated_file_is_refused_by_name(tmp_path, share):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((40, 40), dtype=np.uint16))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ImageError, match=r"Cannot read the DICOM file .*a.dcm"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compression_without_a_decoder_names_what_to_install(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", STORED)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 8])
    dataset.save_as(path)
    with pytest.raises(ImageError, match=r"pip install pylibjpeg"):
        read_image(path)
