import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpainter.networks.convolution import suits, trained_convolution
from inpainter.networks.critic import Critic
from inpainter.step import gradient_penalty

pytestmark = pytest.mark.usefixtures("one_thread")


def with_gradients(y: Tensor, *variables: Tensor) -> list[Tensor]:
    """y, and what its inner product with fixed numbers gives as gradients."""
    fixed = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, variables, fixed)]


@pytest.mark.parametrize(
    ("channels", "size", "stride", "dilation", "enlarge"),
    [
        ((3, 5), 5, 1, 1, False),
        ((4, 6), 3, 2, 1, False),
        ((96, 96), 3, 1, 1, False),  # filtered, both ways
        ((64, 64), 3, 1, 4, False),  # the weights' gradient is filtered
        ((3, 5), 3, 1, 1, True),
        ((96, 24), 3, 1, 1, True),
    ],
)
def test_a_trained_convolution_is_torchs_with_its_gradients(
    channels: tuple[int, int], size: int, stride: int, dilation: int, enlarge: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, size, stride, dilation * (size // 2), dilation)
    x = torch.randn(2, channels[0], 24, 16, requires_grad=True)
    assert suits(x, conv.weight)
    found = with_gradients(trained_convolution(x, conv, enlarge=enlarge), x, conv.weight, conv.bias)
    exact, double = nn.Conv2d(*channels, size, stride, dilation * (size // 2), dilation), x.double()
    exact.load_state_dict(conv.state_dict())
    exact.double()
    large = F.interpolate(double, scale_factor=2, mode="nearest") if enlarge else double
    expected = with_gradients(exact(large), double, exact.weight, exact.bias)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4 * float(theirs.std()))


def test_other_types_and_frozen_weights_go_torchs_way() -> None:
    x, weight = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3, requires_grad=True)
    assert suits(x, weight)
    assert not suits(x, weight.detach())
    assert not suits(x.double(), weight)
    with torch.no_grad():
        assert not suits(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(x, weight)


def test_the_penalty_of_a_critic_has_the_gradients_of_leaky_relu() -> None:
    torch.manual_seed(0)
    critic = Critic(1, 4, (32, 32)).double()
    real, fake = torch.randn(2, 3, 1, 32, 32, dtype=torch.float64)
    alpha = torch.tensor([0.2, 0.5, 0.9])

    def by_torch(x: Tensor) -> Tensor:
        for block in critic.dis_conv_module.children():
            x = F.leaky_relu(block.conv(x), 0.2)
        return critic.linear(x.flatten(1))

    weights = [p for name, p in critic.named_parameters() if name.endswith("weight")]
    found, expected = (
        torch.autograd.grad(gradient_penalty(judge, real, fake, alpha), weights)
        for judge in (critic, by_torch)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
