"""dinoct-prepare: a folder of CT DICOM to a slice store, an index and a patient-level split."""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from dinoct.cli import Outcome, run_command
from dinoct.config import PrepareConfig, to_object
from dinoct.errors import ConfigError


def task(composed: DictConfig) -> Outcome:
    from dinoct.data.command import prepare_command

    prepare_command(to_object(composed), arguments=sys.argv[1:])
    return Outcome()


def refuse_sweep(arguments: Sequence[str]) -> None:
    """A sweep would name folders after the overrides, and a source may hold a patient's name.

    Raises:
        ConfigError: for ``-m``, and for a source that Hydra would take apart.
    """
    if any(argument in ("-m", "--multirun") for argument in arguments):
        raise ConfigError("prepare takes no -m: give several folders as source=[A,B]")
    for argument in arguments:
        value = argument.removeprefix("source=")
        if value != argument and value[:1] not in ("[", "'", '"') and any(c in value for c in ",(){}[]= "):
            quotes = "a path with spaces, commas or brackets needs quotes: \"source='/data/A, B'\""
            raise ConfigError(f"source: {quotes}; several folders are source=[ONE,TWO]")


def cli() -> None:
    """Entry point of ``dinoct-prepare``."""
    sys.exit(run_command("prepare", task, PrepareConfig, before=refuse_sweep))


if __name__ == "__main__":
    cli()
