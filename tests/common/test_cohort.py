"""Metadata about images, and which images intervals draw together."""

from pathlib import Path

import pytest

from common.cohort import MetadataError, cluster_images, read_metadata

IMAGES = ["a.png", "b.png", "v.dcm#000", "v.dcm#001"]


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "metadata.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_row_of_a_volume_is_that_of_its_slices_and_other_images_are_passed_over(
    tmp_path: Path,
) -> None:
    text = "patient,image,scanner\n7,a,X\n8,v.dcm,Y\n,v.dcm#001,Z\n9,other.png,X\n"
    metadata = read_metadata(table(tmp_path, text), IMAGES)
    assert metadata.columns == ["patient", "scanner"]
    assert metadata.values("scanner") == {"a.png": "X", "v.dcm#000": "Y", "v.dcm#001": "Z"}
    assert metadata.values("patient") == {"a.png": "7", "v.dcm#000": "8"}
    assert metadata.unknown == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,age\na.png,3\n", "no column image in name,age"),
        ("image,age,age\na.png,3,4\n", "names age twice"),
        ("image,age\na.png,3,4\n", "line 2: expected 2 values"),
        ("image,age\na.png\n", "line 2: expected 2 values"),
        ("image,age\nz.png,3\n", "none of its 1 rows is of these images.*'a.png'"),
        ("image,age\na.png,3\na.png,4\n", "line 3: a.png has an earlier row"),
        ('image,age\n"a.png,3\n', "cannot be read: unexpected end of data"),
    ],
)
def test_file_that_is_no_metadata_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MetadataError, match=message):
        read_metadata(table(tmp_path, text), IMAGES)


def test_column_that_is_not_there_is_refused_and_the_others_named(tmp_path: Path) -> None:
    metadata = read_metadata(table(tmp_path, "image,age\na.png,3\n"), IMAGES)
    with pytest.raises(MetadataError, match=r"no column 'sex'. Its columns: age\."):
        metadata.values("sex")
    with pytest.raises(MetadataError, match="cannot be read"):
        read_metadata(tmp_path / "none.csv", IMAGES)


def test_images_are_drawn_by_patient_else_by_volume_else_by_themselves() -> None:
    plain = cluster_images(["a.png", "b.png"])
    assert (plain.unit, plain.numbers(["a.png", "b.png"])) == ("image", None)
    volumes = cluster_images(IMAGES)
    assert (volumes.unit, volumes.numbers(IMAGES).tolist()) == ("volume", [0, 1, 2, 2])
    patients = cluster_images(IMAGES, {"a.png": "1", "b.png": "1"}.get)
    assert (patients.unit, patients.unknown) == ("patient", 2)
    assert patients.numbers(IMAGES).tolist() == [0, 0, 1, 1]
    assert patients.count(IMAGES) == 2


def test_first_source_of_a_patient_counts_and_a_patient_is_no_image_of_that_name() -> None:
    clusters = cluster_images(["1", "2"], {"2": "1"}.get, {"2": "9"}.get)
    assert clusters.numbers(["1", "2"]).tolist() == [1, 0]
