"""test.feature_space: FILE: the features of a frozen network, its file, and who depends on it."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models

from common.checkpoint import CheckpointError, checkpoint_path, save_atomic
from common.config import ConfigError, load_config
from inpainter.calibrate import calibrate
from inpainter.completion import l2_distance
from inpainter.networks.pretrained import (
    ARCHITECTURES,
    EfficientNetLite0,
    PretrainedFeatures,
    SameConv2d,
    load_pretrained,
    recognised,
    weights_of,
    without_values,
)
from inpainter.prediction import PredictionOptions, predict
from inpainter.predictor import load_predictor
from inpainter.settings import PicardConfig
from inpainter.training import train
from tests.tiny_runs import (
    PREDICT,
    corrupt,
    heatmaps_in,
    run_script,
    texture,
    tiny_config,
    tiny_file,
    with_test,
    write_checkpoint,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")

METRICS = "test.heatmap_metrics=[MCD_image, MCD_feature, MedCD_feature]"


def used_weights(network: torch.nn.Module, name: str) -> dict[str, Tensor]:
    """A network's weights without those behind the stages, which need not be there."""
    return {k: v for k, v in network.state_dict().items() if k in weights_of(name).used}


def lite0(seed: int = 0) -> EfficientNetLite0:
    torch.manual_seed(seed)
    return EfficientNetLite0()


def write_lite0(path: Path, seed: int = 0) -> Path:
    save_atomic(used_weights(lite0(seed), "efficientnet_lite0"), path)
    return path


def holes(n: int = 2, channels: int = 1, side: int = 64) -> Tensor:
    pictures = [texture(side, side, channels, seed=seed) for seed in range(n)]
    return torch.stack(pictures) * 2 - 1


@pytest.fixture(scope="module")
def resnet() -> models.ResNet:
    torch.manual_seed(0)
    network = models.resnet18().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # not the identity
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network


@pytest.fixture
def features(resnet) -> PretrainedFeatures:
    return PretrainedFeatures(resnet, ARCHITECTURES["resnet18"])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images, a checkpoint in `model` without critics, lite0.pt with a pretrained network."""
    write_images(tmp_path / "train", n=3, size=(48, 64))
    write_images(tmp_path / "test", size=(48, 64))
    write_checkpoint(tmp_path / "model", tiny_config(tmp_path))
    checkpoint_path(tmp_path / "model", "dis", 1).unlink()
    write_lite0(tmp_path / "lite0.pt")
    return tmp_path


def config_of(folder: Path, *more: str) -> PicardConfig:
    space = f"test.feature_space={folder / 'lite0.pt'}"
    return tiny_config(folder, METRICS, space, "netG.dropout_which=ALL", *more)


# --- The features ---


@torch.no_grad()
def test_distance_is_that_of_both_stages_unit_vectors_averaged_over_places(
    features, resnet
) -> None:
    stages = []
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = (holes().repeat(1, 3, 1, 1) + 1) / 2
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1((x - mean) / deviation))))
    x = resnet.layer2(resnet.layer1(x))
    for maps in (x, resnet.layer3(x)):
        unit = maps / maps.norm(dim=1, keepdim=True)  # (2, channels, places, places)
        stages.append((unit[0] - unit[1]).square().sum(dim=0).mean())
    first, second = features.features(holes())[:, None]
    assert l2_distance(first, second).item() == pytest.approx(math.sqrt(sum(stages)), rel=1e-5)
    assert [maps.shape[1:] for maps in (x, resnet.layer3(x))] == [(128, 8, 8), (256, 4, 4)]
    assert first.norm().item() == pytest.approx(math.sqrt(2), rel=1e-5)


@torch.no_grad()
def test_small_holes_are_enlarged_and_large_ones_are_not(features) -> None:
    small = holes(side=16)
    large = F.interpolate(small, (64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(features.features(small), features.features(large))
    assert features.features(holes(side=80)).shape == (2, 128 * 10 * 10 + 256 * 5 * 5)
    assert features.features(small[..., :8]).shape == (2, 128 * 16 * 8 + 256 * 8 * 4)


@torch.no_grad()
def test_grey_is_three_equal_channels_and_colour_counts(features) -> None:
    grey = holes()
    assert torch.equal(features.features(grey), features.features(grey.repeat(1, 3, 1, 1)))
    colour = grey * torch.tensor([1, 0.5, 0.1])[:, None, None]
    assert not torch.allclose(features.features(colour), features.features(grey), atol=1e-3)


@torch.no_grad()
def test_features_of_a_hole_do_not_depend_on_the_batch_and_change_nothing(features) -> None:
    before = {name: value.clone() for name, value in features.state_dict().items()}
    together = features.features(holes(5))
    alone = features.features(holes(5)[3:4])
    assert torch.allclose(together[3:4], alone, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in features.state_dict().items())
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_odd_padding_is_below_and_right_as_in_tensorflow() -> None:
    conv = SameConv2d(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(conv.weight)
    assert conv(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]
    conv = SameConv2d(1, 1, 5, 1, bias=False)
    torch.nn.init.ones_(conv.weight)
    assert conv(torch.ones(1, 1, 3, 4))[0, 0].tolist() == [[9, 12, 12, 9]] * 3


# --- The file ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_is_recognised_by_its_weights_whole_or_cut_off(name) -> None:
    network = without_values(name)
    assert recognised(network.state_dict(), Path("x")) == name
    assert recognised(used_weights(network, name), Path("x")) == name


def test_weights_are_those_of_the_file(tmp_path, resnet, features) -> None:
    state = resnet.state_dict() | {"fc.weight": torch.zeros(4, 512), "fc.bias": torch.zeros(4)}
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    halves = {k: v.half() for k, v in used_weights(resnet, "resnet18").items()}
    for saved, tolerance in ((state, 0), (old, 0), (halves, 1e-2)):
        save_atomic(saved, tmp_path / "weights.pt")
        loaded = load_pretrained(tmp_path / "weights.pt")
        difference = loaded.features(holes()) - features.features(holes())
        assert difference.abs().max() <= tolerance
        assert not loaded.training


def test_files_of_other_things_are_refused(tmp_path) -> None:
    path = write_lite0(tmp_path / "lite0.pt")
    whole = used_weights(lite0(), "efficientnet_lite0")
    stem = "_conv_stem.weight"
    for changes, message in (
        ({stem: torch.zeros(32, 1, 3, 3)}, r"_conv_stem.weight has shape \(32, 1, 3, 3\) for \(32"),
        (
            {"classes": torch.zeros(1)},
            "Nearest is efficientnet_lite0, but classes is unknown",
        ),
        ({stem: torch.full((32, 3, 3, 3), math.nan)}, f"not finite .*{stem}. Copy the file again"),
    ):
        save_atomic(whole | changes, path)
        with pytest.raises(CheckpointError, match=rf"lite0.pt.*{message}"):
            load_pretrained(path)
    del whole[stem], whole["_bn0.weight"]
    save_atomic(whole, path)
    with pytest.raises(CheckpointError, match=r"_conv_stem.weight is missing and 1 more"):
        load_pretrained(path)
    save_atomic({"layer": [1, 2]}, path)
    with pytest.raises(CheckpointError, match=r"lite0.pt: expected the weights of a network"):
        load_pretrained(path)
    save_atomic({"a.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"knows \(resnet18, .*efficientnet_lite0\)\. Give a"):
        load_pretrained(path)
    with pytest.raises(CheckpointError, match=r"lite0.pt.*truncated or no checkpoint"):
        load_pretrained(corrupt(path))


def test_setting_is_the_word_or_a_path_from_where_the_user_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    key = "test.feature_space"
    spaces = {
        text: load_config(PicardConfig, None, [f"{key}={text}"]).test.feature_space
        for text in ("critic", "nets/a.pth", "/b.pth")
    }
    expected = {"critic": "critic", "nets/a.pth": f"{tmp_path}/nets/a.pth", "/b.pth": "/b.pth"}
    assert spaces == expected
    with pytest.raises(ConfigError, match=rf"{key}: expected text or one of critic"):
        load_config(PicardConfig, None, [f"{key}="])


# --- Heatmaps ---


def test_no_critic_is_needed_and_pixel_metrics_stay_the_same(folder) -> None:
    image = texture(48, 64, seed=9)
    found = load_predictor(folder / "model", config=config_of(folder))(image, name="a")
    pixels = tiny_config(
        folder, "test.heatmap_metrics=[MCD_image]", "netG.dropout_which=ALL",
        "test.feature_space=nowhere.pth",
    )  # fmt: skip
    alone = load_predictor(folder / "model", config=pixels)(image, name="a")
    assert torch.equal(found["MCD_image"], alone["MCD_image"])
    assert (found["MedCD_feature"] >= found["MCD_feature"]).all()
    assert found["MCD_feature"].min() > 0
    assert found["MCD_feature"].max() < 2 * math.sqrt(2)


def test_engines_and_batches_give_the_same_scores(folder) -> None:
    config, image = config_of(folder), texture(48, 64, seed=9)
    expected = load_predictor(folder / "model", config=config)(image, name="a")["MCD_feature"]
    for changes in ({"engine": "plain"}, {"parallel_batchsize": 1}, {"precision": "bf16"}):
        other = load_predictor(folder / "model", config=with_test(config, **changes))
        tolerance = 0.02 if "precision" in changes else 1e-4
        found = other(image, name="a")["MCD_feature"]
        assert torch.allclose(found, expected, rtol=tolerance), changes


def test_missing_file_is_named_before_training_and_before_prediction(folder) -> None:
    (folder / "lite0.pt").unlink()
    config = config_of(folder, "test.calibration=knn")
    message = r"test.feature_space: there is no file .*lite0.pt.*never downloaded, or critic"
    for start in (lambda: train(config), lambda: predict(config, PredictionOptions(folder))):
        with pytest.raises(ConfigError, match=message):
            start()
    assert not (folder / "checkpoints").exists()


def test_command_line_goes_on_with_the_same_weights_and_no_others(folder) -> None:
    flags = ["--config", tiny_file(folder, METRICS), "--checkpoint_dir", folder / "model"]
    flags += ["--output_dir", folder / "out", "--set", "test.feature_space=lite0.pt"]
    done = run_script(PREDICT, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(heatmaps_in(folder / "out", "MCD_feature")) == 3
    (folder / "lite0.pt").rename(folder / "moved.pt")
    again = run_script(PREDICT, *flags, "--set", "test.feature_space=moved.pt", cwd=folder)
    assert "0 images scored, 3 were finished before" in again.stdout, again.stderr
    write_lite0(folder / "lite0.pt", seed=1)
    refused = run_script(PREDICT, *flags, cwd=folder)
    assert refused.returncode == 1
    assert "other settings or another checkpoint: feature_space " in refused.stderr


def test_calibration_is_of_one_feature_space(folder) -> None:
    on = ("test.calibration=knn", "test.calibration_windows=60", "test.patch_stride=8")
    config = config_of(folder, *on, "test.heatmap_alignment=centred")
    calibrate(config, folder / "model", "latest")
    image = texture(48, 64, seed=9)
    found = load_predictor(folder / "model", config=config)(image, name="a")
    assert all(heatmap.isfinite().all() for heatmap in found.values())
    message = r"was made in another test.feature_space: .* there, {} now. Run .*--calibrate"
    write_lite0(folder / "lite0.pt", seed=1)
    with pytest.raises(CheckpointError, match=message.format("[0-9a-f]{64}")):
        load_predictor(folder / "model", config=config)
    write_checkpoint(folder / "model", config)
    with pytest.raises(CheckpointError, match=message.format("critic")):
        load_predictor(folder / "model", config=with_test(config, feature_space="critic"))
    pixels = with_test(config, heatmap_metrics=("MCD_image",))
    load_predictor(folder / "model", config=pixels)
