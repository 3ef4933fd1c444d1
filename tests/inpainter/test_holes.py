"""The critics' steps: holes filled on the short way are those that the generator fills."""

import dataclasses

import pytest
import torch

from inpainter.fast.holes import HoleCompleter
from inpainter.masks import masks_from_deltas
from inpainter.networks.dropout import ChannelDropout, ElementDropout, split_by_layer
from inpainter.networks.generator import Generator, he_init
from inpainter.settings import GeneratorConfig
from tests.inpainter.weights import random_window

pytestmark = pytest.mark.usefixtures("one_thread")

BOXES = torch.tensor([[0, 24, 32, 32], [29, 3, 32, 32]])
"""One at the border, one at odd places."""
SETTINGS = {
    "published": GeneratorConfig(ngf=32),
    "ours": GeneratorConfig(
        ngf=8, conv_type="gated", elu="fast", output_clamp="leaky", attention_mask="per_sample"
    ),
    "coarse": GeneratorConfig(ngf=8, stages="coarse"),
}


def fresh(config: GeneratorConfig) -> Generator:
    torch.manual_seed(0)
    generator = Generator(config)
    he_init(generator)
    return generator


def holes() -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops of 64² with their holes empty, and the holes."""
    mask = masks_from_deltas(BOXES, torch.tensor([[1, 2], [0, 3]]), (64, 64))
    return random_window(2, (64, 64)) * (1 - mask), mask


@torch.no_grad()
def assert_filled_alike(
    generator: Generator, completer: HoleCompleter, drop=None, atol=2e-5
) -> None:
    known, mask = holes()
    first = mask[:1] if generator.attention_mask == "first" else None
    expected = generator(known, mask, drop, first).fine * mask + known
    torch.testing.assert_close(completer(known, mask, drop, first), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_holes_are_filled_as_the_generator_fills_them(config: GeneratorConfig) -> None:
    generator = fresh(config)
    completer = HoleCompleter(generator)
    assert_filled_alike(generator, completer)
    layers = generator.droppable_layers()
    keep = torch.rand(2, sum(layers.values())) > 0.3
    drop = ChannelDropout(split_by_layer(keep, layers), 0.3)
    assert_filled_alike(generator, completer, drop, atol=5e-4)  # activations are larger


def test_new_weights_are_used_after_forgetting() -> None:
    generator = fresh(SETTINGS["ours"])
    completer = HoleCompleter(generator)
    assert_filled_alike(generator, completer)
    optimiser = torch.optim.Adam(generator.parameters(), lr=0.01, fused=True)
    known, mask = holes()
    generator(known, mask).fine.square().mean().backward()
    optimiser.step()
    completer.forget()
    assert_filled_alike(generator, completer)


def test_small_crops_element_dropout_and_other_types_go_the_long_way() -> None:
    completer = HoleCompleter(fresh(dataclasses.replace(SETTINGS["coarse"], ngf=2)))
    large = torch.zeros(1, 1, 128, 128)
    assert completer.suits(large, None)
    assert not completer.suits(large[:, :, :64], None)
    assert not completer.suits(large.double(), None)
    assert not completer.suits(large, ElementDropout([], 0.5, []))
