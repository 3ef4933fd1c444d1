"""From plain YAML values to typed settings: the rules, and what is said when a value breaks one.

Settings are nested frozen dataclasses. A setting is addressed by its dotted key, `train.lr`. Used
through `common.config`.
"""

import dataclasses
import math
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from common.config_rules import ANY_TEXT, PATH_TEXT, Range, TextRule
from common.config_text import (
    NUMBER,
    OTHER_BASE,
    SWITCHES,
    Plain,
    meaning,
    read_otherwise,
    shorten,
    show,
)
from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
"""Root of the repository, which paths in settings files are relative to."""

LONGEST_LIST = 1000
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
        raise ConfigError(f"{key}: {expected}, got {show(value)}", key=key)


def check_fields(settings: object, section: str = "") -> None:
    """Raises a ConfigError for the first field that breaks the rule in its type, or is no text
    that a file can hold. Nested sections check their own.

    section: dotted prefix of the names in messages, "" at the top level.
    """
    for name, annotation in leaf_types(type(settings)).items():
        if "." not in name:
            key = f"{section}.{name}" if section else name
            check_value(getattr(settings, name), annotation, key)


def check_value(value: Any, annotation: Any, key: str) -> None:
    """The same for one value; none passes, and what fits no rule's kind."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        literals = [choice for member in arguments for choice in literal_choices(member)]
        for member in arguments if value is not None and value not in literals else ():
            check_value(value, member, key)
    elif origin is tuple:
        require(len(value) <= LONGEST_LIST, key, value, f"must have at most {LONGEST_LIST} values")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        for number, (item, kind) in enumerate(zip(value, kinds, strict=True)):
            check_value(item, kind, f"{key}[{number}]")
    elif origin is Annotated and isinstance(arguments[1], Range):
        require(value in arguments[1], key, value, arguments[1].expected(value))
    elif isinstance(value, str):
        rule = arguments[1] if origin is Annotated else ANY_TEXT
        require(rule.allows(value), key, value, rule.expected)


def literal_choices(annotation: Any) -> tuple[Any, ...]:
    """The choices of a Literal, () of anything else."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def without_rules(annotation: Any) -> Any:
    """A setting's type without the rules it carries: int for Annotated[int, ...]."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    return annotation


def kinds_of(annotation: Any) -> list[Any]:
    """The kinds of value that a setting may have, but none, without rules: [int] for int | None."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    return [without_rules(kind) for kind in kinds if kind is not NoneType]


def may_be_none(annotation: Any) -> bool:
    """Whether none is a value of the setting."""
    return NoneType in get_args(annotation)


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
    return any(PATH_TEXT in get_args(kind) for kind in (annotation, *get_args(annotation)))


def takes_text(annotation: Any) -> bool:
    """Whether a setting of this type is text, or text or none, and nothing else."""
    return kinds_of(annotation) == [str]


def convert(value: Any, annotation: Any, key: str, also: str = "") -> Any:
    """Returns a YAML value as the type that a setting declares, or raises a ConfigError.

    Strict: a bool is no int, an int is a fine float, lists become tuples, the text "none" is None
    where None is allowed. Unquoted text (Plain) is what the type makes of it; see
    `common.config_text.meaning`. Supports bool, int, float, str, Literal, tuples, unions, rules.
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
        read = meaning(value) if isinstance(value, Plain) else value
        for choice in arguments:
            if value == choice if isinstance(choice, str) else same(read, choice):
                return choice
    elif annotation in SCALAR_NAMES:
        read = read_scalar(value, annotation)
        if read is not None:
            return read
    expected = f"expected {describe_type(annotation)}{also}"
    shown = f"{show(value)}{remedy(value, annotation)}"
    raise ConfigError(f"{key}: {expected}, got {shown}", key=key)


def same(value: Any, choice: Any) -> bool:
    """Whether two values are equal and of one type: True is not 1."""
    return value == choice and type(value) is type(choice)


def read_scalar(value: Any, kind: type) -> bool | int | float | str | None:
    """A value as bool, int, float or str; None where it is not of that kind."""
    if isinstance(value, Plain):
        if kind is str:
            return None if read_otherwise(value) else str(value)
        value = SWITCHES.get(value.lower(), value) if kind is bool else meaning(value)
    if kind is float and type(value) in (int, float):
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:
            return None
    return value if type(value) is kind else None


def convert_union(value: Any, members: tuple[Any, ...], key: str) -> Any:
    """Returns the value as the first member type that takes it; see convert."""
    others = [member for member in members if member is not NoneType]
    nullable = len(others) < len(members)
    if nullable and is_nothing(value):
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


def is_nothing(value: Any) -> bool:
    """Whether a value says none, in any of the usual ways."""
    if isinstance(value, Plain) and meaning(value) is None:
        return True
    return value is None or (isinstance(value, str) and value.lower() == "none")


def convert_tuple(value: Iterable[Any], annotation: Any, key: str) -> tuple[Any, ...]:
    """Returns a list as a tuple of fixed or free length; see convert."""
    items, types = list(value), get_args(annotation)
    if len(types) == 2 and types[1] is Ellipsis:
        types = (types[0],) * len(items)
    if len(items) != len(types):
        expected = describe_type(annotation)
        raise ConfigError(f"{key}: expected {expected}, got {len(items)}: {show(items)}", key=key)
    pairs = zip(items, types, strict=True)
    return tuple(convert(item, kind, f"{key}[{i}]") for i, (item, kind) in enumerate(pairs))


def describe_type(annotation: Any) -> str:
    """Names a setting's type in words, as in "a list of 2: a whole number, a whole number"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rule = arguments[1]
        if isinstance(rule, TextRule):
            return "a path" if rule is PATH_TEXT else "text"
        return f"{describe_type(arguments[0])} {rule}"
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


def remedy(value: Any, annotation: Any) -> str:
    """Returns what to write instead of a value of the wrong type, "" where nothing is obvious."""
    if get_origin(annotation) is Literal:
        choices = {str(choice).lower(): str(choice) for choice in get_args(annotation)}
        close = get_close_matches(str(value)[:100].lower(), choices, 1)
        return f". Did you mean {choices[close[0]]!r}?" if close else ""
    if get_origin(annotation) is tuple:
        return f". Write [{shorten(str(value))}]" if isinstance(value, str | int | float) else ""
    if annotation is str and isinstance(value, Plain | int | float) and value != "":
        return f". Write it in quotes: '{shorten(str(value))}'"
    if annotation in (int, float) and isinstance(value, str) and len(value) <= 40:
        return remedy_for_number(value.strip(), annotation)
    return ""


def remedy_for_number(text: str, kind: type) -> str:
    """The same for text that people mean as a number."""
    digits = text.replace("_", "")
    if OTHER_BASE.fullmatch(digits):
        try:
            return f". Write {int(digits, 0)}"
        except ValueError:  # 0b12
            return ""
    number = NUMBER.fullmatch(digits)
    if number is None or not math.isfinite(float(digits)):
        return ""
    sign, bare = "-" * digits.startswith("-"), digits.lstrip("+-").lstrip("0")
    if digits != text or digits.lstrip("+-").isdigit():
        return f". Write {sign}{bare or '0'}"
    if kind is int:
        whole = float(digits).is_integer()
        return f", which YAML reads as text. Write {float(digits):.0f}" if whole else ""
    whole, _, power = bare.lower().partition("e")
    whole = f"{'0' * (not whole or whole[0] == '.')}{whole}{'.0' * ('.' not in whole)}"
    exponent = f"e{power if power[:1] in ('+', '-') else '+' + power}" if power else ""
    return f", which YAML reads as text. Write {sign}{whole}{exponent}"
