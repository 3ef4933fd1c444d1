from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError
from inpainter.networks.loading import load_local_critic
from inpainter.settings import CriticConfig, PicardConfig, TestConfig
from tests.inpainter.weights import small_critic

CONFIG = PicardConfig(
    test=TestConfig(patch_shape=(64, 64, 1), mask_shape=(32, 32)), netD=CriticConfig(ndf=4)
)


def save(folder: Path, content: dict) -> None:
    torch.save(content, folder / "dis_00000001.pt")


def test_critic_of_the_given_settings_loads(tmp_path: Path) -> None:
    critic = small_critic((32, 32))
    save(tmp_path, {"localD": critic.state_dict(), "globalD": {}})
    loaded = load_local_critic(tmp_path, 1, CONFIG)
    assert all(
        torch.equal(a, b) for a, b in zip(critic.parameters(), loaded.parameters(), strict=True)
    )


def test_critic_of_other_settings_is_refused_with_both_values(tmp_path: Path) -> None:
    save(tmp_path, {"localD": small_critic((48, 32), channels=3).state_dict()})
    with pytest.raises(CheckpointError) as refusal:
        load_local_critic(tmp_path, 1, CONFIG)
    assert "netD.input_dim: checkpoint 3, settings 1" in str(refusal.value)
    assert "test.mask_shape, pixels / 256: checkpoint 6, settings 4" in str(refusal.value)


def test_a_file_without_a_local_critic_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"gen": {}})
    with pytest.raises(CheckpointError, match="no entry localD, found a dict of gen"):
        load_local_critic(tmp_path, 1, CONFIG)
