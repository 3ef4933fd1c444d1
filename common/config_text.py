"""What an unquoted YAML value means, and how values are shown in messages."""

import math
import re
from typing import Any

import yaml

WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})")
POINT = re.compile(r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
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


class Plain(str):
    """A value that stands without quotes in a YAML file, as it was written.

    YAML readers disagree on 010, 1:30, off or 2024-01-31; here the setting's type decides.
    """

    __slots__ = ()


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


def show(value: Any, depth: int = 0) -> str:
    """Returns a value as it would stand in a YAML file, for messages: never more than some 100
    characters, whatever it holds."""
    if isinstance(value, list | tuple):
        if depth > 2:
            return "[...]"
        items = [show(item, depth + 1) for item in value[:ITEMS_SHOWN]]
        items += ["..."] * (len(value) > ITEMS_SHOWN)
        return shorten(f"[{', '.join(items)}]")
    if isinstance(value, Plain):
        read = meaning(value)
        if isinstance(read, bool | int) or (isinstance(read, float) and math.isfinite(read)):
            return shorten(str(value))
        value = read
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "a number of more than 40 digits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return shorten(repr(value))
    return "a section" if isinstance(value, dict) else f"a {type(value).__name__}"


def shorten(text: str) -> str:
    """Text of at most some 100 characters; the length says what was cut."""
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[: LONGEST_SHOWN - 30]}... ({len(text)} characters)"
