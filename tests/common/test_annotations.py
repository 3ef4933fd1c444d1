"""Boxes and masks: reading, matching to images, pixel labels."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.annotations import Box, boxes_to_labels, labels_to_boxes, read_annotations
from common.box_files import MAX_BYTES
from common.image_files import ImageError
from common.image_names import AnnotationError, ImageNames
from common.images import write_image

IMAGES = ["a.png", "sub/b.png", "c.png"]
HEADER = "image,top,left,height,width,label\n"


def boxes_file(folder: Path, rows: str, header: str = HEADER) -> Path:
    path = folder / "boxes.csv"
    path.write_text(header + rows, encoding="utf-8")
    return path


def write_mask(path: Path, marked: tuple[slice, slice], size: tuple[int, int] = (6, 8)) -> None:
    mask = torch.zeros(size)
    mask[marked] = 1 / 255  # the smallest value above background that 8 bits hold
    write_image(path, mask)


def test_box_covers_its_height_and_width_from_its_top_left_pixel() -> None:
    labels = boxes_to_labels([(1, 2, 2, 3)], (4, 6))
    expected = np.zeros((4, 6), bool)
    expected[1:3, 2:5] = True
    assert np.array_equal(labels, expected)


def test_overlapping_boxes_are_united() -> None:
    labels = boxes_to_labels([(0, 0, 2, 2), (1, 1, 2, 2)], (4, 4))
    assert labels.sum() == 7


def test_boxes_are_cut_at_every_border() -> None:
    labels = boxes_to_labels([(-1, -2, 2, 3), (3, 4, 9, 9)], (4, 6))
    expected = np.zeros((4, 6), bool)
    expected[0, 0] = expected[3, 4:] = True
    assert np.array_equal(labels, expected)


def test_fractions_of_a_pixel_count_as_the_whole_pixel() -> None:
    labels = boxes_to_labels([(0.6, 1.0, 1.0, 0.5)], (4, 4))
    assert np.argwhere(labels).tolist() == [[0, 1], [1, 1]]


def test_image_may_have_several_rows_one_empty_row_or_none(tmp_path: Path) -> None:
    rows = "a.png,0,0,1,2,mass\na.png,3,3,1,1,\nc.png,,,,,\n"
    annotations = read_annotations(boxes_file(tmp_path, rows), IMAGES)
    assert annotations.labels("a.png", (5, 5)).sum() == 3
    assert annotations.boxes("a.png", (5, 5)) == [Box(0, 0, 1, 2, "mass"), Box(3, 3, 1, 1)]
    assert not annotations.labels("sub/b.png", (5, 5)).any()
    assert not annotations.labels("c.png", (5, 5)).any()


def test_box_that_is_there_twice_is_one_lesion_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "a.png,0,0,1,2,mass\na,0.0,0,1,2,mass\na.png,0,0,1,2,\nc.png,0,0,1,2,mass\n"
    read = read_annotations(boxes_file(tmp_path, rows), IMAGES)
    assert read.boxes("a.png", (5, 5)) == [Box(0, 0, 1, 2, "mass"), Box(0, 0, 1, 2)]
    assert len(read.boxes("c.png", (5, 5))) == 1
    assert "lesions that are there again, number for number, count once: 1 (a.png)" in caplog.text


@pytest.mark.parametrize("rows", ["a.png,,,,,\na,0,0,1,2,mass\n", "a,0,0,1,2,\na.png,,,,,\n"])
def test_image_that_is_normal_and_has_a_box_is_refused(tmp_path: Path, rows: str) -> None:
    message = r"a\.png has a box \(.*line [23]\), and a row .* normal \(.*line [23]\)\. Remove one"
    with pytest.raises(AnnotationError, match=message):
        read_annotations(boxes_file(tmp_path, rows), IMAGES)


@pytest.mark.parametrize("name", ["sub/b.png", "sub/b", "sub\\b.png", "./sub/b.png", "sub/b.tif"])
def test_image_is_found_by_its_path_with_or_without_suffix(tmp_path: Path, name: str) -> None:
    annotations = read_annotations(boxes_file(tmp_path, f"{name},0,0,1,1\n"), IMAGES)
    assert list(annotations.of_image) == ["sub/b.png"]


def test_row_of_an_unknown_image_is_refused_with_its_line_and_the_nearest_name(
    tmp_path: Path,
) -> None:
    path = boxes_file(tmp_path, "a.png,0,0,1,1,\nsub/bb.png,0,0,1,1,\n")
    expected = r"boxes\.csv, line 3: no image is called 'sub/bb\.png'\. Did you mean 'sub/b\.png'"
    with pytest.raises(AnnotationError, match=expected):
        read_annotations(path, IMAGES)
    assert read_annotations(path, IMAGES, on_unknown="skip").skipped == ("sub/bb.png",)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("P1.png", "P1.R"),
        ("1.2.840.113.dcm", "1.2.840.113.7"),
        ("scan.png", "scan.2"),
        ("P1.png", "p1.png"),
        ("P1.png", "P1.png "),
        ("P1.png", "P1\n"),
        ("sub/P1.png", "P1.png"),
    ],
)
def test_only_the_ending_of_an_image_file_may_differ(image: str, name: str) -> None:
    assert ImageNames([image]).find(name) is None


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("1.2.840.7", "1.2.840.7.png"),
        ("scan.2.png", "scan.2"),
        ("P1.dcm", "P1.PNG"),
        ("photo.jfif", "photo.png"),
        ("M\u00fcller.png", "Mu\u0308ller.png"),
        ("Mu\u0308ller.png", "M\u00fcller"),
        ("a\\b.png", "a\\b.png"),
        ("a\nb.png", "a\nb.png"),
    ],
)
def test_name_is_found_whole_by_its_stem_or_in_another_unicode_composition(
    image: str, name: str
) -> None:
    assert ImageNames([image, "other.png"]).find(name) == image


def test_names_that_differ_in_their_composition_alone_are_both_named() -> None:
    images = ["M\u00fcller.png", "Mu\u0308ller.png"]
    assert [ImageNames(images).find(name) for name in images] == images
    with pytest.raises(
        AnnotationError, match=r"M\\xfcller\.png' or 'Mu\\u0308ller\.png', .*compos"
    ):
        ImageNames(images).find("M\u00fcller")


def test_name_in_other_letter_case_is_answered_with_the_right_one() -> None:
    with pytest.raises(AnnotationError, match=r"Did you mean 'P1\.png'\? Correct the name, or go"):
        ImageNames(["a.png", "P1.png"], remedy="go").match("p1", "f, line 2")


def test_names_that_are_skipped_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = boxes_file(tmp_path, "x.png,0,0,1,1,\nx.png,0,0,2,2,\n")
    read_annotations(path, IMAGES, on_unknown="skip")
    assert caplog.messages == [f"{path}: 1 of unknown images: x.png"]


def test_name_that_fits_several_images_is_refused(tmp_path: Path) -> None:
    path = boxes_file(tmp_path, "a,0,0,1,1,\n")
    with pytest.raises(AnnotationError, match=r"line 2: 'a' may mean a\.png or a\.tif"):
        read_annotations(path, ["a.png", "a.tif"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,1,x,3,4,", r"line 2: left must be a number of pixels, got 'x'"),
        ("a.png,1,2,3,nan,", r"line 2: width must be a number of pixels, got 'nan'"),
        ("a.png,1,2,,4,", r"line 2: height must be a number of pixels, got ''"),
        ("a.png,1,2,0,4,", r"line 2: height and width must be above 0, got 0 and 4"),
        ("a.png,1,2,3,4,mass,9", r"line 2: more values than columns"),
        (",1,2,3,4,", r"line 2: no image is called ''"),
    ],
)
def test_malformed_row_is_refused_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_annotations(boxes_file(tmp_path, row + "\n"), IMAGES)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("1_000", "left must be a number of pixels, got '1_000'"),
        ("\uff12", "left must be a number of pixels, got '\uff12'"),
        ("0x10", "left must be a number of pixels, got '0x10'"),
        ("inf", "left must be a number of pixels, got 'inf'"),
        ("1,5", "must be a number of pixels"),
        ("1e308", "left must be a number of pixels up to 10000000, got 1e308"),
        ("1e-400", None),
        ("-1.5", None),
    ],
)
def test_only_plain_numbers_of_pixels_are_taken(
    tmp_path: Path, number: str, message: str | None
) -> None:
    path = boxes_file(tmp_path, f'a.png,0,"{number}",3,4\n')
    if message is None:
        assert read_annotations(path, IMAGES).labels("a.png", (5, 5)).any()
    else:
        with pytest.raises(AnnotationError, match=f"line 2: .*{message}"):
            read_annotations(path, IMAGES)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('a.png,0,0,1,1,\n"c.png,0,0,1,1,', "line 3: not CSV: a quote is opened and never closed"),
        ('"a.png,0,0,1,1,\nc.png",0,0,1,1,\n', "line 2: a value goes on over the end"),
        ('a.png,0,0,1,1,"big" one\n', "line 2: not CSV: ',' expected after '\"'"),
        ("a.png,0,0,1,1," + "x" * 200_000 + "\n", "line 2: not CSV: field larger than"),
    ],
)
def test_damaged_quotes_are_an_error_and_never_fewer_boxes(
    tmp_path: Path, rows: str, message: str
) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_annotations(boxes_file(tmp_path, rows), IMAGES, on_unknown="skip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; the first line must name the columns image,top"),
        (b" \n\n", r"is empty"),
        ((HEADER + "a.png,0,0,1,1,\n").encode("utf-16"), r"text in UTF-16"),
        ((HEADER + "a.png,0,0,1,1,\n").encode("utf-16-le"), r"line 1: NUL bytes; .* UTF-16"),
        ((HEADER + "M\u00fcller.png,0,0,1,1,\n").encode("utf-16-le"), r"line 1: NUL bytes"),
        ((HEADER + "M\u00fcller.png,0,0,1,1,\n").encode("latin-1"), r"line 2: byte 0xfc .*Latin-1"),
        (b"PK\x03\x04....", r"a workbook|workbook \(\.xlsx"),
        (b'{"a.png": [0, 0, 1, 1]}', r"is JSON or XML, not CSV\. Save it as CSV in UTF-8"),
        (HEADER.replace(",", ";").encode(), r"not found in image;top.*separated by semicolons"),
        (HEADER.replace(",", "\t").encode(), r"not found in image\\ttop.*separated by tabs"),
        (b"image,top,left,height,width,top\n", r"the first line names top twice"),
        (b"image,top,left,height\n", r"separated by commas; width not found in image,top"),
    ],
)
def test_what_is_no_box_file_is_refused_with_what_it_is(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "boxes.csv").write_bytes(content)
    with pytest.raises(AnnotationError, match=message):
        read_annotations(tmp_path / "boxes.csv", IMAGES)


def test_pipes_devices_and_endless_files_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", Path("/dev/zero")):
        with pytest.raises(AnnotationError, match="cannot be read: it is no regular file"):
            read_annotations(path, IMAGES)
    with (tmp_path / "huge.csv").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(AnnotationError, match="is larger than 64 MiB"):
        read_annotations(tmp_path / "huge.csv", IMAGES)


def test_spreadsheet_export_with_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = boxes_file(tmp_path, "a.png, 0, 0, 1, 1\n", header="\ufeffimage,top,left,height,width\n")
    assert read_annotations(path, IMAGES).labels("a.png", (2, 2)).sum() == 1


def test_box_outside_its_image_is_refused(tmp_path: Path) -> None:
    annotations = read_annotations(boxes_file(tmp_path, "a.png,50,0,4,4,\n"), IMAGES)
    for early_or_late in (annotations.check, annotations.boxes, annotations.labels):
        with pytest.raises(
            AnnotationError, match=r"of a\.png lies outside the image of \(40, 40\)"
        ):
            early_or_late("a.png", (40, 40))
    annotations.check("a.png", (51, 1))


def test_missing_annotations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="No annotations at"):
        read_annotations(tmp_path / "none.csv", IMAGES)


def test_mask_images_mark_what_is_above_zero_and_an_image_without_one_is_normal(
    tmp_path: Path,
) -> None:
    write_mask(tmp_path / "a.png", (slice(1, 3), slice(2, 5)))
    write_mask(tmp_path / "sub" / "b.tif", (slice(0, 1), slice(0, 1)))
    annotations = read_annotations(tmp_path, IMAGES)
    assert np.array_equal(
        annotations.labels("a.png", (6, 8)), boxes_to_labels([(1, 2, 2, 3)], (6, 8))
    )
    assert annotations.labels("sub/b.png", (6, 8)).sum() == 1
    assert not annotations.labels("c.png", (6, 8)).any()
    assert annotations.boxes("a.png", (6, 8)) == [Box(1, 2, 2, 3)]


def test_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    write_mask(tmp_path / "a.png", (slice(1), slice(1)))
    annotations = read_annotations(tmp_path, IMAGES)
    with pytest.raises(AnnotationError, match=r"a\.png is \(6, 8\) pixels .* a\.png is \(8, 6\)"):
        annotations.labels("a.png", (8, 6))


def test_masks_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    write_mask(tmp_path / "a.png", (slice(1), slice(1)))
    write_mask(tmp_path / "x.png", (slice(1), slice(1)))
    with pytest.raises(AnnotationError, match=r"no image is called 'x\.png'"):
        read_annotations(tmp_path, IMAGES)
    assert read_annotations(tmp_path, IMAGES, on_unknown="skip").skipped[0].endswith("x.png")
    (tmp_path / "x.png").rename(tmp_path / "a.bmp")
    with pytest.raises(AnnotationError, match=r"a\.png has two masks"):
        read_annotations(tmp_path, IMAGES)
    (tmp_path / "a.bmp").rename(tmp_path / "c.jpg")
    with pytest.raises(AnnotationError, match=r"c\.jpg: the noise of JPEG"):
        read_annotations(tmp_path, IMAGES)


def test_unreadable_mask_makes_no_image_normal(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "c.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d.png")
    annotations = read_annotations(tmp_path, [*IMAGES, "d.png"])
    for name in ("a.png", "c.png", "d.png"):
        with pytest.raises(ImageError, match=name):
            annotations.labels(name, (6, 8))
    assert not annotations.labels("sub/b.png", (6, 8)).any()


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".png", {"format": "JPEG"}),
        (".png", {"format": "WEBP", "quality": 50}),
        (".tif", {"compression": "jpeg"}),
        (".png", {"format": "JPEG2000"}),
    ],
)
def test_mask_with_jpegs_noise_is_refused_under_any_suffix(
    tmp_path: Path, suffix: str, options: dict[str, object]
) -> None:
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / f"a{suffix}", **options)
    with pytest.raises(AnnotationError, match=rf"a\{suffix}: the noise of JPEG"):
        read_annotations(tmp_path, IMAGES).labels("a.png", (6, 8))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".png", {"format": "WEBP", "lossless": True}),
        (".webp", {"lossless": True}),
        (".tif", {"compression": "tiff_lzw"}),
    ],
)
def test_exact_mask_of_these_formats_is_read(
    tmp_path: Path, suffix: str, options: dict[str, object]
) -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[1, 2] = 1
    Image.fromarray(mask).save(tmp_path / f"a{suffix}", **options)
    assert np.array_equal(read_annotations(tmp_path, IMAGES).labels("a.png", (6, 8)), mask > 0)


def test_folder_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="No image in"):
        read_annotations(tmp_path, IMAGES)


def test_regions_that_touch_at_a_corner_share_a_box() -> None:
    labels = np.zeros((5, 5), bool)
    labels[0, 0] = labels[1, 1] = labels[4, 3:] = True
    assert labels_to_boxes(labels) == [Box(0, 0, 2, 2), Box(4, 3, 1, 2)]


def test_patient_and_number_of_slices_are_kept_for_each_image(tmp_path: Path) -> None:
    header = "image,top,left,height,width,label,volume_slices,patient,Class\n"
    rows = "v.dcm#007,1,2,3,4,mass,60,P1,x\nv.dcm#007,9,9,3,4,mass,60,,y\nc.png,,,,,,,P2,\n"
    path = boxes_file(tmp_path, rows, header)
    annotations = read_annotations(path, [*IMAGES, "v.dcm#007"])
    assert len(annotations.of_image["v.dcm#007"]) == 2
    assert (annotations.volume_slices("v.dcm#007"), annotations.patient("v.dcm#007")) == (60, "P1")
    assert (annotations.volume_slices("c.png"), annotations.patient("c.png")) == (None, "P2")
    assert annotations.patient("a.png") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,0,0,1,1,6.5,P1", "line 3: volume_slices must be a whole number .*, got '6.5'"),
        ("a.png,0,0,1,1,60,P2", r"line 3: patient of a\.png is 'P2', in an earlier row 'P1'"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(
    tmp_path: Path, row: str, message: str
) -> None:
    header = "image,top,left,height,width,volume_slices,patient\n"
    path = boxes_file(tmp_path, f"a.png,0,0,1,1,60,P1\n{row}\n", header)
    with pytest.raises(AnnotationError, match=message):
        read_annotations(path, IMAGES)


@pytest.mark.parametrize(
    "name", ["s/v.dcm#017", "s/v.dcm#17", "s/v#017", "s/v.dcm#017.png", "s\\v.nii.gz#0017"]
)
def test_slice_is_found_by_volume_and_number(name: str) -> None:
    images = ["s/v.dcm#016", "s/v.dcm#017", "s/w.dcm#017", "v.dcm#017"]
    assert ImageNames(images).find(name) == "s/v.dcm#017"


@pytest.mark.parametrize("name", ["v.dcm", "v"])
def test_volume_without_a_slice_is_answered_with_how_to_name_one(name: str) -> None:
    names = ImageNames(["v.dcm#000", "v.dcm#001"])
    with pytest.raises(AnnotationError, match=r"a volume of 2 slices; name one, .* 'v\.dcm#000'"):
        names.match(name, "boxes.csv, line 2")


def test_file_that_really_has_a_slices_name_wins() -> None:
    assert ImageNames(["v.dcm#1", "v.dcm#001"]).find("v.dcm#1") == "v.dcm#1"
    assert ImageNames(["v#017.png"]).find("v#017") == "v#017.png"
