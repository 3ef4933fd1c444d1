"""DICOM files shown as a viewer would, worked out by hand on four pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.dicom import SEGMENTATION
from common.images import ImageError, read_image, read_mask
from common.notices import forget

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import (  # noqa: E402
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
)


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


@pytest.fixture(autouse=True)
def _anew():
    forget()


STORED = np.array([[0, 1000, 3000, 4095]], dtype=np.uint16)
FULL = [0, 1000 / 4095, 3000 / 4095, 1]


def test_without_a_window_the_slices_own_range_is_shown_and_said(tmp_path, caplog):
    assert shown(write_dicom(tmp_path / "a.dcm", STORED)) == pytest.approx(FULL)
    assert "a.dcm names no usable window: 0 is shown black and 4095 white" in caplog.text


def test_without_a_window_single_outliers_do_not_darken_the_slice(tmp_path):
    stored = np.tile(np.arange(100, dtype=np.uint16), (40, 1))
    stored[0, 0] = 4095
    image = read_image(write_dicom(tmp_path / "a.dcm", stored))
    assert image[0, 1, 1::49].tolist() == pytest.approx([1 / 99, 50 / 99, 1])
    assert image[0, 0, 0] == 1


def test_range_that_the_file_names_is_used_where_the_pixels_fill_it(tmp_path, caplog):
    names = {"SmallestImagePixelValue": 0, "LargestImagePixelValue": 5000}
    path = write_dicom(tmp_path / "a.dcm", STORED, BitsStored=16, HighBit=15, **names)
    assert shown(path) == pytest.approx([0, 0.2, 0.6, 0.819])
    assert "the smallest and largest pixel value that it names" in caplog.text
    names["LargestImagePixelValue"] = 65535  # not of this slice
    path = write_dicom(tmp_path / "b.dcm", STORED, BitsStored=16, HighBit=15, **names)
    assert shown(path) == pytest.approx(FULL)


def test_slice_of_one_value_is_placed_in_the_range_of_its_bits(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.full((1, 4), 819, dtype=np.uint16))
    assert shown(path) == pytest.approx([0.2] * 4)


def test_signed_values_without_a_window_are_shown_from_the_smallest(tmp_path):
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


def test_modality_table_comes_before_the_window(tmp_path):
    path = write_dicom(
        tmp_path / "a.dcm",
        np.array([[0, 1, 2, 900]], dtype=np.uint16),
        ModalityLUTSequence=[table([4000, 3000, 1000, 0], 16)],
        WindowCenter="2000.5",
        WindowWidth="4001",
    )
    assert shown(path) == pytest.approx([1, 0.75, 0.25, 0])


def table(entries: list[int], bits: int, first: int = 0, packed: bool = False) -> Dataset:
    """An item of a table sequence; packed: one byte per entry."""
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", "OW", np.array(entries, dtype="u1" if packed else "<u2").tobytes())
    return item


@pytest.mark.parametrize("packed", [False, True])
def test_long_table_of_8_bits_is_indexed_beyond_255(tmp_path, packed):
    entries = np.linspace(0, 255, 1024).round().astype(int).tolist()
    stored = np.array([[0, 300, 1000, 4000]], dtype=np.uint16)
    path = write_dicom(
        tmp_path / "a.dcm", stored, VOILUTSequence=[table(entries, 8, packed=packed)]
    )
    expected = [0, entries[300] / 255, entries[1000] / 255, 1]
    assert shown(path) == pytest.approx(expected)


def test_table_that_starts_below_0_is_indexed_from_there(tmp_path):
    stored = np.array([[-2, -1, 0, 1]], dtype=np.int16)
    item = table([0, 51, 102, 255], 8)
    item.add_new("LUTDescriptor", "US", [4, 65534, 8])  # -2, written as an unsigned number
    path = write_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[item])
    assert shown(path) == pytest.approx([0, 0.2, 0.4, 1])


def test_table_with_too_few_entries_is_refused(tmp_path):
    item = table([0, 51], 8)
    item.LUTDescriptor = [400, 0, 8]
    path = write_dicom(tmp_path / "a.dcm", STORED, VOILUTSequence=[item])
    with pytest.raises(ImageError, match=r"a.dcm: its table has \d entries of 8 bits, not 400"):
        read_image(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("RescaleSlope", "0"),
        ("RescaleSlope", "nan"),
        ("RescaleSlope", "inf"),
        ("RescaleSlope", "1e400"),
        ("RescaleIntercept", "nan"),
        ("RescaleIntercept", "-inf"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of the value
def test_rescaling_that_gives_no_picture_is_refused_with_its_value(tmp_path, key, value):
    path = write_dicom(tmp_path / "a.dcm", STORED, **{key: value})
    with pytest.raises(ImageError, match=rf"a.dcm: {key} is "):
        read_image(path)


def test_empty_rescaling_is_none(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", STORED, RescaleSlope=None, RescaleIntercept="")
    assert shown(path) == pytest.approx(FULL)


@pytest.mark.parametrize(
    ("centre", "width"), [(0, 0), (2000, 0), (2000, -4000), ("nan", 100), (100, "inf")]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unusable_window_is_left_aside_with_a_word(tmp_path, caplog, centre, width):
    path = write_dicom(tmp_path / "a.dcm", STORED, WindowCenter=centre, WindowWidth=width)
    assert shown(path) == pytest.approx(FULL)
    assert "a.dcm: the window of centre" in caplog.text
    assert "a.dcm names no usable window" in caplog.text


def test_first_usable_of_several_windows_is_taken_and_said(tmp_path, caplog):
    path = write_dicom(tmp_path / "a.dcm", STORED, WindowCenter=[5, 2000.5], WindowWidth=[-1, 4001])
    assert shown(path) == pytest.approx([0, 0.25, 0.75, 1])
    assert "a.dcm has 2 windows: that of centre 2000.5 and width 4001 is shown" in caplog.text


@pytest.mark.parametrize(
    ("width", "function", "expected"),
    [
        # a step at centre - 0.5 = 1000: values up to it are black
        (1, "LINEAR", [0, 0, 1, 1]),
        # LINEAR needs a width of 1 or more: 0.5 is read as exact, from 1000.25 to 1000.75
        (0.5, "LINEAR", [0, 0, 1, 1]),
        (1, "LINEAR_EXACT", [0, 0, 1, 1]),
        (1e-3, "SIGMOID", [0, 0, 1, 1]),
    ],
)
def test_narrow_windows_are_steps_and_never_divide_by_0(tmp_path, width, function, expected):
    path = write_dicom(
        tmp_path / "a.dcm", STORED, WindowCenter=1000.5, WindowWidth=width, VOILUTFunction=function
    )
    assert shown(path) == pytest.approx(expected)


def test_width_of_2_is_one_grey_value_wide(tmp_path):
    stored = np.array([[99, 100, 101, 102]], dtype=np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, WindowCenter=101, WindowWidth=2)
    # C.11.2.1.2.1: up to 100 black, beyond 101 white, between ((x - 100.5) / 1 + 0.5)
    assert shown(path) == pytest.approx([0, 0, 1, 1])


@pytest.mark.parametrize("function", ["sigmoid", " SIGMOID ", "Sigmoid"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_window_function_is_known_in_any_case_and_with_blanks(tmp_path, function):
    path = write_dicom(
        tmp_path / "a.dcm", STORED, WindowCenter=2000, WindowWidth=4000, VOILUTFunction=function
    )
    assert shown(path) == pytest.approx([0.1192, 0.2689, 0.7311, 0.8904], abs=1e-4)


@pytest.mark.parametrize("function", ["", "GAMMA"])
def test_unknown_window_function_is_linear_with_a_word(tmp_path, caplog, function):
    path = write_dicom(
        tmp_path / "a.dcm", STORED, WindowCenter=2000.5, WindowWidth=4001, VOILUTFunction=function
    )
    assert shown(path) == pytest.approx([0, 0.25, 0.75, 1])
    assert ("'GAMMA' is unknown" in caplog.text) == (function == "GAMMA")


@pytest.mark.parametrize("which", ["Shared", "PerFrame"])
def test_functional_groups_of_an_enhanced_object_are_followed(tmp_path, which):
    window, rescaling, groups = Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = "2000.5", "4001"
    rescaling.RescaleSlope, rescaling.RescaleIntercept = "1", "-1000"
    groups.FrameVOILUTSequence = [window]
    groups.PixelValueTransformationSequence = [rescaling]
    path = write_dicom(
        tmp_path / "a.dcm",
        np.array([[0, 2000, 4000, 6000]], dtype=np.uint16),
        BitsStored=16,
        HighBit=15,
        NumberOfFrames=1,
        **{f"{which}FunctionalGroupsSequence": [groups]},
    )
    # values -1000, 1000, 3000, 5000 in a window from 0 to 4000
    assert shown(path) == pytest.approx([0, 0.25, 0.75, 1])


def test_padding_is_black_whether_0_is_black_or_white(tmp_path):
    window = {"WindowCenter": 2000.5, "WindowWidth": 4001}
    path = write_dicom(tmp_path / "a.dcm", STORED, PixelPaddingValue=4095, **window)
    assert shown(path) == pytest.approx([0, 0.25, 0.75, 0])
    path = write_dicom(
        tmp_path / "b.dcm",
        STORED,
        PixelPaddingValue=0,
        PhotometricInterpretation="MONOCHROME1",
        **window,
    )
    assert shown(path) == pytest.approx([0, 0.75, 0.25, 0])


def test_range_of_padding_is_black_and_does_not_count_for_the_shown_range(tmp_path, caplog):
    stored = np.array([[-2000, -1500, 0, 1000]], dtype=np.int16)
    path = write_dicom(
        tmp_path / "a.dcm", stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500
    )
    assert shown(path) == pytest.approx([0, 0, 0, 1])
    assert "a.dcm: 50.0% of its pixels are padding (-2000 to -1500)" in caplog.text
    assert "0 is shown black and 1000 white" in caplog.text


def test_padding_written_with_the_other_sign_is_found(tmp_path):
    stored = np.array([[-2000, 0, 500, 1000]], dtype=np.int16)
    path = write_dicom(tmp_path / "a.dcm", stored)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "US", 63536)
    dataset.save_as(path)
    assert shown(path) == pytest.approx([0, 0, 0.5, 1])


@pytest.mark.parametrize(
    ("kind", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", True),  # as radiographs must say it: inverted once
        ("MONOCHROME1", "IDENTITY", True),
    ],
)
def test_presentation_shape_inverts_once(tmp_path, kind, shape, inverted):
    path = write_dicom(
        tmp_path / "a.dcm", STORED, PhotometricInterpretation=kind, PresentationLUTShape=shape
    )
    expected = [1 - value for value in FULL] if inverted else FULL
    assert shown(path) == pytest.approx(expected, abs=1e-6)


def test_palette_is_looked_up(tmp_path):
    tables = {}
    for colour, entries in (("Red", [0, 65535]), ("Green", [65535, 0]), ("Blue", [0, 13107])):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        tables[f"{colour}PaletteColorLookupTableData"] = np.array(entries, "<u2").tobytes()
    path = write_dicom(
        tmp_path / "a.dcm",
        np.array([[0, 1]], dtype=np.uint8),
        PhotometricInterpretation="PALETTE COLOR",
        **tables,
    )
    image = read_image(path)
    assert image.permute(1, 2, 0).flatten().tolist() == pytest.approx([0, 1, 0, 1, 0, 0.2])


def test_ybr_is_turned_into_rgb(tmp_path):
    stored = np.array([[[76, 85, 255], [255, 128, 128]]], dtype=np.uint8)  # red, white
    path = write_dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="YBR_FULL")
    image = read_image(path).permute(1, 2, 0)
    assert image.flatten().tolist() == pytest.approx([1, 0, 0, 1, 1, 1], abs=0.01)


@pytest.mark.parametrize("explicit", [True, False])
def test_file_without_preamble_and_suffix_is_read(tmp_path, explicit):
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    window = {"WindowCenter": 2000.5, "WindowWidth": 4001, "SOPClassUID": "1.2.840.10008.5.1.4"}
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", STORED, **window))
    bare = DicomBytesIO()
    bare.is_implicit_VR, bare.is_little_endian = not explicit, True
    write_dataset(bare, dataset)
    (tmp_path / "IM000001").write_bytes(bare.getvalue())
    assert shown(tmp_path / "IM000001") == pytest.approx([0, 0.25, 0.75, 1])


def test_deflated_file_cut_short_is_refused_by_name(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((200, 200), np.uint16))
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 40])
    with pytest.raises(ImageError, match=r"Cannot read the DICOM file .*a.dcm"):
        read_image(path)


def test_value_of_odd_length_is_refused_by_name(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", STORED)
    data = path.read_bytes()
    rows = data.index(b"\x28\x00\x10\x00US\x02\x00")
    path.write_bytes(
        data[: rows + 6] + b"\x03\x00" + data[rows + 8 : rows + 10] + b"\0" + data[rows + 10 :]
    )
    with pytest.raises(ImageError, match=r"Cannot read the DICOM file .*a.dcm"):
        read_image(path)


def test_dicom_without_pixels_is_refused_with_its_kind(tmp_path):
    report = Dataset()
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.SOPInstanceUID = "1.2.3"
    report.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(ImageError, match=r"a.dcm holds no image \(its kind is 'Basic Text SR"):
        read_image(tmp_path / "a.dcm")


def test_broken_png_named_dcm_is_refused_by_name(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(ImageError, match=r"Cannot read the image .*a.dcm"):
        read_image(tmp_path / "a.dcm")


def test_lossless_jpeg_and_jpeg_ls_are_read_without_any_decoder_but_our_own(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    stored = (np.random.default_rng(1).random((16, 12)) * 4095).astype(np.uint16)
    attributes = {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": "LINEAR"}
    plain = read_image(write_dicom(tmp_path / "a.dcm", stored, **attributes))
    frames = {
        JPEGLosslessSV1: imagecodecs.jpeg8_encode(stored, lossless=True, bitspersample=12),
        JPEGLSLossless: imagecodecs.jpegls_encode(stored),
    }
    for syntax, frame in frames.items():
        dataset = pydicom.dcmread(tmp_path / "a.dcm")
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = pydicom.encaps.encapsulate([frame])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(tmp_path / "b.dcm")
        assert torch.equal(read_image(tmp_path / "b.dcm"), plain)
        decoder = pydicom.pixels.get_decoder(syntax)
        found = decoder.as_array(dataset, decoding_plugin="imagecodecs")[0]
        assert np.array_equal(found, stored)


@pytest.mark.parametrize(
    "shown_by",
    [
        {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400},
        {"RescaleSlope": 1, "RescaleIntercept": 0, "WindowCenter": 40, "WindowWidth": 400},
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE", "PixelPaddingValue": 1},
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2"])
def test_mask_is_its_stored_values_however_the_file_says_to_show_them(tmp_path, shown_by, dtype):
    path = write_dicom(tmp_path / "a.dcm", np.array([[0, 1, 0, 7]], dtype=dtype), **shown_by)
    assert read_mask(path).tolist() == [[False, True, False, True]]


def test_segmentation_object_is_refused_as_a_mask_with_what_to_save_instead(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.array([[0, 1]], np.uint8), SOPClassUID=SEGMENTATION)
    with pytest.raises(ImageError, match=r"a.dcm is a DICOM segmentation object.* to NIfTI with"):
        read_mask(path)


BYTES = np.array([[0, 51, 102, 255]], dtype=np.uint8)


@pytest.mark.parametrize("window", [(40.0, 400.0), "percentile"])
def test_bytes_have_the_files_own_window_alone(tmp_path, window):
    own = {"WindowCenter": 128, "WindowWidth": 256}
    path = write_dicom(tmp_path / "a.dcm", BYTES, **own)
    shown_by = read_image(path, window=window).flatten().tolist()
    assert shown_by == pytest.approx([0, 0.2, 0.4, 1])
    short = {"BitsStored": 8, "HighBit": 7}  # in 16
    path = write_dicom(tmp_path / "b.dcm", BYTES.astype(np.uint16), **own, **short)
    assert read_image(path, window=window).flatten().tolist() == shown_by


@pytest.mark.parametrize(
    ("dtype", "scale", "expected"),
    [
        ("u1", {"RescaleSlope": 2, "RescaleIntercept": -100}, [0, 0.255, 0.51, 1]),
        ("u1", {"RescaleSlope": 1, "RescaleIntercept": 100}, [0.5, 0.6275, 0.755, 1]),
        ("i1", {}, [0.25, 0.3775, 0.505, 0.2475]),  # 255 is -1
    ],
)
def test_bytes_that_are_rescaled_or_signed_numbers_are_windowed(tmp_path, dtype, scale, expected):
    # in a window from -100 to 300; the second of the first: 2 * 51 - 100 = 2, (2 + 100) / 400
    path = write_dicom(tmp_path / "a.dcm", BYTES.astype(dtype), **scale)
    found = read_image(path, window=(100.0, 400.0)).flatten().tolist()
    assert found == pytest.approx(expected)
