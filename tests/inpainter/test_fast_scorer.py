"""The fast engine gives the plain engine's scores, to 1e-5 of their value."""

import dataclasses

import pytest
import torch

from inpainter.completion import DETAIL, WindowScorer, detail_of
from inpainter.fast import winograd
from inpainter.fast.scorer import FastScorer
from inpainter.networks.dropout import ChannelMasks, ImageDropout
from inpainter.windows import centre_crop
from tests.inpainter.fast_tools import METRICS, Case, worst_error

LIMIT = 1e-5
PUBLISHED = Case((128, 128), (64, 64))


def net(**settings) -> tuple[tuple[str, object], ...]:
    return tuple(settings.items())


GATED = net(conv_type="gated", elu="fast")
CASES = {
    "hole of half the window": PUBLISHED,
    "one window": Case((128, 128), (64, 64), N=1),
    "attention around a small hole, nothing touches the border": Case((256, 192), (48, 64), N=1),
    "sides that differ": Case((64, 96), (48, 16)),
    "hole as large as the window": Case((64, 64), (64, 64)),
    "hole of one window row less": Case((64, 64), (48, 64)),
    "smallest": Case((32, 32), (16, 16), N=3),
    "smallest, large batch": Case((32, 32), (16, 16), N=32),
    "colour, critic sees grey": Case((64, 64), (32, 32), channels=3),
    "colour, critic sees colour": Case((64, 64), (32, 32), channels=3, critic_channels=3),
    "gated": Case((96, 96), (32, 32), gain=1.9, settings=GATED),
    "gated, all": Case((96, 96), (32, 32), gain=1.7, settings=(*GATED, ("dropout_which", "ALL"))),
    "coarse only": Case((96, 96), (32, 32), settings=net(stages="coarse")),
    "coarse only, gated": Case(
        (96, 96), (32, 32), gain=1.9, settings=(*GATED, ("stages", "coarse"))
    ),
    "other dilations": Case((96, 96), (32, 32), settings=net(dilations=(1, 3, 5, 7))),
    "all layers drop": Case((128, 128), (32, 32), settings=net(dropout_which="ALL")),
    "coarse layers drop": Case((96, 96), (32, 32), settings=net(dropout_which="COARSE")),
    "fine layers drop": Case((128, 128), (32, 32), settings=net(dropout_which="FINE")),
    "entries without self": Case((96, 96), (32, 32), settings=net(strip_self_prefix=True)),
    "one late fine layer drops": Case(
        (96, 96),
        (32, 32),
        settings=net(custom_drop_layers_coarse=(), custom_drop_layers_fine=("allconv14",)),
    ),
    "attention's features drop": Case(
        (96, 96),
        (32, 32),
        settings=net(custom_drop_layers_fine=("pmconv6", "fine_generator.conv8")),
    ),
    "nothing drops": Case((96, 96), (32, 32), p=0.0),
    "nearly everything drops": Case((96, 96), (32, 32), p=0.9, settings=net(dropout_which="ALL")),
    "a mask for each sample": Case((64, 64), (32, 32), settings=net(attention_mask="per_sample")),
}


@pytest.mark.parametrize("thin", [False, True], ids=["multiplied", "thinned"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fast_scores_are_the_plain_ones(case: Case, thin: bool) -> None:
    assert worst_error(*case.scores(thin=thin)) < LIMIT


@pytest.mark.parametrize("thin", [False, True], ids=["multiplied", "thinned"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_rounding_the_scores_are_equal_whatever_the_weights(case: Case, thin: bool) -> None:
    """He x 1.3, which amplifies rounding up to a millionfold (gated): float64 can spare that."""
    plain, fast = dataclasses.replace(case, gain=0).exact_scores(thin=thin)
    assert worst_error(plain, fast) < 1e-8


@pytest.mark.parametrize("settings", [(), GATED], ids=["plain", "gated"])
def test_by_he_times_1_3_it_is_as_near_to_exact_as_the_plain_engine(settings) -> None:
    case = Case((64, 64), (32, 32), N=16, gain=0, settings=settings)
    exact, _ = case.exact_scores()
    plain, fast = (typical_error(exact, scores) for scores in case.scores())
    assert fast < 4 * plain


def typical_error(exact: dict, scores: dict) -> float:
    return float(torch.cat([(scores[k] - v).abs() / v for k, v in exact.items()]).median())


@pytest.mark.parametrize("thin", [False, True], ids=["multiplied", "thinned"])
@pytest.mark.parametrize("layer", ["coarse_generator.conv5", "fine_generator.pmconv6"])
def test_a_layer_may_drop_every_channel(layer: str, thin: bool) -> None:
    case = Case((96, 96), (32, 32), settings=net(dropout_which="ALL"))
    masks = case.masks(case.networks()[0])
    none = torch.zeros_like(masks.keep[layer])
    masks = ChannelMasks({**masks.keep, layer: none}, case.p)
    assert worst_error(*case.scores(masks, thin=thin)) < LIMIT


def test_completions_are_the_plain_ones_pixel_by_pixel() -> None:
    generator, critic = PUBLISHED.networks()
    parts = (generator, critic, METRICS, PUBLISHED.hole)
    masks = PUBLISHED.masks(generator)
    with torch.inference_mode():
        fast = list(FastScorer(*parts).completions(PUBLISHED.windows(), masks))
        plain = list(WindowScorer(*parts).completions(PUBLISHED.windows(), masks))
    assert len(fast) == PUBLISHED.M
    assert torch.stack(plain).std() > 0.05
    torch.testing.assert_close(torch.stack(fast), torch.stack(plain), rtol=0, atol=1e-4)


def test_a_detail_is_the_mean_squared_difference_by_its_sign() -> None:
    truth = torch.zeros(3, 2, 16, 16)
    completion = truth.clone()
    completion[0, 0, :2, :2] = 3.0  # the first of 8 x 8 cells, in one of two channels
    completion[1] = -0.1
    detail = detail_of(truth, completion)
    assert detail.shape == (3, 2, 8, 8)
    assert detail[0, 1, 0, 0] == 4.5  # darker than the completion
    assert detail[0].sum() == 4.5
    torch.testing.assert_close(detail[1, 0], torch.full((8, 8), 0.01))
    assert detail[1, 1].sum() == detail[2].sum() == 0


@pytest.mark.parametrize("thin", [False, True], ids=["multiplied", "thinned"])
def test_details_are_the_plain_ones_of_the_mean_completion(thin: bool) -> None:
    generator, critic = PUBLISHED.networks()
    parts = (generator, critic, METRICS, PUBLISHED.hole)
    masks, windows = PUBLISHED.masks(generator), PUBLISHED.windows()
    fast = FastScorer(*parts, thin=thin)(windows, masks, more=[DETAIL])[DETAIL]
    plain = WindowScorer(*parts)
    with torch.inference_mode():
        mean = torch.stack([*plain.completions(windows, masks)]).mean(dim=0)
    torch.testing.assert_close(
        plain(windows, masks, more=[DETAIL])[DETAIL], fast, rtol=1e-3, atol=1e-3
    )
    expected = detail_of(centre_crop(windows, PUBLISHED.hole), mean)
    torch.testing.assert_close(fast, expected, rtol=1e-3, atol=1e-3)
    assert fast.std() > 0.1


@pytest.mark.parametrize("thin", [False, True], ids=["multiplied", "thinned"])
def test_score_of_a_window_does_not_depend_on_the_batch(thin: bool) -> None:
    case = Case((64, 64), (32, 32), N=32)
    generator, critic = case.networks()
    masks = case.masks(generator)
    scorer = FastScorer(generator, critic, METRICS, case.hole, thin=thin)
    together = scorer(case.windows(), masks)
    alone = scorer(case.windows()[30:31], masks.of_window(30))
    assert worst_error({k: v[30:31] for k, v in together.items()}, alone) < LIMIT


def test_masks_that_all_windows_share_are_thinned_for_the_batch() -> None:
    case = Case((64, 64), (32, 32), N=3)
    masks = case.masks(case.networks()[0])
    keep = {name: kept[:1].expand(3, -1, -1) for name, kept in masks.keep.items()}
    assert worst_error(*case.scores(ChannelMasks(keep, case.p, same=True))) < LIMIT


def test_dropout_of_single_elements_takes_the_plain_path() -> None:
    case = Case((64, 64), (32, 32))
    layers = {"coarse_generator.conv5": 16}
    dropout = ImageDropout(layers, case.M, 0.5, 3, "image.png", elementwise=True)
    assert worst_error(*case.scores(dropout.masks(range(case.N)))) < LIMIT


def test_without_dropout_there_is_one_completion() -> None:
    generator, critic = PUBLISHED.networks()
    scorer = FastScorer(generator, critic, METRICS, PUBLISHED.hole)
    with torch.inference_mode():
        assert len(list(scorer.completions(PUBLISHED.windows(), None))) == 1


def test_bf16_scores_are_near_and_rank_the_same() -> None:
    case = Case((64, 64), (32, 32), N=8, M=3)
    plain, fast = case.scores(precision="bf16")
    assert worst_error(plain, fast) < 0.05
    assert worst_error(plain, fast) > 0


@pytest.mark.parametrize("wanted", [False, True], ids=["direct", "minimal filtering"])
def test_wide_layers_are_filtered_with_fewer_products_if_wanted(monkeypatch, wanted) -> None:
    tilings, filtered = [], winograd.winograd

    def counted(*arguments):
        tilings.append(arguments[7])
        return filtered(*arguments)

    monkeypatch.setattr("inpainter.fast.layers.winograd", counted)
    case = Case((64, 64), (32, 32), N=1, ngf=32)
    assert worst_error(*case.scores(minimal_filtering=wanted)) < LIMIT
    assert bool(tilings) == wanted


@pytest.mark.parametrize("instructions", ["AVX512", "AVX2"])
def test_scores_are_the_plain_ones_by_any_processors_tilings(monkeypatch, instructions) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    case = Case((64, 64), (32, 32), N=1, ngf=32)
    assert worst_error(*case.scores()) < LIMIT


def test_windows_scored_side_by_side_keep_their_order() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        case = Case((64, 64), (32, 32), N=5)
        assert worst_error(*case.scores(thin=True)) < LIMIT
    finally:
        torch.set_num_threads(before)
