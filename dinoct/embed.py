"""dinoct-embed: features of a folder of DICOM, or of a prepared set, one row per slice."""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from dinoct.cli import Outcome, run_command
from dinoct.config import EmbedConfig, to_object
from dinoct.errors import ConfigError
from dinoct.prepare import refuse_sweep


def task(composed: DictConfig) -> Outcome:
    from dinoct.delivery.embedding import embed_slices

    embed_slices(to_object(composed))
    return Outcome()


def refuse_multirun(arguments: Sequence[str]) -> None:
    """A sweep would name folders after the overrides, and a source may hold a patient's name.

    Raises:
        ConfigError: for ``-m``, and for a source that Hydra would take apart.
    """
    if any(argument in ("-m", "--multirun") for argument in arguments):
        raise ConfigError("embed takes no -m: run it once per checkpoint, each with its own out=")
    refuse_sweep(arguments)


def cli() -> None:
    """Entry point of ``dinoct-embed``."""
    sys.exit(run_command("embed", task, EmbedConfig, before=refuse_multirun))


if __name__ == "__main__":
    cli()
