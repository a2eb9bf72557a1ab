"""dinoct-train: compose, validate, build, run, tear down."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from dinoct.cli import Outcome, run_command
from dinoct.compare.read import read_figures
from dinoct.config import TrainConfig
from dinoct.errors import ConfigError
from dinoct.sweeps import check_sweep
from dinoct.typed import sweep_argument
from dinoct.validate import check_deletions


def task(composed: DictConfig) -> Outcome:
    """One training run from a composed config; imports torch only now, so that a typing error answers at once."""
    from dinoct.plan import plan_run

    plan = plan_run(composed, command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))

    if plan.done:
        from dinoct.console import console  # not above: a launcher pickles what stands there, and a console has a lock

        console.print(f"done before: {plan.run_dir}", markup=False)
        return Outcome(objective=read_figures(Path(plan.run_dir) / "metrics.jsonl")[1])

    from dinoct.launch import launch

    return launch(plan)


def check_arguments(arguments: Sequence[str]) -> None:
    """What is refused before Hydra sees it, and makes folders of a sweep.

    Raises:
        ConfigError: naming the argument.
    """
    check_deletions(arguments)
    sweep = sweep_argument(arguments)
    if sweep and "preflight=true" in (a.lower() for a in arguments):
        raise ConfigError(f"preflight=true looks at one run and does not go with a sweep ({sweep}): leave one out")
    if sweep:
        check_sweep(arguments)


def cli() -> None:
    """Entry point of ``dinoct-train``."""
    sys.exit(run_command("train", task, TrainConfig, before=check_arguments))


if __name__ == "__main__":
    cli()
