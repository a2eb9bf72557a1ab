"""The older interface: flags with dashes, mapped to overrides by one table.

The scripts print the equivalent command, so that notes written for the flags can be brought up to date.
"""

import re
import shlex
import sys
from collections.abc import Callable, Sequence

from dinoct.errors import ConfigError

TRAIN_FLAGS: dict[str, str] = {  # flags that take a value -> key
    "--config": "model",
    "--max-steps": "train.max_steps",
    "--num-workers": "hardware.num_workers",
    "--batch-size": "train.batch_size",
    "--accumulation-steps": "train.accumulation_steps",
    "--vit-patch": "model.patch",
    "--vit-dim": "model.dim",
    "--vit-depth": "model.depth",
    "--vit-heads": "model.heads",
    "--img-size": "model.img_size",
    "--resume": "resume",
    "--ckpt-every": "ckpt.every",
    "--ckpt-keep-last": "ckpt.keep_last",
    "--device": "hardware.device",
    "--pin-memory": "hardware.pin_memory",
    "--lr": "optim.lr",
    "--monitor-every": "monitor.every",
}
TRAIN_SWITCHES: dict[str, str] = {  # flags that stand alone, or with true / false -> key
    "--grad-checkpoint": "train.grad_checkpoint",
    "--amp": "train.amp",
}
EVAL_FLAGS: dict[str, str] = {
    "--checkpoint": "checkpoint",
    "--split-manifest": "data.split_manifest",
    "--index-csv": "data.index_csv",
    "--n": "n",
    "--device": "hardware.device",
}
MONITOR_FLAGS: dict[str, str] = {"--checkpoint": "checkpoint", "--device": "hardware.device"}


def to_overrides(
    arguments: Sequence[str], flags: dict[str, str], switches: dict[str, str] | None = None
) -> tuple[list[str], list[str]]:
    """Split a command line of flags and overrides.

    Args:
        arguments: as typed; ``--flag value`` and ``--flag=value`` are the same.
        flags: flags with a value, to keys.
        switches: flags that may stand alone, to keys.
    Returns:
        Hydra's own flags (``-m``, ``--help``, ...), and the overrides.
    Raises:
        ConfigError: for an unknown flag or one without its value.
    """
    switches = switches or {}
    plain = "._-/:+," if {"-m", "--multirun"} & set(arguments) else "._-/:+"  # a comma sweeps, or belongs to a path
    hydra: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            (hydra if argument.startswith("-") else overrides).append(argument)
        elif name in flags:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"{name} needs a value")
                value = rest.pop(0)
            overrides.append(f"{flags[name]}={quote(value, plain=plain)}")
        elif name in switches:
            if not equals:
                value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
            overrides.append(f"{switches[name]}={value.lower()}")
        elif name in ("--help", "--cfg", "--multirun", "--version", "--info"):
            hydra.append(argument)
            if name == "--cfg" and not equals and rest:
                hydra.append(rest.pop(0))
        else:
            raise ConfigError(f"{name} is not a flag of this script; flags: {' '.join([*flags, *switches])}")
    return hydra, overrides


def quote(value: str, *, mark: str = "'", plain: str = "._-/:+") -> str:
    """A value as Hydra's grammar wants it: quoted where it holds more than `plain` and ASCII letters and digits."""
    if value and all((c.isascii() and c.isalnum()) or c in plain for c in value):
        return value
    escaped = re.sub(rf"(\\+)(?={mark}|$)", r"\1\1", value)  # a backslash counts before a mark alone
    return mark + escaped.replace(mark, f"\\{mark}") + mark


def run_legacy(
    command: str, cli: Callable[[], None], flags: dict[str, str], switches: dict[str, str] | None = None
) -> None:
    """Rewrite ``sys.argv`` from flags to overrides, say what it became, and run the command."""
    try:
        hydra, overrides = to_overrides(sys.argv[1:], flags, switches)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if "--help" in hydra:
        _print_flags(flags | (switches or {}), command)
    else:
        _print_notes(command, hydra, overrides)
    sys.argv = [command, *hydra, *overrides]
    cli()


def _print_flags(flags: dict[str, str], command: str) -> None:
    print("The older flags, and the settings that they are:\n")
    for flag, key in flags.items():
        print(f"  {flag:<22} {key}")
    print(f"\nSettings may be typed here too. {command} --help:\n", flush=True)


def _print_notes(command: str, hydra: Sequence[str], overrides: Sequence[str]) -> None:
    print("equivalent:", shlex.join([command, *hydra, *overrides]), flush=True)
    if command == "dinoct-train":
        print(f"note: {step_note(overrides)}", flush=True)
    if older := next((item for item in overrides if item.partition("=")[2].startswith("data/runs/")), None):
        print(f"note: {older}: runs lie in outputs/runs now", flush=True)


def step_note(overrides: Sequence[str]) -> str:
    """What a step is now, with what the accumulation given makes of it."""
    typed = dict(override.split("=", 1) for override in overrides if "=" in override)
    batch, accumulation = typed.get("train.batch_size"), typed.get("train.accumulation_steps")
    note = "a step is one optimiser update now, no longer one micro-batch"
    if accumulation and accumulation.isdigit():
        each = f"{accumulation} micro-batches"
        if batch and batch.isdigit():
            each += f" of {batch} = {int(accumulation) * int(batch)} slices"
        note += f": each step takes {each}"
        steps = typed.get("train.max_steps")
        if steps and steps.isdigit():
            note += f", and --max-steps {steps} means {steps} updates"
    return note
