"""Without a GPU: fake CUDA tensors show where a tensor is created on the wrong device."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from inpainter.completion import WindowScorer, dropout_of
from inpainter.fast.scorer import FastScorer
from inpainter.masks import crop_boxes, discount_weights, masks_from_deltas
from inpainter.networks import Networks
from inpainter.networks.critic import Critic
from inpainter.networks.generator import Generator
from inpainter.networks.pretrained import ARCHITECTURES, PretrainedFeatures
from inpainter.recorder import completion_grid
from inpainter.settings import CriticConfig, GeneratorConfig, PicardConfig, TestConfig, TrainConfig
from inpainter.snapshots import completion_error
from inpainter.step import adversarial_term, draw_inputs, step_losses
from inpainter.windows import centre_mask

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="fake tensors of torch 2.4 start CUDA"
)
CUDA = torch.device("cuda")
CONFIG = PicardConfig(
    train=TrainConfig(image_shape=(32, 32, 1), mask_shape=(16, 16), max_delta_shape=(4, 4)),
    test=TestConfig(
        patch_shape=(32, 32, 1),
        mask_shape=(16, 16),
        heatmap_metrics=("MCD_image", "MedCD_feature", "MeanCD_image", "no_dropout"),
        heatmap_M_inpaint=2,
    ),
    netG=GeneratorConfig(ngf=2, droprate=0.2),
    netD=CriticConfig(ndf=2),
)


@pytest.fixture
def fake():
    """Inside, tensors have a device and a shape but no values, and devices may not be mixed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def networks(config: PicardConfig = CONFIG) -> Networks:
    with CUDA:
        return Networks(
            Generator(config.netG),
            Critic(1, config.netD.ndf, (16, 16)),
            Critic(1, config.netD.ndf, (32, 32)),
        )


def on_cuda(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device=CUDA)


def test_fake_tensors_refuse_to_mix_devices(fake) -> None:
    with pytest.raises(RuntimeError, match="device"):
        on_cuda(2) + torch.rand(3)[:2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conv_type": "gated", "elu": "fast", "output_clamp": "leaky"},
        {"stages": "coarse"},
        {"attention_mask": "per_sample"},
    ],
    ids=["published", "ours", "coarse", "per_sample"],
)
def test_generator_stays_on_its_inputs_device(fake, changes) -> None:
    config = dataclasses.replace(CONFIG, netG=dataclasses.replace(CONFIG.netG, **changes))
    generator = networks(config).generator
    completion = generator(on_cuda(2, 1, 32, 32), on_cuda(2, 1, 32, 32))
    assert completion.fine.device.type == completion.coarse.device.type == "cuda"


@pytest.mark.parametrize(("critic", "channels"), [(1, 1), (3, 3), (1, 3)])
def test_critic_stays_on_its_inputs_device(fake, critic, channels) -> None:
    with CUDA:
        module = Critic(critic, 2, (16, 16))
    real, fakes = on_cuda(2, channels, 16, 16), on_cuda(2, channels, 16, 16)
    assert module.features(real).device.type == "cuda"
    assert module((real + fakes) / 2).device.type == "cuda"


@pytest.mark.parametrize("dropout_type", ["2D", "1D"])
def test_training_step_takes_crops_on_the_gpu(dropout_type) -> None:
    """All but the derivatives, which autograd does not take on a GPU that is not there."""
    config = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, critic=False),
        netG=dataclasses.replace(CONFIG.netG, dropout_type=dropout_type),
    )
    boxes = draw_inputs(config, Generator(config.netG), 3, torch.zeros(2, 1, 32, 32)).boxes
    with FakeTensorMode(allow_non_fake_inputs=True):
        nets = networks(config)
        inputs = draw_inputs(config, nets.generator, 3, on_cuda(2, 1, 32, 32))
        on_gpu = (inputs.mask, inputs.discount, inputs.alpha_local, inputs.alpha_global)
        assert {tensor.device.type for tensor in on_gpu} == {"cuda"}
        inputs = inputs._replace(boxes=boxes)  # their numbers are read: real, and on the CPU
        losses = step_losses(nets, inputs, config, with_generator=True)
        adversarial = adversarial_term(nets, inputs, losses.composite, config)
        values = [*losses.named().values(), adversarial, losses.composite]
        assert {value.device.type for value in values} == {"cuda"}
        picture = completion_grid(nets.generator, inputs, 2)
        assert (tuple(picture.shape), picture.device.type) == ((3, 70, 172), "cpu")


def test_masks_lie_where_their_boxes_do(fake) -> None:
    boxes = torch.zeros(2, 4, dtype=torch.int64, device=CUDA)
    deltas = torch.zeros(2, 2, dtype=torch.int64)
    assert masks_from_deltas(boxes, deltas, (32, 32)).device.type == "cuda"
    assert centre_mask((32, 32), (16, 16), CUDA).device.type == "cuda"
    assert discount_weights((16, 16), 0.9, CUDA).device.type == "cuda"


def test_boxes_on_the_cpu_crop_images_on_the_gpu() -> None:
    boxes = torch.tensor([[0, 4, 16, 16], [3, 2, 16, 16]])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert crop_boxes(on_cuda(2, 1, 32, 32), boxes).device.type == "cuda"


@pytest.mark.parametrize("engine", [WindowScorer, FastScorer])
@pytest.mark.parametrize("dropout_type", ["2D", "1D"])
def test_windows_on_the_gpu_are_scored_there(fake, dropout_type, engine) -> None:
    nets = networks()
    test = CONFIG.test
    netG = dataclasses.replace(CONFIG.netG, dropout_type=dropout_type)
    scorer = engine(nets.generator, nets.local_critic, test.heatmap_metrics, (16, 16))
    dropout = dropout_of(nets.generator, netG, test, 1, "image.png")
    scores = scorer(on_cuda(3, 1, 32, 32), dropout.masks([0, 1, 2]))
    assert set(scores) == set(test.heatmap_metrics)
    assert {values.device.type for values in scores.values()} == {"cuda"}


@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_features_stay_on_their_inputs_device(fake, channels) -> None:
    architecture = ARCHITECTURES["efficientnet_lite0"]
    with CUDA:
        network = PretrainedFeatures(architecture.build(), architecture)
    found = network.features(on_cuda(2, channels, 16, 16))
    assert (found.device.type, tuple(found.shape)) == ("cuda", (2, 40 * 8 * 8 + 112 * 4 * 4))


class Transfers(TorchDispatchMode):
    """Copies from the CPU to the GPU that make the CPU wait for what the GPU still has to do."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[torch.Size] = []
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        copies = func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy)
        if copies and (args[0].device.type, result.device.type) == ("cpu", "cuda"):
            self.count += 1
            if not given.get("non_blocking"):
                self.waiting.append(args[0].shape)
        return result


def test_the_cpu_does_not_wait_for_the_gpu_between_completions(fake) -> None:
    nets, test = networks(), CONFIG.test
    scorer = FastScorer(nets.generator, nets.local_critic, test.heatmap_metrics, (16, 16))
    dropout = dropout_of(nets.generator, CONFIG.netG, test, 1, "image.png")
    windows = on_cuda(3, 1, 32, 32)
    scorer(windows, dropout.masks([0, 1, 2]))  # plans what later batches use again
    with Transfers() as transfers:
        scorer(windows, dropout.masks([3, 4, 5]))
    assert transfers.count > 0
    assert transfers.waiting == []


def test_selection_error_is_measured_on_the_crops_device(fake) -> None:
    # a fake tensor has no number to give: to get as far as asking for it is to pass
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        completion_error(networks().generator, on_cuda(2, 1, 32, 32), (16, 16))
