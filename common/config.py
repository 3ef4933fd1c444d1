"""YAML files and command-line flags to nested frozen dataclasses, strictly.

A key that a file lacks has the dataclass's default. An unknown key, a wrong type or an impossible
combination is a ConfigError that names the file, the key and the remedy.
"""

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from common.config_help import describe_settings
from common.config_types import (
    REPOSITORY,
    ConfigError,
    PathText,
    convert,
    is_path,
    leaf_types,
    require,
    require_at_least,
    section_types,
    takes_text,
)
from common.config_yaml import parse_value, read_yaml, write_yaml

__all__ = [
    "REPOSITORY",
    "ConfigError",
    "PathText",
    "add_common_arguments",
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "load_from_arguments",
    "require",
    "require_at_least",
    "resolve_path",
]

LOG = logging.getLogger(__name__)

Settings = TypeVar("Settings")


def load_config(cls: type[Settings], path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file into a settings dataclass; without a path, starts from the defaults.

    overrides: "train.lr=1.0e-4", the value as it would stand in YAML; later ones win.
    Raises ConfigError.
    """
    values = {} if path is None else flat_values(cls, read_yaml(path), str(path))
    for text in overrides:
        values |= parse_override(cls, text)
    source = " ".join([str(path or "default settings"), *(f"--set {text}" for text in overrides)])
    return build(cls, values, source)


def config_from_dict(cls: type[Settings], data: Mapping[str, Any], source: str) -> Settings:
    """Returns nested plain values as settings, as strictly as a file. source: named in errors."""
    return build(cls, flat_values(cls, data, source), source)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns settings as nested plain YAML values, tuples as lists."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = config_to_dict(value)
        plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def config_to_yaml(config: Any) -> str:
    """Returns settings as YAML text that load_config reads back to equal settings."""
    return write_yaml(config_to_dict(config))


def resolve_path(value: str | None, key: str, *, root: Path = REPOSITORY) -> Path:
    """Returns the absolute path that a setting names; it need not exist.

    Relative paths start at root, the repository's. The published files write train_data_path
    relative to inpainter/: a path that exists only there is taken, with a warning.
    Raises ConfigError if the setting is none. key: the setting's dotted key, for messages.
    """
    if value is None:
        raise ConfigError(
            f"{key} is not set. Put it in the settings file or pass --set {key}=PATH.", key=key
        )
    path = Path(value).expanduser()
    there, published = root / path, root / "inpainter" / path
    if path.is_absolute() or there.exists() or not published.exists():
        return path if path.is_absolute() else there.resolve()
    LOG.warning(
        "%s: %s is not in the repository's root but in inpainter/; that one is used. "
        "Write it relative to the root.",
        key,
        value,
    )
    return published.resolve()


def add_common_arguments(
    parser: argparse.ArgumentParser, cls: type, *, default_config: str | Path | None = None
) -> None:
    """Adds --config, --set, --device, --seed, --dry_run, and every setting to --help.

    default_config: file that --config defaults to, relative to the repository's root; None starts
    from the dataclass's defaults.
    """
    default = None if default_config is None else REPOSITORY / default_config
    shown = f" (default: {default_config})" if default_config else ""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config", type=Path, default=default, metavar="FILE", help=f"YAML settings file{shown}"
    )
    set_help = "set one key, for instance train.lr=1.0e-4; repeatable, wins over the file"
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=set_help
    )
    if "device" in leaf_types(cls):
        parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps")
    if "seed" in leaf_types(cls):
        parser.add_argument("--seed", type=int, help="seed of everything random")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved settings and stop"
    )
    try:
        shipped = None if default is None else load_config(cls, default)
    except ConfigError:  # said where the file is used; a broken one must not take --help away
        shipped = None
    parser.epilog = (parser.epilog or "") + describe_settings(cls, shipped, str(default_config))


def load_from_arguments(cls: type[Settings], args: argparse.Namespace) -> Settings:
    """Returns the settings that --config, --set, --device and --seed ask for, the latter winning.

    Logs what the settings' own warnings() says, where the class has such a method.
    """
    flags = {name: getattr(args, name, None) for name in ("device", "seed")}
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    config = load_config(cls, args.config, [*args.overrides, *given])
    for warning in getattr(config, "warnings", list)():
        LOG.warning("%s: %s", args.config or "default settings", warning)
    return config


def flat_values(
    cls: type, data: Mapping[Any, Any], source: str, prefix: str = ""
) -> dict[str, Any]:
    """Returns nested plain values as typed values by dotted key; raises ConfigError."""
    values: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if key in section_types(cls):
            if not isinstance(value, Mapping):
                shown = "is empty" if value is None else f"is a section, got {value!r}"
                raise ConfigError(f"{source}: {key} {shown}; indent its keys below it.", key=key)
            values |= flat_values(cls, value, source, f"{key}.")
        else:
            values[key] = typed(cls, key, value, source)
    return values


def typed(cls: type, key: str, value: Any, source: str) -> Any:
    """Returns one setting's value as its type; raises a ConfigError that starts with the source."""
    leaves = leaf_types(cls)
    if key not in leaves:
        raise ConfigError(f"{source}: unknown key {key!r}. {suggestion(cls, key)}", key=key)
    try:
        return convert(value, leaves[key], key)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}", key=error.key) from None


def suggestion(cls: type, key: str) -> str:
    """Says what an unknown dotted key may have meant: its neighbours first, then all sections."""
    section, _, name = key.rpartition(".")
    leaves = [*leaf_types(cls), *section_types(cls)]
    here = [leaf.rpartition(".")[2] for leaf in leaves if leaf.rpartition(".")[0] == section]
    elsewhere = [leaf for leaf in leaves if leaf.rpartition(".")[2] == name]
    close = get_close_matches(name, here, 1)
    if elsewhere and not close:
        return f"Did you mean {' or '.join(repr(leaf) for leaf in elsewhere)}?"
    close = close or get_close_matches(key, leaves, 1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys here: {', '.join(sorted(here))}"


def parse_override(cls: type, text: str) -> dict[str, Any]:
    """Returns "train.lr=1.0e-4" as {"train.lr": 1.0e-4}; raises ConfigError.

    A path becomes absolute, since it was typed relative to the working directory.
    """
    key, equals, written = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for instance train.lr=1.0e-4.")
    if key in section_types(cls):
        raise ConfigError(f"--set {text}: {key} is a section; set a key in it, {key}.NAME=VALUE.")
    kind = leaf_types(cls).get(key)
    value = typed(cls, key, parse_value(written, literal=takes_text(kind)), "--set")
    if is_path(kind) and value is not None:
        value = str(Path(value).expanduser().absolute())
    return {key: value}


def build(
    cls: type[Settings], values: Mapping[str, Any], source: str, prefix: str = ""
) -> Settings:
    """Returns the dataclass with these values by dotted key; raises its ConfigError with source."""
    arguments: dict[str, Any] = {}
    sections = section_types(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if key in values:
            arguments[field.name] = values[key]
        elif field.name in sections:
            arguments[field.name] = build(sections[field.name], values, source, f"{key}.")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}", key=error.key) from None
