"""The command line of every program: flags, --help, signals and one boundary for errors."""

import argparse
import dataclasses
import errno
import inspect
import logging
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, get_origin

import yaml

from common import notices
from common.config import (
    REPOSITORY,
    ConfigError,
    Given,
    build,
    given_by_set,
    given_by_word,
    given_in_file,
    load_config,
)
from common.config_types import (
    describe_type,
    is_nothing,
    kinds_of,
    leaf_types,
    may_be_none,
    words_of,
)
from common.config_yaml import unquoted
from common.errors import ExitStatus, UserError
from common.files import NO_ROOM, free_space

LOG = logging.getLogger(__name__)
Settings = TypeVar("Settings")
WIDTH = 100
PROFILE_HELP = "write a profile of 20 steps, profile.json.gz, to the run's folder"
COMMON_FLAGS = {"device": "auto, cpu, cuda, cuda:1 or mps", "seed": "seed of everything random"}
REMEDIES = {
    errno.EEXIST: "A file of that name is where a folder is needed. Name another, or move it away.",
    errno.ENOTDIR: "A part of the path is a file, not a folder. Name another path.",
    errno.EINVAL: "Name another path.",
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
    and status 1 (a ConfigError with 2), Ctrl-C with the line `interrupted` and status 130, SIGTERM
    with that line and status 143. Any other exception is a programming error and keeps its
    traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts switch it off for imports
    # SIGTERM ends the program as sys.exit does: open files are dealt with
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitStatus.TERMINATED))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    notices.forget()
    try:
        status = main()
        notices.sum_up()
        _leave(status)
    except KeyboardInterrupt:
        message, status = interrupted, ExitStatus.INTERRUPTED
    except SystemExit as ended:
        if ended.code != ExitStatus.TERMINATED:
            raise
        message, status = interrupted, ExitStatus.TERMINATED
    except UserError as error:
        message, status = str(error), error.status
    except OSError as error:
        message, status = f"{describe_os_error(error)} {unfinished}", ExitStatus.NOTHING_DONE
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        message = f"not enough memory ({first_line(error)}). Lower the batch or image size."
        status = ExitStatus.NOTHING_DONE
    path = Path(sys.argv[0])
    program = path.parent.name if path.name == "__main__.py" else path.name
    print(f"{program}: {message.rstrip()}", file=sys.stderr)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """Exits; a signal that comes now, as torchrun sends one, would end in a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    sys.exit(int(status))


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
    add = parser.add_argument
    add("--config", type=Path, default=default, metavar="FILE", help=f"YAML settings file{shown}")
    set_help = "set one key, for instance seed=3; repeatable, wins over the file"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=set_help)
    flags = [name for name in COMMON_FLAGS if name in leaf_types(cls)]
    for name in flags:
        add(f"--{name}", metavar="VALUE", help=COMMON_FLAGS[name])
    add("--dry_run", action="store_true", help="print the resolved settings and stop")
    parser.set_defaults(setting_flags={name: name for name in flags})
    try:
        shipped = None if default is None else load_config(cls, default)
    except ConfigError:  # said where the file is used; a broken one must not take --help away
        shipped = None
    parser.epilog = (parser.epilog or "") + describe_settings(cls, shipped, str(default_config))


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    without: Collection[str] = (),
    redirect: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Adds --<field> for every leaf of a settings class, besides add_common_arguments's flags.

    For programs whose published flags are flat (`--lr_init 0.1`) while their settings are nested
    (`contrastive.lr_init`). without: fields that get no flag, for instance because another flag has
    that name. redirect: flags that set another field than that of their name, by its dotted key.
    """
    keys = {name: key for name, key in flag_keys(cls).items() if name not in without}
    for name, key in keys.items():
        if name in COMMON_FLAGS:
            continue
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"= {key}"}
        kinds = kinds_of(leaf_types(cls)[key])
        choices = list(map(str, words_of(leaf_types(cls)[key])))
        if kinds == [bool] and not may_be_none(leaf_types(cls)[key]):
            options["action"] = argparse.BooleanOptionalAction
        elif any(get_origin(kind) is tuple for kind in kinds):
            options |= {"nargs": "*", "metavar": "VALUE"}
        else:
            options["metavar"] = "|".join(choices) or "VALUE"
        parser.add_argument(f"--{name}", **options)
    parser.set_defaults(setting_flags=keys | redirect)


def flag_keys(cls: type) -> dict[str, str]:
    """Flag name → dotted key of every leaf field; ValueError where two fields share a name."""
    keys: dict[str, str] = {}
    for key in leaf_types(cls):
        name = key.rpartition(".")[2]
        if name in keys:
            raise ValueError(f"fields {keys[name]} and {key} would share the flag --{name}")
        keys[name] = key
    return keys


def load_from_arguments(
    cls: type[Settings], args: argparse.Namespace, *, other_sections: Collection[str] = ()
) -> Settings:
    """The settings that --config, --set and the flags ask for, later ones winning.

    other_sections: top-level sections of the file that belong to another program and are skipped.
    Logs what the settings' own warnings() says, where the class has such a method.
    """
    source = str(args.config or "default settings")
    config = build(cls, given_settings(cls, args, other_sections=other_sections), source)
    for warning in getattr(config, "warnings", list)():
        LOG.warning("%s: %s", source, warning)
    return config


def given_settings(
    cls: type, args: argparse.Namespace, *, other_sections: Collection[str] = ()
) -> Given:
    """The same as they were written; their keys are the settings that the command gives."""
    given = {} if args.config is None else given_in_file(cls, args.config, without=other_sections)
    for text in args.overrides:
        given |= given_by_set(cls, text)
    for name, key in args.setting_flags.items():
        value = getattr(args, name, None)
        if isinstance(value, str):
            given |= given_by_word(cls, key, value, f"--{name}")
        elif isinstance(value, list):
            words, annotation = [unquoted(word) for word in value], leaf_types(cls)[key]
            nothing = may_be_none(annotation) and [is_nothing(w) for w in words] == [True]
            by_name = len(words) == 1 and words[0] in words_of(annotation)
            read = words[0] if by_name else words
            given[key] = (None if nothing else read, f"--{name}")
        elif value is not None:  # a switch
            given[key] = (value, f"--{name}")
    return given


def describe_settings(cls: type, shipped: Any = None, shipped_name: str = "") -> str:
    """Lists every setting of a settings dataclass, section by section.

    shipped: settings whose values are shown beside the defaults where they differ; shipped_name:
    the file they come from.
    """
    beside = "" if shipped is None else f", after -> that of {shipped_name}"
    head = (
        "settings, in the file (a section's keys indented below its name) or as --set KEY=VALUE.\n"
        f"After = stands the value used where the file lacks the key{beside}.\n"
        "Paths in the file are relative to the repository's root, typed ones to here."
    )
    return "\n".join([head, *describe_section(cls(), shipped, "")])


def describe_section(defaults: Any, shipped: Any, prefix: str) -> list[str]:
    """Returns the lines on one section and on those inside it."""
    documents, types = field_documents(type(defaults)), leaf_types(type(defaults))
    lines, below = [], []
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        other = value if shipped is None else getattr(shipped, field.name)
        if dataclasses.is_dataclass(value):
            title = " ".join((inspect.getdoc(type(value)) or "").split())
            below += ["", *textwrap.wrap(title, WIDTH)]
            below += describe_section(value, other, f"{prefix}{field.name}.")
            continue
        line = f"{prefix}{field.name} = {as_yaml(value)}"
        line += f"  -> {as_yaml(other)}" if other != value else ""
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
    found = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


def as_yaml(value: Any) -> str:
    """Returns a setting's value as it would stand in a file."""
    if value is None:
        return "none"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
