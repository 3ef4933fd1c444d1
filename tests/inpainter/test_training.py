"""The training run as a function: what it takes, records and refuses."""

import dataclasses

import pytest
import torch

from common.checkpoint import load_tensors, steps_in
from common.config import ConfigError, load_config
from common.devices import supports_bf16
from common.images import ImageError, write_image
from common.training import TrainingError
from inpainter.settings import PicardConfig
from inpainter.snapshots import prune_snapshots, resolve_step, run_folder
from inpainter.training import cache_of_each, precision_of, train
from tests.tiny_runs import (
    RGB,
    corrupt,
    read_log,
    tiny_config,
    write_every_format,
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_generator_is_updated_at_every_n_critic_th_step_counted_from_one(train_folder) -> None:
    config = tiny_config(train_folder, "train.n_steps=3", "train.n_critic=3", "netG.droprate=none")
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, snapshot_save_iter=1)
    )
    train(config)
    states = [load_tensors(run_folder(config) / f"gen_{step:08d}.pt") for step in (1, 2, 3)]
    layer = "coarse_generator.conv1.conv.weight"
    assert torch.equal(states[0][layer], states[1][layer])
    assert not torch.equal(states[1][layer], states[2][layer])
    lines = [line for line in read_log(run_folder(config)) if "train/d" in line]
    assert ["train/l1" in line for line in lines] == [False, False, True]


def test_pruning_keeps_the_newest_and_the_best_and_best_is_the_lowest_error(train_folder) -> None:
    config = tiny_config(train_folder, "train.snapshot_save_iter=1", "train.n_steps=6")
    train(config)
    checkpoints = run_folder(config)
    errors = {
        line["step"]: line["select_l1"]
        for line in read_log(run_folder(config))
        if "select_l1" in line
    }
    assert list(errors) == [1, 2, 3, 4, 5, 6]
    best = min(errors, key=errors.get)
    assert resolve_step(checkpoints, "best") == best
    (checkpoints / "log.jsonl").open("a").write('{"step": 2, "select_l1": 1e-9}\n')
    (checkpoints / "gen_00000001.pt").unlink()  # as a kill while pruning leaves it
    prune_snapshots(checkpoints, keep=2)
    for role in ("gen", "dis", "state"):
        assert steps_in(checkpoints, role) == [2, 5, 6]
    assert resolve_step(checkpoints, "best") == 2


@pytest.mark.parametrize("critic", [1, 3])
@pytest.mark.parametrize("conv_type", ["plain", "gated"])
def test_colour_images_train_with_a_grey_and_with_a_colour_critic(tmp_path, critic, conv_type):
    (tmp_path / "train").mkdir()
    write_every_format(tmp_path / "train", channels=3)
    config = tiny_config(
        tmp_path, *RGB, f"netD.input_dim={critic}", f"netG.conv_type={conv_type}",
        "netG.attention_mask=per_sample", "netG.output_clamp=leaky", "train.n_steps=2",
    )  # fmt: skip
    result = train(config)
    assert (result.step, dict(result.skipped)) == (2, {})
    weight = load_tensors(result.folder / "dis_00000002.pt")["localD"]
    assert weight["dis_conv_module.conv1.conv.weight"].shape[1] == critic


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_terms(train_folder) -> None:
    config = tiny_config(train_folder, "train.lr=1.0e+30", "train.snapshot_save_iter=100")
    with pytest.raises(TrainingError, match=r"not finite at step \d: .*wgan_d .*a lower train.lr"):
        train(config)
    assert steps_in(run_folder(config), "gen") == []


def test_weights_that_are_not_finite_are_not_saved(train_folder) -> None:
    config = tiny_config(
        train_folder, "train.lr=1.0e+38", "train.snapshot_save_iter=1", "train.n_critic=1"
    )
    with pytest.raises(TrainingError, match=r"not finite at step 1: select_l1 nan"):
        train(config)
    assert steps_in(run_folder(config), "gen") == []


def test_a_collapsed_training_stops_and_says_what_to_set(train_folder) -> None:
    config = tiny_config(
        train_folder,
        "train.critic=false",
        "train.lr=5.0",
        "train.n_steps=200",
        "train.select_crops=0",
    )
    with pytest.raises(
        TrainingError, match=r"The generator collapsed: at step \d+, \d+% .*init: he"
    ):
        train(config)


def test_bad_images_are_skipped_and_counted_or_stop_the_run(train_folder, caplog) -> None:
    broken = corrupt(train_folder / "train" / "1.png")
    write_image(train_folder / "train" / "black.png", torch.zeros(40, 40))
    result = train(tiny_config(train_folder, "train.n_steps=8", "train.select_crops=0"))
    assert set(result.skipped) == {broken, train_folder / "train" / "black.png"}
    assert "2 of 4 images were skipped" in caplog.text
    assert read_log(run_folder(tiny_config(train_folder)))[-1]["train/skipped_images"] == 2
    with pytest.raises(ImageError, match=r"(1|black)\.png.*train\.on_bad_image: skip"):
        train(tiny_config(train_folder, "train.on_bad_image=error", "expname=strict"))


def test_a_folder_of_black_images_is_an_error_and_no_endless_loop(tmp_path) -> None:
    write_image(tmp_path / "train" / "black.png", torch.zeros(40, 40))
    with pytest.raises(ImageError, match=r"None of the 1 training images .*whole image is black"):
        train(tiny_config(tmp_path))


def test_an_image_smaller_than_the_crop_is_enlarged(tmp_path) -> None:
    write_images(tmp_path / "train", n=1, size=(20, 50))
    assert train(tiny_config(tmp_path)).step == 4


def test_missing_and_empty_folders_are_named(tmp_path) -> None:
    with pytest.raises(ImageError, match=rf"folder {tmp_path / 'train'} does not exist"):
        train(tiny_config(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(ImageError, match=r"No image in .*train\. Expected files that end in \.png"):
        train(tiny_config(tmp_path))
    write_images(tmp_path / "train" / "patient1")
    with pytest.raises(ImageError, match=r"set data_with_subfolder: true"):
        train(tiny_config(tmp_path))
    with pytest.raises(ConfigError, match=r"train_data_path is not set.*--set train_data_path="):
        train(load_config(PicardConfig, None))


def test_steps_follow_from_epochs_as_published(train_folder) -> None:
    config = tiny_config(
        train_folder, "train.n_steps=none", "train.n_epochs=3", "train.batch_size=3"
    )
    assert train(config).step == 3  # 3 epochs * 3 images / 3 crops


def test_automatic_precision_is_resolved_and_recorded(train_folder) -> None:
    config = tiny_config(train_folder, "train.precision=auto", "train.max_rotation=20")
    train(config)
    saved = load_config(PicardConfig, run_folder(config) / "config.yaml").train
    expected = "bf16" if supports_bf16(torch.device("cpu")) else "fp32"
    assert saved.precision == expected
    assert saved.max_rotation == 20
    assert precision_of(config, torch.device("cuda")) == "tf32"


def test_caches_of_all_readers_take_half_of_the_memory_at_most(monkeypatch, caplog) -> None:
    monkeypatch.setattr("inpainter.training.memory_of", lambda _: 10 * 2**30)
    assert cache_of_each(1024, 5) == 1024
    assert caplog.messages == []
    assert cache_of_each(2048, 5) == 1024
    assert "train.cache_mb: 2048 in each of 5 processes" in caplog.text
