"""Heatmaps of DIA's score by occlusion, and the page of an evaluation that has them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.checkpoint import load_tensors
from common.config import REPOSITORY, ConfigError
from common.image_sets import ImageSet
from common.images import write_image
from dia.encoders import Heads
from dia.evaluation import evaluate
from dia.features import ViewSettings
from dia.localisation import (
    Occlusion,
    Patch,
    occluded,
    occlusion_maps,
    spread_over,
    write_heatmaps,
)
from dia.predictor import SetFeatures, TrainedEncoder
from dia.report_page import draw_entries, heat_limits, judge
from dia.results import SetScores
from dia.scoring import fit_csi
from dia.settings import DiaConfig
from dia.training import train
from diffusion_models.settings import DataConfig, DdpmConfig
from diffusion_models.training import train as train_diffusion
from inpainter.heatmap_tables import list_heatmaps
from tests.tiny_dia import SIDE, tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import read_table, run_script, texture

VIEWS = ViewSettings("none", 1, 2, (0.9, 1.0), "published", seed=0, batch_size=4)
OWN_SIZE = (SIDE + 4, SIDE + 8)
EVALUATE = REPOSITORY / "eval.py"


class Smoothness(nn.Module):
    """A network whose only feature is minus the mean difference between neighbouring pixels."""

    def forward(self, images: torch.Tensor, *_: str) -> Heads:
        roughness = images.diff(dim=3).abs().mean(dim=(1, 2, 3))[:, None]
        return Heads(roughness, roughness, 1 - roughness, torch.ones_like(roughness))


def encoder_of(network: nn.Module, device: str = "cpu", views: ViewSettings = VIEWS):
    return TrainedEncoder(network, DiaConfig(), views, torch.device(device), Path("last.model"))


def test_patches_cover_the_image_and_none_leads_out_of_it() -> None:
    patches = Occlusion(patch=0.5, step=0.6).patches(7, 10)
    assert {patch.side for patch in patches} == {4}  # half of 7, rounded to even
    assert sorted({patch.top for patch in patches}) == [0, 2, 3]
    assert sorted({patch.left for patch in patches}) == [0, 2, 4, 6]
    (whole,) = Occlusion(patch=1, step=1).patches(7, 7)
    assert whole == (0, 0, 7)


def test_pixel_has_the_mean_change_of_the_patches_that_cover_it() -> None:
    patches = [Patch(0, 0, 2), Patch(0, 1, 2)]
    changes = torch.tensor([1.0, 3.0])
    assert spread_over(changes, patches, (2, 3)).tolist() == [[1, 2, 3], [1, 2, 3]]


def test_only_the_patch_is_blurred_and_its_brightness_stays() -> None:
    image = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    first, second = occluded(image, [Patch(0, 0, 6), Patch(14, 14, 6)])
    assert torch.equal(first[:, 6:], image[:, 6:])
    assert torch.equal(second[:, :14], image[:, :14])
    inside, before = first[:, :6, :6], image[:, :6, :6]
    assert inside.std() < 0.3 * before.std()
    assert inside.mean() == pytest.approx(before.mean().item(), abs=0.1)


def test_map_is_hot_where_detail_makes_an_image_anomalous_and_nought_elsewhere() -> None:
    image = torch.full((3, 24, 24), 0.5)
    image[:, 12:18, 12:18:2] = 1.0
    one = torch.ones(3, 2, 1)
    references = {"simclr": fit_csi(one, one, n_shifts=1, score="simclr")}
    occlusion = Occlusion(patch=0.25, step=0.5)
    maps = occlusion_maps(encoder_of(Smoothness()), references, image, "a.png", occlusion)
    heat = maps["simclr"]
    assert heat.shape == (24, 24)
    row, column = divmod(int(heat.argmax()), 24)
    assert 12 <= row < 18
    assert 12 <= column < 18
    assert heat[:3].abs().max() < 1e-6  # patches there do not see the square, nor do their blurs
    assert heat[12:18, 12:18].mean() > 10 * heat[:, :3].abs().max()


def test_maps_do_not_depend_on_the_batch() -> None:
    image, one = texture(16, 16, 3), torch.ones(3, 2, 1)
    references = {"simclr": fit_csi(one, one, n_shifts=1, score="simclr")}

    def heat(size: int) -> torch.Tensor:
        views = replace(VIEWS, batch_size=size)
        encoder = encoder_of(Smoothness(), views=views)
        return occlusion_maps(encoder, references, image, "a", Occlusion(0.5, 0.5))["simclr"]

    torch.testing.assert_close(heat(2), heat(100), rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An encoder, a diffusion model, and normal and spotted test images of another size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("dia")
    data = write_normals(root / "data")
    for name in ("normal", "spot"):
        for number in range(2):
            image = texture(*OWN_SIZE, 3, seed=30 + number + len(name))
            if name == "spot":
                image[:, 4:10, 5:11] = torch.rand(3, 6, 6)
            write_image(root / "data" / "test" / name / f"{number}.png", image)
    contrastive = tiny_contrastive(root / "run")
    train(DiaConfig(device="cpu", data=data, contrastive=contrastive))
    diffusion = tiny_diffusion(root / "ddpm")
    train_diffusion(DdpmConfig(device="cpu", data=data, diffusion=diffusion))
    torch.set_num_threads(threads)
    return root


def test_command_writes_heatmaps_that_are_evaluated_and_a_page(run: Path) -> None:
    flags = f"--dataset folder --data_root {run / 'data'} --one_class_idx 0 --device cpu"
    flags += f" --ood_samples 1 --bootstrap_samples 5 --load_path {run / 'run' / 'last.model'}"
    flags += f" --diffusion_model_path {run / 'ddpm' / 'model-1.pt'} --report_images 3"
    flags += " --heatmap_patch 0.5"
    given = ["--mode", "ood_pre", *flags.split(), "--ood_score", "CSI", "simclr"]
    done = run_script(EVALUATE, *given, "--heatmaps", "--report", cwd=run)
    assert done.returncode == 0, done.stderr
    folder = run / "run" / "eval_ood_pre_last"
    rows = read_table(folder / "heatmaps" / "heatmaps.csv")
    names = [f"test/{name}/{number}.png" for name in ("normal", "spot") for number in range(2)]
    assert [row["image"] for row in rows] == [name for name in names for _ in range(2)]
    assert [row["metric"] for row in rows[:2]] == ["CSI_occlusion", "simclr_occlusion"]
    heat = load_tensors(folder / "heatmaps" / rows[0]["file"])
    assert heat.shape == OWN_SIZE
    numbers = read_table(folder / "heatmaps" / "scores.csv")[0]
    assert float(numbers["max"]) == pytest.approx(heat.max().item(), rel=1e-5)

    page = (folder / "report.html").read_text()
    assert "The 3 images of 4 on which" in page
    assert page.count(">dissolved at t = 99<") == 3
    assert page.count(">CSI_occlusion</span>") == 3
    assert "so these numbers are too good" not in page  # nothing was selected

    boxes = run / "boxes.csv"
    lines = [f"test/spot/{number}.png,4,5,6,6" for number in range(2)]
    boxes.write_text("\n".join(["image,top,left,height,width", *lines, ""]))
    given = ("--heatmap_dir", folder / "heatmaps", "--annotations", boxes, "--report")
    done = run_script(EVALUATE, *given, "--image_dir", run / "data", "--bootstrap", 5, cwd=run)
    assert done.returncode == 0, done.stderr
    assert "simclr_occlusion" in done.stdout
    page = (folder / "heatmaps" / "evaluation" / "report.html").read_text()
    assert page.count('<article class="card"') == 4
    assert "encoder " in page  # its SHA-256


def test_accuracies_have_a_page_of_the_images_of_the_wrong_class(run: Path) -> None:
    given = f"--mode test_acc --dataset folder --data_root {run / 'data'} --device cpu"
    given += f" --load_path {run / 'run' / 'last.model'} --report"
    done = run_script(EVALUATE, *given.split(), cwd=run)
    assert done.returncode == 0, done.stderr
    page = (run / "run" / "eval_test_acc_last" / "report.html").read_text()
    assert "2 images, each taken for one of 2 classes" in page
    assert page.count('<article class="card"') == 2


def test_images_of_two_datasets_with_one_name_have_their_own_heatmaps(tmp_path: Path) -> None:
    def numbered(seed: int) -> ImageSet:
        images = torch.stack([texture(16, 16, 3, seed=seed), texture(16, 16, 3, seed=seed + 1)])
        return ImageSet(images, [0, 0], ["test/0", f"test/{seed}"], classes=("a",), size=16)

    sets = {"normal": numbered(1), "breastmnist": numbered(5)}
    encoder, one = encoder_of(Smoothness()), torch.ones(3, 2, 1)
    train = SetFeatures(["a", "b", "c"], one, one, {})
    first = write_heatmaps(encoder, train, sets, ["simclr"], tmp_path, [])
    listed = {entry.image: entry.file for entry in list_heatmaps(tmp_path)["simclr_occlusion"]}
    assert list(listed) == ["test/0", "test/1", "breastmnist/test/0", "test/5"]
    highest = [load_tensors(file).max().item() for file in listed.values()]
    assert len(set(highest)) == 4

    scores = {name: SetScores(images.names, np.arange(2.0)) for name, images in sets.items()}
    shown = judge(sets, scores, {name: name for name in sets})
    entries = draw_entries(shown, "score", encoder, None, first, heat_limits(first, shown))
    texts = [entry.pictures[1].alt for entry in entries]
    assert [text.split()[-1] for text in texts] == [f"{value:.3g}" for value in highest]


def test_diffusion_model_that_does_not_fit_the_page_is_refused_before_any_image(
    run: Path, tmp_path: Path
) -> None:
    published = {"step": 1, "model": load_tensors(run / "ddpm" / "model-1.pt")["model"]}
    torch.save(published, tmp_path / "model-1.pt")
    contrastive = tiny_contrastive(
        run / "run",
        load_path=str(run / "run" / "last.model"),
        diffusion_model_path=str(tmp_path / "model-1.pt"),
        diff_resolution=15,
    )
    data = DataConfig("folder", data_root=str(run / "data"), one_class_idx=0, resize_to=SIDE)
    config = DiaConfig(device="cpu", data=data, contrastive=contrastive)
    results = replace(config.evaluation, report=True, results_dir=str(tmp_path / "results"))
    with pytest.raises(ConfigError, match=r"diff_resolution.*multiple of 2 pixels"):
        evaluate(replace(config, evaluation=results), "ood_pre", [])
    assert not (tmp_path / "results").exists()


def test_other_scores_have_no_heatmaps() -> None:
    config = DiaConfig()
    config = replace(config, evaluation=replace(config.evaluation, heatmaps=True))
    with pytest.raises(ConfigError, match="--heatmaps are of the scores of --mode ood_pre"):
        evaluate(config, "test_acc", [])
