"""Whole programs on a pretended GPU, where a tensor on another device than its input's fails."""

from dataclasses import replace

import pytest
import torch

from common.checkpoint import load_tensors
from common.images import write_image
from dia.evaluation import evaluate
from dia.settings import DiaConfig
from dia.training import train as train_encoder
from diffusion_models.pictures import draw_dissolved
from diffusion_models.settings import DdpmConfig
from diffusion_models.training import train as train_diffusion
from inpainter.calibrate import calibrate
from inpainter.explain import explain
from inpainter.normal_scores import set_operating_point
from inpainter.prediction import PredictionOptions, predict
from inpainter.training import train
from tests.pretended_gpu import pretended_gpu
from tests.tiny_dia import SIDE, changed, tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import (
    read_table,
    texture,
    tiny_config,
    with_test,
    write_checkpoint,
    write_images,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.4."), reason="fake tensors of torch 2.4 start CUDA"
    ),
]
METRICS = ("MCD_image", "MedCD_feature")


@pytest.fixture
def gpu():
    with pretended_gpu():
        yield torch.device("cuda")


def test_devices_do_not_mix_and_what_lies_there_is_copied_before_it_is_read(gpu) -> None:
    there = torch.ones(3, device=gpu)
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"numpy\(\) is not supported"):
        there.numpy()
    assert there.cpu().numpy().shape == (3,)
    assert (torch.arange(3) + 1).tolist() == [1, 2, 3]


def test_normals_are_measured_and_a_scan_is_judged_and_explained_on_a_gpu(tmp_path, gpu) -> None:
    normals = write_images(tmp_path / "train", n=2, size=(48, 48))
    write_images(tmp_path / "test", n=1, size=(48, 48))
    config = tiny_config(tmp_path, "test.calibration_windows=30", "test.precision=tf32")
    config = with_test(replace(config, device="cuda"), heatmap_metrics=METRICS, calibration="knn")
    write_checkpoint(tmp_path / "model", config)

    calibrate(config, tmp_path / "model", "latest")
    known = load_tensors(tmp_path / "model" / "calibration_00000001.pt")["scales"]["1.0"]["known"]
    assert len(known) == 30
    paths = sorted(normals.iterdir())
    _, point = set_operating_point(
        config, tmp_path / "model", "latest", paths, normals, specificity=0.5
    )
    assert set(point.metrics) == set(METRICS)

    options = PredictionOptions(
        tmp_path / "model", image_dir=tmp_path / "test", output_dir=tmp_path / "out"
    )
    assert len(predict(config, options).finished) == 1
    assert len(read_table(tmp_path / "out" / "verdicts.csv")) == len(METRICS)
    said = explain(config, (tmp_path / "model", 1), tmp_path / "test/0.png", (20, 20), tmp_path)
    assert "of windows of normal images (operating point)" in said


def test_training_that_a_cpu_began_goes_on_on_a_gpu(tmp_path) -> None:
    write_images(tmp_path / "train")
    config = tiny_config(tmp_path, "train.snapshot_save_iter=1", "train.n_critic=1")
    train(changed(config, "train", n_steps=1))
    with pretended_gpu():
        result = train(changed(replace(config, device="cuda"), "train", n_steps=2), resume="latest")
    assert result.step == 2
    assert load_tensors(result.folder / "gen_00000002.pt")


def test_diffusion_model_and_encoder_are_trained_and_evaluated_on_a_gpu(tmp_path, gpu) -> None:
    data, diffusion = (
        write_normals(tmp_path, count=2),
        tiny_diffusion(tmp_path / "ddpm", dim_mults=(1,)),
    )
    for kind in ("normal", "other"):
        write_image(tmp_path / "test" / kind / "0.png", texture(SIDE, SIDE, 3))
    ddpm = DdpmConfig(device="cuda", precision="fp16", data=data, diffusion=diffusion)
    assert train_diffusion(ddpm).step == 1
    saved = replace(ddpm, diffusion=replace(diffusion, state_dict_path=str(tmp_path / "ddpm")))
    assert len(draw_dissolved(saved)) > 1

    model = tmp_path / "ddpm" / "model-1.pt"
    contrastive = tiny_contrastive(
        tmp_path / "run",
        mode="simclr_DIA",
        shift_trans_type="diffusion_rotation",
        diff_resolution=SIDE,
        diffusion_model_path=str(model),
    )
    config = DiaConfig(device="cuda", precision="fp16", data=data, contrastive=contrastive)
    assert train_encoder(config).epoch == 1
    config = changed(config, "contrastive", load_path=str(tmp_path / "run" / "last.model"))
    scores = {"ood_score": ("CSI", "simclr"), "ood_samples": 1, "bootstrap_samples": 5}
    maps = {"heatmaps": True, "heatmap_patch": 0.5, "heatmap_step": 1.0, "report": True}
    config = changed(config, "evaluation", **scores, **maps)
    assert "AUROC" in evaluate(config, "ood_pre", []).text
    rows = read_table(tmp_path / "run" / "eval_ood_pre_last" / "heatmaps" / "heatmaps.csv")
    assert len(rows) == 2 * 2
    config = changed(config, "evaluation", heatmaps=False)
    assert "Error@1" in evaluate(config, "test_marginalized_acc", []).text
