"""Folders that a training or a prediction starts from."""

from pathlib import Path

import pytest

from tests.tiny_runs import tiny_config, write_checkpoint, write_images


@pytest.fixture
def train_folder(tmp_path: Path) -> Path:
    """A folder with three images in `train`."""
    write_images(tmp_path / "train")
    return tmp_path


@pytest.fixture
def scan_folder(tmp_path: Path) -> Path:
    """A folder with three images of 48 x 64 pixels in `test` and a checkpoint in `model`."""
    write_images(tmp_path / "test", size=(48, 64))
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    return tmp_path
