"""The YAML text of settings files: what unquoted values mean, how text is read and written.

What is read is a part of YAML without surprises: one mapping, no tags, no aliases, keys given once,
few and shallow values. Files come from strangers, too, beside their checkpoints and heatmaps.
"""

import math
import re
from typing import Any

import yaml

WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})")
POINT = re.compile(r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
NUMBER = re.compile(r"([-+]?)(?=\.?[0-9])0*([0-9]*)(\.[0-9]*)?(?:[eE]([-+]?)([0-9]+))?")
"""What people write as a number, readable to every YAML reader or not."""
OTHER_BASE = re.compile(r"[-+]?0[xob][0-9a-fA-F_]+")
WORDS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
}
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""What is read where true or false is wanted, and only there."""
LONGEST_SHOWN = 100
ITEMS_SHOWN = 12
MOST_BYTES = 128 * 1024
MOST_VALUES = 2000
MOST_LEVELS = 20
DEEP = re.compile(r"([\[{]\s*){40}")
"""Brackets that PyYAML would look through slowly before it comes to the first."""


class Plain(str):
    """A value that stands without quotes in a YAML file, as it was written.

    YAML readers disagree on 010, 1:30, off or 2024-01-31; here the setting's type decides.
    """

    __slots__ = ()

    def as_text(self) -> str | None:
        """The text that it is, None where some YAML reader takes it for something else."""
        return None if read_otherwise(self) else str(self)

    def as_number(self) -> Any:
        """The number that it is, or whatever else it means by itself."""
        return meaning(self)


class Word(Plain):
    """A word of the command line: any text stands for itself, and 1e-4 is a number."""

    __slots__ = ()

    def as_text(self) -> str | None:
        return str(self) or None

    def as_number(self) -> Any:
        return float(self) if NUMBER.fullmatch(self) else meaning(self)


def unquoted(written: str) -> str:
    """Returns a command line's text as a Word; what stands between quotes as mere text."""
    quoted = len(written) > 1 and written[0] == written[-1] and written[0] in "'\""
    return written[1:-1] if quoted else Word(written)


def meaning(text: Plain) -> bool | int | float | str | None:
    """What an unquoted value is by itself, as in YAML 1.2: true, false, null, a number, or text.

    Numbers in spellings that readers disagree on, such as 010, 1_000, 0x10, 1:30 and 1e-4, are
    text, and so are numbers of more than 40 digits.
    """
    if text in WORDS:
        return WORDS[text]
    if WHOLE.fullmatch(text):
        return int(text)
    if POINT.fullmatch(text):
        return float(text)
    if SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return str(text)


def read_otherwise(text: str) -> bool:
    """Whether some YAML reader takes this text, without quotes, for something that is no text."""
    if meaning(Plain(text)) != text or NUMBER.fullmatch(text) or OTHER_BASE.fullmatch(text):
        return True
    readings = yaml.SafeLoader.yaml_implicit_resolvers  # YAML 1.1
    return any(pattern.match(text) for _, pattern in readings.get(text[:1], []))


def suggested_number(text: str, kind: type) -> str:
    """Returns what to write for text that people mean as a number, such as 0042, 1_000 or 1e-4.

    kind: int or float. "" where nothing is obvious.
    """
    digits = text.replace("_", "")
    if OTHER_BASE.fullmatch(digits):
        try:
            return f". Write {int(digits, 0)}"
        except ValueError:  # 0b12
            return ""
    parts = NUMBER.fullmatch(digits)
    if parts is None or not math.isfinite(float(digits)):
        return ""
    sign, whole, point, power_sign, power = parts.groups(default="")
    number = f"{sign.strip('+')}{whole or '0'}"
    if kind is float:
        number += (point if len(point) > 1 else ".0") + f"e{power_sign or '+'}{power}" * bool(power)
    elif point or power:
        number = f"{float(digits):.0f}" if float(digits).is_integer() else ""
    why = ", which YAML reads as text" if power else ""
    return f"{why}. Write {number}" if number else ""


def format_value(value: Any, depth: int = 0) -> str:
    """Returns a value as it would stand in a YAML file, for messages: never more than some 100
    characters, whatever it holds."""
    if isinstance(value, list | tuple):
        if depth > 2:
            return "[...]"
        items = [format_value(item, depth + 1) for item in value[:ITEMS_SHOWN]]
        items += ["..."] * (len(value) > ITEMS_SHOWN)
        return shorten(f"[{', '.join(items)}]")
    if isinstance(value, Plain):
        read = meaning(value)
        if isinstance(read, bool | int) or (isinstance(read, float) and math.isfinite(read)):
            return shorten(str(value))
        value = read
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "a number of more than 40 digits"
    if isinstance(value, float | str):
        return shorten(repr(value))
    return "a section" if isinstance(value, dict) else f"a {type(value).__name__}"


def shorten(text: str) -> str:
    """Text of at most some 100 characters; the length says what was cut."""
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[: LONGEST_SHOWN - 30]}... ({len(text)} characters)"


class SettingsLoader(yaml.SafeLoader):
    """Reads the structure of a YAML text, and gives up on what settings have no use for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.levels = self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Called by PyYAML for every value, and by itself for those inside."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            refuse(event, f"the alias *{event.anchor} is not understood here; repeat the value")
        if event.tag not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            refuse(event, f"the tag {shorten(tag)} is not understood here; leave it out")
        self.values += 1
        if self.values > MOST_VALUES:
            refuse(event, f"more than {MOST_VALUES} values")
        if self.levels == MOST_LEVELS:
            refuse(event, f"values are nested more than {MOST_LEVELS} deep")
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def refuse(place: yaml.Event | yaml.Node, problem: str) -> None:
    """Raises a YAMLError about a place in the text."""
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def parse(text: str) -> Any:
    """Returns nested lists and dicts of a YAML text; unquoted values are Plain, others str.

    Raises YAMLError, also for a key that is given twice or is no single value.
    """
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"{len(text)} characters; settings have at most {MOST_BYTES}")
    if DEEP.search(text):
        raise yaml.YAMLError(f"values are nested more than {MOST_LEVELS} deep")
    loader = SettingsLoader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    return Plain("") if node is None else value_of(node)


def value_of(node: yaml.Node) -> Any:
    """Returns what a node of a YAML text holds; see parse."""
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [value_of(item) for item in node.value]
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            refuse(key, "a key must be a name, not a list or a section")
        if key.value in values:
            line, name = key.start_mark.line + 1, shorten(repr(key.value))
            raise yaml.YAMLError(f"line {line} gives the key {name} a second time")
        values[key.value] = value_of(value)
    return values


def plain_values(value: Any) -> Any:
    """Returns nested values with every Plain one as what it means by itself."""
    if isinstance(value, dict):
        return {key: plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_values(inner) for inner in value]
    return meaning(value) if isinstance(value, Plain) else value


def explain(error: yaml.YAMLError) -> str:
    """Returns what PyYAML says of a text, and where, in one line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.character:#x} at position {error.position} is not allowed"
    mark = getattr(error, "problem_mark", None)
    parts = (getattr(error, "context", None), getattr(error, "problem", None))
    problem = " ".join(", ".join(filter(None, parts)).split() or str(error).split())
    if "'\\t'" in problem:
        problem += "; indent with blanks, not tabs"
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return f"{where}{problem}"


def write(data: dict[str, Any]) -> str:
    """Returns nested plain values as YAML text, lists on one line, sections as indented blocks."""
    return yaml.dump(data, Dumper=SettingsDumper, sort_keys=False, width=100, allow_unicode=True)


class SettingsDumper(yaml.SafeDumper):
    """Writes lists on one line, quotes whatever some reader takes for no text, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_text(self, data: str) -> yaml.Node:
        style = "'" if read_otherwise(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


SettingsDumper.add_representer(list, SettingsDumper.represent_list)
SettingsDumper.add_representer(str, SettingsDumper.represent_text)
