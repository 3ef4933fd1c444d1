"""Every choice that a setting offers runs: trainings, prediction and evaluation at their smallest.

The choices are read from the settings classes, so a new one is run, too.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from common.config import ConfigError, load_config
from common.config_types import leaf_types
from dia.evaluation import evaluate
from dia.settings import BANK_SCORES, DiaConfig, OodScore
from dia.shifts import SHIFT_NAMES
from dia.training import train as train_dia
from diffusion_models import training as ddpm
from diffusion_models.pictures import draw_dissolved, draw_samples
from diffusion_models.settings import DdpmConfig
from inpainter.prediction import PredictionOptions, predict
from inpainter.settings import Metric, PicardConfig
from inpainter.snapshots import run_folder
from inpainter.training import train
from tests.test_shipped_defaults import write_tree
from tests.tiny_runs import heatmaps_in, settings, write_images

pytestmark = pytest.mark.usefixtures("one_thread")
Row = dict[str, Any]
NOT_HERE = {
    "test.compile": "needs a C++ compiler and half a minute; tests/inpainter/test_fast_sharing.py",
    "train.compile": "needs the same; tests/test_training_options.py compiles quickly",
    "compile": "the same",
    "cuda": "changes nothing on a CPU; tests/common/test_devices.py",
    "train.mask_type": "mosaic is refused; tests/inpainter/test_settings.py",
}
SMALL_DDPM = {
    "diffusion.image_size": 32,  # dilation begins there
    "diffusion.dim": 8,
    "diffusion.dim_mults": [1, 2],
    "diffusion.timesteps": 400,
    "diffusion.strip_steps": [0, 50],
    "diffusion.ddpm_batch_size": 2,
    "diffusion.gradient_accumulate_every": 1,
    "diffusion.train_num_steps": 1,
    "diffusion.save_every": 1,
    "diffusion.sampling_timesteps": 1,
    "diffusion.num_samples": 1,
}
SMALL_DIA = {
    "contrastive.epochs": 1,
    "contrastive.max_batches": 1,
    "contrastive.batch_size": 2,
    "contrastive.diff_resolution": 32,
    "contrastive.kernel_size": 3,
    "contrastive.lr_init": 1.0e-4,
    "evaluation.ood_samples": 1,
    "evaluation.select_ood_samples": 1,
    "evaluation.bootstrap_samples": 10,
    "evaluation.heatmap_patch": 0.5,
    "evaluation.heatmap_step": 1.0,
}
N_PARTS = 4
"""In which DIA's choices run, for processes that share the tests out."""
COSTLY = ("contrastive.model", "evaluation.heatmaps", "evaluation.report")


def choices_of(cls: type) -> dict[str, tuple[Any, ...]]:
    """Dotted key -> values of every setting that offers some: texts and switches."""
    found = {
        key: (False, True) if annotation is bool else get_args(annotation)
        for key, annotation in leaf_types(cls).items()
        if annotation is bool or get_origin(annotation) is Literal
    }
    return {key: values for key, values in found.items() if key not in NOT_HERE}


def covering_rows(
    choices: dict[str, tuple[Any, ...]], valid: Callable[[Row], bool], once: tuple[str, ...] = ()
) -> list[Row]:
    """Few combinations in which every choice occurs, mixed at random with a fixed seed.

    once: settings whose first value, the cheapest, is taken where all others have occurred. Not
    always one that is missing: the last two missing may not go together.
    """
    numbers = random.Random(3)
    missing = {(key, value) for key, values in choices.items() for value in values}
    rows: list[Row] = []
    for _ in range(5000):
        row = {
            key: numbers.choice(
                [v for v in values if (key, v) in missing and numbers.random() < 0.8]
                or (values[:1] if key in once else values)
            )
            for key, values in choices.items()
        }
        if missing and valid(row):
            rows.append(row)
            missing -= set(row.items())
    assert missing == set(), "no combination with these is accepted"
    return rows


def texts(row: Row) -> list[str]:
    """A combination as key=value texts; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in row.items()]


def accepted(cls: type, *before: str) -> Callable[[Row], bool]:
    """Whether the settings class takes a combination."""

    def valid(row: Row) -> bool:
        try:
            load_config(cls, None, [*before, *texts(row)])
        except ConfigError:
            return False
        return True

    return valid


def test_every_choice_of_picard_trains_and_predicts(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", n=1, size=(40, 48))
    choices = choices_of(PicardConfig) | {"test.refine": ("off", 2)}
    metrics = f"test.heatmap_metrics={json.dumps(get_args(Metric))}"
    small = settings(tmp_path, metrics, "train.n_steps=2", "train.snapshot_save_iter=2")
    for number, row in enumerate(covering_rows(choices, accepted(PicardConfig, *small))):
        row = {"expname": f"row{number}", **row, "test.save_heatmap_data": True}
        config = load_config(PicardConfig, None, [*small, *texts(row)])
        assert train(config).step == 2, row
        output = tmp_path / f"heatmaps{number}"
        result = predict(config, PredictionOptions(run_folder(config), output_dir=output))
        assert result.finished == ["0.png"], row
        for metric in get_args(Metric):
            (heatmap,) = heatmaps_in(output, metric).values()
            assert heatmap.shape == (40, 48), row
            assert heatmap.isfinite().all(), row


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("every_choice")
    write_tree(root)
    return root


def data(root: Path) -> list[str]:
    small = ("data.dataset=kvasir", "data.resize_to=32", "data.one_class_idx=0", "device=cpu")
    return [*small, f"data.data_root={root}"]


def test_every_choice_of_the_diffusion_program_trains_and_draws(
    images: Path, tmp_path: Path
) -> None:
    small = [*data(images), *texts(SMALL_DDPM)]
    rows = covering_rows(choices_of(DdpmConfig), accepted(DdpmConfig, *small))
    for number, row in enumerate(rows):
        folder = tmp_path / str(number)
        chosen = [*small, *texts(row), f"diffusion.output_dir={folder}"]
        assert ddpm.train(load_config(DdpmConfig, None, chosen)).step == 1, row
        chosen += [f"diffusion.state_dict_path={folder / 'model-1.pt'}"]
        config = load_config(DdpmConfig, None, chosen)
        for path in (*draw_dissolved(config), *draw_samples(config)):
            assert path.is_file(), row


@pytest.fixture(scope="module")
def model(images: Path, tmp_path_factory) -> Path:
    """A diffusion model to dissolve with."""
    folder = tmp_path_factory.mktemp("ddpm")
    given = [*data(images), *texts(SMALL_DDPM), f"diffusion.output_dir={folder}"]
    ddpm.train(load_config(DdpmConfig, None, given))
    return folder / "model-1.pt"


@pytest.mark.parametrize("part", range(N_PARTS))
def test_every_choice_of_dia_trains_and_evaluates(
    images: Path, model: Path, part: int, tmp_path: Path
) -> None:
    small = [*data(images), *texts(SMALL_DIA), f"contrastive.diffusion_model_path={model}"]
    choices = choices_of(DiaConfig) | {"contrastive.shift_trans_type": SHIFT_NAMES}
    choices |= {"contrastive.width": (8, 64)}  # of the small-image encoders, and of the others
    fits = accepted(DiaConfig, *small)

    def valid(row: Row) -> bool:
        imagenet = "imagenet" in row["contrastive.model"]
        return (row["contrastive.width"] == 64) == imagenet and fits(row)

    rows = list(enumerate(covering_rows(choices, valid, once=COSTLY)))
    assert len(rows) > N_PARTS
    for number, row in rows[part::N_PARTS]:
        run = tmp_path / f"run{number}"
        chosen = [*small, *texts(row), f"contrastive.run_dir={run}"]
        assert train_dia(load_config(DiaConfig, None, chosen)).epoch == 1, row
        chosen += [f"contrastive.load_path={run / 'last.model'}"]
        if row["contrastive.mode"] == "simclr":  # its encoder tells no shifts apart
            chosen += ["contrastive.shift_trans_type=none"]
        for mode, scores in modes_of(number, len(rows)).items():
            config = load_config(DiaConfig, None, [*chosen, f"evaluation.ood_score={scores}"])
            assert "Written to" in evaluate(config, mode, []).text, row
        shutil.rmtree(run)  # the larger encoders' are half a gigabyte


def modes_of(number: int, n_rows: int) -> dict[str, str]:
    """What is evaluated of a row: the published score; of the last row everything."""
    if number < n_rows - 1:
        return {"ood_pre": '["CSI"]'}
    others = [score for score in get_args(OodScore) if score not in BANK_SCORES]
    modes = {"ood_pre": json.dumps(BANK_SCORES), "ood": json.dumps(others)}
    return modes | dict.fromkeys(("test_acc", "test_marginalized_acc"), '["CSI"]')
