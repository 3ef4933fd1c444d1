"""Random streams: the same for the same parts, and global ones that are seeded together."""

import random

import numpy as np
import pytest
import torch

from common.random_numbers import generator_for, seed_everything, seed_from


def draws(*parts: int | str) -> list[float]:
    return torch.rand(4, generator=generator_for(*parts)).tolist()


def test_same_parts_give_the_same_stream_and_others_another():
    assert draws(1, "crop", 7) == draws(1, "crop", 7)
    others = [draws(1, "crop", 8), draws(2, "crop", 7), draws(1, "box", 7), draws(1, "crop", "7")]
    assert draws(1, "crop", 7) not in others
    assert len({tuple(other) for other in others}) == 4


def test_numpy_integers_count_as_integers():
    assert seed_from(np.int64(5), "x") == seed_from(5, "x")


def test_random_stream_is_the_same_on_every_machine():
    # a change here changes every training run: the first 8 bytes of a SHA-256, halved
    assert seed_from(1337, "crop", 0) == 2831096545931675742


def test_parts_that_are_no_counters_are_refused():
    with pytest.raises(TypeError):
        seed_from(0.5)


def test_generators_leave_the_global_stream_alone():
    seed_everything(3)
    expected = torch.rand(1)
    seed_everything(3)
    draws("anything")
    assert torch.rand(1) == expected


def test_seeding_repeats_all_three_global_streams():
    def three() -> tuple[float, ...]:
        seed_everything(2**40 + 1)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert three() == three()
