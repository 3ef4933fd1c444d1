"""The baselines without a training loop."""

import pytest
import torch

from demos.baselines import (
    BASELINES,
    dense_heatmap,
    farthest_points,
    fit_difference_of_gaussians,
    fit_knn,
    fit_laplacian_energy,
    fit_linear_completion,
    fit_local_std,
    fit_patchcore,
    fit_pca,
    gaussian_blur,
    patch_bank,
)
from inpainter.networks.pretrained import ARCHITECTURES, PretrainedFeatures


def stripes(phase: int, height: int = 64, width: int = 48) -> torch.Tensor:
    """(1, H, W): vertical waves of 8 pixels, the same in every row."""
    columns = torch.arange(width) + phase
    wave = 0.5 + 0.2 * torch.sin(columns * (2 * torch.pi / 8))
    return wave.expand(height, width)[None].clone()


def with_blob(image: torch.Tensor) -> torch.Tensor:
    """The image with an even disc of 6 pixels radius at row 40, column 20."""
    rows, columns = torch.meshgrid(
        torch.arange(image.shape[1]), torch.arange(image.shape[2]), indexing="ij"
    )
    image = image.clone()
    image[0, (rows - 40) ** 2 + (columns - 20) ** 2 < 36] = 0.8
    return image


@pytest.mark.parametrize("name", BASELINES)
def test_heatmap_is_finite_has_the_images_size_and_is_reproducible(name):
    training = [stripes(phase) for phase in range(4)]
    image = with_blob(stripes(1, height=50, width=45))  # not a multiple of any stride
    first, second = (BASELINES[name](training)(image) for _ in range(2))
    assert first.shape == (50, 45)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("fit", [fit_pca, fit_linear_completion, fit_knn])
def test_learned_baselines_point_at_what_training_images_lack(fit):
    heat = fit([stripes(phase) for phase in range(8)])(with_blob(stripes(3)))
    peak = divmod(int(heat.argmax()), heat.shape[1])
    assert abs(peak[0] - 40) <= 8
    assert abs(peak[1] - 20) <= 8
    assert heat[36:44, 16:24].mean() > 3 * heat[:16].mean()


def test_even_image_has_no_local_std_laplacian_or_blobs():
    even = torch.full((1, 32, 32), 0.4)
    for fit in (fit_local_std, fit_laplacian_energy, fit_difference_of_gaussians):
        assert fit([])(even).abs().max() < 1e-3


def test_local_std_of_wide_noise_is_the_noises():
    noise = torch.randn(1, 200, 200, generator=torch.Generator().manual_seed(0)) * 0.1
    assert fit_local_std([], sigma=8.0)(noise).mean() == pytest.approx(0.1, rel=0.02)


def test_blur_keeps_the_mean_and_spreads_a_point_evenly():
    point = torch.zeros(41, 41)
    point[20, 20] = 1
    blurred = gaussian_blur(point.numpy(), 2.0)
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert blurred[20, 20] == pytest.approx(1 / (2 * torch.pi * 4), rel=0.02)


def test_patches_seen_in_training_have_no_distance_to_them():
    image = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    score = fit_knn([image], patch=8, stride=2, bank_size=10_000, neighbours=1)
    assert score(image)[8:-8, 8:-8].max() < 0.02  # squared distances round to 1e-5
    assert score(1 - image).min() > 0.1


def test_linear_completion_is_exact_where_the_surround_decides():
    training = [stripes(phase) for phase in range(8)]
    heat = fit_linear_completion(training, ridge=1e-8)(stripes(5))
    assert heat[20:-20, 20:-20].max() < 1e-2


def test_scores_sit_at_their_patches_centres():
    image = torch.zeros(1, 64, 64)
    image[0, 30:34, 42:46] = 1
    heat = dense_heatmap(image, 12, 4, lambda patches: patches.sum(1))
    rows, columns = torch.nonzero(heat > 0.9 * heat.max(), as_tuple=True)
    assert rows.float().mean() == pytest.approx(31.5, abs=0.6)
    assert columns.float().mean() == pytest.approx(43.5, abs=0.6)


def test_bank_leaves_background_out():
    image = torch.zeros(1, 40, 40)
    image[0, :, 20:] = 0.5
    bank = patch_bank([image], 8, 100, seed=0)
    assert bank.shape == (100, 64)
    assert ((bank > 0.02).mean(1) >= 0.25).all()


def test_images_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        fit_pca([])
    with pytest.raises(ValueError, match="no patch"):
        fit_pca([torch.zeros(1, 32, 32)])
    with pytest.raises(ValueError, match=r"smaller than the patch, 16 px"):
        fit_pca([torch.ones(1, 8, 8)])
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        fit_local_std([])(torch.zeros(3, 32, 32))


def test_bank_is_spread_over_the_points_each_the_farthest_from_those_before():
    points = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    first, *others = farthest_points(points, 3, torch.Generator().manual_seed(0)).flatten().tolist()
    farthest = {0.0: [12.0, 10.0], 1.0: [12.0, 10.0], 10.0: [0.0, 12.0], 12.0: [0.0, 10.0]}
    assert others == farthest[first]
    assert torch.equal(farthest_points(points, 4, torch.Generator()), points)


def test_patchcore_is_zero_on_a_training_image_and_points_at_what_is_new():
    torch.manual_seed(0)
    network = ARCHITECTURES["resnet18"].build()
    features = PretrainedFeatures(network, ARCHITECTURES["resnet18"])
    score = fit_patchcore([stripes(phase) for phase in range(4)], features)
    seen, new = score(stripes(2)), score(with_blob(stripes(2)))
    assert seen.shape == new.shape == (64, 48)
    assert seen.max() < 0.05 * new.max()
    row, column = divmod(int(new.argmax()), 48)
    assert abs(row - 40) <= 12
    assert abs(column - 20) <= 12
