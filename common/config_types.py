"""From plain YAML values to typed settings: the rules, and what is said when a value breaks one.

Settings are nested frozen dataclasses. A setting is addressed by its dotted key, `train.lr`. Used
through `common.config`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
"""Root of the repository, which paths in settings files are relative to."""

PathText = Annotated[str, "path"]
"""Text that names a file or folder; see `common.config.resolve_path` for what it is relative to."""

SCALAR_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ConfigError(UserError):
    """A setting that cannot be used; the message names where, the key, its value and the remedy."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        """message: the whole sentence. key: the dotted key at fault, where there is one."""
        super().__init__(message)
        self.key = key


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raises a ConfigError naming the dotted key, its value and what it must be, unless it holds.

    expected: completes "train.lr: ..., got 0", for instance "must be > 0".
    """
    if not condition:
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{key}: {expected}, got {show(shown)}", key=key)


def require_at_least(minimum: int, settings: object, section: str, names: Iterable[str]) -> None:
    """Raises a ConfigError for the first of these fields below the minimum; none is allowed.

    section: dotted prefix of the names in messages, "" at the top level.
    """
    for name in names:
        value = getattr(settings, name)
        key = f"{section}.{name}" if section else name
        require(value is None or value >= minimum, key, value, f"must be >= {minimum}")


@cache
def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Maps the dotted key of every setting of a dataclass, nested ones included, to its type."""
    leaves: dict[str, Any] = {}
    for name, annotation in get_type_hints(cls, include_extras=True).items():
        if name not in {field.name for field in dataclasses.fields(cls)}:
            continue
        if dataclasses.is_dataclass(annotation):
            leaves |= leaf_types(annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = annotation
    return leaves


@cache
def section_types(cls: type, prefix: str = "") -> dict[str, type]:
    """Maps the dotted name of every nested section to its dataclass."""
    sections: dict[str, type] = {}
    for name, annotation in get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            inner = section_types(annotation, f"{prefix}{name}.")
            sections |= {prefix + name: annotation, **inner}
    return sections


def is_path(annotation: Any) -> bool:
    """Whether a setting of this type is a PathText, or one or none."""
    return annotation == PathText or PathText in get_args(annotation)


def takes_text(annotation: Any) -> bool:
    """Whether a setting of this type is text, or text or none, and nothing else."""
    return is_path(annotation) or annotation in (str, str | None)


def convert(value: Any, annotation: Any, key: str, also: str = "") -> Any:
    """Returns a YAML value as the type that a setting declares, or raises a ConfigError.

    Strict: a bool is no int, an int is a fine float, lists become tuples, the text "none" is None
    where None is allowed. Supports bool, int, float, str, Literal, tuples, unions, PathText.
    also: ends the description of what was expected, as in "a number or none".
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return convert(value, arguments[0], key, also)
    if origin in (Union, UnionType):
        return convert_union(value, arguments, key)
    if origin is tuple and isinstance(value, list | tuple):
        return convert_tuple(value, annotation, key)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif annotation is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
    elif annotation in SCALAR_NAMES and type(value) is annotation:
        return value
    expected = f"expected {describe_type(annotation)}{also}"
    raise ConfigError(f"{key}: {expected}, got {show(value)}{remedy(value, annotation)}", key=key)


def convert_union(value: Any, members: tuple[Any, ...], key: str) -> Any:
    """Returns the value as the first member type that takes it; see convert."""
    others = [member for member in members if member is not NoneType]
    nullable = len(others) < len(members)
    if nullable and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    for i, member in enumerate(others):
        rest = [describe_type(other) for other in others if other is not member]
        also = "".join(f" or {text}" for text in [*rest, *["none"] * nullable])
        try:
            return convert(value, member, key, also)
        except ConfigError:
            if i == len(others) - 1:
                raise
    raise TypeError(f"{key}: a union of {members} holds no type of value")


def convert_tuple(value: Iterable[Any], annotation: Any, key: str) -> tuple[Any, ...]:
    """Returns a list as a tuple of fixed or free length; see convert."""
    items, types = list(value), get_args(annotation)
    if len(types) == 2 and types[1] is Ellipsis:
        types = (types[0],) * len(items)
    if len(items) != len(types):
        expected = describe_type(annotation)
        raise ConfigError(f"{key}: expected {expected}, got {len(items)}: {items!r}", key=key)
    pairs = zip(items, types, strict=True)
    return tuple(convert(item, kind, f"{key}[{i}]") for i, (item, kind) in enumerate(pairs))


def describe_type(annotation: Any) -> str:
    """Names a setting's type in words, as in "a list of 2: a whole number, a whole number"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return "a path"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, UnionType):
        others = [describe_type(member) for member in arguments if member is not NoneType]
        return " or ".join([*others, *["none"] * (NoneType in arguments)])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each {describe_type(arguments[0])}"
        kinds = sorted({describe_type(kind) for kind in arguments})
        return f"a list of {len(arguments)}, each {' or '.join(kinds)}"
    return SCALAR_NAMES[annotation]


def show(value: Any) -> str:
    """Returns a value as it would stand in a YAML file, for messages."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    return "a section" if isinstance(value, dict) else repr(value)


def remedy(value: Any, annotation: Any) -> str:
    """Returns what to write instead of a value of the wrong type, "" where nothing is obvious."""
    if get_origin(annotation) is Literal:
        close = get_close_matches(str(value), [str(a) for a in get_args(annotation)], 1)
        return f". Did you mean {close[0]!r}?" if close else ""
    if get_origin(annotation) is tuple:
        return f". Write [{value}]" if isinstance(value, str | int | float) else ""
    if annotation is str and isinstance(value, int | float):
        return f". Write it in quotes: '{value}'"
    if annotation in (int, float) and isinstance(value, str):
        number = re.fullmatch(r"([-+]?\d*)(\.\d*)?(?:[eE]([-+]?)(\d+))?", value.strip())
        if number and any(letter.isdigit() for letter in value):
            whole, fraction, sign, power = number.groups()
            if annotation is int:
                return f", which YAML reads as text. Write {float(value):.0f}"
            exponent = f"e{sign or '+'}{power}" if power else ""
            return f", which YAML reads as text. Write {whole or '0'}{fraction or '.0'}{exponent}"
    return ""
