"""Archives as downloaded, made small: where each picture goes, its lesions, and what is refused."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from common.annotations import Box, read_annotations
from common.datasets import DatasetError, dataset_row
from common.datasets.archives import ARCHIVES
from common.datasets.preparing import Prepared, prepare, summary
from common.image_sets import load_set
from common.images import read_mask
from diffusion_models.settings import DataConfig
from tests.tiny_runs import run_script

COMMAND = "common/datasets/__main__.py"
_DRAW = np.random.default_rng(7)


def picture(path: Path, size: tuple[int, int] = (12, 16)) -> Path:
    """A picture like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_DRAW.integers(0, 256, size, np.uint8)).save(path)
    return path


def mask(path: Path, rows: slice, columns: slice, size: tuple[int, int] = (12, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    marked = np.zeros(size, np.uint8)
    marked[rows, columns] = 76  # as in IDRiD's files
    Image.fromarray(marked).save(path)
    return path


def prepared(name: str, source: Path, folder: Path, **options: object) -> Prepared:
    archive = ARCHIVES[name]
    pictures = archive.pictures(source)
    return prepare(name, pictures, source, folder, normal=archive.normal, **options)


def links(folder: Path, part: str) -> list[str]:
    return sorted(p.relative_to(folder / part).as_posix() for p in (folder / part).rglob("*.*"))


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "manifest.csv").open() as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def write_mias(folder: Path, lines: Sequence[str], side: int = 1024) -> Path:
    """Films of the given lines of Info.txt, of `side` pixels."""
    for film in {line.split()[0] for line in lines}:
        picture(folder / f"{film}.pgm", (side, side))
    text = "MIAS\n\n1st column: number\n\n" + "\n".join(lines) + "\n"
    (folder / "Info.txt").write_text(text)
    return folder


MIAS = [
    "mdb001 G CIRC B 100 1000 10",
    "mdb001 G CALC M 500 23 3",
    "mdb002 G NORM ",
    "mdb003 D NORM",
    "mdb004 D NORM",
    "mdb005 F CALC M *NOTE 3* ",
    "mdb006 F NORM",
    *(f"mdb{number:03d} F NORM" for number in range(7, 15)),
]


def test_mias_counts_from_the_bottom_left_and_keeps_a_womans_films_together(
    tmp_path: Path,
) -> None:
    source, folder = write_mias(tmp_path / "src", MIAS, side=512), tmp_path / "dst"
    result = prepared("mias", source, folder)
    boxes = read_annotations(folder / "annotations.csv", links(folder, "test"))
    # row 1023 - 1000 = 23 of 1024, so the box is 13 to 33 inclusive; half of it at 512 pixels
    assert boxes.boxes("abnormal/mdb001.pgm", (512, 512)) == [
        Box(6.5, 45, 10.5, 10.5, "CIRC"),
        Box(498.5, 248.5, 3.5, 3.5, "CALC"),
    ]
    assert boxes.patient("abnormal/mdb001.pgm") == "woman 001"
    drawn = read_mask(folder / "masks" / "abnormal" / "mdb001.png")
    assert drawn[11, 45:55].all()  # the centre's row, 5 pixels to the right
    assert not drawn[11, 55]
    assert not drawn[7, 46]  # a corner of the box
    rows = manifest(folder)
    assert (rows["mdb005.pgm"]["split"], rows["mdb005.pgm"]["why"]) == (
        "",
        "CALC without a circle in Info.txt",
    )
    assert rows["mdb002.pgm"]["why"] == "normal, but woman 001 has an abnormal image"
    parts = {row["patient"]: set() for row in rows.values() if row["split"]}
    for row in rows.values():
        if row["split"]:
            parts[row["patient"]].add(row["split"])
    assert all(len(found) == 1 for found in parts.values())
    assert summary(result)[0] == "train: normal 8"  # of five healthy women one is tested


def test_second_run_changes_nothing_and_another_one_is_refused(tmp_path: Path) -> None:
    source, folder = write_mias(tmp_path / "src", MIAS, side=64), tmp_path / "dst"
    first = prepared("mias", source, folder)
    before = {p: (p.lstat().st_mtime_ns, p.is_symlink()) for p in folder.rglob("*")}
    again = prepared("mias", source, folder)
    assert (first.new > 15, again.new) == (True, 0)
    assert {p: (p.lstat().st_mtime_ns, p.is_symlink()) for p in folder.rglob("*")} == before
    (folder / "train" / "normal").rename(tmp_path / "lost")
    assert prepared("mias", source, folder).new == 8
    with pytest.raises(DatasetError, match=r"was prepared with seed 0, not seed 1\. Pass a new"):
        prepared("mias", source, folder, seed=1)
    (source / "mdb014.pgm").unlink()
    with pytest.raises(DatasetError, match=r"was prepared from other files: its manifest\.csv"):
        prepared("mias", source, folder)
    with pytest.raises(DatasetError, match="is not empty, and not a folder that `prepare` made"):
        prepared("mias", source, tmp_path / "lost")


def test_seed_draws_other_women(tmp_path: Path) -> None:
    source = write_mias(tmp_path / "src", MIAS, side=16)
    tested = set()
    for seed in range(4):
        prepared("mias", source, tmp_path / str(seed), seed=seed)
        tested.add(tuple(links(tmp_path / str(seed), "test")))
    assert len(tested) > 1


def test_folder_inside_the_archive_is_refused(tmp_path: Path) -> None:
    source = write_mias(tmp_path / "src", MIAS, side=16)
    with pytest.raises(DatasetError, match=r"lies in the archive's folder .* a folder elsewhere"):
        prepared("mias", source, source / "sorted")


def test_cropped_film_is_refused(tmp_path: Path) -> None:
    source = write_mias(tmp_path / "src", MIAS, side=16)
    picture(source / "mdb001.pgm", (16, 12))
    with pytest.raises(DatasetError, match=r"mdb001\.pgm is \(16, 12\) pixels .* are square"):
        prepared("mias", source, tmp_path / "dst")


def test_file_system_without_links_is_refused(tmp_path: Path, monkeypatch) -> None:
    source = write_mias(tmp_path / "src", MIAS, side=16)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    with pytest.raises(DatasetError, match=r"takes no symbolic links .*Operation not permitted"):
        prepared("mias", source, tmp_path / "dst")


def test_masks_of_one_image_are_united(tmp_path: Path) -> None:
    source, folder = tmp_path / "src" / "Dataset_BUSI_with_GT", tmp_path / "dst"
    for label, n in (("benign", 2), ("malignant", 1), ("normal", 10)):
        for number in range(1, n + 1):
            picture(source / label / f"{label} ({number}).png")
            mask(source / label / f"{label} ({number})_mask.png", slice(2), slice(number))
    mask(source / "benign" / "benign (2)_mask_1.png", slice(5, 6), slice(7, 9))
    picture(source / "benign" / "benign (3).png")
    prepared("busi", source.parent, folder)
    images = links(folder, "test")
    assert [name for name in images if not name.startswith("normal")] == [
        *("benign/benign (1).png", "benign/benign (2).png", "malignant/malignant (1).png")
    ]
    assert len(links(folder, "train")) == 8
    masks = read_annotations(folder / "masks", images)
    assert masks.labels("benign/benign (2).png", (12, 16)).sum() == 2 * 2 + 2
    assert masks.labels("malignant/malignant (1).png", (12, 16)).sum() == 2
    assert (folder / "masks" / "malignant" / "malignant (1).png").is_symlink()
    left = manifest(folder)["Dataset_BUSI_with_GT/benign/benign (3).png"]
    assert (left["split"], left["why"]) == ("", "it has no mask")


def write_idrid(source: Path) -> None:
    grading = source / "B. Disease Grading"
    for part, which, grades in (("a", "Training", "0100"), ("b", "Testing", "03")):
        rows = ["Image name,Retinopathy grade,Risk of macular edema ,,"]
        for number, grade in enumerate(grades, 1):
            rows.append(f"IDRiD_{number:03d},{grade},0,,")
            picture(
                grading / "1. Original Images" / f"{part}. {which} Set" / f"IDRiD_{number:03d}.jpg"
            )
        table = grading / "2. Groundtruths" / f"{part}. IDRiD_Disease Grading_{which} Labels.csv"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("\n".join([*rows, ",,,,"]) + "\n", encoding="utf-8-sig")
    pixels = source / "A. Segmentation"
    picture(pixels / "1. Original Images" / "a. Training Set" / "IDRiD_01.jpg")
    truths = pixels / "2. All Segmentation Groundtruths" / "a. Training Set"
    mask(truths / "1. Microaneurysms" / "IDRiD_01_MA.tif", slice(1), slice(3))
    mask(truths / "2. Haemorrhages" / "IDRiD_01_HE.tif", slice(4, 6), slice(1))
    mask(truths / "5. Optic Disc" / "IDRiD_01_OD.tif", slice(12), slice(16))


def test_idrid_unites_lesions_and_keeps_what_is_tested_out_of_training(tmp_path: Path) -> None:
    source, folder = tmp_path / "src", tmp_path / "dst"
    write_idrid(source)
    originals = source / "B. Disease Grading" / "1. Original Images"
    twin = originals / "a. Training Set" / "IDRiD_003.jpg"
    photograph = source / "A. Segmentation/1. Original Images/a. Training Set/IDRiD_01.jpg"
    twin.write_bytes(photograph.read_bytes())
    result = prepared("idrid", source, folder)
    assert links(folder, "train") == ["normal/IDRiD_001.jpg", "normal/IDRiD_004.jpg"]
    assert links(folder, "test") == ["lesions/IDRiD_01.jpg", "normal/IDRiD_001.jpg"]
    labels = read_annotations(folder / "masks", links(folder, "test")).labels(
        "lesions/IDRiD_01.jpg", (12, 16)
    )
    assert labels.sum() == 3 + 2  # without the optic disc
    row = manifest(folder)[twin.relative_to(source).as_posix()]
    assert row["split"] == ""
    assert row["why"] == "identical to test/lesions/IDRiD_01.jpg, of class lesions"
    assert "in training and test alike: 1 images" in result.notes[0]


def test_idrid_grades_are_classes_and_the_known_twin_is_left_out(tmp_path: Path) -> None:
    source, folder = tmp_path / "src", tmp_path / "dst"
    write_idrid(source)
    training = source / "B. Disease Grading/1. Original Images/a. Training Set"
    (training / "IDRiD_004.jpg").rename(training / "IDRiD_118.jpg")
    table = (
        source / "B. Disease Grading/2. Groundtruths/a. IDRiD_Disease Grading_Training Labels.csv"
    )
    table.write_text(table.read_text(encoding="utf-8-sig").replace("IDRiD_004", "IDRiD_118"))
    prepared("idrid-grading", source, folder)
    assert links(folder, "train") == ["0/IDRiD_001.jpg", "0/IDRiD_003.jpg", "1/IDRiD_002.jpg"]
    assert links(folder, "test") == ["0/IDRiD_001.jpg", "3/IDRiD_002.jpg"]
    assert load_set("folder", folder, "test", size=8).labels.tolist() == [0, 2]


def write_aptos(source: Path, normals: int = 10) -> None:
    grades = [*("0" * normals), "2", "4"]
    rows = [f"{i:012x},{grade}" for i, grade in enumerate(grades)]
    for i in range(len(grades)):
        picture(source / "train_images" / f"{i:012x}.png")
    picture(source / "test_images" / "00cb6555d108.png")
    (source / "train.csv").write_text("id_code,diagnosis\n" + "\n".join(rows) + "\n")


def test_command_sorts_aptos_and_the_programs_read_the_folder(tmp_path: Path) -> None:
    write_aptos(tmp_path / "raw")
    done = run_script(COMMAND, "prepare", "aptos", tmp_path / "raw", tmp_path / "dst")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["train: 0 8", "test: 0 2, 2 1, 4 1"]
    assert f"--dataset aptos --data_root {tmp_path / 'dst'}" in done.stdout
    assert f"train_data_path: {tmp_path / 'dst' / 'train' / '0'}" in done.stdout
    images = load_set("aptos", tmp_path / "dst", "test")
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.names[0].startswith("test/0/")
    listed = run_script(COMMAND, "list")
    sizes = ("_64", "_128", "_224")
    names = [name for name in ARCHIVES if not name.endswith(sizes)]
    assert [line.split(":")[0] for line in listed.stdout.splitlines()[::3]] == names
    again = run_script(COMMAND, "prepare", "aptos", tmp_path / "raw", tmp_path / "dst", "--seed=1")
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith(f"datasets: {tmp_path / 'dst'} was prepared")


def test_archive_that_was_not_sorted_is_answered_with_the_command(tmp_path: Path) -> None:
    write_aptos(tmp_path / "APTOS2019")
    (tmp_path / "APTOS2019" / "split").mkdir()
    for root in (tmp_path, tmp_path / "APTOS2019"):
        expected = (
            rf"python -m common\.datasets prepare aptos {root} FOLDER\. Then pass another --d"
        )
        with pytest.raises(DatasetError, match=expected):
            DataConfig(dataset="aptos", data_root=str(root)).images("train")


@pytest.mark.parametrize("official", [False, True])
def test_oct_is_found_beside_its_copy_and_patients_are_in_one_part(
    tmp_path: Path, official: bool
) -> None:
    names = {
        "train/NORMAL": ["NORMAL-11-1", "NORMAL-11-2", "NORMAL-12-1"],
        "train/CNV": ["CNV-30-1"],
        "test/NORMAL": ["NORMAL-20-1"],
        "test/CNV": ["CNV-11-9"],
        "test/DME": ["DME-40-1"],
        "test/DRUSEN": ["DRUSEN-50-1"],
        "val/NORMAL": ["NORMAL-60-1"],
    }
    for root in ("OCT2017 ", "oct2017/OCT2017 "):
        for place, files in names.items():
            for name in files:
                picture(tmp_path / "src" / root / place / f"{name}.jpeg")
    result = prepared("retina", tmp_path / "src", tmp_path / "dst", official=official)
    kept = links(tmp_path / "dst", "train")
    normals = ["NORMAL/NORMAL-11-1.jpeg", "NORMAL/NORMAL-11-2.jpeg", "NORMAL/NORMAL-12-1.jpeg"]
    assert kept == ["CNV/CNV-30-1.jpeg", *(normals if official else normals[2:])]
    assert [note[:32] for note in result.notes] == (
        [] if official else ["training images left out: 2, for"]
    )
    assert load_set("retina", tmp_path / "dst", "test").labels.tolist() == [0, 1, 1, 1]
    assert manifest(tmp_path / "dst")["OCT2017 /val/NORMAL/NORMAL-60-1.jpeg"]["split"] == ""
    with pytest.raises(DatasetError, match="prepare retina"):
        load_set("retina", tmp_path / "src", "train")


def test_chest_radiographs_are_read_from_the_nested_folder(tmp_path: Path) -> None:
    source = tmp_path / "src" / "chest_xray" / "chest_xray"
    picture(source / "train" / "NORMAL" / "IM-0115-0001.jpeg")
    picture(source / "train" / "PNEUMONIA" / "person1_bacteria_1.jpeg")
    picture(source / "test" / "NORMAL" / "NORMAL2-IM-0115-0001.jpeg")
    picture(source / "test" / "PNEUMONIA" / "person1_virus_6.jpeg")
    prepared("chestxray", tmp_path / "src", tmp_path / "dst")
    rows = manifest(tmp_path / "dst")
    assert {row["patient"] for row in rows.values()} == {
        *("IM-0115", "NORMAL2-IM-0115", "person1_bacteria", "person1_virus")
    }
    assert all(row["split"] for row in rows.values())


@pytest.mark.parametrize(
    ("name", "folders", "train", "test"),
    [
        ("covid", ["COVID", "non-COVID"], "non-COVID 4", "COVID 5, non-COVID 1"),
        (
            "kvasir",
            ["normal-cecum", "normal-pylorus", "normal-z-line", "polyps", "esophagitis"],
            "normal 12",
            "normal 3, polyps 5",
        ),
    ],
)
def test_archive_of_class_folders_is_divided(
    tmp_path: Path, name: str, folders: list[str], train: str, test: str
) -> None:
    for label in folders:
        for number in range(5):
            picture(tmp_path / "src" / "inner" / label / f"{label} ({number}).png")
    result = prepared(name, tmp_path / "src", tmp_path / "dst")
    assert summary(result)[:2] == [f"train: {train}", f"test: {test}"]
    images = load_set(name, tmp_path / "dst", "train")
    assert set(images.labels.tolist()) == {dataset_row(name).normal}
    with pytest.raises(DatasetError, match=f"holds {name} as downloaded"):
        load_set(name, tmp_path / "src", "train")


@pytest.mark.parametrize("layout", ["mvtec", "bmad"])
def test_masks_of_defects_are_found_in_both_layouts(tmp_path: Path, layout: str) -> None:
    source, folder = tmp_path / "src", tmp_path / "dst"
    inner = "" if layout == "mvtec" else "img"
    for place in ("train/good", "test/good", "test/Ungood"):
        for number in range(2):
            picture(source / place / inner / f"{number:03d}.png")
    if layout == "mvtec":
        mask(source / "ground_truth" / "Ungood" / "000_mask.png", slice(2), slice(3))
    else:
        mask(source / "test" / "Ungood" / "label" / "000.png", slice(2), slice(3))
        mask(source / "test" / "good" / "label" / "000.png", slice(0), slice(0))
        picture(source / "valid" / "good" / "img" / "004.png")
    result = prepared("bmad", source, folder)
    assert summary(result)[:2] == ["train: good 2", "test: Ungood 1, good 2"]
    masks = read_annotations(folder / "masks", links(folder, "test"))
    assert masks.labels("Ungood/000.png", (12, 16)).sum() == 6
    left = [row["why"] for row in manifest(folder).values() if not row["split"]]
    expected = ["it has no mask, others have"]
    assert left == expected + ["the archive's validation part"] * (layout == "bmad")


def test_image_in_no_classs_folder_is_left_out(tmp_path: Path) -> None:
    source, folder = tmp_path / "src", tmp_path / "dst"
    for place in ("train/good", "test/good", "test/crack"):
        for number in range(2):
            picture(source / place / f"{number:03d}.png")
    astray = ["overview.png", "test/overview.png", "ground_truth/overview.png"]
    for name in astray:
        picture(source / name)
    result = prepared("bmad", source, folder)
    assert summary(result)[:2] == ["train: good 2", "test: crack 2, good 2"]
    rows = manifest(folder)
    assert [name for name, row in rows.items() if not row["split"]] == sorted(astray)
    assert {rows[name]["why"] for name in astray} == {"in no class's folder"}


def test_folder_of_several_sets_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("bottle", "cable"):
        picture(tmp_path / name / "train" / "good" / "000.png")
    with pytest.raises(DatasetError, match=r"2 sets \(bottle, cable\); pass the folder of one"):
        prepared("bmad", tmp_path, tmp_path / "dst")


@pytest.mark.parametrize("side", [28, 64])
def test_medmnist_file_is_linked_whole_and_its_twins_are_said(tmp_path: Path, side: int) -> None:
    name = "pneumoniamnist" + ("" if side == 28 else f"_{side}")
    pixels = _DRAW.integers(0, 256, (5, side, side), np.uint8)
    arrays = {}
    for part, numbers in (("train", [0, 1, 2]), ("val", [3]), ("test", [4, 1])):
        arrays[f"{part}_images"] = pixels[numbers]
        arrays[f"{part}_labels"] = np.array([[0], [1], [0]][: len(numbers)], np.uint8)
    source = tmp_path / "src"
    source.mkdir()
    np.savez(source / f"{name}.npz", **arrays)
    result = prepared(name, source, tmp_path / "dst")
    images = load_set(name, tmp_path / "dst", "train")
    assert (len(images), images[0].image.shape) == (3, (3, side, side))
    row = manifest(tmp_path / "dst")[f"{name}.npz:train/1"]
    assert row["why"].endswith(
        "identical to test/1; stays in training, for its file is linked whole"
    )
    assert "in training and test alike: 1 images" in result.notes[0]
    assert dataset_row(name).fit == ("pad" if side == 28 else "resize")
    assert prepared(name, source, tmp_path / "dst").new == 0


@pytest.mark.parametrize("name", ["pneumoniamnist_65", "covid_64", "mnist_64"])
def test_medmnist_has_its_published_sizes_alone(name: str) -> None:
    with pytest.raises(DatasetError, match=f"dataset '{name}' is unknown"):
        dataset_row(name)


def write_tomosynthesis(path: Path, frames: np.ndarray) -> None:
    """A multi-frame file in lossless JPEG 2000, as BCS-DBT has them."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID(
        "1.2.840.10008.5.1.4.1.1.13.1.3"
    )
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 10, 9
    dataset.PixelRepresentation = 0
    dataset.compress(JPEG2000Lossless, frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def breast(side: str, seed: int, frames: int = 3) -> np.ndarray:
    """Slices (frames, 40, 48) whose brighter edge is the left one (L) or the right one (R)."""
    ramp = np.linspace(800, 0, 48)[None, None].repeat(40, 1).repeat(frames, 0)
    noise = np.random.default_rng(seed).integers(0, 100, ramp.shape)
    return ((ramp if side == "L" else ramp[:, :, ::-1]) + noise).astype(np.uint16)


DBT_VIEWS = [
    # part, patient, view, label, brighter edge, boxes (Slice, X, Y, Width, Height)
    ("train", "DBT-P00001", "lcc", "Normal", "L", []),
    ("train", "DBT-P00001", "rcc", "Normal", "R", []),
    ("train", "DBT-P00002", "lcc", "Normal", "L", []),
    ("train", "DBT-P00002", "rcc", "Actionable", "R", []),
    ("test", "DBT-P00003", "lcc", "Cancer", "L", [(1, 5, 3, 10, 6)]),
    ("test", "DBT-P00003", "rcc2", "Benign", "L", [(2, 5, 3, 10, 6), (0, 20, 1, 4, 4)]),
    ("test", "DBT-P00003", "lmlo", "Normal", "L", []),
]


def write_bcs_dbt(source: Path) -> None:
    """Three patients, with the real columns, versions in names and the retriever's folders."""
    key = "PatientID,StudyUID,View"
    heads = {
        "file-paths": f"{key},descriptive_path,classic_path",
        "labels": f"{key},Normal,Actionable,Benign,Cancer",
        "boxes": f"{key},Subject,Slice,X,Y,Width,Height,Class,AD,VolumeSlices",
    }
    versions = {"train": "-v2", "test": "-v2-PHASE-2-Jan-2024"}
    rows = {(what, part): [head] for what, head in heads.items() for part in versions}
    for number, (part, patient, view, label, side, boxes) in enumerate(DBT_VIEWS):
        row = f"{patient},DBT-S{number:05d},{view}"
        study = (
            f"Breast-Cancer-Screening-DBT/{patient}/01-01-2000-DBT-S{number:05d}-MAMMO screening"
        )
        described = f"{study}/{number}.000000-76228/1-1.dcm"
        classic = f"Breast-Cancer-Screening-DBT/{patient}/1.2.{number}/1.2.3.{number}/1-1.dcm"
        stored = [described, f"{study}/{number}.000000-NA-76228/1-1.dcm", classic][number % 3]
        if number == 3:
            stored = str(Path(classic).with_name("5f1c.dcm"))
        write_tomosynthesis(source / "manifest-1617905855234" / stored, breast(side, number))
        flags = ",".join(str(int(label == name)) for name in heads["labels"].split(",")[3:])
        rows["file-paths", part].append(f"{row},{described},{classic}")
        rows["labels", part].append(f"{row},{flags}")
        for slice_, x, y, width, height in boxes:
            numbers = f"{slice_},{x},{y},{width},{height}"
            rows["boxes", part].append(f"{row},0,{numbers},{label.lower()},0,3")
    for (what, part), lines in rows.items():
        table = source / f"BCS-DBT-{what}-{part}{versions[part]}.csv"
        table.write_text("\n".join(lines) + "\n")


def test_boxes_of_tomosynthesis_are_turned_back_where_the_archives_tools_turn_the_image(
    tmp_path: Path,
) -> None:
    source, folder = tmp_path / "src", tmp_path / "dst"
    write_bcs_dbt(source)
    result = prepared("bcs-dbt", source, folder)
    assert summary(result) == [
        "train: normal 2",
        "test: benign 1, cancer 1, normal 1",
        "left out: 2: 1 × normal view of a patient with other views, "
        "1 × actionable: neither normal nor annotated",
    ]
    cancer = "cancer/DBT-P00003_DBT-S00004_lcc.dcm#001"
    benign = "benign/DBT-P00003_DBT-S00005_rcc2.dcm#"
    boxes = read_annotations(folder / "annotations.csv", [cancer, f"{benign}002", f"{benign}000"])
    assert boxes.boxes(cancer, (40, 48)) == [Box(3, 5, 6, 10, "cancer")]
    # 40 - 3 - 6 rows and 48 - 5 - 10 columns from the other corner
    assert boxes.boxes(f"{benign}002", (40, 48)) == [Box(31, 33, 6, 10, "benign")]
    assert boxes.boxes(f"{benign}000", (40, 48)) == [Box(35, 24, 4, 4, "benign")]
    assert (boxes.volume_slices(cancer), boxes.patient(cancer)) == (3, "DBT-P00003")
    turned = [row["why"] for row in manifest(folder).values() if "turned" in row["why"]]
    assert turned == ["biopsied, with boxes, test part; boxes turned by 180°, as the file is"]


def test_training_part_alone_is_divided_by_patient(tmp_path: Path) -> None:
    source, folder = tmp_path / "src", tmp_path / "dst"
    write_bcs_dbt(source)
    for table in source.glob("*-test-*.csv"):
        table.unlink()
    paths = source / "BCS-DBT-file-paths-train-v2.csv"
    paths.rename(source / "BCS-DBT-file-paths-train.csv")
    prepared("bcs-dbt", source, folder)
    assert links(folder, "test") == ["normal/DBT-P00002_DBT-S00002_lcc.dcm"]
    assert len(links(folder, "train")) == 2


def test_two_versions_of_a_table_are_refused(tmp_path: Path) -> None:
    write_bcs_dbt(tmp_path)
    (tmp_path / "BCS-DBT-labels-train.csv").write_text("PatientID\n")
    with pytest.raises(DatasetError, match=r"2 files BCS-DBT-labels-train\*\.csv; keep the newest"):
        prepared("bcs-dbt", tmp_path, tmp_path / "dst")


@pytest.mark.parametrize("name", [name for name in ARCHIVES if "mnist_" not in name])
def test_folder_of_something_else_is_refused_with_the_layout(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "src" / "holiday.jpg")
    (tmp_path / "src" / "README").touch()
    expected = rf"Expected {name} as downloaded, .*\. Get it from .* and unpack it\."
    with pytest.raises(DatasetError, match=expected):
        prepared(name, tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    with pytest.raises(DatasetError, match=f"is no folder. Pass that of the unpacked {name}"):
        prepared(name, tmp_path / "none", tmp_path / "dst")


def test_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    write_aptos(tmp_path)
    (tmp_path / "train.csv").write_text("id,diagnosis\n1,0\n")
    with pytest.raises(DatasetError, match=r"train\.csv lacks the column id_code; it has id, diag"):
        prepared("aptos", tmp_path, tmp_path / "dst")
