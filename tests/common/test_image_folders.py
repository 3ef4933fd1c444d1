"""Listing: which files of a folder are images, and that nothing else is passed over in silence."""

import logging
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.image_files import IMAGE_SUFFIXES, ImageError
from common.image_folders import find_images, list_images, shown, subfolder_names
from tests.tiny_runs import (
    PREDICT,
    run_script,
    tiny_config,
    tiny_file,
    write_checkpoint,
    write_images,
)

FULL = b"not empty"


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FULL)


def listed(folder: Path, recursive: bool) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in list_images(folder, recursive)]


def passed_over(folder: Path, recursive: bool = True) -> dict[str, list[str]]:
    return {
        kind: [path.relative_to(folder).as_posix() for path in paths]
        for kind, paths in find_images(folder, recursive).passed_over.items()
    }


def test_images_are_listed_sorted_and_without_other_or_hidden_files(tmp_path):
    write_files(tmp_path, "b.PNG", "a.jpg", ".hidden.png", "notes.txt", "sub/c.tif", "sub/x/d.dcm")
    (tmp_path / "folder.png").mkdir()
    assert listed(tmp_path, False) == ["a.jpg", "b.PNG"]
    assert listed(tmp_path, True) == ["a.jpg", "b.PNG", "sub/c.tif", "sub/x/d.dcm"]


def test_every_file_that_is_no_image_is_put_down_by_its_kind(tmp_path):
    write_files(tmp_path, "a.png", "notes.txt", ".hidden.png", "b.png.tmp", "c.tif~")
    write_files(tmp_path, "Thumbs.db", ".DS_Store", "._a.png", "desktop.ini", "DICOMDIR")
    (tmp_path / "empty.png").touch()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s.png"))
    assert passed_over(tmp_path) == {
        "made by the system": [".DS_Store", "._a.png", "DICOMDIR", "Thumbs.db", "desktop.ini"],
        "hidden": [".hidden.png"],
        "temporary or safety copy": ["b.png.tmp", "c.tif~"],
        "no regular file": ["device.png", "pipe.png", "s.png"],
        "empty": ["empty.png"],
        "broken link": ["lost.png", "round.png"],
        "unknown kind": ["notes.txt"],
    }
    assert listed(tmp_path, True) == ["a.png"]


def test_file_without_an_image_suffix_is_an_image_by_its_first_bytes(tmp_path):
    grey = Image.fromarray(np.zeros((4, 4), np.uint8))
    grey.save(tmp_path / "a.jfif", format="JPEG")
    grey.save(tmp_path / "1.2.840.7", format="PNG")
    (tmp_path / "IM000001").write_bytes(bytes(128) + b"DICM" + bytes(60))
    write_files(tmp_path, "IM000002")
    assert listed(tmp_path, False) == ["1.2.840.7", "IM000001", "a.jfif"]
    assert passed_over(tmp_path) == {"unknown kind": ["IM000002"]}


@pytest.mark.parametrize(
    "name",
    [
        *(".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN", "System Volume Information"),
        *("__MACOSX", "lost+found", ".Trash-1000"),
    ],
)
def test_hidden_and_system_folders_are_not_searched_but_named_where_they_hold_files(tmp_path, name):
    write_files(tmp_path, "a.png", f"{name}/b.png")
    assert listed(tmp_path, True) == ["a.png"]
    assert passed_over(tmp_path) == {"hidden or system folder": [name]}
    assert subfolder_names(tmp_path) == []
    (tmp_path / name / "b.png").unlink()
    assert passed_over(tmp_path) == {}


def test_subfolders_that_are_not_searched_are_named(tmp_path):
    write_files(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "nothing").mkdir()
    assert passed_over(tmp_path, recursive=False) == {"subfolder not searched": ["sub"]}


def test_summary_counts_files_and_names_a_few(tmp_path, caplog):
    write_files(tmp_path, "a.png", *[f"{i}.txt" for i in range(5)], ".git/config")
    (tmp_path / "x.png").symlink_to("nowhere")
    list_images(tmp_path, True)
    list_images(tmp_path, True)
    expected = (
        f"{tmp_path}: 6 files and 1 folder passed over: 1 hidden or system folder (.git), "
        "5 unknown kind (0.txt, 1.txt, 2.txt and 2 more), 1 broken link (x.png)"
    )
    assert caplog.messages == [expected]
    assert caplog.records[0].levelno == logging.WARNING


def test_files_of_the_system_alone_are_no_warning(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_files(tmp_path, "a.png", ".DS_Store")
    list_images(tmp_path, False)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "1 made by the system (.DS_Store)" in caplog.text


def test_names_that_cannot_be_printed_are_shown_with_escapes(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(FULL)
    assert find_images(tmp_path, True).summary().endswith(r"1 unknown kind (caf\udce9.txt)")
    assert shown("a\nb") == r"a\nb"
    assert len(shown("x" * 10_000)) == 1001


def test_damaged_images_are_refused_where_bad_images_are_errors(tmp_path):
    write_files(tmp_path, "a.png")
    (tmp_path / "b.png").touch()
    (tmp_path / "notes.txt").touch()
    assert listed(tmp_path, False) == ["a.png"]
    with pytest.raises(ImageError, match=r"1 of its images cannot be read.*: b\.png\. Replace"):
        list_images(tmp_path, False, on_bad="error")


def test_linked_folders_are_followed_once(tmp_path):
    write_files(tmp_path / "real", "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "data")
    assert list_images(tmp_path / "data", True) == [tmp_path / "data" / "linked" / "a.png"]


def test_missing_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match=r"no_such does not exist\. Absolute path: /"):
        list_images(tmp_path / "no_such", False)
    with pytest.raises(ImageError, match="is a file, not a folder"):
        list_images(tmp_path / "file", False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_folder_that_may_not_be_read_is_refused_by_name(tmp_path):
    write_files(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "sub").chmod(0)
    try:
        with pytest.raises(ImageError, match=r"sub cannot be read: Permission denied"):
            list_images(tmp_path, True)
    finally:
        (tmp_path / "sub").chmod(0o700)


def test_folder_without_images_is_refused_with_what_counts_and_what_is_there(tmp_path):
    write_files(tmp_path, "notes.txt")
    suffixes = ", ".join(IMAGE_SUFFIXES)
    expected = rf"No image in {tmp_path}\. .* end in {suffixes}\. .*1 unknown kind \(notes\.txt\)"
    with pytest.raises(ImageError, match=expected):
        list_images(tmp_path, True)


def test_folder_with_images_only_in_subfolders_says_so_with_the_callers_remedy(tmp_path):
    write_files(tmp_path, "sub/a.png")
    with pytest.raises(ImageError, match="Its subfolders have some: pass one of those"):
        list_images(tmp_path, False)
    with pytest.raises(ImageError, match="Its subfolders have some: say so"):
        list_images(tmp_path, False, remedy="say so")


@pytest.mark.usefixtures("one_thread")
def test_prediction_names_what_it_passes_over_and_does_not_wait_for_a_pipe(tmp_path):
    write_images(tmp_path / "test", n=1)
    write_files(tmp_path / "test", "notes.txt")
    os.mkfifo(tmp_path / "test" / "x.png")
    config = tiny_config(tmp_path, "data_with_subfolder=true")
    done = run_script(
        PREDICT, "--config", tiny_file(tmp_path, "data_with_subfolder=true"),
        "--checkpoint_dir", write_checkpoint(tmp_path / "model", config),
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 files passed over: 1 unknown kind (notes.txt), 1 no regular file" in done.stderr
    assert "1 images scored" in done.stdout
