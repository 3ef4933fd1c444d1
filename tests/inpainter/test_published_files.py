"""Settings and checkpoints as the published code writes them, through our command."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from torch import Tensor

from common.checkpoint import CheckpointError, load_tensors
from common.config import REPOSITORY, load_config
from common.images import to_signed
from inpainter.networks.critic import Critic
from inpainter.networks.generator import Generator
from inpainter.prediction import PredictionOptions, predict
from inpainter.settings import GeneratorConfig, PicardConfig
from tests.golden.golden_tools import group
from tests.tiny_runs import PREDICT, heatmaps_in, run_script

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = REPOSITORY / "tests" / "golden" / "picard_heatmap_1ch.npz"
WINDOWS = [(top, left) for top in (0, 32) for left in (0, 32, 64)]


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as stored:
        return dict(stored)


@pytest.fixture
def folder(tmp_path, arrays) -> Path:
    """The recorded image, lossless, and the recorded weights in the published layout."""
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "scan.tif", arrays["image01"][0, 0])
    write_published(tmp_path / "model", arrays)
    return tmp_path


def write_published(model: Path, arrays: dict[str, np.ndarray], prefix: str = "") -> None:
    model.mkdir(exist_ok=True)

    def prefixed(name: str) -> dict[str, Tensor]:
        return {prefix + key: value for key, value in group(arrays, name).items()}

    torch.save(prefixed("sd_gen"), model / "gen_00020000.pt")
    global_critic = Critic(1, 8, (256, 256)).state_dict()
    critics = {"localD": prefixed("sd_localD"), "globalD": global_critic}
    torch.save(critics, model / "dis_00020000.pt")


def published_file(folder: Path) -> Path:
    """configs/published.yaml at the recorded widths, with the user's paths and no dropout."""
    text = (REPOSITORY / "configs" / "published.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    values |= {"dataset_name": "golden", "test_data_path": str(folder / "images"), "cuda": False}
    values["netG"]["ngf"] = values["netD"]["ndf"] = 8
    values["test"]["droprate"] = 0
    path = folder / "published_style.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plain_scores(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Metric -> grid (2, 3) of the six windows without dropout, in the plainest words."""
    generator, critic = Generator(GeneratorConfig(ngf=8)), Critic(1, 8, (128, 128))
    generator.load_state_dict(group(arrays, "sd_gen"))
    critic.load_state_dict(group(arrays, "sd_localD"))
    image = torch.from_numpy(arrays["image01"])
    mask = torch.zeros(1, 1, 256, 256)
    mask[:, :, 64:192, 64:192] = 1
    image_scores, feature_scores = [], []
    with torch.no_grad():
        for top, left in WINDOWS:
            window = to_signed(image[:, :, top : top + 256, left : left + 256])
            completion = generator(window * (1 - mask), mask).fine[:, :, 64:192, 64:192]
            truth = window[:, :, 64:192, 64:192]
            image_scores.append((truth - completion).norm())
            feature_scores.append((critic.features(truth) - critic.features(completion)).norm())
    return {
        "MCD_image": torch.stack(image_scores).view(2, 3),
        "MCD_feature": torch.stack(feature_scores).view(2, 3),
    }


def test_published_settings_and_checkpoints_run_unchanged(folder, arrays) -> None:
    done = run_script(
        PREDICT, "--config", published_file(folder), "--checkpoint_dir", folder / "model",
        "--checkpoint_iter", "20000", "--output_dir", folder / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warning = next(line for line in done.stderr.splitlines() if "match no layer" in line)
    assert "netG.custom_drop_layers_fine" in warning
    for name in ("self.conv2_downsample", "self.pmconv1", "self.allconv16"):
        assert name in warning
    for metric, grid in plain_scores(arrays).items():
        expected = torch.nn.functional.interpolate(
            grid[None, None], size=(300, 330), mode="bicubic", align_corners=False
        )[0, 0]
        (heat,) = heatmaps_in(folder / "out", metric).values()
        assert (heat - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (folder / "out" / "plots" / f"scan_{metric}_10_0.0_128_256_32.png").is_file()


def test_weights_of_data_parallel_give_the_same_heatmap(folder, arrays) -> None:
    config = load_config(
        PicardConfig,
        published_file(folder),
        ["test.save_heatmap_plots=false", "test.patch_stride=64", "device=cpu"],
    )
    plain = predict(config, PredictionOptions(folder / "model", output_dir=folder / "plain"))
    write_published(folder / "parallel", arrays, prefix="module.")
    options = PredictionOptions(folder / "parallel", output_dir=folder / "prefixed")
    prefixed = predict(config, options)
    for metric in config.test.heatmap_metrics:
        first, second = (
            heatmaps_in(result.folder, metric)["scan.tif"] for result in (plain, prefixed)
        )
        assert torch.equal(first, second)


def test_other_networks_than_the_files_hold_are_refused_with_both_values(folder) -> None:
    config = load_config(PicardConfig, published_file(folder))
    changed = dataclasses.replace(config.netG, ngf=32, conv_type="gated", stages="coarse")
    other = dataclasses.replace(config, netG=changed)
    with pytest.raises(CheckpointError) as refused:
        predict(other, PredictionOptions(folder / "model"))
    message = str(refused.value)
    assert "gen_00020000.pt was made with other settings" in message
    assert "netG.ngf: checkpoint 8, settings 32" in message
    assert "netG.conv_type: checkpoint 'plain', settings 'gated'" in message
    assert "netG.stages: checkpoint 'coarse_fine', settings 'coarse'" in message


def test_what_weights_do_not_show_is_compared_with_the_settings_beside_them(folder) -> None:
    (folder / "model" / "config.yaml").write_text(
        "netG:\n  ngf: 8\n  dilations: [1, 2, 4, 4]\n  output_clamp: leaky\n"
    )
    config = load_config(PicardConfig, published_file(folder))
    with pytest.raises(CheckpointError) as refused:
        predict(config, PredictionOptions(folder / "model"))
    assert "netG.dilations: checkpoint (1, 2, 4, 4), settings (2, 4, 8, 16)" in str(refused.value)
    assert "netG.output_clamp: checkpoint 'leaky', settings 'hard'" in str(refused.value)


def test_a_critic_of_another_width_is_refused(folder) -> None:
    config = load_config(PicardConfig, published_file(folder), ["netD.ndf=16"])
    with pytest.raises(CheckpointError, match=r"netD\.ndf: checkpoint 8, settings 16"):
        predict(config, PredictionOptions(folder / "model"))


def test_a_file_that_is_no_generator_is_named(folder) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "model" / "gen_00020000.pt")
    config = load_config(PicardConfig, published_file(folder))
    with pytest.raises(CheckpointError, match=r"gen_00020000\.pt: the weight .* not a PICARD gen"):
        predict(config, PredictionOptions(folder / "model"))
    assert set(load_tensors(folder / "model" / "dis_00020000.pt")) == {"localD", "globalD"}
