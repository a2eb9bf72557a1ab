"""dinoct-export: the trained encoder as one file for the next project."""

import sys

from omegaconf import DictConfig

from dinoct.cli import Outcome, run_command
from dinoct.config import ExportConfig, to_object


def task(composed: DictConfig) -> Outcome:
    from dinoct.delivery.formats import export_encoder

    export_encoder(to_object(composed))
    return Outcome()


def cli() -> None:
    """Entry point of ``dinoct-export``."""
    sys.exit(run_command("export", task, ExportConfig))


if __name__ == "__main__":
    cli()
