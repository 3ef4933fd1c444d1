"""Networks and scoring on a pretended GPU: a tensor made on the wrong device fails here."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dia.augment import augment, random_augmentation
from dia.encoders import build_encoder
from dia.features import ViewSettings, draw_samples, image_features, published_draws
from dia.losses import contrastive_losses, heads_for, probe_loss
from dia.scoring import (
    csi_score,
    fit_csi,
    marginal_logits,
    similarity_to_mean,
)
from dia.settings import ContrastiveConfig
from dia.shifts import SHIFT_NAMES, parse_shift
from dia.views import Draws, NegativeViewConfig, make_views, shift_labels
from diffusion_models.diffusion import GaussianDiffusion, gaussian_noise
from diffusion_models.dissolve import Dissolver
from diffusion_models.unet import Unet

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="fake tensors of torch 2.4 start CUDA"
)
CUDA = torch.device("cuda")
VIEWS = ViewSettings("rotation", 4, 2, (0.08, 1.0), "per_image", seed=0, batch_size=2)


@pytest.fixture
def fake_cuda():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def dissolver() -> Dissolver:
    with CUDA:
        return Dissolver(GaussianDiffusion(Unet(8, (1, 2)), steps=100))


def test_diffusion_follows_its_input(fake_cuda) -> None:
    network = dissolver()
    images = torch.rand(2, 3, 16, 16, device=CUDA)
    steps = torch.tensor([3, 5])
    assert network(images, steps).device.type == "cuda"
    assert network(torch.rand(2, 3, 16, 16), step=5).device.type == "cpu"
    noise = gaussian_noise((2, 3, 16, 16), device=CUDA, local=True)
    loss = network.diffusion.p_losses(images, steps.to(CUDA), noise)
    assert loss.device.type == "cuda"
    assert network.diffusion.p_sample(images, 5, noise)[0].device.type == "cuda"


@pytest.mark.parametrize("name", [n for n in SHIFT_NAMES if n != "none"])
def test_views_and_augmentation_follow_their_input(fake_cuda, name: str) -> None:
    images = torch.rand(2, 3, 32, 32, device=CUDA)
    kind, cpu = parse_shift(name), torch.Generator()
    draws = Draws(torch.ones(4), torch.ones(4, 2), torch.full((4,), 50))
    negatives = NegativeViewConfig(dissolve=dissolver(), resolution=16)
    views = make_views(images, "simclr_DIA", kind, draws, negatives)
    augmented = augment(views, random_augmentation(24, (32, 32), (0.08, 1.0), cpu))
    assert augmented.shape == (24, 3, 32, 32)
    assert augmented.device.type == "cuda"


@pytest.mark.parametrize("name", ["resnet18", "resnet18_imagenet", "resnet18_imagenet_simsiam"])
def test_encoder_and_losses_follow_their_input(fake_cuda, name: str) -> None:
    with CUDA:
        encoder = build_encoder(name, n_classes=2, n_shifts=4)
    rows = torch.rand(24, 3, 32, 32, device=CUDA)
    for mode in ("simclr_CSI", "simclr_DIA"):
        objective = ContrastiveConfig(mode=mode, shift_trans_type="rotation")
        heads = encoder(rows, *heads_for(objective, encoder.simsiam))
        labels = torch.zeros(24, dtype=torch.int64, device=CUDA)
        assert contrastive_losses(heads, labels, objective).total.device.type == "cuda"
    classes = torch.zeros(2, dtype=torch.int64, device=CUDA)
    assert probe_loss(encoder.linear, heads.penultimate, classes, 4).device.type == "cuda"
    assert shift_labels(2, 4, 3, CUDA).device.type == "cuda"


def test_features_follow_their_input(fake_cuda) -> None:
    with CUDA:
        encoder = build_encoder("resnet18", n_classes=2, n_shifts=4, width=8).eval()
    images = torch.rand(2, 3, 16, 16, device=CUDA)
    draws = draw_samples(VIEWS, ["a", "b"], (16, 16))
    for features in image_features(encoder, images, "rotation", 4, draws):
        assert features.shape[:2] == (2, 8)
        assert features.device.type == "cuda"


def test_scores_follow_their_input(fake_cuda) -> None:
    simclr, logits = torch.rand(9, 8, 16, device=CUDA), torch.rand(9, 8, 4, device=CUDA)
    for score in ("CSI", "simclr"):
        reference = fit_csi(simclr, logits, n_shifts=4, score=score)
        assert csi_score(reference, simclr, logits).device.type == "cuda"
    assert similarity_to_mean(torch.rand(2, 5, 3, device=CUDA)).device.type == "cuda"
    assert marginal_logits(torch.rand(4, 5, 8, device=CUDA)).device.type == "cuda"


def test_published_draws_are_made_on_the_cpu() -> None:
    drawn = published_draws(VIEWS, 0, 2, (16, 16))
    assert drawn.signs.device.type == drawn.augmentation.crop.device.type == "cpu"
