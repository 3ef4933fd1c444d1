"""The command line of every program: flags, --help, signals and one boundary for errors."""

import argparse
import ast
import dataclasses
import errno
import inspect
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml

from common import notices
from common.config import (
    REPOSITORY,
    ConfigError,
    build,
    describe_type,
    flat_values,
    kinds_of,
    leaf_types,
    literal_choices,
    load_config,
    may_be_none,
    parse_override,
    read_settings,
    takes_text,
    typed,
    without_rules,
)
from common.config_yaml import NUMBER, Plain, shorten
from common.errors import UserError
from common.files import NO_ROOM, free_space
from common.runtime import exit_on_sigterm

LOG = logging.getLogger(__name__)
Settings = TypeVar("Settings")
WIDTH = 100
COMMON = ("device", "seed")
"""Flags that `add_common_arguments` has added already."""
INTERRUPTED = 128 + signal.SIGINT
REMEDIES = {
    errno.EEXIST: "A file of that name is where a folder is needed. Name another, or move it away.",
    errno.ENOTDIR: "A part of the path is a file, not a folder. Name another path.",
    errno.EISDIR: "A folder is where a file is needed. Name another path.",
    errno.EACCES: "Allow it, or name another path.",
    errno.EPERM: "Allow it, or name another path.",
    errno.EROFS: "That place cannot be written to; name another path.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit (ulimit -n), or lower the number of reading processes.",
}


def run_script(
    main: Callable[[], int], *, interrupted: str = "Interrupted.", unfinished: str = ""
) -> NoReturn:
    """Runs a program's main function and exits with the status that it returns.

    unfinished: how to go on after the system's refusals are mended, for the message.

    A UserError, an error of the operating system and a lack of memory end the program with one line
    and status 1, Ctrl-C with the line `interrupted` and status 130, SIGTERM with status 143. Any
    other exception is a programming error and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts switch it off for imports
    exit_on_sigterm()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    notices.forget()
    try:
        status = main()
        notices.sum_up()
    except KeyboardInterrupt:
        _say(interrupted)
        status = INTERRUPTED
    except UserError as error:
        _say(str(error))
        status = 1
    except OSError as error:
        _say(f"{describe_os_error(error)} {unfinished}".rstrip())
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        _say(f"not enough memory ({first_line(error)}). Lower the batch or image size.")
        status = 1
    sys.exit(status)


def describe_os_error(error: OSError) -> str:
    """The system's reason, the file and, where there is an obvious one, the remedy."""
    reason = error.strerror or str(error) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    remedy = REMEDIES.get(error.errno, "")
    if error.errno == errno.EFBIG:
        remedy = "Raise the limit on the size of files (ulimit -f); what was saved before is whole."
    elif error.errno in NO_ROOM and where:
        free = free_space(Path(os.fsdecode(error.filename)))
        known = "" if free is None else f" ({free / 2**20:.0f} MiB are free there)"
        remedy = f"Make room{known}; what was saved before is whole."
    return f"{where}{reason}. {remedy}".rstrip()


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether NumPy or PyTorch, on a CPU or a GPU, could not allocate an array."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "unable to allocate")
    return any(sign in text for sign in signs)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _say(message: str) -> None:
    """One message on standard error, behind the program's name."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


def add_common_arguments(
    parser: argparse.ArgumentParser, cls: type, *, default_config: str | Path | None = None
) -> None:
    """Adds --config, --set, --device, --seed, --dry_run, and every setting to --help.

    default_config: file that --config defaults to, relative to the repository's root; None starts
    from the dataclass's defaults.
    """
    default = None if default_config is None else REPOSITORY / default_config
    shown = f" (default: {default_config})" if default_config else ""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config", type=Path, default=default, metavar="FILE", help=f"YAML settings file{shown}"
    )
    set_help = "set one key, for instance train.lr=1.0e-4; repeatable, wins over the file"
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=set_help
    )
    if "device" in leaf_types(cls):
        parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps")
    if "seed" in leaf_types(cls):
        parser.add_argument("--seed", metavar="N", help="seed of everything random")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved settings and stop"
    )
    try:
        shipped = None if default is None else load_config(cls, default)
    except ConfigError:  # said where the file is used; a broken one must not take --help away
        shipped = None
    parser.epilog = (parser.epilog or "") + describe_settings(cls, shipped, str(default_config))


def load_from_arguments(cls: type[Settings], args: argparse.Namespace) -> Settings:
    """Returns the settings that --config, --set, --device and --seed ask for, the latter winning.

    Logs what the settings' own warnings() says, where the class has such a method.
    """
    flags = {name: getattr(args, name, None) for name in ("device", "seed")}
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    config = load_config(cls, args.config, [*args.overrides, *given])
    for warning in getattr(config, "warnings", list)():
        LOG.warning("%s: %s", args.config or "default settings", warning)
    return config


def flag_keys(cls: type) -> dict[str, str]:
    """Flag name → dotted key of every leaf field; ValueError where two fields share a name."""
    keys: dict[str, str] = {}
    for key in leaf_types(cls):
        name = key.rpartition(".")[2]
        if name in keys:
            raise ValueError(f"fields {keys[name]} and {key} would share the flag --{name}")
        keys[name] = key
    return keys


def add_flags(parser: argparse.ArgumentParser, cls: type, *, without: Collection[str] = ()) -> None:
    """Adds --<field> for every leaf of a settings class; what is not given stays the file's.

    without: fields that get no flag, for instance because another flag has that name.
    """
    for name, key in flag_keys(cls).items():
        if name in COMMON or name in without:
            continue
        annotation = leaf_types(cls)[key]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": f"= {key}"}
        choices = [c for kind in kinds_of(annotation) for c in literal_choices(kind)]
        if annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif _is_list(annotation):
            options |= {"nargs": "*", "metavar": "VALUE"}
        else:
            options["metavar"] = "|".join(map(str, choices)) if choices else "VALUE"
        parser.add_argument(f"--{name}", **options)


def load_from_flags(
    cls: type[Settings],
    args: argparse.Namespace,
    *,
    other_sections: Collection[str] = (),
    redirect: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """The settings that --config, --set and the flags ask for, later ones winning.

    other_sections: top-level sections of the file that belong to another program and are skipped.
    redirect: flags that set another field than that of their name, by its dotted key. Logs what
    the settings' own warnings() says, where the class has such a method.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    source = str(args.config or "default settings")
    if args.config is not None:
        data = {k: v for k, v in read_settings(args.config).items() if k not in other_sections}
        values |= flat_values(cls, data, source)
    for text in args.overrides:
        value = parse_override(cls, text)
        values |= value
        origins |= dict.fromkeys(value, f"--set {shorten(text)}")
    for name, key in (flag_keys(cls) | redirect).items():
        given = getattr(args, name, None)
        if given is not None:
            values |= _flag_value(cls, name, key, given)
            origins[key] = f"--{name}"
    config = build(cls, values, source, origins)
    for warning in getattr(config, "warnings", list)():
        LOG.warning("%s: %s", source, warning)
    return config


def _flag_value(cls: type, name: str, key: str, given: str | bool | list[str]) -> dict[str, Any]:
    annotation = leaf_types(cls)[key]
    try:
        if isinstance(given, list):
            return {key: typed(cls, key, _list_value(given, annotation), f"--{name}")}
        if isinstance(given, bool):
            return {key: given}
        if takes_text(annotation):
            return parse_override(cls, f"{key}={given}")
        value = Plain(_as_float_text(given) if float in kinds_of(annotation) else given)
        return {key: typed(cls, key, value, f"--{name}")}
    except ConfigError as error:
        message = str(error).removeprefix("--set: ").removeprefix(f"--{name}: ")
        raise ConfigError(f"--{name}: {message}", key=key) from None


def _list_value(given: list[str], annotation: Any) -> list[str] | None:
    """The words behind a flag as a list of what the setting holds, for typed."""
    if may_be_none(annotation) and [word.lower() for word in given] == ["none"]:
        return None
    (kind,) = kinds_of(annotation)
    elements = {without_rules(element) for element in get_args(kind)} - {Ellipsis}
    if float in elements:
        return [Plain(_as_float_text(word)) for word in given]
    return [Plain(word) for word in given] if int in elements else list(given)


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in kinds_of(annotation))


def _as_float_text(text: str) -> str:
    """The number as YAML writes it: 1e-6, which YAML takes for text, becomes 1.0e-06."""
    if text.lstrip("+-").isdigit() or not NUMBER.fullmatch(text):
        return text
    number = repr(float(text))
    return number if "." in number or "e" not in number else number.replace("e", ".0e")


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
