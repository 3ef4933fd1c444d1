"""Settings files and flags: what is read, and what is refused with which words."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from common.cli import add_common_arguments, load_from_arguments
from common.config import ConfigError, config_to_yaml, load_config, resolve_path
from common.config_types import PathText, require


@dataclass(frozen=True)
class Inner:
    """`inner:` a section."""

    size: tuple[int, int] = (2, 3)
    """Height, width in pixels."""
    names: tuple[Literal["a", "b"], ...] = ("a",)
    rate: float = 0.1
    limit: float | None = None

    def __post_init__(self) -> None:
        require(self.rate >= 0, "inner.rate", self.rate, "must be >= 0")


@dataclass(frozen=True)
class Outer:
    """A small settings file."""

    folder: PathText | None = None
    name: str | None = None
    count: int = 1
    """Things to count."""
    flip: bool = False
    step: int | str = "latest"
    device: str = "auto"
    seed: int = 0
    inner: Inner = field(default_factory=Inner)


def read(tmp_path: Path, text: str) -> Outer:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Outer, path)


def test_file_sets_what_it_names_and_leaves_the_rest_at_the_default(tmp_path: Path) -> None:
    config = read(tmp_path, "count: 4\ninner: {size: [5, 6], names: [b, a], rate: 2}\n")
    assert config == Outer(count=4, inner=Inner(size=(5, 6), names=("b", "a"), rate=2.0))
    assert isinstance(config.inner.rate, float)


@pytest.mark.parametrize("written", ["null", "none", "None", "~", ""])
def test_none_is_written_in_any_of_the_usual_ways(tmp_path: Path, written: str) -> None:
    assert read(tmp_path, f"inner:\n  limit: {written}\n").inner.limit is None
    assert load_config(Outer, None, [f"inner.limit={written}", f"name={written}"]).name is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: {siz: [1, 2]}", r"x.yaml: unknown key 'inner.siz'. Did you mean 'size'\?"),
        ("rate: 1.0", r"unknown key 'rate'. Did you mean 'inner.rate'\?"),
        ("zebra: 1", "unknown key 'zebra'. Known keys here: count, device, flip, folder"),
        ("count: 1.5", "count: expected a whole number, got 1.5"),
        ("count: 1e3", "count: .*'1e3', which YAML reads as text. Write 1000"),
        ("count: true", "count: expected a whole number, got true"),
        ("flip: 1", "flip: expected true or false, got 1"),
        ("name: 2023", "name: expected text or none, got 2023. Write it in quotes: '2023'"),
        ("inner: {rate: 1e-4}", "inner.rate: .*'1e-4', which YAML reads as text. Write 1.0e-4"),
        ("inner: {rate: 1.0e4}", r"Write 1.0e\+4"),
        ("inner: {rate: .nan}", "inner.rate: expected a number, got nan"),
        ("inner: {rate: null}", "inner.rate: expected a number, got nothing"),
        ("inner: {limit: abc}", "inner.limit: expected a number or none, got 'abc'"),
        (
            "inner: {size: [1, 2, 3]}",
            "inner.size: expected a list of 2, each a whole number, got 3",
        ),
        ("inner: {size: 4}", "inner.size: expected a list of 2"),
        ("inner: {size: [1, x]}", r"inner.size\[1\]: expected a whole number, got 'x'"),
        ("inner: {names: [aa]}", r"names\[0\]: expected one of a, b, got 'aa'. Did you mean 'a'\?"),
        ("inner:", "x.yaml: inner is empty"),
        ("inner: 3", "x.yaml: inner is a section, got 3"),
        ("inner: {rate: -1.0}", r"x.yaml: inner.rate: must be >= 0, got -1.0"),
        ("count: 1\ninner: {rate: 1.0}\ncount: 2", "line 3 gives the key 'count' a second time"),
        ("inner:\n  rate: 1.0\n  rate: 2.0", "line 3 gives the key 'rate' a second time"),
        ("- 1", "x.yaml: holds one list; expected lines of `key: value`"),
        ("", "x.yaml: is empty"),
        ("count: [1", "x.yaml: not valid YAML: .*"),
        ("count: !!python/object/apply:os.getcwd []", "x.yaml: not valid YAML"),
    ],
)
def test_refusal_names_file_key_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_missing_file_is_named_with_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("count: 1")
    with pytest.raises(ConfigError, match=r"No settings file .*x.yaml. There is: .*other.yaml"):
        load_config(Outer, tmp_path / "x.yaml")


def test_error_carries_the_dotted_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, "inner: {rate: -1.0}")
    assert raised.value.key == "inner.rate"
    assert str(raised.value).startswith(f"{tmp_path / 'x.yaml'}: ")


def test_set_wins_over_the_file_and_the_last_one_over_all(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("inner: {rate: 1.0, size: [7, 8]}")
    config = load_config(Outer, path, ["inner.rate=2", "inner.rate=3.0", "inner.names=[b]"])
    assert config.inner == Inner(size=(7, 8), names=("b",), rate=3.0)


def test_set_repairs_a_combination_that_the_file_alone_could_not_have(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("inner: {rate: -1.0}")
    assert load_config(Outer, path, ["inner.rate=0"]).inner.rate == 0


def test_text_on_the_command_line_needs_no_quotes_for_yaml() -> None:
    config = load_config(Outer, None, ["name=2023", "step=5", "device=cuda:1"])
    assert (config.name, config.step, config.device) == ("2023", 5, "cuda:1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.rat=1", r"--set inner.rat=1: unknown key 'inner.rat'. Did you mean 'rate'\?"),
        ("inner.rate=1e-4", "--set inner.rate=1e-4: inner.rate: .*Write 1.0e-4"),
        ("inner=3", "--set inner=3: inner is a section"),
        ("count", "--set count: expected KEY=VALUE"),
        ("inner.rate=-2", "--set inner.rate=-2: inner.rate: must be >= 0"),
        ("inner.size=[1", r"--set inner.size=\[1: not valid YAML"),
    ],
)
def test_set_is_refused_as_a_file_is(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, [override])


@pytest.mark.parametrize("config", [Outer(), Outer(name="on", step="5", count=-2)])
def test_written_settings_read_back_equal(tmp_path: Path, config: object) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(type(config), path) == config


def test_typed_path_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Outer, None, ["folder=data/x"]).folder == str(tmp_path / "data" / "x")


def test_path_in_a_file_is_relative_to_the_repository(tmp_path: Path) -> None:
    assert resolve_path("configs", "folder") == Path(__file__).parents[2] / "configs"
    assert resolve_path("a/b", "folder", root=tmp_path) == tmp_path / "a" / "b"
    assert resolve_path("/a/b", "folder", root=tmp_path) == Path("/a/b")
    with pytest.raises(ConfigError, match=r"folder is not set.*--set folder=PATH"):
        resolve_path(None, "folder")


def test_flags_win_over_set_and_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("seed: 1\ncount: 1\ndevice: cuda")
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, Outer)
    flags = ["--set", "count=2", "--set", "seed=2", "--seed", "3", "--device", "cpu"]
    args = parser.parse_args(["--config", str(path), *flags])
    assert load_from_arguments(Outer, args) == Outer(seed=3, count=2, device="cpu")
    assert args.dry_run is False


def test_help_lists_every_setting_with_default_type_and_meaning(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped.yaml"
    shipped.write_text("count: 9")
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, Outer, default_config=shipped)
    text = parser.format_help()
    assert "count = 1  -> 9\n      Things to count. (a whole number)" in text
    assert "inner.size = [2, 3]\n      Height, width in pixels. (a list of 2, each a" in text
    assert "inner.limit = none" in text
