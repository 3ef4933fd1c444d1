"""The fast ways give the numbers of the published loops."""

import torch

from benchmarks.published_dia import loop_csi_scores, loop_views, with_loop_layers
from dia.scoring import csi_score, fit_csi
from dia.shifts import ShiftType
from dia.views import BetaParameters, NegativeViewConfig, draw_views, make_views
from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.dissolve import Dissolver
from diffusion_models.unet import Unet


def test_one_dissolving_call_gives_the_views_of_one_call_per_shift() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    beta = BetaParameters(1.0, 1.0)
    draws = draw_views(2, 4, beta=beta, offset=0.3, upper=1.0, generator=generator)
    diffusion = GaussianDiffusion(Unet(8, (1, 2)))
    published = with_loop_layers(diffusion)
    dissolver = Dissolver(diffusion).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 24, 24)
    negatives = NegativeViewConfig(dissolve=dissolver, resolution=16)
    kind = ShiftType("rotation", "diffusion")
    ours = make_views(images, "simclr_DIA", kind, draws, negatives)
    theirs = loop_views(images, draws, published, 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_one_matrix_product_gives_the_scores_of_the_loop_over_images() -> None:
    torch.manual_seed(0)
    reference = fit_csi(torch.randn(9, 8, 5), 1 + torch.rand(9, 8, 4), n_shifts=4)
    tested = torch.randn(6, 8, 5), torch.randn(6, 8, 4)
    torch.testing.assert_close(csi_score(reference, *tested), loop_csi_scores(reference, *tested))
