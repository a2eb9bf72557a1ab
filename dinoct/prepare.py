"""dinoct-prepare: a folder of CT DICOM to a slice store, an index and a patient-level split."""

import sys

from omegaconf import DictConfig

from dinoct.cli import Outcome, run_command
from dinoct.config import PrepareConfig, to_object


def task(composed: DictConfig) -> Outcome:
    from dinoct.data.command import prepare_command

    prepare_command(to_object(composed), arguments=sys.argv[1:])
    return Outcome()


def cli() -> None:
    """Entry point of ``dinoct-prepare``."""
    sys.exit(run_command("prepare", task, PrepareConfig))


if __name__ == "__main__":
    cli()
