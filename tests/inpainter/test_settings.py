"""PICARD's settings: the help on them, the combinations refused, the warnings."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from common.cli import add_common_arguments, load_from_arguments
from common.config import ConfigError, config_to_yaml, load_config
from common.config_types import leaf_types
from inpainter.evaluation_settings import add_evaluation_flags
from inpainter.prediction import add_prediction_flags
from inpainter.settings import PicardConfig, input_path


def test_resolved_settings_read_back_equal(tmp_path: Path) -> None:
    config = load_config(PicardConfig, None, ["train.lr=1.0e-5", "train.subset_frac=0.5"])
    path = tmp_path / "resolved.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(PicardConfig, path) == config


def test_every_picard_setting_is_explained_in_help() -> None:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, PicardConfig, default_config="configs/default.yaml")
    lines = parser.format_help().splitlines()
    for key in leaf_types(PicardConfig):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  {key} = "))
        about = next(line for line in lines[at + 1 :] if not line.startswith(" " * 8))
        assert about.startswith(" " * 6), f"{key} has no docstring under its field"
        assert not about.strip().startswith("("), f"{key} has no docstring under its field"


@pytest.mark.parametrize("add_flags", [add_prediction_flags, add_evaluation_flags])
def test_help_names_every_kind_of_annotations_that_is_read(add_flags: Callable) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    about = next(a.help for a in parser._actions if a.dest == "annotations")
    for kind in ("image,top,left,height,width[,label]", "masks", "COCO", "LabelMe", "YOLO"):
        assert kind in about


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.image_shape=[250,256,1]", "multiples of 16 pixels, got \\[250, 256, 1\\]"),
        ("train.image_shape=[256,256,3]", "channels must equal netG.input_dim = 1"),
        ("train.mask_shape=[256,128]", "must be smaller than train.image_shape, \\[256, 256\\]"),
        ("train.margin=[64,64]", "train.margin: must leave room for the box"),
        ("train.mask_type=mosaic", "does not implement it"),
        ("train.batch_size=0", "train.batch_size: must be >= 1, got 0"),
        ("test.droprate=1.0", r"test.droprate: must be in \[0, 1\)"),
        ("test.heatmap_metrics=[]", "needs one metric or more"),
        ("test.heatmap_localise=0.5", "above 0 needs test.heatmap_type: averaged_hole"),
        ("test.heatmap_sign=darker", "needs test.heatmap_type: averaged_hole"),
        ("netG.ngf=5", "netG.ngf: must be even"),
        ("netD.input_dim=3", "netD.input_dim: must be 1 or netG.input_dim = 1"),
        ("gpu_ids=[]", "gpu_ids: needs one GPU"),
    ],
)
def test_impossible_picard_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PicardConfig, None, [override])


def test_dead_published_dropout_names_are_warned_about_unless_they_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (warning,) = PicardConfig().warnings()
    assert "self.allconv16 match no layer" in warning
    assert load_config(PicardConfig, None, ["netG.strip_self_prefix=true"]).warnings() == []
    assert load_config(PicardConfig, None, ["netG.dropout_which=ALL"]).warnings() == []
    typo = load_config(PicardConfig, None, ["netG.custom_drop_layers_coarse=[conv1, cnv2]"])
    assert typo.netG.dead_entries()["netG.custom_drop_layers_coarse"] == ["cnv2"]
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, PicardConfig)
    with caplog.at_level(logging.WARNING):
        load_from_arguments(PicardConfig, parser.parse_args([]))
    assert "self.conv3" in caplog.text


def test_several_gpus_are_answered_with_the_torchrun_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    overrides = ["gpu_ids=[0, 2]", "netG.custom_drop_layers_fine=[]"]
    (warning,) = load_config(PicardConfig, None, overrides).warnings()
    assert "CUDA_VISIBLE_DEVICES=0,2 torchrun --nproc_per_node=2" in warning


def test_path_that_exists_only_relative_to_inpainter_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "inpainter" / "scans").mkdir(parents=True)
    assert input_path("scans", "train_data_path", root=tmp_path) == tmp_path / "inpainter" / "scans"
    assert "train_data_path: scans is not in the repository's root" in caplog.text
    caplog.clear()
    (tmp_path / "scans").mkdir()
    assert input_path("scans", "train_data_path", root=tmp_path) == tmp_path / "scans"
    assert not caplog.records
    with pytest.raises(ConfigError, match="train_data_path is not set"):
        input_path(None, "train_data_path")
