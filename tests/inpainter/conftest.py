"""Folders that a prediction or a training starts from."""

from pathlib import Path

import pytest

from tests.tiny_runs import tiny_config, write_checkpoint, write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in `test` and a checkpoint in `model`."""
    write_images(tmp_path / "test", size=(48, 64))
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    return tmp_path


@pytest.fixture
def train_folder(tmp_path: Path) -> Path:
    """Three images in `train`."""
    write_images(tmp_path / "train")
    return tmp_path
