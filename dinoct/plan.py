"""From a composed config to the plan of a run: new or resumed, where, with which settings. Nothing is written yet."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dinoct.config import TrainConfig, to_object
from dinoct.errors import ConfigError
from dinoct.sweeps import find_job, job_overrides
from dinoct.validate import validate

if TYPE_CHECKING:
    from dinoct.checkpoint import Checkpoint

OWN_GROUPS = ("model", "hardware", "aug", "engine", "data", "loss", "optim", "ckpt", "tracker", "probe", "parallel")


@dataclass
class RunPlan:
    cfg: TrainConfig
    command: str
    choices: dict[str, str]
    run_dir: str | None  # null: a new folder under outputs/runs
    sweep: str | None = None  # the sweep's name, which groups its runs
    job: str | None = None  # of a cluster's scheduler: the same when it is started again
    overrides: list[str] | None = None  # of a sweep's job: what it trains, as its sweep finds it again
    requeued: bool = False  # this job of a sweep was in run_dir before: pre-empted, out of time, killed
    done: bool = False  # this job was done before
    checkpoint: "Checkpoint | None" = None
    typed: frozenset[str] = frozenset()  # keys on the command line
    warnings: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    resumes_in_place: bool = False  # in the checkpoint's own run folder

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.cfg)


def check_parallel(plan: RunPlan) -> None:
    """Whether ``parallel`` fits what else was typed, and the way the command was started.

    Raises:
        ConfigError: naming the key to change.
    """
    parallel, started = plan.cfg.parallel, int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else None
    if "ckpt.sharded" in plan.typed and plan.cfg.ckpt.sharded and parallel.name != "fsdp":
        raise ConfigError("ckpt.sharded=true needs parallel=fsdp: elsewhere one process has the whole state")
    if parallel.name == "none":
        if started not in (None, 1):
            raise ConfigError(
                f"{started} processes were started, each of which would train alone: add parallel=ddp or parallel=fsdp"
            )
        return
    for key in ("preflight", "replay"):
        if getattr(plan.cfg, key):
            raise ConfigError(f"{key} looks at one process: add parallel=none")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if started is None and tasks > 1:
        raise ConfigError(
            f"srun started {tasks} tasks that do not know of each other, and each would start processes of its own: "
            "take one task per node, with torchrun (docs/scaling.md)"
        )
    if started is not None and parallel.processes not in (None, started):
        raise ConfigError(f"parallel.processes={parallel.processes}, but {started} were started: leave it out")


def plan_run(composed: DictConfig, *, command: str) -> RunPlan:
    """Decide what the command means.

    Raises:
        ConfigError, CheckpointError: naming the key to change.
    """
    hydra = HydraConfig.get()
    choices = {group: str(hydra.runtime.choices[group]) for group in (*OWN_GROUPS, "experiment")}
    cfg = to_object(composed)
    sweep, run_dir = None, cfg.run_dir
    if cfg.preflight and cfg.replay is not None:
        raise ConfigError("preflight=true looks at a run to come and does not go with replay: leave one out")
    if hydra.mode == RunMode.MULTIRUN:
        if run_dir:
            raise ConfigError(
                "run_dir cannot be given in a sweep: its runs would share the folder; use hydra.sweep.dir"
            )
        run_dir, sweep = hydra.runtime.output_dir, str(hydra.sweep.dir).rstrip("/").rsplit("/", 1)[-1]
    plan = RunPlan(cfg, command, choices, run_dir, sweep, typed=_typed(list(hydra.overrides.task)))
    check_parallel(plan)
    if sweep:
        executor = os.environ.get("SUBMITIT_EXECUTOR")
        plan.overrides = job_overrides(hydra.overrides.task)
        find_job(plan, Path(str(hydra.sweep.dir)), f"{executor} {hydra.job.id}" if executor else None)
        if plan.done:
            return plan
    if cfg.replay is not None:
        cfg.resume = cfg.replay
    if cfg.resume is None:
        validate(cfg)
    else:
        _resumed(plan, composed, overrides=list(hydra.overrides.task))
    if plan.checkpoint is None:
        plan.warnings += _experiment_over_choices(choices, composed, list(hydra.overrides.task))
    if sweep and plan.cfg.eval.every is None:  # a sweep is compared by the mean percentile rank, never by the loss
        plan.cfg.eval.every = plan.cfg.train.max_steps
    return plan


def _typed(overrides: list[str]) -> frozenset[str]:
    keys = {override.lstrip("+").split("=", 1)[0] for override in overrides}
    for override in overrides:
        if "={" in override:
            from dinoct.resume import typed_below

            keys |= set(typed_below(override))
    return frozenset(keys)


def _experiment_over_choices(choices: dict[str, str], composed: DictConfig, overrides: list[str]) -> list[str]:
    """A warning for each ``GROUP=CHOICE`` that was typed beside an experiment whose own keys go over it."""
    names = [override.split("=", 1)[0] for override in overrides if "={" not in override]
    typed = [group for group in OWN_GROUPS if group in names]
    if not typed or "experiment" not in names:
        return []
    from dinoct.resume import flatten

    without = compose("train", [override for override in overrides if not override.startswith("experiment=")])
    found = []
    for group in typed:
        rest = [override for override in overrides if not override.startswith(f"{group}=")]
        if compose("train", rest, return_hydra_config=True).hydra.runtime.choices[group] == choices[group]:
            continue  # it is the experiment's own
        chosen, taken = flatten(without[group]), flatten(composed[group])
        kept = [f"{group}.{key}={taken[key]}" for key in taken if taken[key] != chosen[key]]
        if kept:
            over = f"experiment={choices['experiment']} goes over {group}={choices[group]}"
            found.append(f"{over}: {' '.join(kept)}; type those to change them")
    return found


def _resumed(plan: RunPlan, composed: DictConfig, *, overrides: list[str]) -> None:
    """Fill the plan of a run that goes on from a checkpoint."""
    from dinoct import resume

    checkpoint, warnings = resume.find_checkpoint(plan.cfg.resume, plan.cfg.run_dir)
    plan.warnings += warnings
    stored = checkpoint.meta["config"]
    plan.cfg = resume.merge_config(
        stored,
        composed,
        defaults=compose("train"),
        overrides=overrides,
        choices=plan.choices,
        stored_choices=checkpoint.meta["choices"],
    )
    validate(plan.cfg)
    limit = plan.cfg.train.max_steps
    if limit is not None and limit < checkpoint.step:
        raise ConfigError(f"train.max_steps={limit} lies before the checkpoint's step {checkpoint.step}")
    resume.check_shapes(stored, plan.config_dict())
    plan.changes = resume.changes(stored, plan.config_dict())
    chosen = ("hardware", "parallel", *(group for group in plan.choices if group in plan.typed))
    plan.choices = checkpoint.meta["choices"] | {group: plan.choices[group] for group in chosen}
    plan.checkpoint = checkpoint
    home = checkpoint.path.absolute().parent
    if (home / "config.json").is_file():  # else it is no run's: copied to there, perhaps
        place = Path(plan.run_dir or home)
        plan.resumes_in_place = place.is_dir() and place.samefile(home)
        plan.run_dir = str(home if plan.resumes_in_place else place.absolute())
    if plan.resumes_in_place and checkpoint.path.name.startswith("abandoned_sharded_"):
        raise ConfigError(f"resume={plan.cfg.resume}: shares that were set aside need another folder: give run_dir=...")
