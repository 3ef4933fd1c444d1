"""The benchmark of the heatmap engines."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.heatmap_stages import stage_seconds
from benchmarks.heatmap_subject import (
    METRICS,
    Subject,
    random_networks,
    random_settings,
    trained_subject,
)
from benchmarks.published_heatmap import PublishedScorer
from common.config import ConfigError
from common.images import ImageError
from inpainter.completion import WindowScorer
from inpainter.fast.scorer import FastScorer
from tests.inpainter.fast_tools import worst_error
from tests.tiny_runs import run_script, with_test, write_images

CPU = torch.device("cpu")
CONFIG = random_settings(window=32, M=2, ngf=4)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder with the networks of step 7, and three images in `images`."""
    generator, critic = random_networks(CONFIG, 1.3, CPU)
    torch.save(generator.state_dict(), tmp_path / "gen_00000007.pt")
    torch.save({"localD": critic.state_dict()}, tmp_path / "dis_00000007.pt")
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    return tmp_path


def trained(checkpoint: Path, count: int = 3, config=CONFIG) -> Subject:
    return trained_subject(config, (checkpoint, "latest"), checkpoint / "images", 1, count, CPU)


def test_all_engines_score_windows_of_images_by_trained_weights_alike(checkpoint) -> None:
    subject = trained(checkpoint)
    assert [tuple(batch.shape) for batch in subject.batches] == [(1, 1, 32, 32)] * 3
    plain, fast, published = (
        engine(*subject.parts())(subject.batches[1], subject.masks(1, 3))
        for engine in (WindowScorer, FastScorer, PublishedScorer)
    )
    assert set(plain) == set(METRICS)
    assert worst_error(plain, fast) < 1e-5
    assert worst_error(plain, published) < 1e-5


def test_every_stage_is_timed(checkpoint) -> None:
    subject = trained(checkpoint)
    stages = {"coarse", "fine", "attention", "critic", "rest"}
    published = stage_seconds(subject, PublishedScorer(*subject.parts()))
    fast = stage_seconds(subject, FastScorer(*subject.parts()))
    assert set(published) == stages
    assert set(fast) == stages | {"prepare"}
    assert all(seconds > 0 for seconds in [*published.values(), *fast.values()])


def test_refuses_settings_and_images_that_it_cannot_compare(checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"test\.droprate > 0"):
        trained(checkpoint, config=with_test(CONFIG, droprate=0.0))
    with pytest.raises(ImageError, match="3 windows with tissue; lower --pairs"):
        trained(checkpoint, count=4)


@pytest.mark.slow
def test_command_prints_its_tables_and_writes_the_numbers(tmp_path) -> None:
    file = tmp_path / "speed.json"
    done = run_script(
        "benchmarks/heatmap_speed.py", "--window", 32, "--M", 2, "--ngf", 4, "--pairs", 1,
        "--threads", 1, "--image", 96, 128, "--json", file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert results["max_rel_error"] < 1e-4
    names = ("ratio_fp32", "ratio_bf16", "conv_peak_share", "peak_memory_gib")
    assert all(results[name] > 0 for name in names)
    assert 0 < results["completed"] < results["windows"]
    assert set(results["stages"]) == {"published", "fp32", "bf16"}
    assert "peak memory of a 96x128 image" in done.stdout
