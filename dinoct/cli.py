"""What all commands share: compose, run, one clear line on an error, an exit status.

Nothing heavy is imported here, so that `--help` and a mistyped key answer at once.
"""

import argparse
import difflib
import errno
import io
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises what happened instead of printing its own digest

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dinoct.caches import find_room_for_caches
from dinoct.errors import ConfigError, DinoctError
from dinoct.legacy import quote
from dinoct.stopping import hand_on

if hasattr(argparse.ArgumentParser, "_check_help"):  # Python 3.14 reads help texts when they are added to a parser,
    _check_help = argparse.ArgumentParser._check_help  # and Hydra 1.3 has one that is none before it is shown

    def _check_text(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            _check_help(parser, action)

    argparse.ArgumentParser._check_help = _check_text

DONE, ERROR, FAILED = 0, 1, 2
_TEXTS = (str, str | None, list[str], list[str] | None, Any)
_NO_TEXT = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d[\d_]*)?|[+-]?(inf|nan)|true|false", re.I)
QUOTING = "a value with more than plain letters, digits and ._-/: needs quotes, for the shell too"
told: list[str] = []  # what was said of this job's error, for the table of its sweep


@dataclass(frozen=True)
class Outcome:
    """What a task ends with: the exit status, and the figure that a sweep may optimise (smaller is better)."""

    status: int = DONE
    objective: float | None = None


def run_command(
    config_name: str,
    task: Callable[[DictConfig], Outcome],
    schema: type,
    *,
    before: Callable[[Sequence[str]], None] = lambda _: None,
) -> int:
    """Compose the primary config `config_name` from ``sys.argv`` and run `task` on it.

    Args:
        config_name: a file of `conf/` without its ending.
        task: gets the composed config.
        schema: the dataclass of the config, for suggestions on misspelt keys.
        before: sees the command line's arguments first and may refuse them.
    Returns:
        The exit status: the task's, or 1 after an error of which one line stands on stderr.
    """
    status = DONE
    sys.argv[1:] = keep_text(sys.argv[1:], schema)
    typed = list(sys.argv)

    def remember(cfg: DictConfig) -> float | None:
        nonlocal status
        told.clear()
        sys.argv = list(typed)  # a launcher of jobs runs this in a process that another command started
        try:
            outcome = task(cfg)
            hand_on(outcome.status)
        except Exception as error:  # here and not outside: Hydra would print the overrides beside it, and end a sweep
            complain(error, schema)
            outcome = Outcome(ERROR, float("inf"))
        status = max(status, outcome.status)
        if status > 128 and HydraConfig.get().mode == RunMode.MULTIRUN:
            sys.exit(status)  # stopped by a signal: the sweep's other jobs do not start
        return outcome.objective

    try:
        find_room_for_caches()
        refuse_what_hydra_cannot_parse(sys.argv[1:])
        refuse_unknown_additions(sys.argv[1:], schema)
        refuse_empty_values(sys.argv[1:], schema)
        before(sys.argv[1:])
        hydra.main(version_base="1.3", config_path="pkg://dinoct.conf", config_name=config_name)(remember)()
    except Exception as error:
        status = complain(error, schema)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        status = 128 + getattr(interrupt, "signal", signal.SIGINT)
    return status


def complain(error: Exception, schema: type) -> int:
    """One line on stderr; returns the exit status."""
    if isinstance(error, DinoctError):
        message = str(error)
    elif isinstance(error, HydraException | OmegaConfBaseException):
        message = explain_config_error(error, schema, sys.argv[1:])
    elif isinstance(error, OSError) and (typed := typed_place(error, sys.argv[1:])):
        message = f"{typed} cannot be written or read: {error.strerror}: {os.fsdecode(error.filename)}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        key = next(key for key in ("out", "run_dir", "data.root") if key in option_keys(schema))
        key = "hydra.sweep.dir" if key == "run_dir" and sweep_argument(sys.argv[1:]) else key
        typed = next((argument for argument in sys.argv[1:] if argument.startswith(f"{key}=")), None)
        place = f"elsewhere than {typed}" if typed else f"elsewhere, by {key}=..."
        message = f"{error.strerror}: free some, or write {place}"
    else:
        message = f"{type(error).__name__}: {error} (DINOCT_TRACEBACK=1 shows where)"
    words = {"phantom", *(word for key in option_keys(schema) for word in key.split("."))}
    for argument in sys.argv[1:]:  # a source may hold a patient's name: it is not repeated
        value = argument.removeprefix("source=").strip("'")
        if argument.startswith("source=") and value not in words and any(map(str.isalnum, value)):
            message = message.replace(argument, "source=...").replace(value, "...")
    if os.environ.get("DINOCT_TRACEBACK") == "1":
        traceback.print_exception(error)
    told.append(" ".join(message.split()))
    print(f"error: {told[-1]}", file=sys.stderr)
    return ERROR


def sweep_argument(arguments: Sequence[str]) -> str | None:
    """The argument that asks for a sweep, where one does."""
    return next((a for a in arguments if a in ("-m", "--multirun") or a.startswith("+sweep=")), None)


def typed_place(error: OSError, arguments: Sequence[str]) -> str | None:
    """The argument that led to the file of an error: its value is the file, or a folder above it or in it."""
    if not isinstance(error.filename, str | bytes) or not error.strerror:
        return None
    path = os.path.abspath(os.fsdecode(error.filename))
    for argument in arguments:
        value = argument.partition("=")[2]
        place = os.path.abspath(value.strip("'\""))
        shared = os.path.commonpath([place, path])
        if value and place != "/" and (shared == place or (shared == path and "/" in value)):
            return argument
    return None


def refuse_what_hydra_cannot_parse(arguments: Sequence[str]) -> None:
    """Hydra's parser prints its whole usage and exits with 2, which means a failed evaluation here.

    Raises:
        ConfigError: naming the argument.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            get_args_parser().parse_args(arguments)
    except SystemExit as end:
        if end.code in (0, None):  # --help and its like end the parse too
            return
        reason = said.getvalue().strip().splitlines()[-1].split("error:", 1)[-1].strip()
        raise ConfigError(
            f"{reason}. Settings are KEY=VALUE without dashes, and flags such as -m stand before them; "
            "the older flags work with scripts/phase5_*.py"
        ) from None


def keep_text(arguments: Sequence[str], schema: type) -> list[str]:
    """Arguments in which what looks like a number and is a text stands in quotes.

    Hydra reads ``run_dir=20260103_120000`` as the number 20260103120000, and a patient 1e5 as 100000.0.
    """
    texts = {key for key, kind in option_types(schema) if kind in _TEXTS}
    out = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in texts:
            inside = re.fullmatch(r"\[([^\[\]'\"]*)\]", value)
            kept = f"[{','.join(map(_kept, inside[1].split(',')))}]" if inside else _kept(value)
            argument = f"{key}={kept}"
        out.append(argument)
    return out


def _kept(value: str) -> str:
    return f"'{value.strip()}'" if _NO_TEXT.fullmatch(value.strip()) else value


def refuse_empty_values(arguments: Sequence[str], schema: type) -> None:
    """``run_dir=`` is what a shell makes of an unset variable, and as a path it would be the current folder.

    Raises:
        ConfigError: naming the key.
    """
    known = {*option_keys(schema), "experiment"}
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if "=" in argument and key in known and not value.strip("'\" "):
            raise ConfigError(f"{key}= has no value: give one, or {key}=null for none")


def refuse_unknown_additions(arguments: Sequence[str], schema: type) -> None:
    """Hydra lets ``+key=value`` add a key that nothing reads; only settings and groups are worth adding.

    Raises:
        ConfigError: naming the override.
    """
    known = {*option_keys(schema), "sweep", "experiment"}
    for argument in arguments:
        key = argument.lstrip("+").split("=", 1)[0].split("@")[0]
        if argument.startswith("+") and key not in known and not key.startswith("hydra"):
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{argument}: there is no setting {key}" + (f"; did you mean {near[0]}?" if near else ""))


def explain_config_error(error: Exception, schema: type, overrides: Sequence[str]) -> str:
    """One sentence for an error of Hydra or OmegaConf, with the nearest key where one was misspelt."""
    text = str(error)
    known = {*option_keys(schema), "experiment", "sweep"}
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        unknown = "=" in override and not override.startswith("hydra") and key not in known
        if unknown and f"'{key.rsplit('.', 1)[-1]}'" in text.replace(key, key.rsplit(".", 1)[-1]):
            near = difflib.get_close_matches(key, known, n=1)
            return f"{key} is not a setting" + (f"; did you mean {near[0]}?" if near else "") + " (see --cfg job)"
    if isinstance(error, OverrideParseException):
        key = error.override.lstrip("+~").split("=", 1)[0]
        if key not in known and not key.startswith("hydra"):
            return f"{key} is not a setting (see --cfg job)"
        return f"{error.override} cannot be read: {QUOTING}: {quoted(error.override)}"
    if text.startswith("Ambiguous value for argument"):
        typed = text.splitlines()[0].split("'", 1)[1].removesuffix("'")
        return f"{typed}: several values are a sweep (-m) or a list (in brackets); {QUOTING}: {quoted(typed)}"
    if "missing mandatory value:" in text.lower():
        key = text.rsplit(":", 1)[1].split()[0]
        return f"{key} is needed: give {key}=..."
    if text.startswith("Error merging override") and error.__cause__:
        text = f"{text.removeprefix('Error merging override ')}: {str(error.__cause__).splitlines()[0]}"
    text = re.sub(r"is incompatible with type hint '(?:Optional\[)?Union\[([^]]+)\]+'", r"is none of: \1", text)
    text = re.sub(r"Value '(.*?)' of type '\w+' could not be converted to Integer", _whole_number, text)
    text = re.sub(r"Value '.*?' of type '\w+' could not be converted to Float", "it must be a number", text)
    text = re.sub(r"Invalid value assigned: \w+ is not a ListConfig, list or tuple", "a list stands in brackets", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    drop = (
        "full_key:",
        "object_type=",
        "Set the environment",
        "reference_type=",
        "Config search path",
        "Did you mean",
        "provider=",
    )
    return " ".join(line for line in lines if not line.startswith(drop))


def _whole_number(found: re.Match) -> str:
    try:
        nearest = f", such as {round(float(found[1]))}"
    except (ValueError, OverflowError):
        nearest = ""
    return f"it must be a whole number{nearest}"


def quoted(override: str) -> str:
    """An override as a shell takes it, its value in quotes: ``'checkpoint="Müller/x.pth"'``."""
    key, _, value = override.partition("=")
    if key == "source":  # it is not repeated, see `complain`
        value = '"..."'
    elif re.fullmatch(r"\[.*\]", value):
        value = f"[{','.join(quote(item, mark=chr(34)) for item in value[1:-1].split(','))}]"
    else:
        value = quote(value, mark='"', plain="")
    return shlex.quote(f"{key}={value}")


def option_keys(schema: type) -> list[str]:
    """All keys that a user may set, dotted: the public option surface."""
    return [key for key, _ in option_types(schema)]


def option_types(schema: type, prefix: str = "") -> list[tuple[str, Any]]:
    """`option_keys`, each with its type."""
    found = []
    for item in fields(schema):
        name = f"{prefix}{item.name}"
        found.append((name, item.type))
        if is_dataclass(item.type):
            found += option_types(item.type, f"{name}.")
    return found
