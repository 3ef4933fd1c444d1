"""Reading and writing the YAML text of settings files. Used through `common.config`.

What is read is a part of YAML without surprises: one mapping, no tags, no aliases, keys given once,
few and shallow values. Files come from strangers, too, beside their checkpoints and heatmaps.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from common.config_text import Plain, meaning, read_otherwise, shorten
from common.config_types import REPOSITORY, ConfigError

MOST_BYTES = 128 * 1024
MOST_VALUES = 2000
MOST_LEVELS = 20
DEEP = re.compile(r"([\[{]\s*){40}")
"""Brackets that PyYAML would look through slowly before it comes to the first."""


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


def parse_text(text: str) -> Any:
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
    """Returns what a node of a YAML text holds; see parse_text."""
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [value_of(item) for item in node.value]
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            refuse(key, "a key must be a name, not a list or a section")
        if key.value in values:
            line = key.start_mark.line + 1
            raise RepeatedKeyError(f"line {line} gives the key {shorten(repr(key.value))}")
        values[key.value] = value_of(value)
    return values


class RepeatedKeyError(yaml.YAMLError):
    """A mapping names a key twice."""


def plain_values(value: Any) -> Any:
    """Returns nested values with every Plain one as what it means by itself."""
    if isinstance(value, dict):
        return {str(key): plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_values(inner) for inner in value]
    return meaning(value) if isinstance(value, Plain) else value


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


def parse_value(written: str) -> Any:
    """Returns the YAML value of a command-line text, unquoted ones as Plain; raises ConfigError."""
    try:
        return parse_text(written)
    except RepeatedKeyError as error:
        problem = f"{error} a second time"
    except yaml.YAMLError as error:
        problem = explain(error)
    raise ConfigError(f"--set: {shorten(repr(written))} is not valid YAML: {problem}")


def unquoted(written: str) -> str:
    """Returns a command-line text that stands for itself, less one pair of quotes around it."""
    quoted = len(written) > 1 and written[0] == written[-1] and written[0] in "'\""
    return written[1:-1] if quoted else written


def write_yaml(data: dict[str, Any]) -> str:
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
