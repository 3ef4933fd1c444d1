"""The Python API: the heatmaps of the command line, image by image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import CheckpointError, checkpoint_path, load_tensors, save_atomic
from common.config import config_to_yaml
from common.images import ImageError, read_image
from common.notices import counts, forget
from common.shading import Flattening
from inpainter.predictor import Predictor, load_predictor
from tests.tiny_runs import (
    PREDICT,
    RGB,
    TRAIN,
    heatmaps_in,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
METRICS = "test.heatmap_metrics=[MCD_image, MCD_feature, no_dropout]"


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_heatmaps_are_those_of_the_command_line_bit_for_bit(tmp_path, engine) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "test" / "patient", n=2)
    settings = (METRICS, "netG.dropout_which=ALL", "data_with_subfolder=true")
    file = tiny_file(tmp_path, *settings, f"test.engine={engine}")
    trained = run_script(TRAIN, "--config", file)
    assert trained.returncode == 0, trained.stderr
    done = run_script(
        PREDICT, "--config", file, "--checkpoint_iter", "best", "--output_dir", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    (weights,) = tmp_path.glob("checkpoints/**/gen_*.pt")
    for config in (file, None):  # None: the one that training wrote
        predictor = load_predictor(weights.parent, step="best", config=config, device="cpu")
        for name in ("patient/0.png", "patient/1.png"):
            path = tmp_path / "test" / name
            heatmaps = predictor(path, name=name)
            assert list(heatmaps) == ["MCD_image", "MCD_feature", "no_dropout"]
            for metric, heat in heatmaps.items():
                assert torch.equal(heat, heatmaps_in(tmp_path / "out", metric)[name])
            pixels = read_image(path, 1)
            for image in (pixels, pixels[0], pixels[0].numpy(), pixels.numpy().astype("f8")):
                assert torch.equal(predictor(image, name=name)["MCD_image"], heatmaps["MCD_image"])


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    config = tiny_config(tmp_path, METRICS, "netG.dropout_which=ALL")
    write_checkpoint(tmp_path / "model", config)
    return load_predictor(str(tmp_path / "model"), 1, config)


def test_name_decides_what_drops_and_a_file_has_its_own(predictor, tmp_path) -> None:
    folder = write_images(tmp_path / "test", n=1)
    by_default = predictor(str(folder / "0.png"))
    named, other = (predictor(folder / "0.png", name=name) for name in ("0.png", "1.png"))
    assert torch.equal(by_default["MCD_image"], named["MCD_image"])
    assert not torch.equal(named["MCD_image"], other["MCD_image"])
    assert torch.equal(named["no_dropout"], other["no_dropout"])


def test_networks_see_flattened_images(predictor, tmp_path, caplog) -> None:
    config = replace(predictor.config, flatten=0.2)
    (tmp_path / "model" / "config.yaml").write_text(config_to_yaml(config))
    flat = load_predictor(tmp_path / "model", 1)
    assert not caplog.messages
    image = texture(40, 44)
    seen = Flattening(0.2, config.test.tissue_threshold)(image)
    assert torch.equal(flat(image)["MCD_image"], predictor(seen)["MCD_image"])
    assert not torch.equal(flat(image)["MCD_image"], predictor(image)["MCD_image"])


def test_images_that_do_not_fill_the_window_are_said(predictor) -> None:
    test = replace(predictor.config.test, heatmap_alignment="centred")
    centred = replace(predictor, config=replace(predictor.config, test=test))
    forget()
    centred(texture(40, 44))
    assert counts() == {}
    centred(texture(40, 20))
    assert counts() == {"image smaller than the window mirrored": 1}


def test_dark_places_of_flattened_images_are_tissue_as_before(predictor) -> None:
    image = texture(64, 64) * 0.1 + 0.5
    image[:, 24:40, 24:40] = 0.15  # darker than its surroundings by more than flattening keeps
    test = replace(predictor.config.test, tissue_threshold=0.1, min_tissue_fraction=0.9)
    test = replace(test, only_check_nonblack_pixels=True)
    flat = replace(predictor, config=replace(predictor.config, flatten=0.2, test=test))
    assert flat.pixels_of(image)[0, 32, 32] < test.tissue_threshold
    assert flat(image)["MCD_image"][32, 32] > 0


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [("flatten", 0.2, "0.2"), ("white_value", 4095, "4095"),
     ("window", (40.0, 400.0), "[40.0, 400.0]")],
)  # fmt: skip
def test_other_pixels_than_in_training_are_said(
    predictor, tmp_path, caplog, key, value, shown
) -> None:
    trained = replace(predictor.config, **{key: value})
    (tmp_path / "model" / "config.yaml").write_text(config_to_yaml(trained))
    load_predictor(tmp_path / "model", 1, predictor.config)
    (message,) = caplog.messages
    here = getattr(predictor.config, key) or "none"
    assert f"{key}: {here} here, and {shown} where" in message
    assert f"config.yaml: they know no such images. Set {key}={shown}" in message


def test_reversed_arrays_are_taken(predictor) -> None:
    image = texture(40, 44)[0].numpy()
    heatmaps = [predictor(given)["no_dropout"] for given in (image[::-1], image[::-1].copy())]
    assert torch.equal(*heatmaps)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((40, 44), dtype=np.uint8), r"floats in \[0, 1\], got torch.uint8; divide by"),
        (np.full((40, 44), 255.0), r"values in \[0, 1\], got 255 to 255"),
        (torch.full((40, 44), torch.nan), r"values in \[0, 1\], got nan"),
        (torch.zeros(3, 40, 44), r"\(H, W\) or \(1, H, W\) pixels, got \(3, 40, 44\)"),
        (torch.zeros(1, 1, 40, 44), r"\(H, W\) or \(1, H, W\) pixels, got \(1, 1, 40, 44\)"),
        (torch.zeros(0, 44), r"\(H, W\) or \(1, H, W\) pixels, got \(0, 44\)"),
    ],
)
def test_arrays_that_are_no_image_are_refused(predictor, image, message: str) -> None:
    with pytest.raises(ValueError, match=f"image: expected {message}"):
        predictor(image)


def test_what_cannot_be_loaded_is_refused_with_the_remedy(predictor, tmp_path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png"):
        predictor(tmp_path / "absent.png")
    with pytest.raises(CheckpointError, match=r"No gen_00000007.*Steps there: 1\. Ask for one"):
        load_predictor(tmp_path / "model", 7, predictor.config)
    path = checkpoint_path(tmp_path / "model", "gen", 1)
    weights = load_tensors(path)
    weights["coarse_generator.conv17.conv.bias"][:] = float("nan")
    save_atomic(weights, path)
    with pytest.raises(CheckpointError, match=r"step 1: .*not finite"):
        load_predictor(tmp_path / "model", 1, predictor.config)


@pytest.mark.parametrize("multiplied", [False, True])
def test_bf16_is_called_slow_where_the_processor_emulates_it(
    predictor, tmp_path, monkeypatch, caplog, multiplied: bool
) -> None:
    monkeypatch.setattr("inpainter.predictor.supports_bf16", lambda device: multiplied)
    test = replace(predictor.config.test, precision="bf16")
    load_predictor(tmp_path / "model", config=replace(predictor.config, test=test))
    assert ("Use test.precision: fp32 here." in caplog.text) is not multiplied


def test_colour_networks_expect_colour_arrays(tmp_path) -> None:
    config = tiny_config(tmp_path, *RGB)
    write_checkpoint(tmp_path / "model", config)
    predictor = load_predictor(tmp_path / "model", config=config)
    assert predictor(texture(40, 44, 3))["MCD_image"].shape == (40, 44)
    with pytest.raises(ValueError, match=r"expected \(3, H, W\) pixels, got \(40, 44\)"):
        predictor(torch.zeros(40, 44))
