"""Reading and writing the YAML text of settings files. Used through `common.config`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from common.config_types import REPOSITORY, ConfigError


def read_yaml(path: Path) -> dict[Any, Any]:
    """Returns the mapping in a YAML file; raises ConfigError, for a key given twice too."""
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.y*ml"))
        if (REPOSITORY / path).is_file():
            near = [str(REPOSITORY / path)]
        there = f" There is: {', '.join(near)}." if near else ""
        raise ConfigError(f"No settings file {path}.{there} Pass one with --config.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        repeated = next(repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader)), None)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if repeated is not None:
        line = repeated.start_mark.line + 1
        raise ConfigError(f"{path}: line {line} gives the key {repeated.value!r} a second time.")
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds one {type(data).__name__}"
        raise ConfigError(f"{path}: {what}; expected lines of `key: value`.")
    return data


def repeated_keys(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yields the key nodes that repeat an earlier key of their mapping, at any depth."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    yield key
                seen.add(key.value)
            yield from repeated_keys(value)


def parse_value(written: str, *, literal: bool = False) -> Any:
    """Returns the YAML value of a command-line text; raises ConfigError.

    literal: the text stands for itself, whatever YAML would read in it; none and null do not.
    """
    if literal:
        return None if written.lower() in ("", "~", "none", "null") else written.strip("'\"")
    try:
        return yaml.safe_load(written)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set: {written!r} is not valid YAML: {error}") from error


def write_yaml(data: dict[str, Any]) -> str:
    """Returns nested plain values as YAML text, lists on one line, sections as indented blocks."""
    return yaml.dump(data, Dumper=FlowListDumper, sort_keys=False, width=100, allow_unicode=True)


class FlowListDumper(yaml.SafeDumper):
    """Writes lists on one line."""

    def represent_list(self, data: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


FlowListDumper.add_representer(list, FlowListDumper.represent_list)
