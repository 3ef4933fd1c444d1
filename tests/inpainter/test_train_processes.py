"""Several processes training together, as torchrun starts them."""

import json
import os
import signal
from functools import partial

import pytest
import torch

from common.checkpoint import load_tensors, steps_in
from inpainter.snapshots import run_folder
from inpainter.training import train
from tests.tiny_runs import ended, forked_pair, tiny_config, wait_for_text

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = (
    "train.n_critic=1",
    "train.batch_size=4",
    "train.channels_last=true",
    "train.mask_batch_same=false",
    "train.grad_clip_norm=0.1",
    "netG.attention_mask=per_sample",
)


def test_two_processes_train_the_same_weights_as_one(train_folder) -> None:
    together = tiny_config(train_folder, "train.n_steps=2", *OPTIONS)
    alone = tiny_config(train_folder, "train.n_steps=2", "expname=alone", *OPTIONS)
    statuses = [ended(child) for child in forked_pair(partial(train, together))]
    assert statuses == [0, 0]
    train(alone)
    for role in ("gen", "dis"):
        both, one = (
            load_tensors(run_folder(config) / f"{role}_00000002.pt") for config in (together, alone)
        )
        torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_step(train_folder) -> None:
    config = tiny_config(train_folder, "train.n_steps=100000", *OPTIONS)
    children = forked_pair(partial(train, config))
    log = run_folder(config) / "log.jsonl"
    wait_for_text(log, 200)
    os.kill(children[1].pid, signal.SIGTERM)
    assert [ended(child) for child in children] == [0, 0]
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert steps_in(run_folder(config), "gen")[-1] == last
