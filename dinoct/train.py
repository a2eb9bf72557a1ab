"""dinoct-train: compose, validate, build, run, tear down."""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from dinoct.cli import Outcome, run_command
from dinoct.config import TrainConfig
from dinoct.validate import check_deletions


def task(composed: DictConfig) -> Outcome:
    """One training run from a composed config; imports torch only now, so that a typing error answers at once."""
    from dinoct.plan import plan_run

    plan = plan_run(composed, command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))

    from dinoct.run import execute

    return execute(plan)


def cli() -> None:
    """Entry point of ``dinoct-train``."""
    sys.exit(run_command("train", task, TrainConfig, before=check_deletions))


if __name__ == "__main__":
    cli()
