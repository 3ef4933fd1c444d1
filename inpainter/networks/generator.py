"""The inpainting generator: a coarse stage, then a fine stage with contextual attention.

After Yu et al. 2018 (arXiv 1801.07892) as PICARD uses it. N samples, C image channels, n width.
Images are in [-1, 1]; mask 1 = hole. The layers' names and weights are those of the published code.
"""

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.devices import upcast_to_fp32
from inpainter.networks.attention import contextual_attention
from inpainter.networks.convolution import suits, trained_convolution
from inpainter.networks.dropout import Drop
from inpainter.settings import GeneratorConfig

Activation = Literal["elu", "fast_elu", "relu", "none"]
ConvType = Literal["plain", "gated"]
Clamp = Literal["hard", "leaky"]


class _FastElu(torch.autograd.Function):
    """ELU as max(x, exp(min(x, 0)) - 1); torch's CPU kernel calls expm1, which is slower."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = torch.maximum(x, x.clamp(max=0).exp_().sub_(1))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.clamp(max=0).add_(1).mul_(grad)  # dy/dx = y + 1 where x < 0, else 1


def fast_elu(x: Tensor) -> Tensor:
    """ELU with alpha 1, within 1e-7 of `torch.nn.functional.elu`, and its gradient.

    x: any shape, returns the same shape in (-1, inf).
    """
    return _FastElu.apply(x)


class _LeakyClamp(torch.autograd.Function):
    """Clamp to [-1, 1] whose gradient also passes where following it leads back inside."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        leads_out = ((x > 1) & (grad < 0)) | ((x < -1) & (grad > 0))
        return grad.masked_fill(leads_out, 0)


def clamp_output(x: Tensor, clamp: Clamp) -> Tensor:
    """Clamps to [-1, 1]; see `netG.output_clamp` for what happens to the gradient outside."""
    return _LeakyClamp.apply(x) if clamp == "leaky" else x.clamp(-1, 1)


def activate(x: Tensor, activation: Activation, *, in_place: bool = False) -> Tensor:
    match activation:
        case "elu":
            return F.elu(x, inplace=in_place)
        case "fast_elu":
            return fast_elu(x)
        case "relu":
            return torch.relu(x)
        case "none":
            return x


class ConvBlock(nn.Module):
    """Convolution, then activation; gated: one convolution of twice the width, ELU(a) * sigmoid(b).

    Gating after Yu et al. 2019 (arXiv 1806.03589, section 3.1); the first half of the convolution's
    outputs are the features. The weights are `conv.weight` and `conv.bias`, as published.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: Activation = "elu",
        conv_type: ConvType = "plain",
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gated = conv_type == "gated"
        self.out_channels = out_channels
        self.conv = nn.Conv2d(
            in_channels,
            out_channels * (2 if self.gated else 1),
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
        )

    def forward(self, x: Tensor, *, enlarge: bool = False) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride); enlarge: nearest ×2 before it."""
        return self.activated(self.convolve(x, enlarge=enlarge))

    def activated(self, y: Tensor) -> Tensor:
        """What the layer makes of its convolution's result: (N, out or, gated, 2 out, h, w)."""
        if not self.gated:
            return activate(y, self.activation, in_place=True)
        features, gate = y.chunk(2, dim=1)
        return activate(features, self.activation) * torch.sigmoid(gate)

    def convolve(self, x: Tensor, *, enlarge: bool) -> Tensor:
        """The convolution alone."""
        if suits(x, self.conv.weight):
            return trained_convolution(x, self.conv, enlarge=enlarge)
        if enlarge:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x)


def he_init(network: nn.Module) -> None:
    """He initialisation of every ConvBlock; layers without activation start small.

    Torch's default loses the signal layer by layer (a completion of a fresh generator then has a
    standard deviation of 3e-5); a large last layer starts at the clamp, where training can stick.
    """
    for block in network.modules():
        if not isinstance(block, ConvBlock):
            continue
        fan_in = block.conv.weight[0].numel()
        gain = 0.1 if block.activation == "none" else math.sqrt(2)
        gain *= 2 if block.gated else 1  # an open gate starts at sigmoid(0) = 1/2
        with torch.no_grad():
            features = block.conv.weight[: block.out_channels]
            features.normal_(std=gain / math.sqrt(fan_in))
            if block.gated:
                block.conv.weight[block.out_channels :].normal_(std=0.5 / math.sqrt(fan_in))
            block.conv.bias.zero_()


class Completion(NamedTuple):
    """Both stages' images, (N, C, H, W) in [-1, 1]; `fine` is `coarse` where there is one stage."""

    coarse: Tensor
    fine: Tensor

    def in_fp32(self) -> "Completion":
        """The same images as float32, or as they are where that is wider."""
        fine = upcast_to_fp32(self.fine)
        return Completion(fine if self.coarse is self.fine else upcast_to_fp32(self.coarse), fine)


class Stage(nn.Module):
    """Layers by name, run one after the other; names decide where it upsamples and drops."""

    NEVER_DROP = ("conv1", "conv17", "allconv17")
    UPSAMPLE_BEFORE = ("conv13", "conv15", "allconv13", "allconv15")

    def __init__(self, name: str, config: GeneratorConfig) -> None:
        super().__init__()
        self.name = name
        self.conv_type: ConvType = config.conv_type
        self.elu: Activation = "elu" if config.elu == "exact" else "fast_elu"

    def add(self, layer: str, channels: tuple[int, int], kernel_size: int = 3, **options) -> None:
        """Adds a ConvBlock, with ELU if not told else; the last layer of a stage stays plain."""
        options = {"activation": self.elu, "conv_type": self.conv_type} | options
        self.add_module(layer, ConvBlock(*channels, kernel_size, **options))

    def add_trunk(self, prefix: str, widths: list[int], dilations: tuple[int, ...] = ()) -> None:
        """conv1 … conv6, of which 2 and 4 halve the resolution, then the dilated conv7 … conv10."""
        first = ("conv1", "conv2_downsample", "conv3", "conv4_downsample", "conv5", "conv6")
        for i, layer in enumerate(first):
            stride = 2 if layer.endswith("downsample") else 1
            activation = "relu" if prefix + layer == "pmconv6" else self.elu
            size = 5 if i == 0 else 3
            channels = (widths[i], widths[i + 1])
            self.add(prefix + layer, channels, size, stride=stride, activation=activation)
        for number, dilation in enumerate(dilations, start=7):
            self.add(f"{prefix}conv{number}_atrous", (widths[-1], widths[-1]), dilation=dilation)

    def add_decoder(self, prefix: str, in_width: int, n: int, channels: int) -> None:
        """conv11 … conv17: two upsamplings back to full resolution, then the image."""
        widths = [in_width, 4 * n, 4 * n, 2 * n, 2 * n, n, n // 2]
        for number, pair in enumerate(pairwise(widths), start=11):
            self.add(f"{prefix}conv{number}", pair)
        self.add(f"{prefix}conv17", (n // 2, channels), activation="none", conv_type="plain")

    def run(self, x: Tensor, prefix: str, first: int, last: int, drop: Drop | None) -> Tensor:
        """Applies the layers `<prefix>conv<first>` … `<prefix>conv<last>` in order."""
        for layer, block in self.layers(prefix, first, last):
            x = block(x, enlarge=layer in self.UPSAMPLE_BEFORE)
            if drop is not None and layer not in self.NEVER_DROP:
                x = drop(f"{self.name}.{layer}", x)
        return x

    def layers(self, prefix: str, first: int, last: int) -> list[tuple[str, nn.Module]]:
        """(name, block) of the layers `<prefix>conv<first>` … `<prefix>conv<last>`."""
        names = {f"{prefix}conv{number}" for number in range(first, last + 1)}
        return [(k, block) for k, block in self.named_children() if k.split("_")[0] in names]


class CoarseGenerator(Stage):
    """First estimate of the hole from dilated convolutions at 1/4 resolution."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__("coarse_generator", config)
        channels, n = config.input_dim, config.ngf
        widths = [channels + 2, n, 2 * n, 2 * n, 4 * n, 4 * n, 4 * n]
        self.add_trunk("", widths, config.dilations)
        self.add_decoder("", 4 * n, n, channels)

    def forward(self, image: Tensor, mask: Tensor, drop: Drop | None) -> Tensor:
        """image (N, C, H, W) with the hole zeroed, mask (N, 1, H, W) -> (N, C, H, W), unclamped."""
        return self.run(with_mask_planes(image, mask), "", 1, 17, drop)


class FineGenerator(Stage):
    """Second estimate: a convolution branch and an attention branch over the filled image."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__("fine_generator", config)
        channels, n = config.input_dim, config.ngf
        self.add_trunk("", [channels + 2, n, n, 2 * n, 2 * n, 4 * n, 4 * n], config.dilations)
        self.add_trunk("pm", [channels + 2, n, n, 2 * n, 4 * n, 4 * n, 4 * n])
        for number in (9, 10):
            self.add(f"pmconv{number}", (4 * n, 4 * n))
        self.add_decoder("all", 8 * n, n, channels)

    def forward(
        self, filled: Tensor, mask: Tensor, attention_mask: Tensor, drop: Drop | None
    ) -> Tensor:
        """filled (N, C, H, W), mask (N, 1, H, W), attention_mask (1 or N, 1, H, W) -> unclamped."""
        x = with_mask_planes(filled, mask)
        branch = self.run(x, "", 1, 10, drop)
        features = self.run(x, "pm", 1, 6, drop)
        attended = contextual_attention(features, features, attention_mask).output
        attended = self.run(attended, "pm", 9, 10, drop)
        return self.run(torch.cat([branch, attended], dim=1), "all", 11, 17, drop)


class Generator(nn.Module):
    """Completes holes: `generator(image with the hole zeroed, mask) -> Completion`."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.output_clamp: Clamp = config.output_clamp
        self.attention_mask = config.attention_mask
        self.coarse_generator = CoarseGenerator(config)
        self.fine_generator = FineGenerator(config) if config.stages == "coarse_fine" else None

    def forward(
        self,
        image: Tensor,
        mask: Tensor,
        drop: Drop | None = None,
        attention_mask: Tensor | None = None,
    ) -> Completion:
        """Both stages' completions of a batch.

        image: (N, C, H, W) in [-1, 1], zero in the hole; mask: (N, 1, H, W), 1 = hole. H and W are
        multiples of 16. drop: what is dropped after each layer's activation. attention_mask: (1 or
        N, 1, H, W), the hole that the attention avoids; None takes it of `mask`, by the settings.
        """
        coarse = clamp_output(self.coarse_generator(image, mask, drop), self.output_clamp)
        if self.fine_generator is None:
            return Completion(coarse, coarse)
        filled = image * (1 - mask) + coarse * mask
        if attention_mask is None:
            attention_mask = mask[:1] if self.attention_mask == "first" else mask
        fine = self.fine_generator(filled, mask, attention_mask, drop)
        return Completion(coarse, clamp_output(fine, self.output_clamp))

    def droppable_layers(self) -> dict[str, int]:
        """Name -> output channels of the layers that can drop, in the order they run."""
        stages = [s for s in (self.coarse_generator, self.fine_generator) if s is not None]
        return {
            f"{stage.name}.{layer}": block.out_channels
            for stage in stages
            for layer, block in stage.named_children()
            if layer not in Stage.NEVER_DROP
        }


def with_mask_planes(image: Tensor, mask: Tensor) -> Tensor:
    """(N, C + 2, H, W): the image, a plane of ones, and the mask, as every stage takes them."""
    mask = mask.to(image.dtype).expand(image.shape[0], 1, *image.shape[2:])
    return torch.cat([image, torch.ones_like(mask), mask], dim=1)
