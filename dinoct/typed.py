"""The command line as it was typed: what may stand there, and what Hydra would misread."""

import difflib
import io
import re
import shlex
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from typing import Any

from hydra._internal.utils import get_args_parser

from dinoct.config import DoctorConfig, EmbedConfig, EvalConfig, ExportConfig, MonitorConfig, PrepareConfig, TrainConfig
from dinoct.errors import ConfigError
from dinoct.legacy import quote

COMMANDS = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "eval": EvalConfig,
    "monitor": MonitorConfig,
    "export": ExportConfig,
    "embed": EmbedConfig,
    "doctor": DoctorConfig,
}
_TEXTS = (str, str | None, list[str], list[str] | None, Any)
_NO_TEXT = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d[\d_]*)?|[+-]?(inf|nan)|true|false", re.I)
QUOTING = "a value with more than plain letters, digits and ._-/: needs quotes, for the shell too"


def sweep_argument(arguments: Sequence[str]) -> str | None:
    """The argument that asks for a sweep, where one does."""
    return next((a for a in arguments if a in ("-m", "--multirun") or a.startswith("+sweep=")), None)


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
        if key == "experiment" and value == "null":
            raise ConfigError("experiment=null is what there is without it: leave it out")


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


def is_number(key: str, schema: type) -> bool:
    """Whether a setting takes one number."""
    return dict(option_types(schema)).get(key) in (int, float, int | None, float | None)


def meant(key: str, schema: type) -> str:
    """What a key that is no setting of a command was meant to be, in words; empty where nobody knows."""
    if others := [name for name, other in COMMANDS.items() if other is not schema and key in option_keys(other)]:
        return f" of this command but of {' and '.join(f'dinoct-{name}' for name in others)}"
    last = key.rsplit(".", 1)[-1]
    near = [known for known in option_keys(schema) if known.rsplit(".", 1)[-1] == last]
    near = near or difflib.get_close_matches(key, {*option_keys(schema), "experiment", "sweep"}, n=1)
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def stands_alone(word: str, schema: type) -> str:
    """What is wrong with a word without "=". It is not repeated where it may be a folder with a patient's name."""
    keys = option_keys(schema)
    if word in (*keys, "experiment"):
        return f"{word} stands there without a value: a setting is {word}=VALUE, in one word"
    place = next(key for key in ("checkpoint", "source", "resume", "data.root") if key in keys)
    what = "a word" if "source" in keys else word
    return (
        f"{what} stands there without a key: a setting is KEY=VALUE, a path stands behind its key ({place}=PATH), and "
        f"a value with spaces needs quotes, for the shell too: '{place}=\"A B\"'"
    )
