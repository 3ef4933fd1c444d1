"""What the fast engine computes once for several windows, and torch.compile."""

import pytest
import torch
from torch import Tensor

from inpainter.fast.scorer import FastScorer
from inpainter.fast.stages import FastCoarse
from inpainter.windows import centre_crop
from tests.inpainter.fast_tools import METRICS, Case, worst_error

ONE = Case((64, 64), (32, 32), N=1)
LIMIT = 1e-5


@pytest.fixture
def encoded(monkeypatch) -> list[Tensor]:
    """The masked windows whose surroundings were encoded so far."""
    seen = []
    encode = FastCoarse.prefix

    def prefix(self, known, live):
        seen.append(known.clone())
        return encode(self, known, live)

    monkeypatch.setattr(FastCoarse, "prefix", prefix)
    return seen


def windows_around(values: list[float]) -> Tensor:
    """A window for each value: even around a hole of noise, (N, 1, 64, 64)."""
    windows = torch.stack([torch.full((1, *ONE.window), value) for value in values])
    draws = torch.Generator().manual_seed(6)
    hole = centre_crop(windows, ONE.hole)
    hole.copy_(torch.rand(hole.shape, generator=draws) * 2 - 1)
    return windows


def new_scorer(**options) -> FastScorer:
    return FastScorer(*ONE.networks(), METRICS[:4], ONE.hole, **options)


def test_equal_surroundings_in_a_row_are_encoded_once_with_the_same_scores(encoded) -> None:
    windows = windows_around([-1.0, -1.0, -1.0, 0.5, 0.5, -1.0])
    masks = ONE.masks(ONE.networks()[0])
    together = new_scorer(thin=True)
    found = [together(windows[i : i + 1], masks) for i in range(len(windows))]
    assert [float(known[0, 0, 0, 0]) for known in encoded] == [-1.0, 0.5, -1.0]
    for i, scores in enumerate(found):
        alone = new_scorer(thin=True)(windows[i : i + 1], masks)
        assert all(torch.equal(scores[metric], alone[metric]) for metric in alone)
    assert len({float(scores["MCD_image"]) for scores in found}) == len(windows)


def test_a_single_pixel_makes_surroundings_differ(encoded) -> None:
    windows = windows_around([0.25, 0.25])
    windows[1, 0, 63, 63] += 1e-6
    scorer, masks = new_scorer(), ONE.masks(ONE.networks()[0])
    for i in range(2):
        scorer(windows[i : i + 1], masks)
    assert len(encoded) == 2


def test_compiled_attention_gives_the_same_scores(monkeypatch) -> None:
    graphs, real = [], torch.compile

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    assert worst_error(*ONE.scores(compiled=True)) < LIMIT
    assert graphs
