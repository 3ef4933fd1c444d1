"""What a checkpoint's own run says of it when it is evaluated; and networks of any width."""

import argparse
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from common.config import ConfigError, config_to_yaml, load_config
from common.processes import Processes
from dia.building import check_dissolving, initial_encoder, layout_for
from dia.encoders import build_encoder
from dia.evaluation import add_evaluation_flags, evaluation_config, selected_by
from dia.settings import ContrastiveConfig, DiaConfig, EncoderName
from diffusion_models.diffusion import GaussianDiffusion
from diffusion_models.dissolve import Dissolver
from diffusion_models.unet import Unet
from tests.tiny_dia import changed


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A file in the folder of a run with settings that are not the defaults."""
    settings = ContrastiveConfig(
        model="resnet18", width=8, simclr_dim=16, mode="simclr_DIA",
        shift_trans_type="diffusion_rotation",
    )  # fmt: skip
    run = changed(DiaConfig(contrastive=settings), "data", resize_to=32, one_class_idx=0)
    (tmp_path / "config.yaml").write_text(config_to_yaml(run))
    return tmp_path / "best_CSI.model"


def asked(checkpoint: Path, *flags: str) -> DiaConfig:
    parser = argparse.ArgumentParser()
    add_evaluation_flags(parser)
    return evaluation_config(parser.parse_args(["--load_path", str(checkpoint), *flags]))


@pytest.mark.parametrize("flags", ["", "--shift_trans_type rotation", "--resize_to 32 --width 8"])
def test_run_says_what_the_command_does_not(checkpoint: Path, flags: str) -> None:
    config = asked(checkpoint, *flags.split())
    contrastive = config.contrastive
    assert (contrastive.model, contrastive.width, contrastive.simclr_dim) == ("resnet18", 8, 16)
    assert contrastive.shift_trans_type == "rotation"
    assert (config.data.resize_to, config.data.one_class_idx) == (32, 0)


@pytest.mark.parametrize(
    ("flags", "both"),
    [
        ("--shift_trans_type cutperm", "'cutperm' is asked for.*trained with 'rotation'"),
        ("--resize_to 64", "64 is asked for.*trained with 32"),
        ("--set contrastive.width=64", "64 is asked for.*trained with 8"),
        ("--model resnet34", "'resnet34' is asked for.*trained with 'resnet18'"),
        ("--one_class_idx 1", "1 is asked for.*trained with 0"),
    ],
)
def test_command_that_contradicts_the_run_is_refused(checkpoint, flags: str, both: str) -> None:
    with pytest.raises(ConfigError, match=both):
        asked(checkpoint, *flags.split())


@pytest.mark.parametrize("model", get_args(EncoderName))
def test_width_that_the_encoder_cannot_have_is_refused_with_the_setting(model: str) -> None:
    width_of = partial(load_config, DiaConfig, None)
    assert width_of([f"contrastive.model={model}"]).contrastive.width == 64
    small, chosen = "imagenet" not in model, [f"contrastive.model={model}", "contrastive.width=8"]
    if small:
        assert width_of(chosen).contrastive.width == 8
        return
    message = rf"contrastive\.width: must be 64 with contrastive\.model = {model}, .* got 8"
    with pytest.raises(ConfigError, match=message):
        width_of(chosen)
    with_weights = width_of([*chosen, "contrastive.load_path=last.model"])  # their run may say more
    with pytest.raises(ConfigError, match=message):
        initial_encoder(with_weights.contrastive, 2, torch.device("cpu"), Processes())


def test_images_are_read_as_the_run_read_them_but_where_the_command_says(
    checkpoint: Path, caplog
) -> None:
    path = checkpoint.parent / "config.yaml"
    run = load_config(DiaConfig, path)
    path.write_text(config_to_yaml(changed(run, "data", window=(2500.0, 1000.0))))
    assert asked(checkpoint).data.window == (2500.0, 1000.0)
    assert not caplog.messages
    data = asked(checkpoint, "--white_value", "4095").data
    assert (data.white_value, data.window) == (4095, "auto")
    assert any("data.window: auto here, and [2500.0, 1000.0]" in each for each in caplog.messages)


def test_training_images_are_as_contaminated_as_the_run_had_them_but_where_the_command_says(
    checkpoint: Path, caplog
) -> None:
    path = checkpoint.parent / "config.yaml"
    run = changed(load_config(DiaConfig, path), "contrastive", contamination_ratio=0.1)
    path.write_text(config_to_yaml(run))
    assert asked(checkpoint).contrastive.contamination_ratio == 0.1
    assert asked(checkpoint, "--dataset", "retina").contrastive.contamination_ratio == 0
    assert not caplog.messages
    assert asked(checkpoint, "--contamination_ratio", "0").contrastive.contamination_ratio == 0
    assert any("contamination_ratio: 0.0 here, and 0.1 where" in each for each in caplog.messages)


def test_folder_of_a_run_says_what_its_best_checkpoint_is(checkpoint: Path) -> None:
    checkpoint.touch()
    assert asked(checkpoint.parent).contrastive.width == 8


def test_checkpoint_that_the_training_loss_chose_says_so(checkpoint: Path) -> None:
    assert selected_by(checkpoint.with_name("best_loss.model")) == "training loss"
    assert selected_by(checkpoint) == "test"


def test_run_without_shifts_is_evaluated_by_its_own_settings(checkpoint: Path) -> None:
    settings = ContrastiveConfig(
        model="resnet18", width=8, mode="simclr", shift_trans_type="rotation"
    )
    path = checkpoint.parent / "config.yaml"
    path.write_text(config_to_yaml(changed(DiaConfig(contrastive=settings), "data", resize_to=32)))
    config = asked(checkpoint, "--config", str(path))
    assert config.contrastive.shift_trans_type == "none"
    with pytest.raises(ConfigError, match=r"'cutperm' is asked for.*trained with 'none'"):
        asked(checkpoint, "--shift_trans_type", "cutperm")


def test_lone_checkpoint_is_what_the_command_says(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").unlink()
    config = asked(checkpoint, "--shift_trans_type", "cutperm", "--model", "resnet34")
    assert config.contrastive.shift_trans_type == "cutperm"
    assert config.contrastive.model == "resnet34"


@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 16])
def test_gradients_on_the_layout_of_a_cpu_are_those_of_float64(width: int) -> None:
    def gradients(dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        encoder = build_encoder("resnet18", n_classes=2, n_shifts=4, width=width).to(dtype)
        encoder = encoder.to(memory_format=layout)
        images = torch.rand(4, 3, 16, 16).to(dtype)
        encoder(images).penultimate.pow(2).sum().backward()
        return {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}

    right = gradients(torch.float64, torch.contiguous_format)
    ours = gradients(torch.float32, layout_for(torch.device("cpu"), width))
    largest = max(grad.abs().max() for grad in right.values())
    assert max((ours[n] - right[n]).abs().max() for n in right) < 1e-3 * largest


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"diffusion_upper_offset": 99.0}, "diffusion_upper_offset.*has 100 steps.*at most 1"),
        ({"diff_resolution": 33}, "diff_resolution.*multiple of 2 pixels"),
    ],
)
def test_dissolving_beyond_the_diffusion_model_is_refused(values: dict, named: str) -> None:
    dissolver = Dissolver(GaussianDiffusion(Unet(8, (1, 2)), steps=100))
    with pytest.raises(ConfigError, match=named):
        check_dissolving(ContrastiveConfig(**values), dissolver)
