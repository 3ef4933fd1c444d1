"""Command-line flags generated from settings: one flag per leaf field, named as the field.

For programs whose published flags are flat (`--lr_init 0.1`) while their settings are nested
(`contrastive.lr_init`). Defaults and help exist once, in the dataclass.
"""

import argparse
import logging
from collections.abc import Collection, Mapping
from types import MappingProxyType, NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from common.config import (
    ConfigError,
    build,
    flat_values,
    parse_override,
    typed,
)
from common.config_types import leaf_types
from common.config_yaml import parse_value, read_yaml

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
        choices = _choices(annotation)
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
    source = str(args.config or "default settings")
    if args.config is not None:
        data = {k: v for k, v in read_yaml(args.config).items() if k not in other_sections}
        values |= flat_values(cls, data, source)
    for text in args.overrides:
        values |= parse_override(cls, text)
    for name, key in (flag_keys(cls) | redirect).items():
        given = getattr(args, name, None)
        if given is not None:
            values |= _flag_value(cls, name, key, given)
    config = build(cls, values, source)
    for warning in getattr(config, "warnings", list)():
        LOG.warning("%s: %s", source, warning)
    return config


def _flag_value(cls: type, name: str, key: str, given: Any) -> dict[str, Any]:
    try:
        if isinstance(given, list) and _is_number_list(leaf_types(cls)[key]):
            given = [parse_value(_as_float_text(text)) for text in given]
        if isinstance(given, list | bool | int):
            return {key: typed(cls, key, given, "the command line")}
        if float in (leaf_types(cls)[key], *get_args(leaf_types(cls)[key])):
            given = _as_float_text(given)
        return parse_override(cls, f"{key}={given}")
    except ConfigError as error:
        message = str(error).removeprefix(f"--set {key}={given}: ").removeprefix("--set: ")
        raise ConfigError(f"--{name}: {message}", key=key) from None


def _is_list(annotation: Any) -> bool:
    members = [annotation, *get_args(annotation)]
    return any(get_origin(member) is tuple for member in members)


def _is_number_list(annotation: Any) -> bool:
    members = [annotation, *get_args(annotation)]
    elements = [get_args(member) for member in members if get_origin(member) is tuple]
    return any(element in (int, float) for inner in elements for element in inner)


def _choices(annotation: Any) -> tuple[Any, ...]:
    members = [m for m in (annotation, *get_args(annotation)) if m is not NoneType]
    return next((get_args(m) for m in members if get_origin(m) is Literal), ())


def _as_float_text(text: str) -> str:
    """The number as YAML writes it: 1e-6, which YAML takes for text, becomes 1.0e-06."""
    if text.lstrip("+-").isdigit():
        return text
    try:
        number = repr(float(text))
    except ValueError:
        return text
    return number if "." in number or "e" not in number else number.replace("e", ".0e")
