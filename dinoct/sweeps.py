"""A job of a sweep: which folder is its own where the sweep goes on, or where a cluster's scheduler starts it again.

A job is what it trains. Hydra's name of its folder is not enough: it is cut where the overrides are long, leaves some
of them out, and changes with the job's number.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dinoct.errors import ConfigError
from dinoct.rundir import RunFolder

if TYPE_CHECKING:
    from dinoct.plan import RunPlan

NOT_TRAINED = ("resume", "hardware", "parallel", "tracker", "ckpt", "monitor")  # where and how, but not what


def job_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides that say what a job trains, sorted."""
    bare = (override.lstrip("+") for override in overrides)
    return sorted(each for each in bare if each.split("=", 1)[0].split(".", 1)[0] not in NOT_TRAINED)


def check_sweep(arguments: Sequence[str]) -> None:
    """What is refused before Hydra makes a sweep's folder.

    Raises:
        ConfigError: naming the argument.
    """
    if "SUBMITIT_EXECUTOR" in os.environ:  # one job of a sweep, which was checked
        return
    if "RANK" in os.environ:
        raise ConfigError("torchrun cannot start a sweep: parallel.processes=N starts the processes of each job")
    typed = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments if "=" in argument)
    folder, again = typed.get("hydra.sweep.dir", "").strip("'\""), typed.get("resume") == "auto"
    held = bool(folder) and any(Path(folder).glob("*/config.json"))
    if again and not folder:
        raise ConfigError("resume=auto in a sweep goes on with that sweep: name it, hydra.sweep.dir=outputs/sweeps/ID")
    if again and not held:
        raise ConfigError(f"resume=auto: no run has begun in hydra.sweep.dir={folder}")
    if held and not again:
        raise ConfigError(
            f"hydra.sweep.dir={folder} holds a sweep already: resume=auto goes on with it, or take another folder"
        )


def find_job(plan: "RunPlan", sweep_dir: Path, job: str | None) -> None:
    """Fill in the folder of a plan, and what it goes on from: its own checkpoint, else what the sweep began from.

    Args:
        plan: of the job; ``resume=auto`` in it says that the sweep goes on.
        sweep_dir: of the sweep.
        job: as the cluster's scheduler knows it; it is the same when it was requeued.
    Raises:
        ConfigError: for a folder that holds another run.
    """
    from dinoct.resume import has_checkpoint

    own, again = RunFolder(Path(plan.run_dir)), plan.cfg.resume == "auto"
    before, plan.job, origin = own.read_config(), job, plan.cfg.resume
    if again:
        runs = {path.parent: RunFolder(path.parent).read_config() for path in sorted(sweep_dir.glob("*/config.json"))}
        origin = next((run["history"][0].get("from_checkpoint") for run in runs.values() if run.get("history")), None)
        found = next((folder for folder, run in runs.items() if run.get("overrides") == plan.overrides), None)
        plan.done = found is not None and runs[found].get("state") == "done"
    else:
        found = own.path if job is not None and before.get("job") == job else None
    if found is not None:
        with suppress(OSError):
            own.path.rmdir()  # Hydra has made it, and the job's number was another then
        plan.run_dir, plan.requeued = str(found), True
        plan.cfg.resume = str(found) if has_checkpoint(found) else origin
    elif before:
        cure = "take its place in the order of the values" if again else "resume=auto goes on with a sweep"
        raise ConfigError(f"{own.path} holds a run already: {cure}, or take another hydra.sweep.dir")
    elif again:
        plan.warnings.append(f"no run in {sweep_dir} has these settings: this job begins")
        plan.cfg.resume = origin
