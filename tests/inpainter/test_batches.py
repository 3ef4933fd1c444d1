"""Batches of training crops: resumed, shared between processes, read ahead by workers."""

import logging
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from common.devices import RuntimeSetupError
from common.images import ImageError, write_image
from common.stopping import StopRequest
from inpainter.data import CropRule, NormalCrops, crop_batches
from tests.tiny_runs import ended, forked, wait_until

SHAPE = (16, 16, 1)


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """Five grey images of 24 x 30 pixels."""
    for number in range(5):
        write_image(tmp_path / f"{number}.png", 0.1 + 0.9 * torch.rand(24, 30))
    return sorted(tmp_path.iterdir())


def patches(paths: list[Path], **changes: object) -> NormalCrops:
    """Crops by the settings' names: those of CropRule, image_shape, and NormalCrops' own."""
    height, width, channels = changes.pop("image_shape", SHAPE)
    of_rule = {name: changes.pop(name) for name in CropRule.__annotations__ if name in changes}
    rule = CropRule((height, width), **of_rule)
    return NormalCrops(paths, rule, **{"channels": channels, "seed": 7} | changes)


@pytest.fixture
def mixed(paths) -> list[Path]:
    """A good image, one that is corrupt and one that is black."""
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    write_image(paths[2], torch.zeros(24, 30))
    return paths[:3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_batches_equal_the_uninterrupted_ones(paths, num_workers):
    whole = list(crop_batches(patches(paths), 4, 0, 6, 0))
    resumed = list(crop_batches(patches(paths), 4, 2, 6, num_workers))
    assert len(whole) == 6
    assert len(resumed) == 4
    for expected, batch in zip(whole[2:], resumed, strict=True):
        assert torch.equal(batch, expected)
    assert torch.equal(whole[1], patches(paths).crops([4, 5, 6, 7]))


def test_processes_share_each_batch(paths):
    (whole,) = crop_batches(patches(paths), 6, 3, 4, 0)
    shares = [
        next(crop_batches(patches(paths), 6, 3, 4, 0, rank=r, world_size=3)) for r in range(3)
    ]
    assert torch.equal(torch.cat(shares), whole)


def test_batch_that_cannot_be_shared_is_refused_with_one_that_can(paths):
    with pytest.raises(RuntimeSetupError, match=r"train.batch_size 55 .* 2 processes.* example 54"):
        next(crop_batches(patches(paths), 55, 0, 1, 0, world_size=2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_the_global_random_stream_alone(paths, num_workers):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert len(list(crop_batches(patches(paths, flip=True), 4, 0, 2, num_workers))) == 2
    assert torch.rand(1) == expected


def test_images_skipped_in_workers_are_reported_here_once(mixed, caplog):
    dataset = patches(mixed)
    with caplog.at_level(logging.WARNING):
        assert len(list(crop_batches(dataset, 8, 0, 6, 2))) == 6
    assert set(dataset.skipped) == {mixed[1], mixed[2]}
    assert len(caplog.records) == 2


def test_error_in_a_worker_keeps_its_type_and_message(mixed):
    dataset = patches(mixed[1:], on_bad_image="error")
    with pytest.raises(ImageError, match=r"^(Cannot read|.*the whole image is black)"):
        next(crop_batches(dataset, 2, 0, 1, 1))


def read_until_stopped(folder: Path, image: Path) -> None:
    """Reads batches ahead by a worker; says in `folder` when it reads and when it has saved."""
    os.setsid()
    errors = os.open(folder / "errors.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, sys.stderr.fileno())
    crops = NormalCrops([image], CropRule((16, 16)), channels=1, seed=1)
    with StopRequest() as stop:
        for number, _ in enumerate(crop_batches(crops, 4, 0, 100_000, 1)):
            if number == 1:
                (folder / "reading").touch()
            if stop.requested:
                break
            time.sleep(0.01)
    (folder / "saved").touch()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_group_leaves_time_to_save(paths, tmp_path, number):
    child = forked(partial(read_until_stopped, tmp_path, paths[0]))
    wait_until((tmp_path / "reading").exists)
    os.killpg(child.pid, number)
    assert ended(child) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "errors.txt").read_text() == ""
