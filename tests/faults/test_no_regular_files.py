"""A pipe, a device, a folder or a socket in a file's place: a named error at once, and no hang."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from common.annotations import AnnotationError, read_annotations
from common.checkpoint import CheckpointError, load_tensors, save_text_atomic
from common.claims import claim
from common.cohort import MetadataError, read_metadata
from common.config import ConfigError, read_yaml
from common.files import open_regular, write_atomic
from common.images import ImageError, read_image
from common.run_log import RunLog, read_log
from inpainter.operating_point import load_operating_point
from tests.tiny_runs import (
    PREDICT,
    run_script,
    tiny_config,
    tiny_file,
    write_checkpoint,
    write_images,
)

Make = Callable[[Path], object]


def bind_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's name may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


PLACED: dict[str, Make] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": bind_socket,
    "folder": Path.mkdir,
}
WHAT = r"no regular file but a (pipe|device|socket)|Is a directory"


@pytest.fixture(params=PLACED)
def place(request, tmp_path: Path) -> Callable[[str], Path]:
    """Puts one of them at a name."""

    def put(name: str) -> Path:
        PLACED[request.param](tmp_path / name)
        return tmp_path / name

    return put


def test_it_is_neither_opened_nor_written_over(place) -> None:
    path = place("a.pt")
    before = path.lstat().st_ino
    with pytest.raises(OSError, match=WHAT) as caught:
        open_regular(path)
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match=WHAT):
        write_atomic(path, lambda file: file.write(b"x"))
    assert path.lstat().st_ino == before
    assert [entry.name for entry in path.parent.iterdir()] == ["a.pt"]


def test_what_a_killed_process_left_at_the_temporary_name_is_in_nobody_s_way(tmp_path) -> None:
    os.mkfifo(tmp_path / "a.txt.tmp")
    save_text_atomic("new", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


READERS: dict[str, tuple[str, Callable[[Path], object], type[Exception]]] = {
    "image": ("a.png", lambda path: read_image(path, 1), ImageError),
    "checkpoint": ("gen_00000001.pt", load_tensors, CheckpointError),
    "settings": ("a.yaml", read_yaml, ConfigError),
    "boxes": ("a.csv", lambda path: read_annotations(path, {"a.png": path}), AnnotationError),
    "metadata": ("a.csv", lambda path: read_metadata(path, ["a.png"]), MetadataError),
    "operating point": ("operating_point_00000001.json", load_operating_point, CheckpointError),
}


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_names_it(place, kind: str) -> None:
    name, read, error = READERS[kind]
    path = place(name)
    with pytest.raises(error, match=re.escape(name)):
        read(path)


def test_log_that_became_a_pipe_is_a_warning_and_its_lines_wait(tmp_path: Path, caplog) -> None:
    log = RunLog(tmp_path, tmp_path / "events", 0)
    log.scalars(1, {"a": 1.0})
    path = tmp_path / "log.jsonl"
    path.unlink()
    os.mkfifo(path)
    log.scalars(2, {"a": 2.0})
    assert "no regular file but a pipe" in caplog.text
    path.unlink()
    log.scalars(3, {"a": 3.0})
    assert [record["step"] for record, _ in read_log(path)] == [2, 3]


def test_claim_at_a_pipe_is_refused(place) -> None:
    with pytest.raises(OSError, match=WHAT):
        claim(place("writer.lock"))


@pytest.mark.parametrize("flag", ["--config", "--annotations", "images"])
def test_prediction_given_a_pipe_ends_at_once_with_its_name(tmp_path: Path, flag: str) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    write_images(tmp_path / "test", n=1)
    model = write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    given = [pipe] if flag == "images" else [flag, pipe]
    flags = ["--config", tiny_file(tmp_path), "--checkpoint_dir", model]
    done = run_script(PREDICT, *flags, *given)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "pipe.png" in done.stderr
