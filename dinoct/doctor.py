"""dinoct-doctor: what this machine has for a run, line by line, and what to do about what is missing."""

import sys

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dinoct.cli import DONE, ERROR, Outcome, run_command
from dinoct.config import DoctorConfig, to_object


def task(composed: DictConfig) -> Outcome:
    """Print the findings as they come; imports torch only now."""
    from dinoct.checkup.findings import FAIL, WARN, show
    from dinoct.checkup.report import check_up

    cfg = to_object(composed)
    named = any(override.startswith("data") for override in HydraConfig.get().overrides.task)
    levels = [show(finding) for finding in check_up(cfg, data_named=named)]
    print(f"{levels.count(FAIL)} failed, {levels.count(WARN)} to look at")
    return Outcome(ERROR if FAIL in levels else DONE)


def cli() -> None:
    """Entry point of ``dinoct-doctor``."""
    sys.exit(run_command("doctor", task, DoctorConfig))


if __name__ == "__main__":
    cli()
