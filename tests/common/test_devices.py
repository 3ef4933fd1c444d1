"""Devices, their precision, and evaluation mode."""

import pytest
import torch
from torch import nn

from common.devices import RuntimeSetupError, eval_mode, resolve_device, tf32_products
from common.training import joined_training
from dia.settings import DiaConfig
from diffusion_models.settings import DdpmConfig
from tests.tiny_runs import NEEDS_GPU


def test_cpu_is_always_there():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto", allow_gpu=False) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "auto:1", ""])
def test_unknown_device_is_refused_with_the_names_there_are(name):
    with pytest.raises(RuntimeSetupError, match=f"'{name}'. Expected auto, cpu, cuda"):
        resolve_device(name)


def test_gpu_number_beyond_those_there_is_refused():
    with pytest.raises(RuntimeSetupError, match=r"sees no GPU|GPU 99 was asked for"):
        resolve_device("cuda:99")


@NEEDS_GPU
def test_auto_takes_the_gpu_of_the_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda") == torch.device("cuda", 0)


def test_evaluating_restores_the_flag_of_every_submodule():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1)))
    module[1][0].eval()
    before = [m.training for m in module.modules()]
    with eval_mode(module) as inside:
        assert not any(m.training for m in inside.modules())
    assert [m.training for m in module.modules()] == before == [True, True, True, False, True]


def fail_while_evaluating(module: nn.Module) -> None:
    with eval_mode(module):
        raise KeyError("inside")


def test_evaluating_restores_the_flags_after_an_error():
    module = nn.Dropout()
    with pytest.raises(KeyError, match="inside"):
        fail_while_evaluating(module)
    assert module.training


@pytest.mark.parametrize("config", [DiaConfig, DdpmConfig])
@pytest.mark.parametrize(("precision", "rounds"), [("fp32", False), ("tf32", True)])
def test_products_are_rounded_to_tf32_only_where_it_is_asked_for(config, precision, rounds) -> None:
    with tf32_products(not rounds):
        with joined_training(config(device="cpu", precision=precision)):
            assert torch.backends.cudnn.allow_tf32 is rounds
            assert torch.backends.cuda.matmul.allow_tf32 is rounds
        assert torch.backends.cudnn.allow_tf32 is not rounds
