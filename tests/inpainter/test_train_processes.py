"""Several processes training together, as torchrun starts them."""

import json
import os
import signal
from functools import partial

import pytest

from common.checkpoint import steps_in
from inpainter.snapshots import run_folder
from inpainter.training import train
from tests.tiny_runs import ended, forked_pair, tiny_config, wait_for_text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_signal_to_one_process_stops_all_after_the_same_step(train_folder) -> None:
    config = tiny_config(train_folder, "train.n_steps=100000")
    children = forked_pair(partial(train, config))
    log = run_folder(config) / "log.jsonl"
    wait_for_text(log, 200)
    os.kill(children[1].pid, signal.SIGTERM)
    assert [ended(child) for child in children] == [0, 0]
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert steps_in(run_folder(config), "gen")[-1] == last
