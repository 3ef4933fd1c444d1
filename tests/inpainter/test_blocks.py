import pytest
import torch
import torch.nn.functional as F

from inpainter.networks.generator import ConvBlock, clamp_output, fast_elu, he_init


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
