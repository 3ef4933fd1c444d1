"""The flags that are generated from settings, and the shipped settings file."""

import argparse

import pytest

from common.cli import add_common_arguments, add_flags, flag_keys, load_from_arguments
from common.config import REPOSITORY, ConfigError, load_config
from dia.evaluation import add_evaluation_flags, evaluation_config
from dia.settings import DiaConfig
from diffusion_models.settings import DdpmConfig
from tests.tiny_runs import DiaFile


def parsed(cls: type, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, cls)
    add_flags(parser, cls)
    return parser.parse_args(words)


def test_flags_win_over_the_file_and_take_plain_scientific_numbers() -> None:
    words = (
        "--config",
        str(REPOSITORY / "configs/dia.yaml"),
        "--weight_decay",
        "1e-4",
        "--resize_fix",
    )
    words += ("--ood_score", "CSI", "simclr", "--suffix", "3", "--eval_step", "none")
    config = load_from_arguments(
        DiaConfig, parsed(DiaConfig, *words), other_sections=("diffusion",)
    )
    assert config.contrastive.weight_decay == 1e-4
    assert config.contrastive.resize_fix
    assert config.contrastive.suffix == "3"
    assert config.evaluation.ood_score == ("CSI", "simclr")
    assert config.contrastive.mode == "simclr_DIA"


def test_lists_of_numbers_are_typed_as_words() -> None:
    words = ("--dim_mults", "1", "2", "--adam_betas", "0.9", "1e-1")
    config = load_from_arguments(DdpmConfig, parsed(DdpmConfig, *words))
    assert config.diffusion.dim_mults == (1, 2)
    assert config.diffusion.adam_betas == (0.9, 0.1)
    with pytest.raises(ConfigError, match=r"--dim_mults: .*expected a whole number"):
        load_from_arguments(DdpmConfig, parsed(DdpmConfig, "--dim_mults", "1", "wide"))


def test_wrong_flag_value_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"--epochs: .*expected a whole number"):
        load_from_arguments(DiaConfig, parsed(DiaConfig, "--epochs", "many"))


def test_crop_flags_mean_the_evaluation_in_the_evaluation() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode")
    add_evaluation_flags(parser)
    words = [
        "--mode",
        "ood_pre",
        "--config",
        "configs/dia.yaml",
        "--resize_factor",
        "0.3",
        "--no-resize_fix",
    ]
    assert evaluation_config(parser.parse_args(words)).eval_crop_scale == (0.3, 1.0)


def test_shipped_settings_load_for_all_programs() -> None:
    config = load_config(DiaFile, REPOSITORY / "configs" / "dia.yaml")
    assert config.contrastive.batch_size == 32
    assert config.eval_crop_scale == (0.54, 0.54)


def test_every_published_flag_is_there() -> None:
    published = """dataset data_root one_class_idx model mode simclr_dim shift_trans_type
        diffusion_model_path loss_mode diffusion_scheduler diff_resolution contamination_ratio
        kernel_size resize_to_constant local_rank resume_path load_path no_strict suffix error_step
        save_step epochs optimizer lr_scheduler warmup lr_init weight_decay batch_size
        test_batch_size diffusion_offset diffusion_upper_offset sim_lambda simsiam_lambda
        temperature ood_dataset ood_score ood_layer ood_samples ood_batch_size resize_factor
        resize_fix print_score save_score"""
    assert set(published.split()) <= set(flag_keys(DiaConfig))
    published = "dataset on_label image_size dilation local_randn steps state_dict_path ratio"
    assert set(published.split()) <= set(flag_keys(DdpmConfig))
