"""Files of several slices: their names, one slice at a time, one grey range for all of a file."""

from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from common import volume_files
from common.annotations import AnnotationError, read_annotations
from common.config_types import ConfigError
from common.dicom import SEGMENTATION
from common.grey_range import SAMPLED_SLICES, check_window
from common.image_folders import list_images, with_slices
from common.image_sets import data_identity, load_set
from common.images import ImageError, read_image
from common.notices import forget
from common.volumes import chosen_slices, slice_path, split_slice
from diffusion_models.settings import DataConfig
from inpainter.data import split_held_out
from inpainter.settings import PicardConfig
from tests.common.test_dicom import Dataset, write_dicom
from tests.image_files import unit, values

RAS = np.eye(4)
STACK = np.arange(3 * 2 * 4, dtype=np.uint16).reshape(3, 2, 4) * 100  # (frames, H, W), to 2300


@pytest.fixture(autouse=True)
def _anew():
    forget()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scan.dcm#017", ("scan.dcm", 17)),
        ("a/b.nii.gz#1234", ("a/b.nii.gz", 1234)),
        ("scan.dcm", ("scan.dcm", None)),
        ("scan#1.png", ("scan#1.png", None)),
        ("scan.dcm#17", ("scan.dcm#17", None)),
        ("a/#017", ("a/#017", None)),
    ],
)
def test_slice_is_named_by_its_file_and_number(name, expected):
    assert split_slice(name) == expected
    assert split_slice(Path(name)) == (Path(expected[0]), expected[1])
    if expected[1] is not None:
        assert slice_path(Path(expected[0]), expected[1]) == Path(name)


def test_file_that_really_has_the_name_of_a_slice_wins(tmp_path):
    stored = values("u1", 3, 4)
    path = tmp_path / "scan.dcm#001"
    Image.fromarray(stored).save(path, format="PNG")
    assert split_slice(path) == (path, None)
    assert torch.equal(read_image(path), unit(stored))
    assert list_images(tmp_path, False) == [path]
    write_frames(tmp_path / "scan.dcm", STACK)
    with pytest.raises(
        ImageError, match=r"scan.dcm#001 is a file, and scan.dcm has a slice of tha"
    ):
        list_images(tmp_path, False)


@pytest.mark.parametrize(
    ("which", "expected"),
    [("all", [0, 1, 2, 3, 4]), ("middle", [2]), ("every_2", [0, 2, 4]), ("every_9", [0])],
)
def test_slices_are_chosen_by_the_setting(which, expected):
    assert list(chosen_slices(5, which)) == expected
    assert PicardConfig(slices=which).slices == DataConfig(slices=which).slices


@pytest.mark.parametrize("which", ["none", "every_0", "every_-1", "every_", "5"])
def test_other_choices_of_slices_are_refused(which):
    with pytest.raises(ConfigError, match="slices: must be all, middle or every_N"):
        PicardConfig(slices=which)


def write_frames(path: Path, stack: np.ndarray, **attributes: object) -> Path:
    """A DICOM file of several frames (N, H, W)."""
    size = {"NumberOfFrames": len(stack), "Rows": stack.shape[1], "Columns": stack.shape[2]}
    return write_dicom(path, stack.reshape(-1, stack.shape[2]), **size, **attributes)


def groups(**attributes: object) -> Dataset:
    """An item of a functional groups sequence with a window or a rescaling."""
    item, macro = Dataset(), Dataset()
    for name, value in attributes.items():
        setattr(macro, name, value)
    scales = "RescaleSlope" in attributes
    setattr(item, f"{'PixelValueTransformation' if scales else 'FrameVOILUT'}Sequence", [macro])
    return item


def write_volume(path: Path, stack: np.ndarray) -> Path:
    """Slices (N, H, W) as files of each kind hold them, seen alike by a radiologist."""
    if path.suffix == ".dcm":
        return write_frames(path, stack)
    if path.suffix == ".tif":
        tifffile.imwrite(path, stack, photometric="minisblack")
        return path
    lps = stack.transpose(2, 1, 0)  # axes left, back, up
    if ".nii" in path.name:
        nibabel.save(nibabel.Nifti1Image(lps, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    else:
        space = {"space": "left-posterior-superior", "space directions": np.eye(3)}
        nrrd.write(str(path), lps, space)
    return path


@pytest.mark.parametrize("name", ["a.dcm", "a.tif", "a.nii", "a.nii.gz", "a.nrrd", "IM_0001.NII"])
def test_volume_is_listed_and_read_slice_by_slice(tmp_path, name):
    path = write_volume(tmp_path / name, STACK)
    images = list_images(tmp_path, False)
    assert [image.name for image in images] == [f"{name}#{i:03d}" for i in range(3)]
    assert list_images(tmp_path, False, slices="middle") == images[1:2]
    shown = {"white_value": 4095} if name == "a.tif" else {"window": (1150, 2300)}
    top = 4095 if name == "a.tif" else 2300
    for image, stored in zip(images, STACK, strict=True):
        expected = torch.from_numpy(stored.astype(np.float64) / top)[None].float()
        torch.testing.assert_close(read_image(image, **shown), expected)
    with pytest.raises(
        ImageError, match=rf"{name} has 3 \w+; expected 1: .*{name}#000 to {name}#0"
    ):
        read_image(path)
    with pytest.raises(ImageError, match=rf"{name}#003: {name} has no such slice; it has 3"):
        read_image(slice_path(path, 3))


def test_volume_is_known_by_its_content_whatever_its_name(tmp_path):
    write_volume(tmp_path / "a.nii.gz", STACK).rename(tmp_path / "1.2.840")
    write_volume(tmp_path / "b.nrrd", STACK).rename(tmp_path / "volume")
    write_volume(tmp_path / "c.dcm", STACK).rename(tmp_path / "IM0001")
    assert len(list_images(tmp_path, False)) == 9


@pytest.mark.parametrize("name", ["a.dcm", "a.nii", "a.nrrd", "a.tif"])
def test_file_of_one_slice_keeps_its_name(tmp_path, name):
    path = write_volume(tmp_path / name, STACK[:1])
    assert list_images(tmp_path, False) == [path]
    assert torch.equal(read_image(path), read_image(slice_path(path, 0)))


def test_every_slice_of_a_volume_is_shown_in_one_range(tmp_path, caplog):
    for name in ("a.dcm", "a.nii", "a.nrrd"):
        images = with_slices([write_volume(tmp_path / name, STACK)])
        shown = torch.stack([read_image(image) for image in images])
        torch.testing.assert_close(shown[:, 0].double(), torch.from_numpy(STACK / 2300))
    assert "a.dcm#000 names no usable window: 0 is shown black and 2300 white, perce" in caplog.text
    assert "a.nii#000 does not say what is black and white: 0 is shown black and 23" in caplog.text
    pages = with_slices([write_volume(tmp_path / "a.tif", STACK)])
    torch.testing.assert_close(read_image(pages[1], window="percentile"), shown[1])


def test_range_of_a_long_volume_is_measured_on_a_few_of_its_slices(tmp_path):
    stack = np.zeros((8 * SAMPLED_SLICES + 1, 1, 8), dtype=np.int16)
    stack[0], stack[-1], stack[1] = -1000, 1000, 3000  # the second slice is not among them
    images = with_slices([write_volume(tmp_path / "a.nii", stack)])
    assert [read_image(images[n]).max().item() for n in (0, 1, 2, -1)] == [0, 1, 0.5, 1]


def test_each_frame_has_its_own_window_and_rescaling(tmp_path):
    own = [
        groups(WindowCenter=500.5, WindowWidth=1001),
        groups(WindowCenter=1000.5, WindowWidth=2001),
    ]
    path = write_frames(
        tmp_path / "a.dcm",
        np.array([[[0, 500]], [[0, 500]]], dtype=np.uint16),
        PerFrameFunctionalGroupsSequence=own,
        SharedFunctionalGroupsSequence=[groups(RescaleSlope=2, RescaleIntercept=0)],
    )
    shown = [read_image(slice_path(path, n)).flatten().tolist() for n in (0, 1)]
    assert shown == [pytest.approx([0, 1]), pytest.approx([0, 0.5])]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_frame_that_cannot_be_decoded_does_not_cost_the_others(tmp_path):
    path = write_frames(tmp_path / "a.dcm", values("u2", 3, 32, 32) >> 4)
    import pydicom

    dataset = pydicom.dcmread(path)
    dataset.compress(JPEG2000Lossless)
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=3))
    frames[1] = frames[1][:40] + bytes(len(frames[1]) - 40)
    dataset.PixelData = encapsulate(frames)
    dataset.save_as(path)
    first, second, third = list_images(tmp_path, False)
    assert read_image(first).shape == read_image(third).shape == (1, 32, 32)
    with pytest.raises(ImageError, match=r"Cannot read the DICOM file .*a.dcm#001"):
        read_image(second)


def test_colour_frames_are_read(tmp_path):
    stored = values("u1", 2, 3, 4, 3)
    path = write_dicom(
        tmp_path / "a.dcm", stored.reshape(6, 4, 3), NumberOfFrames=2, Rows=3, Columns=4
    )
    assert torch.equal(read_image(slice_path(path, 1)), unit(stored[1]))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LPI", "ASR", "SRA", "PIL"])
def test_nifti_is_shown_axial_with_the_front_on_top_and_the_right_on_the_left(tmp_path, codes):
    ras = np.zeros((3, 4, 5), dtype=np.uint8)  # axes to the right, to the front, up
    ras[2, 0, 1] = 10  # right, back, second from the feet
    ras[0, 3, 1] = 20  # left, front
    image = nibabel.Nifti1Image(ras, np.diag([1.0, 2.0, 3.0, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(RAS), nibabel.orientations.axcodes2ornt(codes)
    )
    nibabel.save(image.as_reoriented(turn), tmp_path / "a.nii.gz")
    images = list_images(tmp_path, False)
    assert len(images) == 5
    shown = read_image(images[1])[0] * 255
    assert shown.shape == (4, 3)
    assert (shown[3, 0].item(), shown[0, 2].item(), shown.sum().item()) == (10, 20, 30)


@pytest.mark.parametrize(
    ("space", "directions"),
    [
        ("left-posterior-superior", [[0, 0, 3], [0, -2, 0], [-1, 0, 0]]),
        ("RAS", [[0, 0, 3], [0, 2, 0], [1, 0, 0]]),
        ("left-anterior-inferior", [[0, 0, -3], [0, 2, 0], [-1, 0, 0]]),
    ],
)
@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
def test_nrrd_is_turned_by_its_space_directions(tmp_path, space, directions, encoding):
    stored = np.zeros((5, 4, 3), dtype=np.uint8)  # axes up, to the front, to the right
    stored[1, 0, 2], stored[1, 3, 0] = 10, 20
    header = {"space": space, "space directions": np.array(directions), "encoding": encoding}
    nrrd.write(str(tmp_path / "a.nrrd"), stored, header)
    images = list_images(tmp_path, False)
    shown = read_image(images[1])[0] * 255
    assert (len(images), shown.shape) == (5, (4, 3))
    assert (shown[3, 0].item(), shown[0, 2].item(), shown.sum().item()) == (10, 20, 30)


def test_nrrd_without_space_is_shown_as_stored_with_a_word(tmp_path, caplog):
    stored = values("u1", 4, 3, 2)
    nrrd.write(str(tmp_path / "a.nrrd"), stored)
    assert torch.equal(read_image(tmp_path / "a.nrrd#001"), unit(stored[:, :, 1].T))
    assert "a.nrrd#001 has no anatomical space or directions" in caplog.text


def nifti(path: Path, stored: np.ndarray, affine: np.ndarray = RAS, **header: object) -> Path:
    image = nibabel.Nifti1Image(stored, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def test_range_that_a_nifti_file_names_is_shown(tmp_path):
    stored = np.array([[[-1000, 0, 40, 1000]]], dtype=np.int16).transpose(2, 1, 0)[::-1]
    path = nifti(tmp_path / "a.nii", stored, cal_min=-160, cal_max=240)
    assert read_image(path).flatten().tolist() == pytest.approx([0, 0.4, 0.5, 1])
    assert read_image(path, window=(40, 80)).flatten().tolist() == pytest.approx([0, 0, 0.5, 1])
    expected = [0, 0.5, 0.52, 1]
    assert read_image(path, window="percentile").flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("window", ["auto", (40.0, 400.0), "percentile"])
def test_bytes_of_a_volume_are_shown_as_the_file_says_and_have_no_window(tmp_path, window):
    stored = np.array([[[0, 51, 102, 255]]], dtype=np.uint8).transpose(2, 1, 0)[::-1]
    path = nifti(tmp_path / "a.nii", stored)
    shown = read_image(path, window=window).flatten().tolist()
    assert shown == pytest.approx([0, 0.2, 0.4, 1])
    path = nifti(tmp_path / "b.nii", stored, cal_min=51, cal_max=153)
    assert read_image(path, window=window).flatten().tolist() == pytest.approx([0, 0, 0.5, 1])
    write_volume(tmp_path / "c.nrrd", np.array([[[0, 51, 102, 255]]], dtype=np.uint8))
    shown = read_image(tmp_path / "c.nrrd", window=window).flatten().tolist()
    assert shown == pytest.approx([0, 0.2, 0.4, 1])


@pytest.mark.parametrize(
    ("dtype", "slope", "expected"),
    [("u1", 2, [0.25, 0.505, 0.76, 1]), ("i1", None, [0.25, 0.3775, 0.505, 0.2475])],
)
def test_bytes_of_a_volume_that_are_other_numbers_are_windowed(tmp_path, dtype, slope, expected):
    stored = np.array([[[0, 51, 102, 255]]], dtype=np.uint8).transpose(2, 1, 0)[::-1]
    image = nibabel.Nifti1Image(stored.astype(dtype), RAS)
    image.header.set_slope_inter(slope, None if slope is None else 0)
    nibabel.save(image, tmp_path / "a.nii")  # from -100 to 300: (2 * 51 + 100) / 400
    shown = read_image(tmp_path / "a.nii", window=(100.0, 400.0)).flatten().tolist()
    assert shown == pytest.approx(expected)


def test_voxels_that_are_not_a_number_are_black_with_a_word(tmp_path, caplog):
    stored = np.array([[[np.nan]], [[-1]], [[3]], [[1]]], dtype=np.float32)[::-1]
    assert read_image(nifti(tmp_path / "a.nii", stored)).flatten().tolist() == [0, 0, 1, 0.5]
    assert "a.nii: 25.0% of its pixels are not a number (NaN): black" in caplog.text


def test_pixels_that_are_not_square_are_said(tmp_path, caplog):
    read_image(nifti(tmp_path / "a.nii", values("u1", 3, 4, 1), np.diag([0.5, 2, 1, 1])))
    assert "a.nii: its pixels are 2 mm high and 0.5 mm wide" in caplog.text


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (
            np.zeros((2, 3, 4, 5), np.uint8),
            r"lengths \(2, 3, 4, 5\); expected three. Save one file",
        ),
        (np.zeros((2, 3, 4), np.complex64), "its voxels are complex64; expected one number each"),
    ],
)
def test_volume_of_other_axes_or_numbers_is_refused(tmp_path, stored, reason):
    path = nifti(tmp_path / "a.nii", stored)
    assert list_images(tmp_path, False) == [path]
    with pytest.raises(ImageError, match=rf"Cannot read the volume .*a.nii: .*{reason}"):
        read_image(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd"])
def test_truncated_volume_is_refused_by_name(tmp_path, name):
    path = write_volume(tmp_path / name, values("u2", 3, 40, 40))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    last = list_images(tmp_path, False)[-1]
    with pytest.raises(ImageError, match=rf"Cannot read the volume .*{name}#002: "):
        read_image(last)
    path.write_bytes(data[:360])
    with pytest.raises(ImageError, match=rf"Cannot read the volume .*{name}"):
        read_image(list_images(tmp_path, False)[0])


@pytest.mark.parametrize("dtype", ["i8", "u8"])
@pytest.mark.parametrize("name", ["long long", "int64", "longlong", "signed long long int"])
def test_nrrd_of_64_bits_is_read(tmp_path, dtype, name):
    stored = np.array([[[0, 500, 1000, 2000]]], dtype=dtype).transpose(2, 1, 0)
    nrrd.write(str(tmp_path / "a.nrrd"), stored, {"encoding": "raw"})
    name = (
        name
        if dtype == "i8"
        else {"int64": "uint64", "longlong": "ulonglong"}.get(
            name, f"unsigned {name.removeprefix('signed ')}"
        )
    )
    data = (tmp_path / "a.nrrd").read_bytes()
    old = b"type: int64" if dtype == "i8" else b"type: uint64"
    assert old in data
    (tmp_path / "a.nrrd").write_bytes(data.replace(old, f"type: {name}".encode()))
    shown = read_image(tmp_path / "a.nrrd", window=(1000.0, 2000.0)).flatten().tolist()
    assert shown == [0, 0.25, 0.5, 1]


def test_nrrd_of_colours_is_refused_and_not_read_as_slices_3_pixels_wide(tmp_path):
    kinds = {"kinds": ["RGB-color", "domain", "domain"]}
    nrrd.write(str(tmp_path / "a.nrrd"), values("u1", 3, 5, 4), kinds)
    with pytest.raises(ImageError, match=r"its axes are RGB-color, domain, domain; expected dom"):
        read_image(tmp_path / "a.nrrd#000")
    nrrd.write(str(tmp_path / "b.nrrd"), values("u1", 3, 5, 4), {"kinds": ["domain"] * 3})
    assert read_image(tmp_path / "b.nrrd#003").shape == (1, 5, 3)


def test_volume_without_any_value_says_so(tmp_path):
    path = nifti(tmp_path / "a.nii", np.full((2, 3, 1), np.nan, np.float32))
    with pytest.raises(ImageError, match=r"a.nii: no voxel of it has a value: all are NaN or inf"):
        read_image(path)
    stored = np.full((2, 1, 1), 7, np.float32)
    stored[0] = -np.inf
    assert read_image(nifti(tmp_path / "b.nii", stored)).flatten().tolist() == [0, 0]


def test_nrrd_with_its_values_elsewhere_is_refused(tmp_path):
    head = (
        "NRRD0004\ntype: uchar\ndimension: 2\nsizes: 2 2\nencoding: raw\ndata file: /etc/hosts\n\n"
    )
    (tmp_path / "a.nrrd").write_text(head)
    with pytest.raises(
        ImageError, match=r"a.nrrd: its values lie in another file; save both as on"
    ):
        read_image(tmp_path / "a.nrrd")


def test_smaller_copies_in_a_tiff_are_no_slices(tmp_path, caplog):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(STACK[0])
        file.write(STACK[0][:1, ::2], subfiletype=1)
    assert list_images(tmp_path, False) == [tmp_path / "a.tif"]
    assert torch.equal(read_image(tmp_path / "a.tif"), unit(STACK[0]))
    assert "a.tif: 1 of its 2 pages are smaller copies or transparency masks" in caplog.text


def test_window_applies_to_deep_files_of_any_kind_and_leaves_bytes_alone(tmp_path):
    stored = np.array([[-5, 0, 5, 10]], dtype=np.int16)
    tifffile.imwrite(tmp_path / "a.tif", stored)
    assert read_image(tmp_path / "a.tif", window=(0, 10)).flatten().tolist() == [0, 0.5, 1, 1]
    shown = read_image(tmp_path / "a.tif", window="percentile").flatten().tolist()
    assert shown == pytest.approx([0, 1 / 3, 2 / 3, 1])
    pixels = values("u1", 3, 4)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert torch.equal(read_image(tmp_path / "b.png", window=(0, 10)), unit(pixels))


@pytest.mark.parametrize("width", [0.0, -80.0])
def test_window_without_width_or_beside_white_value_is_refused(width):
    with pytest.raises(ConfigError, match=r"window\[1\]: must be in \[1e-09, "):
        PicardConfig(window=(40.0, width))
    with pytest.raises(ConfigError, match=r"data.window: .*data.white_value: set one of them"):
        DataConfig(window="percentile", white_value=4095)
    check_window("auto", 4095)


def test_masks_of_a_volume_are_found_slice_by_slice(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    write_volume(images / "a.dcm", STACK)
    write_volume(masks / "a.nii.gz", (STACK > 1600).astype(np.int16))
    Image.fromarray(np.eye(4, dtype=np.uint8)[:2]).save(masks / "b.dcm#001.png")
    write_volume(images / "b.dcm", STACK)
    names = [path.name for path in list_images(images, False)]
    found = read_annotations(masks, names)
    assert found.labels("a.dcm#002", (2, 4)).tolist() == (STACK[2] > 1600).tolist()
    assert not found.labels("a.dcm#000", (2, 4)).any()
    assert found.labels("b.dcm#001", (2, 4)).sum() == 2
    assert not found.labels("b.dcm#002", (2, 4)).any()
    assert list(read_annotations(masks, ["a.dcm#001", "b.dcm#001"]).of_image) == names[1::3]
    with pytest.raises(AnnotationError, match=r"no image is called 'a.nii.gz#000'"):
        read_annotations(masks, ["b.dcm#001"])


@pytest.fixture
def image_and_masks(tmp_path):
    """A folder with a volume of 3 slices of 2 x 4 pixels, and one for its mask."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    write_volume(tmp_path / "images" / "a.nii", STACK)
    return tmp_path / "images", tmp_path / "masks"


@pytest.mark.parametrize("slices", ["all", "middle", "every_2"])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.dcm", "a.tif"])
def test_mask_of_another_number_of_slices_is_refused(image_and_masks, slices, n, name):
    images, masks = image_and_masks
    files = {path.name: path for path in list_images(images, False, slices=slices)}
    write_volume(masks / name, np.zeros((n, 2, 4), np.uint8))
    with pytest.raises(
        AnnotationError,
        match=rf"{name} has {n} slices, the last is #00{n - 1}; that of its image a.nii is #002",
    ):
        read_annotations(masks, files, files=files)
    write_volume(masks / name, np.ones((3, 2, 4), np.uint8))
    found = read_annotations(masks, files, files=files)
    assert list(found.of_image) == list(files)


def test_mask_with_fewer_slices_than_names_is_refused_where_no_image_is_at_hand(image_and_masks):
    _, masks = image_and_masks
    write_volume(masks / "a.nii", np.ones((2, 2, 4), np.uint8))
    with pytest.raises(AnnotationError, match=r"2 slices, the last is #001; .* a.nii is #002"):
        read_annotations(masks, ["a.nii#000", "a.nii#002"])
    assert list(read_annotations(masks, ["a.nii#001"]).of_image) == ["a.nii#001"]
    gone = {"a.nii#001": masks / "gone" / "a.nii#001"}
    assert list(read_annotations(masks, gone, files=gone).of_image) == ["a.nii#001"]


@pytest.mark.parametrize(
    ("steps", "codes"), [((1, 1, 1), "RAS"), ((-1, -1, -1), "LPI"), ((-1, 1, 1), "LAS")]
)
def test_mask_whose_axes_run_otherwise_is_refused(image_and_masks, steps, codes):
    images, masks = image_and_masks  # axes left, back, up
    files = {path.name: path for path in list_images(images, False)}
    stored = np.zeros((4, 2, 3), np.uint8)
    stored[1, 0, 2] = 1
    nifti(masks / "a.nii.gz", stored, np.diag([*steps, 1.0]))
    with pytest.raises(
        AnnotationError, match=rf"a.nii.gz: its axes run {codes}, those of its image .*a.nii LPS"
    ):
        read_annotations(masks, files, files=files)
    nifti(masks / "a.nii.gz", stored, np.diag([-1.0, -1.0, 1.0, 1.0]))
    found = read_annotations(masks, files, files=files)
    assert np.argwhere(found.labels("a.nii#002", (2, 4))).tolist() == [[0, 1]]


def test_mask_of_one_slice_whose_axes_run_otherwise_is_refused(tmp_path):
    image = write_volume(tmp_path / "a.nii", STACK[:1])
    (tmp_path / "masks").mkdir()
    nifti(tmp_path / "masks" / "a.nii", np.ones((4, 2, 1), np.uint8))
    with pytest.raises(AnnotationError, match=r"its axes run RAS, those of its image .* LPS"):
        read_annotations(tmp_path / "masks", ["a.nii"], files={"a.nii": image})


def test_segmentation_object_in_a_folder_of_masks_is_refused_at_once(image_and_masks):
    _, masks = image_and_masks
    write_frames(masks / "a.dcm", np.ones((2, 2, 4), np.uint8), SOPClassUID=SEGMENTATION)
    names = [f"a.nii#00{n}" for n in range(3)]
    with pytest.raises(AnnotationError, match=r"a.dcm is a DICOM segmentation object, which is n"):
        read_annotations(masks, names)
    assert read_annotations(masks, ["b.png"], on_unknown="skip").of_image == {}


def test_slices_are_images_of_their_class_in_dia(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "normal").mkdir(parents=True)
        write_volume(tmp_path / split / "normal" / "a.dcm", STACK)
        Image.fromarray(values("u1", 2, 4)).save(tmp_path / split / "normal" / "b.png")
    found = load_set("folder", tmp_path, "train", size=8, slices="every_2", window=(1150, 2300))
    assert found.names == [f"train/normal/{n}" for n in ("a.dcm#000", "a.dcm#002", "b.png")]
    assert found[1].image.shape == (3, 8, 8)
    assert found[1].image.max().item() == 1


def test_slices_of_a_volume_are_held_out_together_and_known_by_their_files_content(tmp_path):
    files = [write_volume(tmp_path / f"{n}.dcm", STACK + n) for n in range(4)]
    paths = with_slices(files)
    trained, held_out = split_held_out(paths, 0.25, seed=0)
    assert len(held_out) == 3
    assert len({split_slice(path)[0] for path in held_out}) == 1
    assert sorted(trained + held_out) == paths
    before = data_identity(paths, tmp_path)
    write_volume(files[0], STACK + 9)
    assert data_identity(paths, tmp_path)["sha256"] != before["sha256"]


def test_slices_across_the_order_of_the_file_are_put_together_from_parts(tmp_path, monkeypatch):
    stored = values("u1", 5, 3, 4)  # axes up, left, back
    path = tmp_path / "a.nii"
    nifti(path, stored, np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]))
    monkeypatch.setattr(volume_files, "VALUES_AT_ONCE", 40)  # two of the four parts at a time
    for number, image in enumerate(list_images(tmp_path, False)):
        assert torch.equal(read_image(image), unit(stored[number].T))


def test_header_of_no_known_numbers_is_a_named_error(tmp_path):
    path = write_volume(tmp_path / "a.nii", np.zeros((2, 5, 6), np.int16))
    data = bytearray(path.read_bytes())
    data[70:72] = b"\x03\x01"  # the code of the voxels' type
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"Cannot read the volume .*a\.nii.*data code 259"):
        read_image(slice_path(path, 0), 1)
