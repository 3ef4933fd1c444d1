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
from types import MappingProxyType
from typing import Any, TypeVar

from common.config_help import describe_settings
from common.config_rules import PathText
from common.config_text import Plain, meaning, shorten, show
from common.config_types import (
    REPOSITORY,
    ConfigError,
    check_fields,
    convert,
    is_path,
    leaf_types,
    may_be_none,
    require,
    section_types,
    takes_text,
)
from common.config_yaml import parse_value, read_settings, read_yaml, unquoted, write_yaml

__all__ = [
    "REPOSITORY",
    "ConfigError",
    "PathText",
    "add_common_arguments",
    "check_fields",
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "load_from_arguments",
    "read_yaml",
    "require",
    "resolve_path",
]

LOG = logging.getLogger(__name__)

Settings = TypeVar("Settings")


def load_config(cls: type[Settings], path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file into a settings dataclass; without a path, starts from the defaults.

    overrides: "train.lr=1.0e-4", the value as it would stand in YAML; later ones win.
    Raises ConfigError.
    """
    values = {} if path is None else flat_values(cls, read_settings(path), str(path))
    origins: dict[str, str] = {}
    for text in overrides:
        value = parse_override(cls, text)
        values |= value
        origins |= dict.fromkeys(value, f"--set {shorten(text)}")
    return build(cls, values, str(path or "default settings"), origins)


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

    ~ is the home folder. Relative paths start at root, the repository's. The published files write
    train_data_path relative to inpainter/: data that exist only there are taken, with a warning.
    Raises ConfigError if the setting is none. key: the setting's dotted key, for messages.
    """
    if value is None:
        raise ConfigError(
            f"{key} is not set. Put it in the settings file or pass --set {key}=PATH.", key=key
        )
    path = without_tilde(value, key)
    there, published = root / path, root / "inpainter" / path
    is_input = key.endswith("data_path") or key == "train.resume"
    if path.is_absolute() or not is_input or there.exists() or not published.exists():
        return path if path.is_absolute() else there.resolve()
    LOG.warning(
        "%s: %s is not in the repository's root but in inpainter/; that one is used. "
        "Write it relative to the root.",
        key,
        value,
    )
    return published.resolve()


def without_tilde(value: str, key: str) -> Path:
    """Returns a path with ~ or ~user expanded; raises ConfigError where there is no such home."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key}: no home folder is known for {show(value)}.", key=key) from None


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
        parser.add_argument("--seed", metavar="N", help="seed of everything random")
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
                empty = value is None or (isinstance(value, Plain) and meaning(value) is None)
                shown = "is empty" if empty else f"is a section, got {show(value)}"
                raise ConfigError(f"{source}: {key} {shown}; indent its keys below it.", key=key)
            found = flat_values(cls, value, source, f"{key}.")
        else:
            found = {key: typed(cls, key, value, source)}
        for twice in found.keys() & values.keys():
            section, _, last = twice.rpartition(".")
            raise ConfigError(
                f"{source}: {twice} is given twice: as {twice}, and as {last} below {section}.",
                key=twice,
            )
        values |= found
    return values


def typed(cls: type, key: str, value: Any, source: str) -> Any:
    """Returns one setting's value as its type; raises a ConfigError that starts with the source."""
    leaves = leaf_types(cls)
    if key not in leaves:
        shown = shorten(repr(key))
        raise ConfigError(f"{source}: unknown key {shown}. {suggestion(cls, key[:100])}", key=key)
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
        shown = shorten(text)
        raise ConfigError(f"--set {shown}: expected KEY=VALUE, for instance train.lr=1.0e-4.")
    if key in section_types(cls):
        shown = shorten(text)
        raise ConfigError(f"--set {shown}: {key} is a section; set a key in it, {key}.NAME=VALUE.")
    kind = leaf_types(cls).get(key)
    value = command_line_text(written, kind) if takes_text(kind) else parse_value(written)
    value = typed(cls, key, value, "--set")
    if is_path(kind) and value:
        value = str(without_tilde(value, key).absolute())
    return {key: value}


def command_line_text(written: str, kind: Any) -> str | None:
    """Returns what was typed for a setting that is text: itself, whatever YAML would read in it.

    Where none is a value of the setting, null, none, ~ and nothing at all say so.
    """
    if written == "" or (may_be_none(kind) and written.lower() in ("~", "null", "none")):
        return None
    return unquoted(written)


def build(
    cls: type[Settings],
    values: Mapping[str, Any],
    source: str,
    origins: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """Returns the dataclass with these values by dotted key; raises ConfigError.

    source: where they come from. origins: dotted key -> what on the command line set it instead.
    """
    try:
        return construct(cls, values)
    except ConfigError as error:
        key = (error.key or "").partition("[")[0]
        others = f"{source} with the command line's settings" if origins else source
        raise ConfigError(f"{origins.get(key, others)}: {error}", key=error.key) from None


def construct(cls: type[Settings], values: Mapping[str, Any], prefix: str = "") -> Settings:
    """Returns the dataclass with these values by dotted key; raises its own ConfigError."""
    arguments: dict[str, Any] = {}
    sections = section_types(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if key in values:
            arguments[field.name] = values[key]
        elif field.name in sections:
            arguments[field.name] = construct(sections[field.name], values, f"{key}.")
    return cls(**arguments)
