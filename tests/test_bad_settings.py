"""Settings that no run could mean are refused, and every documented value is accepted."""

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from common.cli import add_common_arguments, add_flags, flag_keys, load_from_arguments
from common.config import ConfigError, build, config_to_yaml, load_config, read_yaml
from common.config_types import kinds_of, leaf_types, may_be_none
from common.datasets import DATASET_NAMES
from common.devices import RuntimeSetupError
from dia.settings import ContrastiveConfig, DiaConfig
from dia.shifts import SHIFT_NAMES
from diffusion_models.settings import DdpmConfig
from inpainter.prediction import PredictionOptions, predict
from inpainter.settings import PicardConfig
from inpainter.snapshots import run_folder
from inpainter.training import train
from tests.tiny_runs import TRAIN, as_flags, run_script

PROGRAMS = (PicardConfig, DiaConfig, DdpmConfig)
SHIFTS = {"contrastive.shift_trans_type": "rotation"}
"""What the modes with shifts need."""


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@cache
def parser_of(cls: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, cls)
    add_flags(parser, cls)
    return parser


def parsed(cls: type, *words: str) -> argparse.Namespace:
    return parser_of(cls).parse_args(words)


def get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def element_kinds(annotation: Any) -> Iterator[Any]:
    """The kinds of value that a setting holds, those in its lists included, without rules."""
    for kind in kinds_of(annotation):
        if get_origin(kind) is tuple:
            items = (item for item in get_args(kind) if item is not Ellipsis)
            yield from (inner for item in items for inner in kinds_of(item))
        else:
            yield kind


# --- YAML means what was written ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset_name: 010", "dataset_name: .*Write it in quotes: '010'"),
        ("dataset_name: 1.10", "got 1.10. Write it in quotes: '1.10'"),
        ("dataset_name: 1:30", "Write it in quotes: '1:30'"),
        ("dataset_name: 2024-01-31", "Write it in quotes: '2024-01-31'"),
        ("dataset_name: no", "Write it in quotes: 'no'"),
        ("dataset_name: 1e4", "Write it in quotes: '1e4'"),
        ("seed: 0042", "seed: expected a whole number, got '0042'. Write 42"),
        ("seed: 1_000", "'1_000'. Write 1000"),
        ("seed: 0x10", "'0x10'. Write 16"),
        ("seed: 0b11", "'0b11'. Write 3"),
        ("seed: 1:30", "seed: expected a whole number, got '1:30'"),
        ("seed: off", "seed: expected a whole number, got 'off'"),
        ("seed:", "seed: expected a whole number, got nothing"),
        ("train: {lr: 1e-4}", "'1e-4', which YAML reads as text. Write 1.0e-4"),
        ("train: {lr: -00.5}", "Write -0.5"),
        ("seed: !!int ''", "line 1, column 7: the tag !!int is not understood"),
        ("seed: !!float ''", "the tag !!float is not understood"),
        ("cuda: !!bool maybe", "the tag !!bool is not understood"),
        ("seed: !!timestamp foo", "the tag !!timestamp is not understood"),
        ("seed: !!python/object/apply:os.getcwd []", "the tag !!python/object.* not understood"),
        ("gpu_ids: &a [0]\ntest: *a", "line 2, column 7: the alias"),
        ("<<: {seed: 1}", "unknown key '<<'"),
        ("? [seed]\n: 1", "a key must be a name"),
        ("7: 1", "unknown key '7'"),
        ("seed: 1\nseed: 2", "line 2 gives the key 'seed' a second time"),
        (
            "train.lr: 1.0\ntrain: {lr: 1.0}",
            "train.lr is given twice: as train.lr, and as lr below",
        ),
        ("seed: 1\n---\nseed: 2", "single document"),
        ("train:\n\tlr: 1.0", "line 2.*indent with blanks, not tabs"),
        ("seed: 1\x00", "character 0x0 at position 7 is not allowed"),
        (
            'expname: "a\\0b"',
            "expname: names a folder: .* no slash, backslash or control character",
        ),
        ('expname: "\\udcff"', "expname: names a folder"),
        ('train_data_path: "a\\0b"', "train_data_path: a path must be text .*control characters"),
        (f"seed: {'9' * 400}", r"seed: expected a whole number, got '9+\.\.\. \(402 characters\)"),
        (f"train: {{lr: {'9' * 400}.0}}", "train.lr: expected a number, got 'a number|inf"),
    ],
)
def test_what_yaml_readers_disagree_on_is_named_as_written(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(PicardConfig, written(tmp_path / "x.yaml", text))
    assert str(raised.value).startswith(str(tmp_path / "x.yaml"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("seed: 1".encode("utf-16"), "is written in UTF-16; save it as UTF-8"),
        ("seed: 1\nexpname: é".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
        (b"#" * 2**20, "at most 128 KiB"),
    ],
)
def test_other_encodings_and_huge_files_are_refused(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "x.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load_config(PicardConfig, tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("\ufeffseed: 3", "seed", 3),
        ("seed: +5", "seed", 5),
        ("train: {lr: .5}", "train.lr", 0.5),
        ("train: {lr: 1.0e-05}", "train.lr", 1e-5),
        ("cuda: off", "cuda", False),
        ("cuda: Yes", "cuda", True),
        ("test: {refine: off}", "test.refine", "off"),
        ('test: {refine: "off"}', "test.refine", "off"),
        ("test: {refine: 4}", "test.refine", 4),
        ("dataset_name: '010'", "dataset_name", "010"),
        ("dataset_name: ~", "dataset_name", None),
        ("train.lr: 1.0", "train.lr", 1.0),
    ],
)
def test_what_is_clear_is_read(tmp_path: Path, text: str, key: str, value: Any) -> None:
    config = load_config(PicardConfig, written(tmp_path / "x.yaml", text))
    assert get(config, key) == value


@pytest.mark.parametrize("name", ["010", "1e4", "0o17", "on", "2024-01-31", "1:30", "~", "a: b"])
def test_typed_names_are_text_and_survive_being_written(tmp_path: Path, name: str) -> None:
    config = load_config(PicardConfig, None, [f"expname={name}"])
    assert config.expname == name
    path = written(tmp_path / "x.yaml", config_to_yaml(config))
    assert load_config(PicardConfig, path) == config


BOMBS = {
    "maps": "a0: &a0 {x: 1}\n"
    + "".join(
        f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(4))}}}\n" for i in range(1, 30)
    ),
    "lists": "a0: &a0 [x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "deep": "gpu_ids: " + "[" * 50_000,
    "deep sections": "".join(f"{' ' * i}a:\n" for i in range(400)),
    "many values": f"gpu_ids: [{'1,' * 50_000}]",
    "one long word": f"expname: {'x' * 100_000}",
    "long key": f"{'x' * 1000}: 1",
    "long list": f"gpu_ids: [{'1,' * 1500}]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_multiplies_nests_or_goes_on_and_on_is_refused_in_a_short_line(
    tmp_path: Path, name: str
) -> None:
    path = written(tmp_path / "config.yaml", BOMBS[name])
    started = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        load_config(PicardConfig, path)
    assert time.monotonic() - started < 600
    assert len(str(raised.value)) < len(str(path)) + 500


def test_any_record_is_read_as_plain_values(tmp_path: Path) -> None:
    text = "a: 010\nb: 2024-01-31\nc: [1, 2.5, true, null, '7']\nd: {e: off}\n"
    expected = {"a": "010", "b": "2024-01-31", "c": [1, 2.5, True, None, "7"], "d": {"e": "off"}}
    assert read_yaml(written(tmp_path / "config.yaml", text)) == expected


# --- The command line ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=0042", "--set seed=0042: seed: expected a whole number, got '0042'. Write 42"),
        ("seed=!!bool maybe", "--set seed=.*: .*the tag !!bool is not understood"),
        (f"gpu_ids={'[' * 2000}", "--set gpu_ids=.*: .*nested more than 20 deep"),
        ("gpu_ids=[[0]]", r"gpu_ids\[0\]: expected a whole number, got \[0\]"),
        ("checkpoints_dir=", "checkpoints_dir: expected text, got nothing"),
        ("checkpoints_dir=~no-such-user/x", "no home folder is known for '~no-such-user/x'"),
        ("test.refine=on", "test.refine: .*one of off, got 'on'"),
    ],
)
def test_set_is_as_strict_as_a_file(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(PicardConfig, None, [override])
    assert len(str(raised.value)) < 400


def test_refused_set_names_itself_alone() -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(PicardConfig, None, ["expname=first", "train.lr=0", "cuda=false"])
    assert str(raised.value).startswith("--set train.lr=0: train.lr: must be in [1e-12, 1e+38]")
    assert "first" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs: contrastive.epochs: must be >= 1, got 0"),
        (["--epochs", "0100"], "--epochs: .*got '0100'. Write 100"),
        (["--lr_init", "1_0.5"], "--lr_init: .*got '1_0.5'. Write 10.5"),
        (["--temperature", "nan"], "--temperature: .*expected a number"),
        (["--ood_score", "csi"], r"--ood_score: .*Did you mean 'CSI'\?"),
        (["--ood_score"], "--ood_score: evaluation.ood_score: needs one or more"),
        (["--suffix", "../x"], "--suffix: contrastive.suffix: names a folder"),
    ],
)
def test_refused_flag_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_from_arguments(DiaConfig, parsed(DiaConfig, *words))


def test_refused_setting_ends_the_program_in_one_line(tmp_path: Path) -> None:
    done = run_script(TRAIN, *as_flags(["train.batch_size=1000000000000"]), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "train.batch_size: must be <= 65536, got 1000000000000" in done.stderr


# --- Every documented value is accepted where it is documented ---


def documented_values() -> Iterator[tuple[type, str, str, Any]]:
    """Yields (settings class, dotted key, value as written, value)."""
    for cls in PROGRAMS:
        for key, annotation in leaf_types(cls).items():
            for kind in element_kinds(annotation):
                many = kind not in kinds_of(annotation)  # in a list
                for choice in get_args(kind) if get_origin(kind) is Literal else ():
                    yield cls, key, f"[{choice}]" if many else choice, (choice,) if many else choice
                if kind is bool:
                    yield from ((cls, key, str(value).lower(), value) for value in (True, False))
            if may_be_none(annotation):
                yield cls, key, "none", None
            if key == "data.dataset":
                yield from ((cls, key, name, name) for name in DATASET_NAMES)
            if key == "device":
                yield from ((cls, key, name, name) for name in ("auto", "cpu", "cuda:1", "mps"))
    for name in SHIFT_NAMES:
        yield DiaConfig, "contrastive.shift_trans_type", name, name


NOT_IMPLEMENTED = {("train.mask_type", "mosaic")}
"""Named by the published file, refused with the reason."""
NEEDED = {
    "contrastive.mode": SHIFTS,
    "test.heatmap_sign": {"test.heatmap_type": "averaged_hole"},
}
"""What values of these keys are accepted with alone."""


@pytest.mark.parametrize(
    ("cls", "key", "text", "value"),
    [v for v in documented_values() if v[1:3] not in NOT_IMPLEMENTED],
)
def test_documented_value_is_accepted_in_files_with_set_and_as_a_flag(
    tmp_path: Path, cls: type, key: str, text: str, value: Any
) -> None:
    before = NEEDED.get(key, {})
    sets = [f"{name}={given}" for name, given in before.items()]
    section, _, name = key.rpartition(".")
    line = f"{section}:\n  {name}: {text}\n" if section else f"{name}: {text}\n"
    path = written(tmp_path / "x.yaml", line)
    assert get(load_config(cls, path, sets), key) == value
    assert get(load_config(cls, None, [*sets, f"{key}={text}"]), key) == value
    if cls is not PicardConfig and name in flag_keys(cls):
        words = [f"--{name}", *text.strip("[]").split()]
        if leaf_types(cls)[key] is bool:
            words = [f"--{name}" if value else f"--no-{name}"]
        assert get(load_from_arguments(cls, parsed(cls, *as_flags(sets), *words)), key) == value


# --- Every number has a range ---


def numeric_places() -> Iterator[tuple[type, str, int | None]]:
    """Yields (settings class, dotted key, place in a list or none) of every number."""
    for cls in PROGRAMS:
        for key, annotation in leaf_types(cls).items():
            if not {int, float} & set(element_kinds(annotation)):
                continue
            value = get(cls(), key)
            yield from (
                (cls, key, i) for i in (range(len(value)) if type(value) is tuple else [None])
            )


@pytest.mark.parametrize(("cls", "key", "place"), list(numeric_places()))
def test_every_number_refuses_what_is_below_its_range_not_finite_or_absurd(
    cls: type, key: str, place: int | None
) -> None:
    for bad in (-1, math.nan, math.inf, -math.inf, 10**39, 10**400):
        value: Any = bad
        if place is not None:
            value = list(get(cls(), key))
            value[place] = bad
        with pytest.raises(ConfigError) as raised:
            build(cls, {key: (value, "settings")}, "settings")
        assert raised.value.key.partition("[")[0] == key
        assert len(str(raised.value)) < 300


def sections() -> Iterator[tuple[type, str]]:
    for cls in PROGRAMS:
        for field in dataclasses.fields(cls):
            value = getattr(cls(), field.name)
            if dataclasses.is_dataclass(value):
                yield from ((type(value), inner.name) for inner in dataclasses.fields(value))


@pytest.mark.parametrize(("cls", "name"), dict.fromkeys(sections()))
def test_numbers_are_refused_without_a_file_too(cls: type, name: str) -> None:
    kinds = set(element_kinds(leaf_types(cls)[name]))
    value = getattr(cls(), name)
    if not {int, float} & kinds:
        assert cls(**{name: value}) == cls()
    else:
        bad = (-1,) * len(value) if type(value) is tuple else -1
        with pytest.raises(ConfigError, match=name):
            cls(**{name: bad})


@pytest.mark.parametrize(
    ("cls", "override"),
    [
        *((PicardConfig, text) for text in (
            "train.lr=0", "train.lr=1.0e-320", "train.grad_clip_norm=1.0e-300",
            "train.grad_clip_norm=0", "wgan_gp_lambda=-5.0", "coarse_l1_alpha=-1.0",
            "train.batch_size=100000", "train.n_steps=0", "netG.ngf=1000000", "netG.ngf=0",
            "netD.ndf=100000000000", "train.select_crops=1000000000000",
            "train.image_shape=[1600000000, 32, 1]", "netG.dilations=[0, 1, 1, 1]",
            "train.max_scale=0.5", "train.max_rotation=200", "train.subset_frac=0",
            "test.heatmap_M_inpaint=1000000000", "test.refine=1", "test.parallel_batchsize=0",
            "seed=9223372036854775808", "gpu_ids=[]", "gpu_ids=[-1]", "device=cuda:x",
            "train.init=He", "expname=..", "expname=a/b", "dataset_name=/tmp", "expname=.x",
            "expname=a\\b", "expname= ", "dataset_name=''",
        )),
        *((DiaConfig, f"contrastive.{text}") for text in (
            "width=0", "width=-8", "width=100000000", "simclr_dim=-3", "simclr_dim=100000000000",
            "kernel_size=0", "kernel_size=6", "sim_lambda=-1.0", "simsiam_lambda=-1.0",
            "weight_decay=1.0e+300", "val_fraction=1.0", "val_fraction=0.0", "lr_init=0",
            "temperature=0", "warmup=1001", "diffusion_offset=2.0", "diffusion_upper_offset=9999",
            "resize_factor=0", "suffix=../../x", "epochs=0",
        )),
        *((DiaConfig, text) for text in (
            "evaluation.bootstrap_samples=1000000000000", "evaluation.ood_samples=1000000000",
            "evaluation.ood_layer=[]", "evaluation.ood_score=[]", "evaluation.ood_dataset=[]",
            "data.resize_to=100000000", "data.resize_to=7", "data.dataset=kvasr", "device=tpu",
        )),
        *((DdpmConfig, f"diffusion.{text}") for text in (
            "train_lr=0", "clip_norm=0", "clip_norm=-1", "image_size=100000000", "image_size=0",
            "dim=8000000", "dim=12", "dim_mults=[0]", "dim_mults=[-1, 2]", "dim_mults=[]",
            "timesteps=1000000000000", "timesteps=50", "num_samples=1000000000",
            "gradient_accumulate_every=1000000000000000", "strip_steps=[]", "strip_steps=[1000]",
            "steps=1000", "sampling_timesteps=1001", "adam_betas=[0.9, 1.0]", "ema_decay=1.0",
            "ratio=0",
        )),
    ],
)  # fmt: skip
def test_senseless_setting_is_refused_by_key(cls: type, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load_config(cls, None, [override])


def test_warm_up_longer_than_the_run_is_refused_or_said() -> None:
    with pytest.raises(ConfigError, match=r"more than the run, train.n_steps = 600, got 601"):
        load_config(PicardConfig, None, ["train.n_steps=600", "train.warmup_steps=601"])
    assert load_config(PicardConfig, None, ["train.n_steps=2", "train.warmup_steps=500"])
    with pytest.raises(ConfigError, match=r"more than contrastive.epochs = 20, got 21"):
        ContrastiveConfig(epochs=20, warmup=21)
    (warning,) = DiaConfig(contrastive=ContrastiveConfig(epochs=1)).warnings()
    assert "the learning rate never reaches its peak" in warning


def test_two_names_of_one_setting_that_differ_are_said() -> None:
    file_and_flag = ["data.one_class_idx=0", "diffusion.on_label=1"]
    config = load_config(DdpmConfig, None, file_and_flag)
    assert config.warnings() == ["on_label is 1 and one_class_idx 0: class 1 is trained on"]
    assert load_config(DdpmConfig, None, ["data.one_class_idx=0"]).warnings() == []


# --- Devices and folders ---


def test_first_of_gpu_ids_is_the_gpu_of_training_and_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = load_config(PicardConfig, None, ["gpu_ids=[5, 0]"])
    with pytest.raises(RuntimeSetupError, match="GPU 5 was asked for"):
        train(config)
    with pytest.raises(RuntimeSetupError, match="GPU 5 was asked for"):
        predict(config, PredictionOptions(tmp_path))


def test_home_folder_is_meant_by_a_tilde_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = written(tmp_path / "x.yaml", "checkpoints_dir: ~/runs\ndataset_name: a")
    assert run_folder(load_config(PicardConfig, path)) == tmp_path / "runs/a/hole_PICARD-train"
