"""YAML files and command-line texts to nested frozen dataclasses, and back.

A key that a file lacks has the dataclass's default. An unknown key, a wrong type or an impossible
combination is a ConfigError that names the file or flag, the key, the value and the remedy.
"""

import dataclasses
import textwrap
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from common import config_yaml
from common.config_types import (
    ConfigError,
    convert,
    is_nothing,
    is_path,
    kinds_of,
    leaf_types,
    may_be_none,
    section_types,
    words_of,
)
from common.config_yaml import MOST_BYTES, format_value, shorten, unquoted
from common.files import open_regular

REPOSITORY = Path(__file__).resolve().parent.parent
"""Root of the repository, which paths in settings files are relative to."""
Settings = TypeVar("Settings")
Given = dict[str, tuple[Any, str]]
"""Settings as they were written: dotted key -> (value, the file or flag that it comes from)."""


def load_config(cls: type[Settings], path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file into a settings dataclass; without a path, starts from the defaults.

    overrides: "train.lr=1.0e-4", the value as it would stand in YAML; later ones win.
    Raises ConfigError.
    """
    given = {} if path is None else given_in_file(cls, path)
    for text in overrides:
        given |= given_by_set(cls, text)
    return build(cls, given, str(path or "default settings"))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns settings as nested plain YAML values, tuples as lists."""

    def section(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: list(value) if type(value) is tuple else value for key, value in fields}

    return dataclasses.asdict(config, dict_factory=section)


def config_to_yaml(config: Any) -> str:
    """Returns settings as YAML text that load_config reads back to equal settings."""
    return config_yaml.write(config_to_dict(config))


def resolve_path(value: str | None, key: str, *, root: Path = REPOSITORY) -> Path:
    """Returns the absolute path that a setting names; it need not exist.

    ~ is the home folder. Relative paths start at root, the repository's. Raises ConfigError if the
    setting is none. key: the setting's dotted key, for messages.
    """
    if value is None:
        message = f"{key} is not set. Put it in the settings file or pass --set {key}=PATH."
        raise ConfigError(message, key=key)
    path = expand_home(value, key)
    return path if path.is_absolute() else (root / path).resolve()


def expand_home(value: str, key: str) -> Path:
    """Returns a path with ~ or ~user expanded; raises ConfigError where there is no such home."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        message = f"{key}: no home folder is known for {format_value(value)}."
        raise ConfigError(message, key=key) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file as nested dicts, lists, text, numbers, bools and None.

    Raises ConfigError for whatever is wrong with it, in less than a second whatever it holds.
    """
    return config_yaml.plain_values(read_settings(path))


def read_settings(path: Path) -> dict[str, Any]:
    """The same with unquoted values as they were written, Plain; raises ConfigError."""
    if not path.exists() or path.is_dir():
        near = sorted(str(other) for other in path.parent.glob("*.y*ml"))
        if (REPOSITORY / path).is_file():
            near = [str(REPOSITORY / path)]
        there = f" There is: {', '.join(near)}." if near else ""
        raise ConfigError(f"No settings file {path}.{there} Pass one with --config.")
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Pass another with --config.") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: settings files have at most {MOST_BYTES // 1024} KiB.")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: is written in UTF-16; save it as UTF-8.")
    try:
        data = config_yaml.parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = f"line {line}: byte 0x{content[error.start]:02x}"
        raise ConfigError(f"{path}: {byte} is not UTF-8; save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {config_yaml.explain(error)}") from None
    if not isinstance(data, dict):
        what = "is empty" if data == "" else f"holds one {'list' if type(data) is list else 'str'}"
        raise ConfigError(f"{path}: {what}; expected lines of `key: value`.")
    return data


def given_in_file(cls: type, path: Path, *, without: Collection[str] = ()) -> Given:
    """Returns the settings in a YAML file, less the top-level sections that belong to another
    program; raises ConfigError."""
    data = {name: value for name, value in read_settings(path).items() if name not in without}
    return flatten(cls, data, str(path))


def given_by_set(cls: type, text: str) -> Given:
    """Returns what "train.lr=1.0e-4" gives; raises ConfigError.

    What is typed for a setting that is text is that text, whatever YAML would read in it.
    """
    source = f"--set {shorten(text)}"
    key, equals, written = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"{source}: expected KEY=VALUE, for instance seed=3.")
    if key in section_types(cls):
        raise ConfigError(f"{source}: {key} is a section; set a key in it, {key}.NAME=VALUE.")
    annotation = known_type(cls, key, source)
    if is_path(annotation) or kinds_of(annotation) == [str]:
        return given_by_word(cls, key, written, source)
    try:
        return {key: (config_yaml.parse(written), source)}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {config_yaml.explain(error)}") from None


def given_by_word(cls: type, key: str, written: str, source: str) -> Given:
    """Returns a word of the command line as a setting; a path, which was typed relative to the
    working directory, as an absolute one."""
    annotation = leaf_types(cls)[key]
    value = unquoted(written)
    is_word = value in words_of(annotation) or (may_be_none(annotation) and is_nothing(value))
    if is_path(annotation) and value and not is_word:
        try:
            value = str(expand_home(value, key).absolute())
        except ConfigError as error:
            raise error.at(source) from None
    return {key: (value, source)}


def flatten(cls: type, data: Mapping[str, Any], source: str, prefix: str = "") -> Given:
    """Returns nested values by dotted key; ConfigError for what is no key, or given twice."""
    given: Given = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if key not in section_types(cls):
            known_type(cls, key, source)
            found = {key: (value, source)}
        elif isinstance(value, Mapping):
            found = flatten(cls, value, source, f"{key}.")
        else:
            what = "is empty" if is_nothing(value) else f"is a section, got {format_value(value)}"
            raise ConfigError(f"{source}: {key} {what}; indent its keys below it.", key=key)
        for twice in found.keys() & given.keys():
            section, _, last = twice.rpartition(".")
            what = f"{twice} is given twice: as {twice}, and as {last} below {section}."
            raise ConfigError(f"{source}: {what}", key=twice)
        given |= found
    return given


def known_type(cls: type, key: str, source: str) -> Any:
    """Returns the type of a setting; raises a ConfigError that suggests another for an unknown key.

    It may have meant one of its neighbours, or else one of another section.
    """
    leaves = leaf_types(cls)
    if key in leaves:
        return leaves[key]
    section, _, name = key[:100].rpartition(".")
    keys = [*leaves, *section_types(cls)]
    here = [leaf.rpartition(".")[2] for leaf in keys if leaf.rpartition(".")[0] == section]
    elsewhere = [leaf for leaf in keys if leaf.rpartition(".")[2] == name]
    close = get_close_matches(name, here, 1) or elsewhere or get_close_matches(key[:100], keys, 1)
    meant = f"Did you mean {' or '.join(map(repr, close))}?" if close else ""
    known = textwrap.shorten(", ".join(sorted(here)), 360, placeholder=" ... (--help has them all)")
    hint = meant or f"Known keys here: {known}"
    raise ConfigError(f"{source}: unknown key {shorten(repr(key))}. {hint}", key=key)


def build(cls: type[Settings], given: Given, source: str) -> Settings:
    """Returns the dataclass with these settings; raises ConfigError.

    source: where the settings come from that no flag gives.
    """
    values: dict[str, Any] = {}
    for key, (value, origin) in given.items():
        try:
            values[key] = convert(value, leaf_types(cls)[key], key)
        except ConfigError as error:
            raise error.at(origin) from None
    try:
        return construct(cls, values)
    except ConfigError as error:
        flags = {key: origin for key, (_, origin) in given.items() if origin != source}
        others = f"{source} with the command line's settings" if flags else source
        raise error.at(flags.get(error.key, others)) from None


def construct(cls: type[Settings], values: Mapping[str, Any], prefix: str = "") -> Settings:
    """Returns the dataclass with these typed values by dotted key; raises its own ConfigError."""
    arguments: dict[str, Any] = {}
    sections = section_types(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if key in values:
            arguments[field.name] = values[key]
        elif field.name in sections:
            arguments[field.name] = construct(sections[field.name], values, f"{key}.")
    return cls(**arguments)
