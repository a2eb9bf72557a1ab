"""dinoct-monitor: draw what a checkpoint sees."""

import sys

from omegaconf import DictConfig

from dinoct.cli import Outcome, run_command
from dinoct.config import MonitorConfig, to_object
from dinoct.eval import refuse_model


def task(composed: DictConfig) -> Outcome:
    from dinoct.monitoring import monitor_checkpoint

    monitor_checkpoint(to_object(composed))
    return Outcome()


def cli() -> None:
    """Entry point of ``dinoct-monitor``."""
    sys.exit(run_command("monitor", task, MonitorConfig, before=refuse_model))


if __name__ == "__main__":
    cli()
