"""The table of datasets and the sets of images read by it."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets import ALIASES, DATASETS, DatasetError, dataset_row
from common.devices import RuntimeSetupError
from common.image_batches import batches_per_epoch, epoch_batches
from common.image_files import ImageError
from common.image_sets import ImageSet, contaminate, load_set
from common.processes import Processes
from common.random_numbers import seed_from
from dia.data import evaluation_sets, load_split, normal_train_set, training_sets
from dia.settings import ContrastiveConfig, DiaConfig, EvaluationConfig
from diffusion_models.settings import DataConfig, DdpmConfig, DiffusionConfig
from diffusion_models.training import training_images


def write_tree(root: Path, classes: dict[str, int], split: str = "train", side: int = 20) -> None:
    """A folder per class with so many images, each of one grey value."""
    for number, (name, count) in enumerate(classes.items()):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.full((side, side, 3), 20 * number + i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


def test_normal_class_is_the_same_for_ddpm_and_classifier(tmp_path: Path) -> None:
    write_tree(tmp_path / "covid", {"COVID": 3, "non-COVID": 2})
    write_tree(tmp_path / "OCT2017", {"CNV": 3, "DME": 1, "DRUSEN": 1, "NORMAL": 2})
    for name in ("sars-covid", "retina"):
        data = DataConfig(dataset=name, data_root=str(tmp_path))
        normal = dataset_row(name).normal
        whole = load_split(DiaConfig(data=data), "train")
        ddpm = training_images(DdpmConfig(data=data))
        assert ddpm.names == whole.of_classes([normal]).names
        assert len(ddpm) == 2


def test_every_alias_names_a_row_and_unknown_names_are_answered_with_the_list() -> None:
    assert set(ALIASES.values()) <= set(DATASETS)
    with pytest.raises(DatasetError, match="'kvasr' is unknown; choose from covid, kvasir"):
        dataset_row("kvasr")


def test_missing_dataset_says_what_to_get_and_what_tree_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"train does not exist\. Expected .*NORMAL.*kaggle"):
        load_set("retina", tmp_path, "train")
    for name, file in (("pneumonia", "pneumoniamnist.npz"), ("cifar10", "cifar-10-batches-py")):
        with pytest.raises(DatasetError, match=rf"{file} does not exist\. Download"):
            load_set(name, tmp_path, "test")


def test_missing_class_folder_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "OCT2017", {"CNV": 1, "DME": 1, "NORMAL": 2})
    with pytest.raises(DatasetError, match="lacks the class folder DRUSEN"):
        load_set("retina", tmp_path, "train")


def test_class_without_images_is_refused_with_the_counts(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 2, "b": 1})
    with pytest.raises(DatasetError, match=r"no image of class 5; the set has \{'a': 2, 'b': 1\}"):
        load_set("folder", tmp_path, "train").of_classes([5])


def test_single_training_image_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 1})
    config = DdpmConfig(data=DataConfig(data_root=str(tmp_path)))
    with pytest.raises(DatasetError, match="at least 2 are needed"):
        training_images(config)
    data = DataConfig(data_root=str(tmp_path), one_class_idx=0)
    with pytest.raises(DatasetError, match="at least 2 are needed"):
        normal_train_set(DiaConfig(data=data))


def test_classes_of_the_test_split_alone_come_after_those_of_training(tmp_path: Path) -> None:
    write_tree(tmp_path, {"good": 2})
    write_tree(tmp_path, {"crack": 1, "good": 1}, split="test")
    train, test = (load_set("folder", tmp_path, split, size=16) for split in ("train", "test"))
    assert train.classes == test.classes == ("good", "crack")
    assert dict(zip(test.names, test.labels.tolist(), strict=True)) == {
        "test/good/0.png": 0,
        "test/crack/0.png": 1,
    }


def test_flat_folder_is_a_train_set_without_test_images(tmp_path: Path) -> None:
    write_tree(tmp_path, {"x": 3}, split="flat")
    folder = tmp_path / "flat" / "x"
    images = load_set("folder", folder, "train", size=16)
    assert len(images) == 3
    assert images[0].image.shape == (3, 16, 16)
    with pytest.raises(DatasetError, match="no test/ folder"):
        load_set("folder", folder, "test")


def test_grey_file_among_colour_ones_is_converted_or_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 1})
    Image.fromarray(np.full((20, 20), 9, np.uint8)).save(tmp_path / "train/normal/grey.png")
    converted = load_set("folder", tmp_path, "train")[1]
    assert converted.image.shape[0] == 3
    with pytest.raises(DatasetError, match=r"grey\.png is grey"):
        load_set("folder", tmp_path, "train", refuse_grey=True)[1]


def test_medmnist_is_read_from_its_file_and_findings_count_as_one(tmp_path: Path) -> None:
    pixels = np.zeros((3, 28, 28), np.uint8)
    labels = np.array([[0, 0], [1, 0], [1, 1]])
    np.savez(tmp_path / "chestmnist.npz", test_images=pixels, test_labels=labels)
    images = load_set("chest", tmp_path, "test")
    assert images.labels.tolist() == [0, 1, 1]
    assert images[0].image.shape == (3, 28, 28)


def test_hidden_and_system_folders_are_no_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "test"):
        write_tree(tmp_path, {".ipynb_checkpoints": 1, "@eaDir": 1, "normal": 2}, split)
    write_tree(tmp_path, {"polyps": 1}, "test")
    images = load_set("folder", tmp_path, "test")
    assert images.classes == ("normal", "polyps")
    assert images.labels.tolist() == [0, 0, 1]
    expected = "2 folders passed over: 2 hidden or system folder (.ipynb_checkpoints, @eaDir)"
    assert expected in caplog.text


def test_what_lies_in_no_class_folder_and_is_no_image_is_said_once_per_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "OCT2017"
    write_tree(root, {"CNV": 1, "DME": 1, "DRUSEN": 1, "NORMAL": 1, "OTHER": 1})
    (root / "train" / "CNV" / "0.png").rename(root / "train" / "beside.png")
    (root / "train" / "CNV" / "1.png").symlink_to(root / "train" / "beside.png")
    (root / "train" / "DME" / "notes.txt").write_text("notes")
    os.mkfifo(root / "train" / "DME" / "x.png")
    assert len(load_set("retina", tmp_path, "train")) == 4
    load_set("retina", tmp_path, "train")
    assert caplog.messages == [
        f"{root}/train: 3 files and 1 folder passed over: 1 folder of no class (OTHER), 1 beside "
        "the class folders (beside.png), 1 unknown kind (DME/notes.txt), 1 no regular file "
        "(DME/x.png)"
    ]


def test_class_is_found_in_another_unicode_composition(tmp_path: Path) -> None:
    composed, decomposed = "ges\u00fcnd", "gesu\u0308nd"
    write_tree(tmp_path, {composed: 2})
    write_tree(tmp_path, {decomposed: 1, "krank": 1}, "test")
    images = load_set("folder", tmp_path, "test")
    assert (images.classes, images.labels.tolist()) == ((composed, "krank"), [0, 1])
    assert load_set("folder", tmp_path, "train").classes == (composed, "krank")
    write_tree(tmp_path, {composed: 1}, "test")
    with pytest.raises(DatasetError, match=r"two folders of the class .* in Unicode composition"):
        load_set("folder", tmp_path, "test")


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_that_differ_in_letter_case_alone_are_refused(tmp_path: Path, split: str) -> None:
    write_tree(tmp_path, {"Normal": 1})
    write_tree(tmp_path, {"Normal": 1, "polyps": 1}, "test")
    write_tree(tmp_path, {"normal": 1}, split)
    with pytest.raises(DatasetError, match="Normal and normal, which differ in letter case alone"):
        load_set("folder", tmp_path, "train")


def test_class_folder_without_images_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 1, "b": 0})
    (tmp_path / "train" / "b" / "x.png").touch()
    with pytest.raises(DatasetError, match=r"train/b holds no image\..*remove.*1 empty \(x\.png\)"):
        load_set("folder", tmp_path, "train")


def test_folder_without_the_expected_tree_is_refused_with_it(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 1}, split="Train")
    with pytest.raises(DatasetError, match=r"No image in .* Expected .*\{train,test\}.*\(Train\)"):
        load_set("folder", tmp_path, "train")
    with pytest.raises(DatasetError, match=r"none does not exist\. .* Expected .*\{train,test\}"):
        load_set("folder", tmp_path / "none", "train")


def test_unreadable_image_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 3})
    (tmp_path / "train" / "normal" / "1.png").write_text("no image")
    images = load_set("folder", tmp_path, "train", size=16)
    with pytest.raises(ImageError, match=r"train/normal/1\.png"):
        images[1]
    rest = images.subset([0, 2])
    assert rest.names == ["train/normal/0.png", "train/normal/2.png"]
    assert [sample.label for sample in rest] == [0, 0]


def test_part_of_a_set_keeps_the_size_of_the_diffusion_program(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 3})
    images = training_images(DdpmConfig(data=DataConfig(data_root=str(tmp_path))))
    assert images.subset([1, 2])[0].image.shape == images[1].image.shape == (3, 32, 32)


def test_name_that_is_not_utf_8_seeds_and_is_written_with_escapes(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 1})
    folder = tmp_path / "train" / "normal"
    (folder / "0.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    images = load_set("folder", tmp_path, "train", size=16)
    assert images[0].name == r"train/normal/caf\xe9.png"
    assert images[0].image.shape == (3, 16, 16)
    assert (
        seed_from("a") != seed_from(os.fsdecode(b"caf\xe9")) != seed_from(os.fsdecode(b"caf\xe8"))
    )


@pytest.mark.parametrize(("index", "said"), [(None, True), (0, False)])
def test_training_on_all_classes_is_said_with_their_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, index: int | None, said: bool
) -> None:
    write_tree(tmp_path, {"normal": 2, "polyps": 1})
    data = DataConfig(data_root=str(tmp_path), one_class_idx=index)
    assert len(normal_train_set(DiaConfig(data=data))) == (3 if said else 2)
    expected = "all 2 classes, 0 (normal), 1 (polyps), anomalies among them"
    assert (expected in caplog.text) is said
    assert ("pass --one_class_idx 0 (normal)" in caplog.text) is said


@pytest.mark.parametrize(("index", "level"), [(None, "WARNING"), (1, "INFO")])
def test_diffusion_training_says_which_class_it_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, index: int | None, level: str
) -> None:
    write_tree(tmp_path, {"abnormal": 3, "normal": 2})
    data = DataConfig(data_root=str(tmp_path), one_class_idx=index)
    with caplog.at_level("INFO"):
        training_images(DdpmConfig(data=data))
    (said,) = [record for record in caplog.records if record.name == "diffusion_models.training"]
    assert said.levelname == level
    if index is None:
        expected = "class 0 (abnormal), 3 images, and not 1 (normal). .* its number as --one_class"
        assert re.search(expected.replace("(", r"\(").replace(")", r"\)"), said.getMessage())
    else:
        assert said.getMessage() == "Trained on: class 1 (normal), 2 images."


def by_validation(**values: object) -> ContrastiveConfig:
    return ContrastiveConfig(select_by="val", **values)


def test_images_mixed_in_are_neither_held_out_nor_validated_on(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 10, "polyps": 6})
    data = DataConfig(data_root=str(tmp_path), one_class_idx=0)
    settings = by_validation(contamination_ratio=0.25, val_fraction=0.4)
    train, sets = training_sets(DiaConfig(data=data, contrastive=settings))
    assert train.labels.tolist() == [0] * 6 + [1] * 2
    normal, polyps = sets["normal"], sets["one_class_1"]
    assert (normal.labels.tolist(), polyps.labels.tolist()) == ([0] * 4, [1] * 4)
    assert not set(train.names) & {*normal.names, *polyps.names}


def test_nothing_is_held_out_where_nothing_can_be_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path / "plain", {"normal": 5})
    write_tree(tmp_path / "mixed", {"normal": 5, "polyps": 1})
    for name, ratio, count in (("plain", 0.0, 5), ("mixed", 0.2, 6)):
        data = DataConfig(data_root=str(tmp_path / name), one_class_idx=0)
        settings = by_validation(val_fraction=0.2, contamination_ratio=ratio)
        train, sets = training_sets(DiaConfig(data=data, contrastive=settings))
        assert (len(train), sets) == (count, None)
        assert "the training loss chooses" in caplog.messages[-1]


def test_slices_of_a_volume_are_held_out_together(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 0, "polyps": 1})
    for number in range(3):
        pages = [Image.fromarray(np.full((20, 20), 9 * n, np.uint8)) for n in range(6)]
        path = tmp_path / "train" / "normal" / f"{number}.tif"
        pages[0].save(path, save_all=True, append_images=pages[1:])
    data = DataConfig(data_root=str(tmp_path), one_class_idx=0)
    settings = by_validation(val_fraction=0.4)
    train, sets = training_sets(DiaConfig(data=data, contrastive=settings))
    files = [{name.partition("#")[0] for name in part.names} for part in (train, sets["normal"])]
    assert [len(train), len(sets["normal"]), len(files[0]), len(files[1])] == [12, 6, 2, 1]
    assert not files[0] & files[1]


def test_training_without_a_test_set_says_how(tmp_path: Path) -> None:
    write_tree(tmp_path, {"x": 3}, split="flat")
    write_tree(tmp_path / "tree", {"normal": 3})
    write_tree(tmp_path / "tree", {"normal": 1}, split="test")
    for root, reason in (
        (tmp_path / "flat" / "x", "no test/"),
        (tmp_path / "tree", "only class 0"),
    ):
        data = DataConfig(data_root=str(root), one_class_idx=0)
        with pytest.raises(DatasetError, match=rf"{reason}.*pass --select_by last"):
            training_sets(DiaConfig(data=data))
        settings = ContrastiveConfig(select_by="last")
        train, sets = training_sets(DiaConfig(data=data, contrastive=settings))
        assert (len(train), sets) == (3, None)


def test_held_out_share_that_leaves_no_pair_to_train_on_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 4, "polyps": 1})
    data = DataConfig(data_root=str(tmp_path), one_class_idx=0)
    config = DiaConfig(data=data, contrastive=by_validation(val_fraction=0.75))
    expected = "val_fraction 0.75 holds 3 of 4 .* leaves 1: .* Lower"
    with pytest.raises(DatasetError, match=expected):
        training_sets(config)


def test_normal_class_is_not_tested_against_itself(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 2, "b": 1}, "test")
    write_tree(tmp_path, {"a": 2})
    data = DataConfig(data_root=str(tmp_path), one_class_idx=0)
    config = DiaConfig(data=data, evaluation=EvaluationConfig(ood_dataset=("0",)))
    with pytest.raises(DatasetError, match="--ood_dataset 0 is the normal class itself"):
        evaluation_sets(config)


def numbered(n: int, label: int = 0) -> ImageSet:
    pixels = np.full((n, 8, 8, 3), 7, np.uint8)
    names = [f"{label}/{i}" for i in range(n)]
    return ImageSet(pixels, [label] * n, names, classes=("a", "b"), size=None)


def test_contamination_makes_the_wanted_share_and_repeats() -> None:
    mixed = contaminate(numbered(90), numbered(50, 1), 0.1)
    assert mixed.labels.tolist().count(1) == 10
    assert mixed.names == contaminate(numbered(90), numbered(50, 1), 0.1).names
    with pytest.raises(DatasetError, match="needs 90 anomalies"):
        contaminate(numbered(90), numbered(50, 1), 0.5)


def test_contamination_of_less_than_one_image_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert len(contaminate(numbered(9), numbered(5, 1), 0.05)) == 9
    assert caplog.messages == [
        "contamination_ratio 0.05 of 9 normals is less than one image: none is mixed in"
    ]


def test_processes_share_each_pass_without_overlap() -> None:
    def names(rank: int, world: int, epoch: int) -> list[str]:
        batches = epoch_batches(
            numbered(11), batch_size=2, epoch=epoch, seed=1, processes=Processes(rank, world)
        )
        return [name for batch in batches for name in batch.names]

    alone, shares = names(0, 1, 3), [names(rank, 2, 3) for rank in (0, 1)]
    assert sorted(alone) == sorted(numbered(11).names)
    assert len(shares[0]) == len(shares[1]) == 5
    assert not set(shares[0]) & set(shares[1])
    assert names(0, 1, 3) == alone != names(0, 1, 4)


def test_fewer_images_than_processes_are_refused() -> None:
    assert batches_per_epoch(11, 2, Processes(0, 2)) == 3
    with pytest.raises(RuntimeSetupError, match="2 training images cannot be shared out among 3"):
        batches_per_epoch(2, 2, Processes(0, 3))


def test_fraction_of_the_training_images_is_the_same_every_time(tmp_path: Path) -> None:
    write_tree(tmp_path, {"normal": 8})
    config = DdpmConfig(
        data=DataConfig(data_root=str(tmp_path)), diffusion=DiffusionConfig(ratio=0.5)
    )
    images = training_images(config)
    assert len(images) == 4
    assert images.names == training_images(config).names
    assert images[0].image.shape == (3, 32, 32)
    assert torch.isfinite(images[0].image).all()
