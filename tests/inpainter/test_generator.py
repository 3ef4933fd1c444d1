import dataclasses
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from inpainter.networks.critic import Critic, to_channels
from inpainter.networks.dropout import ChannelDropout, ImageDropout, active_dropout_layers
from inpainter.networks.generator import ConvBlock, Generator, clamp_output, fast_elu, he_init
from inpainter.settings import GeneratorConfig
from tests.inpainter.weights import lively_generator, random_window


def hole_mask(n: int, hw: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(n, 1, *hw)
    mask[:, :, hw[0] // 4 : hw[0] // 2, hw[1] // 4 : hw[1] // 2] = 1
    return mask


@pytest.mark.parametrize("stages", ["coarse", "coarse_fine"])
@pytest.mark.parametrize("conv_type", ["plain", "gated"])
@pytest.mark.parametrize(("channels", "hw"), [(1, (32, 48)), (3, (64, 32))])
def test_completions_have_the_images_shape_and_range(stages, conv_type, channels, hw) -> None:
    config = GeneratorConfig(input_dim=channels, ngf=4, stages=stages, conv_type=conv_type)
    generator = lively_generator(config)
    mask = hole_mask(2, hw)
    with torch.inference_mode():
        completion = generator(random_window(2, hw, channels) * (1 - mask), mask)
    for image in completion:
        assert image.shape == (2, channels, *hw)
        assert image.abs().max() <= 1
        assert image.std() > 1e-3
    assert (completion.coarse is completion.fine) == (stages == "coarse")


def test_fine_stage_sees_the_coarse_image_in_the_hole_only() -> None:
    generator = lively_generator()
    mask = hole_mask(1, (32, 32))
    seen = []
    generator.fine_generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = random_window(1, (32, 32)) * (1 - mask)
    with torch.inference_mode():
        coarse = generator(image, mask).coarse
    torch.testing.assert_close(seen[0], image + coarse * mask)


def test_attention_mask_is_the_first_samples_or_each_ones_own() -> None:
    masks = torch.cat([hole_mask(1, (64, 64)), hole_mask(1, (64, 64)).flip(2)])
    images = random_window(2, (64, 64)) * (1 - masks)
    outputs = {}
    for choice in ("first", "per_sample"):
        config = GeneratorConfig(ngf=4, attention_mask=choice)
        generator = lively_generator(config)
        with torch.inference_mode():
            together = generator(images, masks).fine
            alone = generator(images[1:], masks[1:]).fine
        outputs[choice] = (together[1:] - alone).abs().max().item()
    assert outputs["per_sample"] < 1e-4
    assert outputs["first"] > 1e-2


def test_layers_have_the_published_names() -> None:
    keys = Generator(GeneratorConfig(ngf=4)).state_dict().keys()
    assert len(keys) == 84
    assert "coarse_generator.conv10_atrous.conv.weight" in keys
    assert "fine_generator.allconv17.conv.bias" in keys


def test_published_lists_drop_in_nine_coarse_layers_only() -> None:
    config = GeneratorConfig(ngf=4)
    names = list(Generator(config).droppable_layers())
    assert len(names) == 38
    live = active_dropout_layers(config, names)
    assert len(live) == 9
    assert all(name.startswith("coarse_generator.") for name in live)
    stripped = dataclasses.replace(config, strip_self_prefix=True)
    assert len(active_dropout_layers(stripped, names)) == 32
    for which, count in (("ALL", 38), ("COARSE", 15), ("FINE", 23)):
        config = dataclasses.replace(config, dropout_which=which)
        assert len(active_dropout_layers(config, names)) == count


def test_dropped_channels_are_zero_and_kept_ones_scaled() -> None:
    keep = {"layer": torch.tensor([[True, False], [False, True]])}
    y = ChannelDropout(keep, p=0.75)("layer", torch.ones(2, 2, 1, 1))
    assert y.flatten(1).tolist() == [[4.0, 0.0], [0.0, 4.0]]
    x = torch.ones(2, 2, 1, 1)
    assert ChannelDropout(keep, p=0.75)("another", x) is x


def test_dropping_every_channel_of_a_layer_still_completes() -> None:
    generator = lively_generator()
    layers = generator.droppable_layers()
    keep = {"coarse_generator.conv3": torch.zeros(1, layers["coarse_generator.conv3"]).bool()}
    mask = hole_mask(1, (32, 32))
    with torch.inference_mode():
        completion = generator(random_window(1, (32, 32)), mask, ChannelDropout(keep, 0.5))
    assert completion.fine.isfinite().all()


def test_channels_drop_at_the_given_rate_and_longer_draws_begin_like_shorter_ones() -> None:
    layers = {"a": 64, "b": 32}
    long = ImageDropout(layers, 200, 0.25, 1, "image.png").masks([3, 4]).keep
    short = ImageDropout(layers, 7, 0.25, 1, "image.png").masks([4]).keep
    assert long["a"].shape == (2, 200, 64)
    assert abs(long["a"].float().mean() - 0.75) < 0.02
    assert all((long[name][1:, :7] == short[name]).all() for name in layers)
    assert not torch.equal(long["a"][0], long["a"][1])


@pytest.mark.parametrize("hw", [(16, 16), (32, 48), (128, 128)])
def test_critics_take_any_patch_whose_sides_are_multiples_of_16(hw) -> None:
    critic = Critic(1, 4, hw)
    x = random_window(3, hw)
    assert critic(x).shape == (3, 1)
    assert critic.features(x).shape == (3, 16, hw[0] // 16, hw[1] // 16)


def test_grey_critic_sees_colour_as_torchvisions_grey() -> None:
    x = torch.tensor([1.0, -0.5, 0.25])[None, :, None, None]
    grey = to_channels(x, 1)
    torch.testing.assert_close(grey.flatten(), torch.tensor([0.2989 - 0.5 * 0.587 + 0.25 * 0.114]))
    with pytest.raises(ValueError, match="3 channels cannot judge"):
        to_channels(grey, 3)


def test_fast_elu_equals_torchs_elu_forward_and_backward() -> None:
    x = torch.cat([torch.linspace(-30, 5, 2001), torch.tensor([0.0, -0.0, 1e-8, -1e-8])])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.linspace(-2, 2, len(x))
    (fast_elu(ours) * weights).sum().backward()
    (F.elu(theirs) * weights).sum().backward()
    torch.testing.assert_close(fast_elu(x), F.elu(x), rtol=0, atol=1e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=3e-7)


def test_fast_elu_leaves_its_input_alone() -> None:
    x = torch.tensor([-1.0, 2.0])
    fast_elu(x)
    assert x.tolist() == [-1.0, 2.0]


def test_leaky_clamp_lets_only_the_gradient_through_that_leads_back_inside() -> None:
    x = torch.tensor([-2.0, -2.0, 0.5, 2.0, 2.0], requires_grad=True)
    grad = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])  # descent goes against it
    y = clamp_output(x, "leaky")
    y.backward(grad)
    assert y.tolist() == [-1.0, -1.0, 0.5, 1.0, 1.0]
    assert x.grad.tolist() == [0.0, -1.0, 1.0, 1.0, 0.0]


def test_hard_clamp_has_no_gradient_outside() -> None:
    x = torch.tensor([-2.0, 0.5, 2.0], requires_grad=True)
    clamp_output(x, "hard").sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_gated_block_is_elu_of_the_first_half_times_sigmoid_of_the_second() -> None:
    block = ConvBlock(1, 1, 3, conv_type="gated")
    with torch.no_grad():
        block.conv.weight.zero_()
        block.conv.bias.copy_(torch.tensor([-1.0, 2.0]))
    expected = F.elu(torch.tensor(-1.0)) * torch.sigmoid(torch.tensor(2.0))
    y = block(torch.zeros(1, 1, 4, 4))
    assert y.shape == (1, 1, 4, 4)
    torch.testing.assert_close(y, expected.expand(1, 1, 4, 4))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_block_keeps_or_halves_the_resolution(stride: int, dilation: int) -> None:
    block = ConvBlock(2, 3, 3, stride=stride, dilation=dilation)
    assert block(torch.zeros(1, 2, 16, 16)).shape == (1, 3, 16 // stride, 16 // stride)


def test_he_initialisation_keeps_the_signals_scale_and_starts_the_image_small() -> None:
    torch.manual_seed(0)
    stack = torch.nn.Sequential(*[ConvBlock(16, 16) for _ in range(8)])
    last = ConvBlock(16, 1, activation="none")
    he_init(stack)
    he_init(last)
    x = torch.randn(2, 16, 32, 32)
    assert 0.3 < stack(x).std() < 3
    assert last(x).std() < 0.3


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "dilation"),
    [((96, 128), 3, 1, 1), ((128, 96), 3, 1, 4), ((3, 16), 5, 1, 1), ((16, 32), 3, 2, 1)],
)
def test_convolutions_in_training_have_the_exact_values_and_gradients(
    channels, kernel, stride, dilation
) -> None:
    torch.manual_seed(0)
    block = ConvBlock(*channels, kernel, stride=stride, dilation=dilation, activation="none")
    x = torch.randn(2, channels[0], 20, 24)
    grad = torch.randn(block.conv(x).shape)
    found, exact = (
        values_and_gradients(block, x, grad, torch.float32),
        values_and_gradients(block, x, grad, torch.float64),
    )
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-4 * b.std().item())


def values_and_gradients(block, x, grad, dtype) -> list[torch.Tensor]:
    """Output, and gradients of input, weights and bias; in float64 torch's own convolution's."""
    block, x = deepcopy(block).to(dtype), x.to(dtype, copy=True).requires_grad_()
    y = block(x)
    y.backward(grad.to(dtype))
    return [y.detach(), x.grad, block.conv.weight.grad, block.conv.bias.grad]
