"""The text of --help: every setting, its default, its type and the docstring under its field."""

import ast
import dataclasses
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any

import yaml

from common.config_types import describe_type, leaf_types

WIDTH = 100


def describe_settings(cls: type, shipped: Any = None, shipped_name: str = "") -> str:
    """Lists every setting of a settings dataclass, section by section.

    shipped: settings whose values are shown beside the defaults where they differ; shipped_name:
    the file they come from.
    """
    head = (
        "settings, in the file (a section's keys indented below its name) or as --set KEY=VALUE.\n"
        "After = stands the value used where the file lacks the key"
    )
    if shipped is not None:
        head += f", after -> that of {shipped_name}"
    paths = "Paths in the file are relative to the repository's root, typed ones to here."
    return "\n".join([f"{head}.\n{paths}", *describe_section(cls, cls(), shipped, "")])


def describe_section(cls: type, defaults: Any, shipped: Any, prefix: str) -> list[str]:
    """Returns the lines on one section and on those inside it."""
    documents, types = field_documents(cls), leaf_types(cls)
    lines, below = [], []
    for field in dataclasses.fields(cls):
        value = getattr(defaults, field.name)
        other = value if shipped is None else getattr(shipped, field.name)
        if dataclasses.is_dataclass(value):
            title = " ".join((inspect.getdoc(type(value)) or "").split())
            below += ["", *textwrap.wrap(title, WIDTH)]
            below += describe_section(type(value), value, other, f"{prefix}{field.name}.")
            continue
        line = f"{prefix}{field.name} = {as_yaml(value)}"
        if other != value:
            line += f"  -> {as_yaml(other)}"
        about = f"{documents.get(field.name, '')} ({describe_type(types[field.name])})"
        lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent=" " * 8)
        lines += textwrap.wrap(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines + below


@cache
def field_documents(cls: type) -> dict[str, str]:
    """Maps a dataclass's field names to the docstrings written under them, on one line each.

    Python keeps no such docstrings, so they are read from the source; {} where there is none.
    """
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:
        return {}
    body = ast.parse(source).body[0].body
    documents: dict[str, str] = {}
    for statement, following in pairwise(body):
        named = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if named and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            documents[statement.target.id] = " ".join(str(following.value.value).split())
    return documents


def as_yaml(value: Any) -> str:
    """Returns a setting's value as it would stand in a file."""
    if value is None:
        return "none"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
