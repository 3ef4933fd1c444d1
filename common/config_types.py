"""The types that settings may have: their rules, conversion to them, and their names in messages.

Settings are nested frozen dataclasses; a setting is addressed by its dotted key, `train.lr`. A type
may carry a rule, `Annotated[int, AtLeast(1, 1000)]`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from common.config_yaml import SWITCHES, Plain, format_value, meaning, shorten, suggested_number
from common.errors import ExitStatus, UserError

LONGEST_LIST = 1000
SCALAR_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ConfigError(UserError):
    """A setting that cannot be used; the message names where, the key, its value and the remedy."""

    status = ExitStatus.BAD_SETTINGS

    def __init__(self, message: str, *, key: str | None = None) -> None:
        """message: the whole sentence. key: the dotted key at fault, where there is one."""
        super().__init__(message)
        self.key = key

    def at(self, source: str) -> "ConfigError":
        """The same error of a setting that comes from a file or flag."""
        return ConfigError(f"{source}: {self}", key=self.key)


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raises a ConfigError naming the dotted key, its value and what it must be, unless it holds.

    expected: completes "train.lr: ..., got 0", for instance "must be > 0".
    """
    if not condition:
        raise ConfigError(f"{key}: {expected}, got {format_value(value)}", key=key)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; not a number is in no range."""

    low: float
    high: float
    ends: str = "[]"
    """Which ends belong to it, in the usual brackets: [) leaves the upper one out."""

    def allows(self, number: float) -> bool:
        above = number >= self.low if self.ends[0] == "[" else number > self.low
        below = number <= self.high if self.ends[1] == "]" else number < self.high
        return above and below

    def expected(self, number: float) -> str:
        """Completes "train.beta1: ..., got 2", for a number outside the range."""
        return f"must be {self}"

    def __str__(self) -> str:
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


class AtLeast(Range):
    """Numbers from low on; high keeps out only what no machine can do, and is not advertised."""

    def expected(self, number: float) -> str:
        return f"must be <= {self.high}" if number > self.high else f"must be {self}"

    def __str__(self) -> str:
        return f">= {self.low}"


@dataclass(frozen=True)
class TextRule:
    """What a text must look like."""

    pattern: str
    """Regular expression of the whole of every allowed text."""
    description: str
    """Completes "device: ..., got 'x'"."""
    longest: int = 4096
    """Most bytes in UTF-8."""

    def allows(self, text: str) -> bool:
        fits = len(text.encode("utf-8", "surrogatepass")) <= self.longest
        return fits and re.fullmatch(self.pattern, text) is not None

    def expected(self, text: str) -> str:
        return self.description


_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_PRINTABLE = "must be text in UTF-8 without control characters, at most 4096 bytes"
Text = Annotated[str, TextRule(rf"[^{_UNPRINTABLE}]*", _PRINTABLE)]
_PATH = TextRule(rf"[^{_UNPRINTABLE}]+", f"a path {_PRINTABLE}, not empty")
PathText = Annotated[str, _PATH]
"""Names a file or folder; see `resolve_path` for what it is relative to."""
NameText = Annotated[
    str,
    TextRule(
        rf"(?![. ])[^/\\{_UNPRINTABLE}]+(?<! )",
        "names a folder: 1 to 100 bytes in UTF-8, no slash, backslash or control character, no dot "
        "at the start, no blank at either end",
        longest=100,
    ),
]
"""Becomes the name of one folder, or a part of it."""
DeviceText = Annotated[
    str,
    TextRule(
        "auto|cpu|cuda|cuda:[0-9]{1,3}|mps", "must be auto, cpu, cuda, cuda:1 (a number) or mps"
    ),
]
"""What `common.devices.resolve_device` understands."""
# Upper ends are generous: nobody who has a machine for it is refused.
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1, "[)")]
"""A share, probability or decay below 1."""
PositiveShare = Annotated[float, Range(0, 1, "(]")]
PEER_TIMEOUT = 600.0
"""Seconds within which all processes of a training have to come, unless a setting says other."""
PeerSeconds = Annotated[float, Range(0, 1e6, "(]")]
Weight = Annotated[float, AtLeast(0, 10**6)]
"""Weight of a term of a loss."""
LearningRate = Annotated[float, Range(1e-12, 1e38)]
"""What float32 holds; one that is too high ends in a loss that is not finite, with advice."""
GradientNorm = Annotated[float, Range(1e-8, 10**8)]
Steps = Annotated[int, AtLeast(1, 10**9)]
"""A number of steps, epochs or batches, or how many lie between two events."""
BatchSize = Annotated[int, AtLeast(1, 2**16)]
Pixels = Annotated[int, AtLeast(1, 2**14)]
"""A length in an image."""
Channels = Annotated[int, AtLeast(1, 2**12)]
"""The width of a network."""
Samples = Annotated[int, AtLeast(1, 10**4)]
"""How often one image, window or picture is repeated."""
Processes = Annotated[int, AtLeast(0, 1024)]
ClassNumber = Annotated[int, AtLeast(0, 10**6)]
SliceRule = Annotated[
    str, TextRule("all|middle|every_[1-9][0-9]{0,5}", "must be all, middle or every_N, as every_5")
]
"""Which slices of a volume are used; see `common.volumes.chosen_slices`."""
Level = Annotated[float, Range(-(10**9), 10**9)]
"""The centre of a window of grey values, in a file's own values."""
Width = Annotated[float, Range(1e-9, 10**9)]
"""The width of such a window."""
WhiteValue = Annotated[int, AtLeast(1, 2**32)]
"""A stored pixel value."""


@cache
def leaf_types(cls: type) -> dict[str, Any]:
    """Maps the dotted key of every setting of a dataclass, nested ones included, to its type."""
    return {key: kind for key, kind in _members(cls) if not dataclasses.is_dataclass(kind)}


@cache
def section_types(cls: type) -> dict[str, type]:
    """Maps the dotted name of every nested section to its dataclass."""
    return {key: kind for key, kind in _members(cls) if dataclasses.is_dataclass(kind)}


def _members(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every setting and section."""
    for name, kind in get_type_hints(cls, include_extras=True).items():
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from _members(kind, f"{prefix}{name}.")


def kinds_of(annotation: Any) -> list[Any]:
    """The kinds of value that a setting may have, but none, without rules: [int] for int | None."""
    kinds = get_args(annotation) if is_union(annotation) else (annotation,)
    without_rules = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    return [kind for kind in without_rules if kind is not NoneType]


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def may_be_none(annotation: Any) -> bool:
    """Whether none is a value of the setting."""
    return NoneType in get_args(annotation)


def is_path(annotation: Any) -> bool:
    """Whether a setting of this type is a PathText, or one or none, or one or a word."""
    return any(_PATH in get_args(kind) for kind in (annotation, *get_args(annotation)))


def words_of(annotation: Any) -> list[Any]:
    """The values that a setting of this type may have by name: ["off"] for Literal["off"] | int."""
    kinds = (kind for kind in kinds_of(annotation) if get_origin(kind) is Literal)
    return [choice for kind in kinds for choice in get_args(kind)]


def check_fields(settings: object, section: str = "") -> None:
    """Raises a ConfigError for the first field that has not its type or breaks the type's rule.

    Nested sections check their own. section: dotted prefix of the names in messages.
    """
    for name, annotation in leaf_types(type(settings)).items():
        if "." not in name:
            convert(getattr(settings, name), annotation, f"{section}.{name}".lstrip("."))


def convert(value: Any, annotation: Any, key: str, also: str = "") -> Any:
    """Returns a value as the type that a setting declares, or raises a ConfigError.

    Strict: a bool is no int, an int is a fine float, lists become tuples, the text "none" is None
    where None is allowed. Unquoted text (Plain) is what the type makes of it; see
    `config_yaml.meaning`. Supports bool, int, float, str, Literal, tuples, unions and rules.
    also: ends the description of what was expected, as in "a number or none".
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        read = convert(value, arguments[0], key, also)
        require(arguments[1].allows(read), key, read, arguments[1].expected(read))
        return read
    if is_union(annotation):
        return convert_union(value, arguments, key)
    if origin is tuple and isinstance(value, list | tuple):
        return convert_tuple(value, annotation, key)
    if origin is Literal:
        read = meaning(value) if isinstance(value, Plain) else value
        for choice in arguments:
            if value == choice if isinstance(choice, str) else (read, type(read)) == (choice, int):
                return choice
    elif annotation in SCALAR_NAMES:
        read = read_scalar(value, annotation)
        if read is not None:
            return read
    expected = f"expected {describe_type(annotation)}{also}"
    fix = suggested_fix(value, annotation)
    raise ConfigError(f"{key}: {expected}, got {format_value(value)}{fix}", key=key)


def read_scalar(value: Any, kind: type) -> bool | int | float | str | None:
    """A value as bool, int, float or str; None where it is not of that kind."""
    if isinstance(value, Plain):
        if kind is str:
            return value.as_text()
        if kind is bool:
            value = SWITCHES.get(value.lower(), value)
        else:
            value = value.as_number() if kind is float else meaning(value)
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
    for member in others:
        rest = [describe_type(other) for other in others if other is not member]
        also = "".join(f" or {text}" for text in [*rest, *["none"] * nullable])
        try:
            return convert(value, member, key, also)
        except ConfigError:
            if member is others[-1]:
                raise


def convert_tuple(value: Sequence[Any], annotation: Any, key: str) -> tuple[Any, ...]:
    """Returns a list as a tuple of fixed or free length; see convert."""
    kinds = get_args(annotation)
    if kinds[-1] is Ellipsis:
        require(len(value) <= LONGEST_LIST, key, value, f"must have at most {LONGEST_LIST} values")
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        expected = f"expected {describe_type(annotation)}"
        got = f"got {len(value)}: {format_value(value)}"
        raise ConfigError(f"{key}: {expected}, {got}", key=key)
    pairs = enumerate(zip(value, kinds, strict=True))
    return tuple(convert(item, kind, f"{key}[{i}]") for i, (item, kind) in pairs)


def is_nothing(value: Any) -> bool:
    """Whether a value says none, in any of the usual ways."""
    if isinstance(value, Plain) and meaning(value) is None:
        return True
    return value is None or (isinstance(value, str) and value.lower() == "none")


def describe_type(annotation: Any) -> str:
    """Names a setting's type in words, as in "a list of 2, each a whole number"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        text = "a path" if arguments[1] is _PATH else "text"
        is_range = isinstance(arguments[1], Range)
        return f"{SCALAR_NAMES[arguments[0]]} {arguments[1]}" if is_range else text
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if is_union(annotation):
        others = [describe_type(member) for member in arguments if member is not NoneType]
        return " or ".join([*others, *["none"] * (NoneType in arguments)])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each {describe_type(arguments[0])}"
        kinds = sorted({describe_type(kind) for kind in arguments})
        return f"a list of {len(arguments)}, each {' or '.join(kinds)}"
    return SCALAR_NAMES[annotation]


def suggested_fix(value: Any, annotation: Any) -> str:
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
        return suggested_number(value.strip(), annotation)
    return ""
