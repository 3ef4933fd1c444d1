"""What the fast engine computes once, nothing that it remembers, and torch.compile."""

import torch
from torch import Tensor

from inpainter.fast.scorer import FastScorer
from inpainter.fast.stages import FastCoarse
from inpainter.windows import centre_crop
from tests.inpainter.fast_tools import METRICS, Case, worst_error

ONE = Case((64, 64), (32, 32), N=1)
LIMIT = 1e-5


def windows_around(values: list[float]) -> Tensor:
    """A window for each value: even around a hole of noise, (N, 1, 64, 64)."""
    windows = torch.stack([torch.full((1, *ONE.window), value) for value in values])
    draws = torch.Generator().manual_seed(6)
    hole = centre_crop(windows, ONE.hole)
    hole.copy_(torch.rand(hole.shape, generator=draws) * 2 - 1)
    return windows


def new_scorer(**options) -> FastScorer:
    return FastScorer(*ONE.networks(), METRICS[:4], ONE.hole, **options)


def test_windows_scored_before_change_nothing() -> None:
    """Whether their surroundings are the same, or differ by a single pixel."""
    windows = windows_around([-1.0, -1.0, -1.0, 0.5, 0.5, -1.0])
    windows[4, 0, 63, 63] += 1e-6
    masks = ONE.masks(ONE.networks()[0])
    together = new_scorer(thin=True)
    found = [together(windows[i : i + 1], masks) for i in range(len(windows))]
    for i, scores in enumerate(found):
        alone = new_scorer(thin=True)(windows[i : i + 1], masks)
        assert all(torch.equal(scores[metric], alone[metric]) for metric in alone)
    assert len({float(scores["MCD_image"]) for scores in found}) == len(windows)


def test_coarse_layers_run_once_for_all_completions_where_only_fine_layers_drop(
    monkeypatch,
) -> None:
    calls = []
    complete = FastCoarse.complete
    monkeypatch.setattr(FastCoarse, "complete", lambda *a: calls.append(1) or complete(*a))
    case = Case((64, 64), (32, 32), N=1, M=3, settings=(("dropout_which", "FINE"),))
    networks = case.networks()
    FastScorer(*networks, METRICS[:4], case.hole)(case.windows(), case.masks(networks[0]))
    assert len(calls) == 1


def test_compiled_attention_gives_the_same_scores(monkeypatch) -> None:
    graphs, real = [], torch.compile

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    assert worst_error(*ONE.scores(compiled=True)) < LIMIT
    assert graphs
