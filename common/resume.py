"""What may change when a run goes on, for all trainings."""

from collections.abc import Collection, Mapping
from typing import Any

from common.checkpoint import CheckpointError

REMEDY = "Give the settings it was made with, or start a new run in another folder."


def changed_settings(
    saved: Mapping[str, Any], given: Mapping[str, Any], *, absent: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, given) of every setting that differs.

    All three are nested plain values, as `config_to_dict` returns them. absent: the settings' own
    defaults, which a key that the saved ones lack had.
    """
    before, after = flat(absent) | flat(saved), flat(given)
    return {
        key: (before.get(key), value) for key, value in after.items() if before.get(key) != value
    }


def check_resumed_settings(
    changed: Mapping[str, tuple[Any, Any]],
    *,
    may_change: Collection[str],
    source: str,
    remedy: str = REMEDY,
) -> list[str]:
    """Refuses to go on where more has changed than may; returns a line for each allowed change.

    may_change: dotted keys, or sections with a dot at the end ("evaluation."). source: the
    checkpoint, for the message. Raises CheckpointError that names every refused key, both values
    and the remedy.
    """
    lines = {
        key: f"{key}: {old!r} when it was saved, {new!r} now" for key, (old, new) in changed.items()
    }
    sections = tuple(name for name in may_change if name.endswith("."))
    refused = [
        line
        for key, line in lines.items()
        if key not in may_change and not key.startswith(sections)
    ]
    if refused:
        raise CheckpointError(
            f"{source} was made with other settings, and cannot go on with these: "
            f"{'; '.join(refused)}. {remedy}"
        )
    return list(lines.values())


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found
