"""COCO, LabelMe, YOLO and masks under other names: recognised by content, drawn, refused."""

import base64
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common import notices
from common.annotations import Box, ShapeAnnotations, read_annotations
from common.image_names import AnnotationError

IMAGES = ["a.png", "sub/b.png", "1.2.840.113.dcm"]
SIZE = (6, 8)


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(*annotations: dict[str, Any], **image: object) -> dict[str, Any]:
    """A COCO file on a.png, which has the annotations, and sub/b.png, which has none."""
    return {
        "images": [
            {"id": 5, "file_name": "a.png", "height": 6, "width": 8, **image},
            {"id": 6, "file_name": "sub/b.png"},
        ],
        "categories": [{"id": 1, "name": "mass"}],
        "annotations": [{"id": i, "image_id": 5, "category_id": 1, **annotation}
                        for i, annotation in enumerate(annotations)],
    }  # fmt: skip


def labelme(*shapes: dict[str, Any], **more: object) -> dict[str, Any]:
    return {"version": "5.4", "imagePath": "a.png", "imageHeight": 6, "imageWidth": 8,
            "imageData": None, "shapes": list(shapes), **more}  # fmt: skip


def pixels(labels: np.ndarray) -> list[list[int]]:
    return np.argwhere(labels).tolist()


def test_coco_boxes_count_from_the_left_and_polygons_mark_the_centres_inside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    polygons = [[4, 2, 7, 2, 4, 5], [0, 5, 1, 5, 1, 6, 0, 6]]  # a triangle and a pixel
    found = coco({"bbox": [1, 2, 3, 1]}, {"bbox": [0, 0, 8, 6], "segmentation": polygons})
    with caplog.at_level(logging.INFO):
        read = read_annotations(write(tmp_path / "a.json", found), IMAGES)
    assert "read as COCO: 2 lesions in 1 of 2 images" in caplog.text
    # centres (row, column) + 0.5 below the line from (2, 7) to (5, 4)
    triangle = [[2, 4], [2, 5], [3, 4]]
    assert pixels(read.labels("a.png", SIZE)) == sorted([[2, 1], [2, 2], [2, 3], *triangle, [5, 0]])
    assert read.boxes("a.png", SIZE) == [Box(2, 1, 1, 3, "mass"), Box(2, 0, 4, 7, "mass")]
    assert not read.labels("sub/b.png", SIZE).any()


@pytest.mark.parametrize("counts", [[13, 2, 4, 3, 26], "=2", "=241f0"])
def test_coco_run_lengths_go_down_the_columns(tmp_path: Path, counts: object) -> None:
    if counts == "=2":  # background, then lesion to the end: 13 + 2 pixels of 3 columns of 5
        run, size = {"size": [5, 3], "counts": counts}, (5, 3)
        expected = [[3, 2], [4, 2]]
    else:
        run, size = {"size": [6, 8], "counts": counts}, SIZE
        expected = [[1, 2], [1, 3], [2, 2], [2, 3], [3, 3]]
    found = coco({"segmentation": run, "iscrowd": 1}, height=size[0], width=size[1])
    read = read_annotations(write(tmp_path / "a.json", found), IMAGES)
    assert pixels(read.labels("a.png", size)) == expected
    assert read.boxes("a.png", size)[0].label == "mass"


def test_too_thin_a_polygon_does_not_vanish(tmp_path: Path) -> None:
    thin = coco({"segmentation": [[1.6, 1.6, 1.9, 1.6, 1.9, 1.9]]})
    read = read_annotations(write(tmp_path / "a.json", thin), IMAGES)
    assert pixels(read.labels("a.png", SIZE)) == [[1, 1]]


def labelme_mask(*marked: tuple[int, int], size: tuple[int, int] = (2, 3)) -> str:
    values = np.zeros(size, np.uint8)
    values[tuple(zip(*marked, strict=True))] = 1
    data = io.BytesIO()
    Image.fromarray(values).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"shape_type": "rectangle", "points": [[3, 2], [1, 1]]}, [[1, 1], [1, 2]]),
        (
            {"shape_type": "rectangle", "points": [[3, 1.001], [1, 1], [1, 2], [3, 2]]},
            [[1, 1], [1, 2]],
        ),
        ({"points": [[1, 1], [3, 1], [3, 2], [1, 2]]}, [[1, 1], [1, 2]]),
        ({"shape_type": "circle", "points": [[2, 2], [2, 3]]}, [[1, 1], [1, 2], [2, 1], [2, 2]]),
        (
            {
                "shape_type": "mask",
                "points": [[4, 1], [6, 2]],
                "mask": labelme_mask((0, 0), (1, 2)),
            },
            [[1, 4], [2, 6]],
        ),
    ],
)
def test_labelme_shapes(tmp_path: Path, shape: dict[str, Any], expected: list[list[int]]) -> None:
    path = write(tmp_path / "a.json", labelme({"label": "cyst", **shape}))
    for place in (path, tmp_path):
        read = read_annotations(place, IMAGES)
        assert pixels(read.labels("a.png", SIZE)) == expected
        assert read.boxes("a.png", SIZE)[0].label == "cyst"


def test_labelme_beside_the_scans_is_found_by_its_own_name(tmp_path: Path) -> None:
    square = {"label": "x", "points": [[0, 0], [2, 0], [2, 2]]}
    write(tmp_path / "sub" / "b.json", labelme(square, imagePath="..\\old place\\b.png"))
    write(tmp_path / "1.2.840.113.json", labelme(imagePath="anything.jpg"))
    Image.new("L", (8, 6)).save(tmp_path / "a.png")  # a scan, no mask
    read = read_annotations(tmp_path, IMAGES)
    assert isinstance(read, ShapeAnnotations)
    assert list(read.of_image) == ["sub/b.png"]
    write(tmp_path / "sub" / "b.json", labelme(square, imagePath="c.png"))
    with pytest.raises(AnnotationError, match=r"by its own name it is of sub/b\.png, by .*c\.png"):
        read_annotations(tmp_path, [*IMAGES, "sub/c.png"])


def test_yolo_counts_in_shares_of_the_image(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "1 0.25 0.5 0.25 0.333333\n0 0.5 0 1 0 1 0.5 0.5 0.5\n")
    write(tmp_path / "1.2.840.113.txt", "")
    write(tmp_path / "classes.txt", "cyst\nmass\n")
    read = read_annotations(tmp_path, IMAGES)
    # columns 2 ± 1 of 8, rows 3 ± 1 of 6: no further row is touched by rounding
    assert read.boxes("a.png", SIZE)[0] == Box(2, 1, 2, 2, "mass")
    expected = np.zeros(SIZE, bool)
    expected[2:4, 1:3] = expected[0:3, 4:8] = True
    assert np.array_equal(read.labels("a.png", SIZE), expected)
    assert read.boxes("a.png", (12, 16))[1] == Box(0, 8, 6, 8, "cyst")
    assert not read.labels("1.2.840.113.dcm", SIZE).any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", coco(file_name="1.2.840.113.7"), r"images\[0\]: no image is called '1\.2\.840"),
        ("x.json", coco({"bbox": [1, 2, 0, 1]}), r"annotations\[0\]: width and height .* 0\.0, 1"),
        ("x.json", coco({"bbox": [1, 2, 3]}), r"bbox must be 4 numbers, got \[1, 2, 3\]"),
        ("x.json", coco({"image_id": 9, "bbox": [1, 1, 1, 1]}), r"no image has the id 9"),
        ("x.json", coco({"bbox": [90, 1, 1, 1]}), r"a shape of a\.png lies outside the image"),
        ("x.json", coco({"segmentation": [[1, 1, 2, 2]]}), r"three corners or more, got 4 numbers"),
        ("x.json", coco(height=12), r"a\.png was annotated at \(12, 8\) pixels .* it has \(6, 8\)"),
        ("x.json", coco(id=6), r"images\[1\]: two images have the id 6"),
        (
            "x.json",
            coco({"segmentation": {"size": [6, 8], "counts": [40, 9]}}),
            r"its runs are 49 pixels, 6 x 8 are 48",
        ),
        (
            "x.json",
            coco({"segmentation": {"size": [6, 8], "counts": "2~"}}),
            r"counts has the letter '~', no run length",
        ),
        ("x.json", coco({"segmentation": {"size": [6, 8], "counts": "2d"}}), r"ends within a num"),
        (
            "x.json",
            coco({"segmentation": {"size": [-6, -8], "counts": [46, 2]}}),
            r"annotations\[0\]: size must be a whole number of pixels above 0, got -6",
        ),
        (
            "x.json",
            coco({"segmentation": {"size": [9, 8], "counts": [72]}}),
            r"its image's \(6, 8\)",
        ),
        (
            "x.json",
            coco({"segmentation": {"size": [9, 8], "counts": [70, 2]}}, height=None),
            r"a\.png was annotated at \(9, 8\) pixels",
        ),
        ("x.json", {**coco(), "annotations": None}, r"x\.json: annotations must be a list"),
        ("x.json", coco({"image_id": [5]}), r"annotations\[0\]: image_id must be a number, got \["),
        ("x.json", coco({"bbox": [1, 1, True, 1]}), r"bbox must be 4 numbers"),
        ("a.json", labelme(None), r"shapes\[0\]: must be an object, got None"),
        ("x.json", '{"images": [', r"is damaged JSON: .* Export it anew"),
        (
            "a.json",
            labelme({"shape_type": "point", "points": [[1, 1]]}),
            r"a point of 1 points mark",
        ),
        (
            "a.json",
            labelme({"shape_type": "rectangle", "points": [[2, 0], [4, 2], [2, 4], [0, 2]]}),
            r"a rectangle needs two opposite corners, or four with upright sides, got 4 points: .* "
            r"Draw it anew, or as a polygon",
        ),
        (
            "a.json",
            labelme({"shape_type": "circle", "points": [[2, 2]]}),
            r"a circle needs two points, its centre and one of its rim, got 1 points",
        ),
        ("a.json", labelme({"points": [[1, 1], [2, "x"]]}), r"a point must be 2 numbers"),
        (
            "a.json",
            labelme({"shape_type": "mask", "points": [[0, 0], [1, 1]], "mask": "no"}),
            r"shapes\[0\]: its mask cannot be read",
        ),
        ("q.json", labelme(imagePath="z.png"), r"q\.json: no image is called 'q'"),
        ("a.txt", "0 0.5 0.5 40 20\n", r"line 1: numbers must be shares .* Are they pixels\?"),
        ("a.txt", "0 0.5 0.5 0.1 0.1 0.99\n", r"a prediction with its confidence"),
        ("a.txt", "0 0.5 0.5 0.1 0\n", r"width and height must be above 0"),
        ("c.txt", "0 0.5 0.5 0.1 0.1\n", r"c\.txt: no image is called 'c'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_its_place(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(AnnotationError, match=message):
        read_annotations(path if name == "x.json" else tmp_path, IMAGES).labels("a.png", SIZE)


def test_mixtures_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "0 0.5 0.5 0.1 0.1\n")
    write(tmp_path / "README.txt", "labels\n")
    with pytest.raises(AnnotationError, match=r"README\.txt, line 1: 'labels' is no line of YOLO"):
        read_annotations(tmp_path, IMAGES)
    (tmp_path / "README.txt").unlink()
    write(tmp_path / "sub" / "b.json", labelme())
    with pytest.raises(AnnotationError, match="holds LabelMe's JSON and YOLO's text; keep one"):
        read_annotations(tmp_path, IMAGES)


@pytest.mark.parametrize("content", ["", "[]", {"objects": [{"bbox": [1, 1, 2, 2]}]}])
def test_other_json_among_labelmes_is_refused_and_makes_no_image_normal(
    tmp_path: Path, content: object
) -> None:
    write(tmp_path / "a.json", labelme())
    write(tmp_path / "sub" / "b.json", content)
    with pytest.raises(AnnotationError, match=r"sub/b\.json: not LabelMe's .* Export it anew, or"):
        read_annotations(tmp_path, IMAGES)


@pytest.mark.parametrize("sides", [(12, 16), (12.0, 16.0), ("12", " 16 "), (12, 16.0)])
@pytest.mark.parametrize("tool", ["coco", "labelme"])
def test_stated_size_counts_in_whatever_type_it_is_written(
    tmp_path: Path, tool: str, sides: tuple[object, object]
) -> None:
    height, width = sides
    stated = (
        coco(height=height, width=width)
        if tool == "coco"
        else labelme(imageHeight=height, imageWidth=width)
    )
    read = read_annotations(write(tmp_path / "a.json", stated), IMAGES)
    assert not read.labels("a.png", (12, 16)).any()
    with pytest.raises(AnnotationError, match=r"a\.png was annotated at \(12, 16\) pixels"):
        read.labels("a.png", SIZE)


@pytest.mark.parametrize("side", [6.5, "six", "", True, 0, -6, [6], math.nan])
def test_stated_size_that_is_none_is_refused(tmp_path: Path, side: object) -> None:
    message = r"a whole number of pixels above 0, got .* remove it if it is not known"
    with pytest.raises(AnnotationError, match=r"a\.json, images\[0\]: height must be " + message):
        read_annotations(write(tmp_path / "a.json", coco(height=side)), IMAGES)
    with pytest.raises(AnnotationError, match=r"a\.json: imageWidth must be " + message):
        read_annotations(write(tmp_path / "a.json", labelme(imageWidth=side)), IMAGES)


def test_size_that_is_null_or_lacking_is_no_size(tmp_path: Path) -> None:
    for stated in (coco(height=None, width=None), labelme(imageHeight=None)):
        read = read_annotations(write(tmp_path / "a.json", stated), IMAGES)
        assert isinstance(read, ShapeAnnotations)
        assert not read.sizes


@pytest.mark.parametrize("segmentation", [[], [[]], [[], []], None])
def test_empty_coco_segmentation_falls_back_to_the_box(
    tmp_path: Path, segmentation: object
) -> None:
    found = coco({"bbox": [1, 2, 3, 1], "segmentation": segmentation})
    read = read_annotations(write(tmp_path / "a.json", found), IMAGES)
    assert read.boxes("a.png", SIZE) == [Box(2, 1, 1, 3, "mass")]


@pytest.mark.parametrize(
    "shape",
    [
        {"bbox": [1, 2, 3, 1]},
        {"segmentation": [[1, 1, 4, 1, 4, 4]]},
        {"segmentation": {"size": [6, 8], "counts": [40, 8]}},
    ],
)
def test_shape_that_is_there_twice_is_one_lesion_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shape: dict[str, Any]
) -> None:
    found = coco(shape, {"bbox": [0, 0, 1, 1]}, shape, {**shape, "category_id": 2})
    read = read_annotations(write(tmp_path / "a.json", found), IMAGES)
    assert [box.label for box in read.boxes("a.png", SIZE)] == ["mass", "mass", "2"]
    assert "lesions that are there again, number for number, count once: 1 (a.png)" in caplog.text


def test_one_image_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", labelme())
    write(tmp_path / "a.png.json", labelme())
    with pytest.raises(AnnotationError, match=r"a\.png is annotated twice: in .*a\.json and in"):
        read_annotations(tmp_path, IMAGES)


def test_unknown_images_can_be_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", coco(file_name="other.png"))
    assert read_annotations(path, IMAGES, on_unknown="skip").skipped == ("other.png",)


def write_mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def test_masks_named_after_their_image_with_an_ending_are_found(tmp_path: Path) -> None:
    for number, name in enumerate(("a_mask", "sub/b_seg", "1.2.840.113-Mask")):
        values = np.zeros(SIZE)
        values[0, : number + 1] = (255, 1, 7)[number]  # a faint rim counts as well
        write_mask(tmp_path / f"{name}.png", values)
    (tmp_path / "notes.txt").write_text("who drew them\n")
    read = read_annotations(tmp_path, IMAGES)
    assert [read.labels(image, SIZE).sum() for image in IMAGES] == [1, 2, 3]


def test_image_that_has_the_masks_whole_name_wins(tmp_path: Path) -> None:
    write_mask(tmp_path / "a_mask.png", np.ones(SIZE))
    assert list(read_annotations(tmp_path, ["a.png", "a_mask.png"]).of_image) == ["a_mask.png"]
    assert list(read_annotations(tmp_path, ["v.dcm#003", "a.png"]).of_image) == ["a.png"]
    write_mask(tmp_path / "v_seg.nii#003.png", np.ones(SIZE))
    assert "v.dcm#003" in read_annotations(tmp_path, ["v.dcm#003", "a.png"]).of_image


def test_mask_of_another_size_is_stretched_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notices.forget()
    values = np.zeros((3, 4))
    values[1, 2] = 255
    write_mask(tmp_path / "a.png", values)
    read = read_annotations(tmp_path, IMAGES, resize_masks=True)
    assert pixels(read.labels("a.png", SIZE)) == [[2, 4], [2, 5], [3, 4], [3, 5]]
    assert "a.png is (3, 4) pixels (height, width), a.png is (6, 8): it is stretched" in caplog.text
    with pytest.raises(AnnotationError, match=r"\(6, 6\); stretched, it would change its shape"):
        read.labels("a.png", (6, 6))
