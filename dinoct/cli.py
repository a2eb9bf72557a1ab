"""What all commands share: compose, run, one clear line on an error, an exit status.

Nothing heavy is imported here, so that `--help` and a mistyped key answer at once.
"""

import argparse
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises what happened instead of printing its own digest

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dinoct.caches import find_room_for_caches
from dinoct.errors import DinoctError
from dinoct.stopping import hand_on
from dinoct.typed import (
    QUOTING,
    is_number,
    keep_text,
    meant,
    option_keys,
    quoted,
    refuse_empty_values,
    refuse_unknown_additions,
    refuse_what_hydra_cannot_parse,
    stands_alone,
    sweep_argument,
)

if hasattr(argparse.ArgumentParser, "_check_help"):  # Python 3.14 reads help texts when they are added to a parser,
    _check_help = argparse.ArgumentParser._check_help  # and Hydra 1.3 has one that is none before it is shown

    def _check_text(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            _check_help(parser, action)

    argparse.ArgumentParser._check_help = _check_text

DONE, ERROR, FAILED = 0, 1, 2
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


def explain_config_error(error: Exception, schema: type, overrides: Sequence[str]) -> str:
    """One sentence for an error of Hydra or OmegaConf, with the nearest key where one was misspelt."""
    text = str(error)
    known = {*option_keys(schema), "experiment", "sweep"}
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        unknown = "=" in override and not override.startswith("hydra") and key not in known
        if unknown and f"'{key.rsplit('.', 1)[-1]}'" in text.replace(key, key.rsplit(".", 1)[-1]):
            return f"{key} is not a setting{meant(key, schema)} (see --cfg job)"
    if isinstance(error, OverrideParseException):
        key = error.override.lstrip("+~").split("=", 1)[0]
        if "=" not in error.override:
            return stands_alone(key, schema)
        if key not in known and not key.startswith("hydra"):
            return f"{key} is not a setting{meant(key, schema)} (see --cfg job)"
        if is_number(key, schema):
            return f"{error.override} cannot be read: {key} takes one number, and each setting is a word of its own"
        return f"{error.override} cannot be read: {QUOTING}: {quoted(error.override)}"
    if text.startswith("Ambiguous value for argument"):
        typed = text.splitlines()[0].split("'", 1)[1].removesuffix("'")
        key, _, values = typed.partition("=")
        if is_number(key, schema):
            return f"{typed}: {key} takes one number, with a decimal point; several are a sweep (-m)"
        return f"{typed}: several values are a sweep (-m) or a list, '{key}=[{values}]'; {QUOTING}: {quoted(typed)}"
    if "missing mandatory value:" in text.lower():
        key = text.rsplit(":", 1)[1].split()[0]
        return f"{key} is needed: give {key}=..."
    if text.startswith("Error merging override") and error.__cause__:
        text = f"{text.removeprefix('Error merging override ')}: {str(error.__cause__).splitlines()[0]}"
    text = re.sub(r"is incompatible with type hint '(?:Optional\[)?Union\[([^]]+)\]+'", r"is none of: \1", text)
    text = re.sub(r"Value '(.*?)' of type '\w+' could not be converted to Integer", _whole_number, text)
    text = re.sub(r"Value '.*?' of type '\w+' could not be converted to Float", "it must be a number", text)
    text = re.sub(r"Invalid value assigned: \w+ is not a ListConfig, list or tuple", "a list stands in brackets", text)
    text = re.sub(r"(\S+)=(\S+): a list stands in brackets", r"\g<0>: \1=[\2]", text)
    text = re.sub(r"=\[\S+: it must be a number", r"\g<0>; a sweep (-m) has no brackets", text)
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
