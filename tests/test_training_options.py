"""What the three trainings share: 16 bits, compiling, profiles."""

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from dia.settings import DiaConfig
from dia.training import train as train_encoder
from diffusion_models.settings import DdpmConfig
from diffusion_models.training import train as train_diffusion
from inpainter.training import train
from tests.tiny_dia import tiny_contrastive, tiny_diffusion, write_normals
from tests.tiny_runs import read_log, tiny_config, write_images

pytestmark = pytest.mark.usefixtures("one_thread")


def picard(folder: Path, precision: str, compiled: bool, **options: bool) -> Path:
    write_images(folder / "train")
    more = (f"train.precision={precision}", f"train.compile={compiled}".lower())
    return train(tiny_config(folder, *more), **options).folder


def diffusion(folder: Path, precision: str, compiled: bool, **options: bool) -> Path:
    settings = tiny_diffusion(folder / "run", train_num_steps=4, save_every=4, log_every=1)
    common = {"device": "cpu", "precision": precision, "compile": compiled}
    config = DdpmConfig(data=write_normals(folder / "data"), diffusion=settings, **common)
    return train_diffusion(config, **options).folder


def encoder(folder: Path, precision: str, compiled: bool, **options: bool) -> Path:
    settings = tiny_contrastive(folder / "run", epochs=2, lr_init=0.01)
    common = {"device": "cpu", "precision": precision, "compile": compiled}
    config = DiaConfig(data=write_normals(folder / "data"), contrastive=settings, **common)
    return train_encoder(config, **options).folder


def values(run: Path, *names: str) -> list[float]:
    """Those of the names that the lines of a run's log have."""
    return [line[f"train/{n}"] for line in read_log(run) for n in names if f"train/{n}" in line]


@pytest.mark.parametrize("training", [picard, diffusion, encoder])
def test_losses_in_16_bits_are_near_those_in_32(training, tmp_path: Path, caplog) -> None:
    exact = values(training(tmp_path / "fp32", "fp32", False), "l1", "loss")
    assert len(exact) > 1
    for precision in ("bf16", "fp16"):
        run = training(tmp_path / precision, precision, False)
        rounded = values(run, "l1", "loss")
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=0.05)
        assert bool(values(run, "loss_scale")) == (precision == "fp16")


@pytest.mark.parametrize("training", [picard, diffusion, encoder])
def test_compiling_changes_no_loss(training, tmp_path: Path, monkeypatch) -> None:
    compiled: list[str] = []

    def compile_quickly(module: torch.nn.Module, dynamic: bool) -> None:
        compiled.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(
            module._call_impl, backend="eager", dynamic=dynamic
        )

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    runs = [training(tmp_path / str(choice), "fp32", choice) for choice in (False, True)]
    assert len(compiled) == 1
    plain, fast = (values(run, "l1", "loss") for run in runs)
    assert fast == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("training", [picard, diffusion, encoder])
def test_profile_is_written_and_says_what_took_longest(training, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    run = training(tmp_path, "fp32", False, profile=True)
    trace = json.loads(gzip.decompress((run / "profile.json.gz").read_bytes()))
    assert any("conv" in str(event.get("name")) for event in trace["traceEvents"])
    (line,) = (record.getMessage() for record in caplog.records if "Profile" in record.getMessage())
    assert str(run / "profile.json.gz") in line
    assert "%" in line.partition("Longest:")[2]
