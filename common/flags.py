"""Command-line flags generated from settings: one flag per leaf field, named as the field.

For programs whose published flags are flat (`--lr_init 0.1`) while their settings are nested
(`contrastive.lr_init`). Defaults and help exist once, in the dataclass.
"""

import argparse
import logging
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin

from common.config import (
    ConfigError,
    build,
    flat_values,
    parse_override,
    typed,
)
from common.config_text import NUMBER, Plain, shorten
from common.config_types import (
    kinds_of,
    leaf_types,
    literal_choices,
    may_be_none,
    takes_text,
    without_rules,
)
from common.config_yaml import read_settings

LOG = logging.getLogger(__name__)
Settings = TypeVar("Settings")
COMMON = ("device", "seed")
"""Flags that `add_common_arguments` has added already."""


def flag_keys(cls: type) -> dict[str, str]:
    """Flag name → dotted key of every leaf field; ValueError where two fields share a name."""
    keys: dict[str, str] = {}
    for key in leaf_types(cls):
        name = key.rpartition(".")[2]
        if name in keys:
            raise ValueError(f"fields {keys[name]} and {key} would share the flag --{name}")
        keys[name] = key
    return keys


def add_flags(parser: argparse.ArgumentParser, cls: type, *, without: Collection[str] = ()) -> None:
    """Adds --<field> for every leaf of a settings class; what is not given stays the file's.

    without: fields that get no flag, for instance because another flag has that name.
    """
    for name, key in flag_keys(cls).items():
        if name in COMMON or name in without:
            continue
        annotation = leaf_types(cls)[key]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": f"= {key}"}
        choices = [c for kind in kinds_of(annotation) for c in literal_choices(kind)]
        if annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif _is_list(annotation):
            options |= {"nargs": "*", "metavar": "VALUE"}
        else:
            options["metavar"] = "|".join(map(str, choices)) if choices else "VALUE"
        parser.add_argument(f"--{name}", **options)


def load_from_flags(
    cls: type[Settings],
    args: argparse.Namespace,
    *,
    other_sections: Collection[str] = (),
    redirect: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """The settings that --config, --set and the flags ask for, later ones winning.

    other_sections: top-level sections of the file that belong to another program and are skipped.
    redirect: flags that set another field than that of their name, by its dotted key. Logs what
    the settings' own warnings() says, where the class has such a method.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    source = str(args.config or "default settings")
    if args.config is not None:
        data = {k: v for k, v in read_settings(args.config).items() if k not in other_sections}
        values |= flat_values(cls, data, source)
    for text in args.overrides:
        value = parse_override(cls, text)
        values |= value
        origins |= dict.fromkeys(value, f"--set {shorten(text)}")
    for name, key in (flag_keys(cls) | redirect).items():
        given = getattr(args, name, None)
        if given is not None:
            values |= _flag_value(cls, name, key, given)
            origins[key] = f"--{name}"
    config = build(cls, values, source, origins)
    for warning in getattr(config, "warnings", list)():
        LOG.warning("%s: %s", source, warning)
    return config


def _flag_value(cls: type, name: str, key: str, given: str | bool | list[str]) -> dict[str, Any]:
    annotation = leaf_types(cls)[key]
    try:
        if isinstance(given, list):
            return {key: typed(cls, key, _list_value(given, annotation), f"--{name}")}
        if isinstance(given, bool):
            return {key: given}
        if takes_text(annotation):
            return parse_override(cls, f"{key}={given}")
        value = Plain(_as_float_text(given) if float in kinds_of(annotation) else given)
        return {key: typed(cls, key, value, f"--{name}")}
    except ConfigError as error:
        message = str(error).removeprefix("--set: ").removeprefix(f"--{name}: ")
        raise ConfigError(f"--{name}: {message}", key=key) from None


def _list_value(given: list[str], annotation: Any) -> list[str] | None:
    """The words behind a flag as a list of what the setting holds, for typed."""
    if may_be_none(annotation) and [word.lower() for word in given] == ["none"]:
        return None
    (kind,) = kinds_of(annotation)
    elements = {without_rules(element) for element in get_args(kind)} - {Ellipsis}
    if float in elements:
        return [Plain(_as_float_text(word)) for word in given]
    return [Plain(word) for word in given] if int in elements else list(given)


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in kinds_of(annotation))


def _as_float_text(text: str) -> str:
    """The number as YAML writes it: 1e-6, which YAML takes for text, becomes 1.0e-06."""
    if text.lstrip("+-").isdigit() or not NUMBER.fullmatch(text):
        return text
    number = repr(float(text))
    return number if "." in number or "e" not in number else number.replace("e", ".0e")
