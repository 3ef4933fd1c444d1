"""What only a GPU can show: the programs run on it, and its heatmaps and scores are the CPU's.

Skipped without one. That trainings take the CPU's steps is in test_parity.py.
"""

from pathlib import Path

import pytest
import torch

from common.checkpoint import load_tensors
from common.config import REPOSITORY
from inpainter.predictor import load_predictor
from tests.tiny_dia import write_normals
from tests.tiny_runs import (
    BOTH_STAGES,
    NEEDS_GPU,
    PREDICT,
    TRAIN,
    heatmaps_in,
    read_log,
    read_table,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    write_checkpoint,
    write_images,
)

pytestmark = [NEEDS_GPU, pytest.mark.usefixtures("one_thread")]
ALL_METRICS = "test.heatmap_metrics=[MCD_image, MCD_feature, MeanCD_image, MedCD_image, no_dropout]"
TRAIN_DIA, EVALUATE = str(REPOSITORY / "train_dia.py"), str(REPOSITORY / "eval.py")
DDPM = str(REPOSITORY / "diffusion_models" / "train_eval_ddpm.py")
SMALL_DDPM = (
    "--dim 8 --dim_mults 1 2 --image_size 16 --train_num_steps 2 --ddpm_batch_size 2 "
    "--num_samples 1 --sampling_timesteps 1 --strip_steps 0 50 --output_dir ddpm"
)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def run(script: str, *arguments: object, cwd: Path) -> str:
    done = run_script(script, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("engine", "precision", "tolerance"),
    [
        ("plain", "fp32", 1e-4),
        ("fast", "fp32", 1e-4),
        ("fast", "tf32", 2e-2),
        ("fast", "bf16", 0.1),
    ],
)
def test_heatmaps_are_those_of_the_cpu(tmp_path, engine, precision, tolerance) -> None:
    options = (*BOTH_STAGES, ALL_METRICS, "netG.dropout_which=ALL", "netG.conv_type=gated")
    config = tiny_config(tmp_path, *options, f"test.engine={engine}")
    write_checkpoint(tmp_path / "model", config)
    changed = tiny_config(
        tmp_path, *options, f"test.engine={engine}", f"test.precision={precision}"
    )
    expected = load_predictor(tmp_path / "model", 1, config, device="cpu")
    found = load_predictor(tmp_path / "model", 1, changed, device="cuda")
    image = texture(90, 75)
    for metric, heatmap in found(image, name="a").items():
        there = expected(image, name="a")[metric]
        assert heatmap.isfinite().all()
        assert (heatmap.cpu() - there).abs().max() <= tolerance * there.abs().max(), metric


def test_heatmaps_do_not_depend_on_the_batch(tmp_path) -> None:
    heatmaps = []
    for size in (1, 5, 32):
        options = (*BOTH_STAGES, ALL_METRICS, f"test.parallel_batchsize={size}")
        config = tiny_config(tmp_path, *options)
        write_checkpoint(tmp_path / str(size), config)
        heatmaps.append(
            load_predictor(tmp_path / str(size), 1, config, device="cuda")(texture(60, 70))
        )
    for metric, first in heatmaps[0].items():
        for other in heatmaps[1:]:
            torch.testing.assert_close(other[metric], first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_picard_trains_goes_on_calibrates_and_predicts(tmp_path, precision) -> None:
    write_images(tmp_path / "train", n=6)
    write_images(tmp_path / "test")
    settings = ("device=cuda", f"train.precision={precision}", "num_workers=2")
    more = ("test.calibration=knn", "test.calibration_windows=60", "train.held_out=0.3")
    file = tiny_file(tmp_path, *BOTH_STAGES, *settings, *more)
    run(TRAIN, "--config", file, cwd=tmp_path)
    run(TRAIN, "--config", file, "--resume", "--set", "train.n_steps=8", cwd=tmp_path)
    (log,) = {path.parent for path in tmp_path.glob("checkpoints/**/log.jsonl")}
    assert max(line["step"] for line in read_log(log)) == 8
    run(PREDICT, "--config", file, "--output_dir", tmp_path / "out", cwd=tmp_path)
    assert len(heatmaps_in(tmp_path / "out", "MCD_image")) == 3
    explained = ("--explain", tmp_path / "test" / "0.png", "20", "20")
    run(PREDICT, "--config", file, *explained, "--output_dir", tmp_path / "one", cwd=tmp_path)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dia_dissolves_trains_goes_on_scores_and_maps(tmp_path, precision) -> None:
    write_normals(tmp_path / "data")
    for split in ("normal", "ill"):
        write_images(tmp_path / "data" / "test" / split, size=(16, 16))
    common = ("--dataset", "folder", "--data_root", tmp_path / "data", "--one_class_idx", "0")
    common = (*common, "--device", "cuda", "--set", f"precision={precision}")
    run(DDPM, "--mode", "train", *common, *SMALL_DDPM.split(), cwd=tmp_path)
    model = next((tmp_path / "ddpm").glob("model-*.pt"))
    flags = "--model resnet18 --set contrastive.width=8 --mode simclr_DIA --batch_size 2"
    flags += " --shift_trans_type diffusion_rotation --diff_resolution 16 --resize_to 16"
    flags += " --set contrastive.select_by=last --set contrastive.lr_init=0.01 --warmup 1"
    flags = (*flags.split(), "--diffusion_model_path", model)
    run(TRAIN_DIA, *common, *flags, "--epochs", "1", "--run_dir", "dia", cwd=tmp_path)
    run(TRAIN_DIA, *common, *flags, "--epochs", "2", "--resume_path", "dia", cwd=tmp_path)
    scores = {}
    for device in ("cuda", "cpu"):
        flags = f"--mode ood_pre --shift_trans_type rotation --ood_samples 2 --device {device}"
        flags += f" --load_path dia/last.model --results_dir {device} --resize_to 16"
        flags += " --model resnet18 --set contrastive.width=8 --set evaluation.cache_features=false"
        run(EVALUATE, *common, *flags.split(), "--heatmaps", cwd=tmp_path)
        rows = read_table(tmp_path / device / "scores_CSI.csv")
        scores[device] = [float(row["CSI"]) for row in rows]
    assert scores["cuda"] == pytest.approx(scores["cpu"], rel=1e-3)


@pytest.mark.parametrize(
    ("training", "saved"),
    [
        ("picard", "checkpoints/**/gen_00000004.pt"),
        ("diffusion", "ddpm/model-1.pt"),
        ("encoder", "dia/last.model"),
    ],
)
def test_compiled_networks_train(training: str, saved: str, tmp_path: Path) -> None:
    write_normals(tmp_path / "data")
    common = ("--dataset", "folder", "--data_root", tmp_path / "data", "--one_class_idx", "0")
    common = (*common, "--device", "cuda", "--set", "compile=true")
    if training == "picard":
        write_images(tmp_path / "train")
        file = tiny_file(tmp_path, *BOTH_STAGES, "device=cuda", "train.compile=true")
        run(TRAIN, "--config", file, cwd=tmp_path)
    elif training == "diffusion":
        run(DDPM, "--mode", "train", *common, *SMALL_DDPM.split(), cwd=tmp_path)
    else:
        small = "--model resnet18 --set contrastive.width=8 --mode simclr_CSI --batch_size 2"
        small += " --shift_trans_type rotation --resize_to 16 --epochs 1 --run_dir dia"
        small += " --set contrastive.select_by=last"
        run(TRAIN_DIA, *common, *small.split(), cwd=tmp_path)
    (path,) = tmp_path.glob(saved)
    assert load_tensors(path)  # raises for a file that is not whole
