"""YAML files and command-line texts to nested frozen dataclasses, strictly.

A key that a file lacks has the dataclass's default. An unknown key, a wrong type or an impossible
combination is a ConfigError that names the file, the key and the remedy. A setting's type may carry
a rule, `Annotated[int, AtLeast(1, 1000)]`. A setting is addressed by its dotted key, `train.lr`.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common.config_yaml import (
    MOST_BYTES,
    NUMBER,
    OTHER_BASE,
    SWITCHES,
    Plain,
    RepeatedKeyError,
    explain,
    meaning,
    parse_text,
    plain_values,
    read_otherwise,
    shorten,
    show,
    unquoted,
    write_yaml,
)
from common.errors import UserError

LOG = logging.getLogger(__name__)

Settings = TypeVar("Settings")
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


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; not a number is in no range."""

    low: float
    high: float
    ends: str = "[]"
    """Which ends belong to it, in the usual brackets: [) leaves the upper one out."""

    def __contains__(self, number: float) -> bool:
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
        return f">= {self.low}" if self.ends[0] == "[" else f"> {self.low}"


@dataclass(frozen=True)
class TextRule:
    """What a text must look like."""

    pattern: re.Pattern[str]
    """Matches the whole of every allowed text."""
    expected: str
    """Completes "device: ..., got 'x'"."""
    longest: int = 4096
    """Most bytes in UTF-8."""

    def allows(self, text: str) -> bool:
        fits = len(text.encode("utf-8", "surrogatepass")) <= self.longest
        return fits and self.pattern.fullmatch(text) is not None


UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
ANY_TEXT = TextRule(
    re.compile(rf"[^{UNPRINTABLE}]*"),
    "must be text in UTF-8 without control characters, at most 4096 bytes",
)
PATH_TEXT = TextRule(re.compile(rf"[^{UNPRINTABLE}]+"), f"a path {ANY_TEXT.expected}, not empty")
NAME = TextRule(
    re.compile(rf"(?![. ])[^/\\{UNPRINTABLE}]+(?<! )"),
    "names a folder: 1 to 100 bytes in UTF-8, no slash, backslash or control character, no dot at "
    "the start, no blank at either end",
    longest=100,
)
DEVICE = TextRule(
    re.compile(r"auto|cpu|cuda|cuda:[0-9]{1,3}|mps"), "must be auto, cpu, cuda, cuda:1 (a number) "
    "or mps",
)  # fmt: skip

PathText = Annotated[str, PATH_TEXT]
"""Text that names a file or folder; see `common.config.resolve_path` for what it is relative to."""
NameText = Annotated[str, NAME]
"""Text that becomes the name of one folder, or a part of it."""
DeviceText = Annotated[str, DEVICE]
"""What `common.runtime.resolve_device` understands."""

# Upper ends are generous: nobody who has a machine for it is refused.
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1, "[)")]
"""A share, probability or decay below 1."""
PositiveShare = Annotated[float, Range(0, 1, "(]")]
"""A share that is not nothing and may be all."""
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
WhiteValue = Annotated[int, AtLeast(1, 2**32)]
"""A stored pixel value."""


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


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file as nested dicts, lists, text, numbers, bools and None.

    Raises ConfigError for whatever is wrong with it, in less than a second whatever it holds.
    """
    return plain_values(read_settings(path))


def read_settings(path: Path) -> dict[str, Any]:
    """The same with unquoted values as they were written, Plain; raises ConfigError."""
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.y*ml"))
        if (REPOSITORY / path).is_file():
            near = [str(REPOSITORY / path)]
        there = f" There is: {', '.join(near)}." if near else ""
        raise ConfigError(f"No settings file {path}.{there} Pass one with --config.")
    try:
        data = parse_text(decoded(path))
    except RepeatedKeyError as error:
        raise ConfigError(f"{path}: {error} a second time.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {explain(error)}") from error
    if not isinstance(data, dict):
        kind = "list" if isinstance(data, list) else "str"
        what = "is empty" if data == "" else f"holds one {kind}"
        raise ConfigError(f"{path}: {what}; expected lines of `key: value`.")
    return data


def decoded(path: Path) -> str:
    """Returns the text of a settings file; raises ConfigError unless it is UTF-8 and of a sane
    size."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path}: settings files have at most {MOST_BYTES // 1024} KiB.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: is written in UTF-16; save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8."
        ) from None


def parse_value(written: str) -> Any:
    """Returns the YAML value of a command-line text, unquoted ones as Plain; raises ConfigError."""
    try:
        return parse_text(written)
    except RepeatedKeyError as error:
        problem = f"{error} a second time"
    except yaml.YAMLError as error:
        problem = explain(error)
    raise ConfigError(f"--set: {shorten(repr(written))} is not valid YAML: {problem}")


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
    `common.config_yaml.meaning`. Supports bool, int, float, str, Literal, tuples, unions, rules.
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
