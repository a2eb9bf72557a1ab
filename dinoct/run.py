"""Carrying out the plan of a training run."""

import logging
import secrets
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dinoct import checkpoint as checkpoints
from dinoct import provenance
from dinoct.announce import announce
from dinoct.checkup.batchsize import fit_batch
from dinoct.cli import DONE, FAILED, Outcome
from dinoct.config import build_engine
from dinoct.console import console, log, run_log
from dinoct.data.dataset import SliceViews, open_split
from dinoct.data.index import SliceIndex
from dinoct.data.views import ViewMaker
from dinoct.engine import Engine
from dinoct.errors import ConfigError, DinoctError
from dinoct.faults import explain, is_out_of_memory
from dinoct.hardware import Hardware, keep_effective_batch, resolve, settle
from dinoct.lineage import Line
from dinoct.locking import NO_LOCKS
from dinoct.models.backbone import parameter_count
from dinoct.models.load import initial_weights
from dinoct.models.ssl import SelfDistillation
from dinoct.optim import build_optimizer
from dinoct.parallel import Parallel
from dinoct.plan import RunPlan
from dinoct.resume import lost_changes, refuse_overtaken
from dinoct.rundir import RUNS, RunFolder
from dinoct.saving import check_space_for_run, state_bytes
from dinoct.schedules import BEHIND_HORIZON, ENDLESS_HORIZON, Schedules
from dinoct.stopping import interruptible
from dinoct.tracking import Tracker, build_tracker
from dinoct.turnback import rewind, turn_back
from dinoct.validate import EIGHT_BIT

RANK_SEEDS = 1_000_003  # between two ranks' generators


def execute(plan: RunPlan, parallel: Parallel | None = None) -> Outcome:
    """Train as planned, in a run folder of its own; or replay a step, or look ahead at what the run would take.

    Args:
        plan: of the run.
        parallel: this rank's place, where several train; the first of them writes.

    Raises:
        DinoctError: with one line; the traceback of anything unforeseen is in the run's train.log.
    """
    parallel = parallel or Parallel()
    hardware = resolve(plan.cfg.hardware, plan.cfg.train, processes=parallel.world, device=parallel.device)
    if plan.checkpoint is not None and "train.accumulation_steps" not in plan.typed:
        before = plan.checkpoint.meta["hardware"]
        effective = before["batch_size"] * before["accumulation_steps"] * before.get("processes", 1)
        hardware = keep_effective_batch(hardware, effective)
    data = open_split(plan.cfg.data)  # what is wrong with the data is said before a folder is made
    settle(hardware)
    torch.manual_seed(plan.cfg.seed)
    if plan.cfg.replay:
        return _replay(plan, hardware, data)
    if plan.cfg.preflight:
        return _preflight(plan, hardware, data)
    if not parallel.leads:
        return _follow(plan, hardware, data, parallel)
    folder = RunFolder.create(plan.run_dir, resumes=plan.resumes_in_place or plan.requeued)
    with folder, run_log(folder.path / "train.log"):
        if not folder.locked:
            log.warning(NO_LOCKS, folder.path)
        if plan.resumes_in_place:
            refuse_overtaken(plan.cfg.resume, plan.checkpoint)  # not below, where the other's run would become failed
        try:
            checkpoints.sweep_temporary(folder.path)
            return _train(plan, hardware, data, folder, parallel)
        except (DinoctError, KeyboardInterrupt) as error:
            log.debug("failed", exc_info=True)
            _mark_failed(folder, error)
            raise
        except Exception as error:
            log.debug("failed", exc_info=True)
            _mark_failed(folder, error)
            message = f"{explain(error)} (the traceback is in {folder.path / 'train.log'})"
            raise DinoctError(message) from error


def _replay(plan: RunPlan, hardware: Hardware, data: tuple) -> Outcome:
    from dinoct.replay import replay

    positions = plan.checkpoint.meta.get("positions")
    if not positions:
        raise ConfigError(f"replay={plan.cfg.replay} is not an emergency checkpoint: it names no samples")
    with run_log():
        parts = _parts(plan, hardware)
        hardware = fit_batch(plan, hardware, parts.model, slices=len(data[0]))
        meta = plan.checkpoint.meta
        engine = _engine(plan, hardware, data, parts, RunFolder(plan.checkpoint.path.parent), Tracker(None, []), meta)
        return Outcome(DONE if replay(engine, positions) else FAILED)


def _preflight(plan: RunPlan, hardware: Hardware, data: tuple) -> Outcome:
    """The run's own engine, in no folder, takes a few steps that are thrown away."""
    from dinoct.checkup.preflight import check_memory, out_of_memory, preflight

    with run_log():
        try:
            check_memory(plan.cfg, hardware)  # before a model that cannot fit drives the machine into its swap
            parts = _parts(plan, hardware)
            hardware = fit_batch(plan, hardware, parts.model, slices=len(data[0]))
            _announce(plan, hardware, parts, data)
            folder = RunFolder(Path(plan.run_dir) if plan.run_dir else RUNS)
            preflight(_engine(plan, hardware, data, parts, folder, Tracker(None, []), {}))
        except DinoctError:
            raise
        except Exception as error:
            message = out_of_memory(plan.cfg, hardware) if is_out_of_memory(error) else explain(error)
            raise DinoctError(f"preflight: {message}") from error
    return Outcome(DONE)


def _mark_failed(folder: RunFolder, error: BaseException) -> None:
    config = folder.read_config()
    if config:
        reason = " ".join(str(error).split()) or type(error).__name__
        with suppress(OSError):  # the disk may be what failed
            folder.write_config(config | {"state": "failed", "error": reason})


@dataclass
class _Parts:
    model: SelfDistillation
    optimizer: torch.optim.Optimizer
    horizon: int
    notes: list[str]  # what starting from other weights changed


def _parts(plan: RunPlan, hardware: Hardware, parallel: Parallel | None = None) -> _Parts:
    """Model and optimiser: at random, or from init_from; a checkpoint is loaded over both later."""
    parallel = parallel or Parallel()
    cfg = plan.cfg
    model = SelfDistillation(cfg.model, cfg.loss, grad_checkpoint=cfg.train.grad_checkpoint)
    notes = _start_from(model, cfg.model.init_from) if plan.checkpoint is None and cfg.model.init_from else []
    model.parallel = parallel
    parallel.shard(model, amp=hardware.amp)
    model.to(hardware.device)
    if parallel.rank:  # the same weights on every rank, but a drop path of its own
        torch.manual_seed(cfg.seed + RANK_SEEDS * parallel.rank)
    return _Parts(model, build_optimizer(model.student, depth=cfg.model.depth, cfg=cfg.optim), _horizon(plan), notes)


def _engine(
    plan: RunPlan,
    hardware: Hardware,
    data: tuple,
    parts: _Parts,
    folder: RunFolder,
    tracker: Tracker,
    meta: dict[str, Any],
) -> Engine:
    """The engine that the config names, with the checkpoint's state in it."""
    cfg = plan.cfg
    if cfg.train.compile:  # behind the trials of train.batch_size=auto, whose sizes would all be compiled
        for backbone in parts.model.backbones:
            backbone.compile_blocks()
    train_index, val_index, store, _ = data
    views = ViewMaker(cfg.aug, cfg.model, cfg.loss.ibot, gram_px=cfg.loss.gram.teacher_px)
    engine = build_engine(
        cfg.engine,
        cfg=cfg,
        model=parts.model,
        optimizer=parts.optimizer,
        schedules=Schedules(cfg.optim, cfg.loss.dino, parts.horizon),
        hardware=hardware,
        train_data=SliceViews(train_index, store, views, seed=cfg.seed),
        val_index=val_index,
        run=folder,
        tracker=tracker,
        meta=meta,
        parallel=parts.model.parallel,
    )
    if plan.checkpoint is not None:
        engine.load(plan.checkpoint)
    return engine


def _follow(plan: RunPlan, hardware: Hardware, data: tuple, parallel: Parallel) -> Outcome:
    """Train beside the rank that leads: the same steps and looks, of which nothing is kept."""
    log.addHandler(logging.NullHandler())
    log.propagate = False
    console.quiet = True
    with TemporaryDirectory() as scratch:
        parts = _parts(plan, hardware, parallel)
        engine = _engine(plan, hardware, data, parts, RunFolder(Path(scratch)), Tracker(None, []), {})
        return Outcome(engine.fit().exit_status)


def _train(plan: RunPlan, hardware: Hardware, data: tuple, folder: RunFolder, parallel: Parallel) -> Outcome:
    with interruptible() if parallel.world == 1 else nullcontext():  # the launcher of several ends them by SIGTERM
        engine, tracker = _made_ready(plan, hardware, data, folder, parallel)
    try:
        result = engine.fit()
    finally:
        engine.saver.wait()  # the folder's lock outlives what is being written in it
        tracker.close()
    try:
        folder.set_state("stopped" if result.exit_status else "done", result.step)
    except OSError as error:  # the state is saved, and whoever waits for the exit status is to have it
        log.warning("config.json still says that the run goes on: %s", error)
    return Outcome(result.exit_status, result.mean_percentile_rank)


def _made_ready(
    plan: RunPlan, hardware: Hardware, data: tuple, folder: RunFolder, parallel: Parallel
) -> tuple[Engine, Tracker]:
    """The run as it stands before its first step: announced, written down in its folder, tracked."""
    cfg, checkpoint = plan.cfg, plan.checkpoint
    train_index, val_index, _, _ = data
    if cfg.tracker.group is None:  # a run that is in no sweep makes a group with its evaluations
        cfg.tracker.group = plan.sweep or folder.path.name
    parts = _parts(plan, hardware, parallel)
    hardware = fit_batch(plan, hardware, parts.model, slices=len(train_index))
    data_hash = provenance.data_manifest_hash(train_index, val_index)
    line = Line.of(checkpoint.meta, checkpoint.step) if checkpoint else Line((), 0)
    meta = {
        "config": plan.config_dict(),
        "choices": plan.choices,
        "horizon": parts.horizon,
        "run_id": checkpoint.meta["run_id"] if plan.resumes_in_place else secrets.token_hex(4),
        "git_commit": provenance.git_commit(),
        "data_manifest_hash": data_hash,
        **_trained_on(plan, train_index, data_hash),
        "starts": line.then(),
        "environment": provenance.environment(),
        "hardware": hardware.describe(),
    }
    if None in meta["data_seen"]:
        parts.notes.append("whom its weights were trained on is not known: no verdict can say that patients are new")
    log.info("run folder %s", folder.path)
    _announce(plan, hardware, parts, data)
    _check_before(plan, folder, parts, meta, held_out=val_index.patients)
    if plan.resumes_in_place:
        _turn_back(plan, folder, line)
    before = folder.read_config()
    now = line if plan.resumes_in_place else Line((), 0)
    rewound = rewind(folder.path / "metrics.jsonl", Line.of(before, 0) if before else now, now)
    folder.write_config(run_config(plan, folder, meta, parameters=parameter_count(parts.model.student.backbone)))
    cfg.tracker.tags = list(dict.fromkeys([*cfg.tracker.tags, cfg.model.name, cfg.hardware.name]))
    tracker = build_tracker(
        cfg.tracker,
        folder.path,
        run_id=meta["run_id"],
        config=meta["config"]
        | {k: meta[k] for k in ("git_commit", "data_manifest_hash", "environment")}
        | {"machine": meta["hardware"]},
        rewound=rewound,
    )
    try:
        return _engine(plan, hardware, data, parts, folder, tracker, meta), tracker
    except BaseException:
        tracker.close()  # the next run of a sweep must not find it open
        raise


def _announce(plan: RunPlan, hardware: Hardware, parts: _Parts, data: tuple) -> None:
    announce(
        plan,
        hardware,
        parameters=parameter_count(parts.model.student.backbone),
        data=data[:2],
        horizon=parts.horizon,
        notes=parts.notes,
    )


def _check_before(
    plan: RunPlan, folder: RunFolder, parts: _Parts, meta: dict[str, Any], *, held_out: frozenset[str]
) -> None:
    """What a resume changes without a word otherwise, and whether the disk will do."""
    checkpoint = plan.checkpoint
    if checkpoint is not None and checkpoint.meta["data_manifest_hash"] != meta["data_manifest_hash"]:
        log.warning("the data or the split changed since the checkpoint: the order of the samples is another one now")
    leaked = held_out & frozenset(meta["train_patients"])
    if leaked:
        log.warning("%d held-out patients were trained on before: dinoct-eval will refuse", len(leaked))
    if checkpoint is not None and (plan.cfg.train.max_steps or checkpoint.step + 1) > parts.horizon:
        longer = plan.cfg.train.max_steps or 2 * parts.horizon
        log.warning("%s; optim.horizon=%d stretches them", BEHIND_HORIZON % parts.horizon, longer)
    size = state_bytes(parts.model.state_dict())
    size *= 1.25 if plan.cfg.optim.moments == EIGHT_BIT else 2  # float32 moments are as large as student and teacher
    check_space_for_run(folder.path, size, plan.cfg.ckpt.keep_last)


def _turn_back(plan: RunPlan, folder: RunFolder, line: Line) -> None:
    """Make the checkpoint that the run goes on from the newest of its folder, and say what that changed."""
    checkpoint = plan.checkpoint
    saved_since = checkpoints.later_than(folder.path, checkpoint.step)
    turned = turn_back(folder.path, checkpoint.path, line)
    for path in turned.left:
        log.warning("of another branch than the checkpoint that this run goes on from, renamed: %s", path.name)
    for path in turned.taken_up:
        log.warning("of the branch that this run goes on with, renamed: %s", path.name)
    history = folder.read_config().get("history", [])
    if not saved_since and (lost := lost_changes(history, checkpoint.step, plan.changes)):
        log.warning(
            "the last start from step %d ended before a checkpoint, so that these are not set, type them again: %s",
            checkpoint.step, ", ".join(lost),
        )  # fmt: skip


def _trained_on(plan: RunPlan, train: SliceIndex, data_hash: str) -> dict[str, Any]:
    """Whom the weights will have been trained on, before a resume and in model.init_from too."""
    before, seen = {}, []
    if plan.checkpoint is not None or plan.cfg.model.init_from:
        before = plan.checkpoint.meta if plan.checkpoint else checkpoints.peek(Path(plan.cfg.model.init_from))
        seen = provenance.data_seen(before)
    return {
        "train_patients": sorted(train.patients.union(before.get("train_patients", []))),
        "data_seen": sorted({data_hash, *seen}, key=str),
    }


def _start_from(model: SelfDistillation, path: str) -> list[str]:
    notes = initial_weights(model.student.backbone, path)
    model.teacher.load_state_dict(model.student.state_dict())
    if model.gram_teacher is not None:
        model.gram_teacher.load_state_dict(model.teacher.backbone.state_dict())
    return [f"started from {path}", *notes]


def _horizon(plan: RunPlan) -> int:
    """Length of the schedules: typed, else the checkpoint's, else max_steps, else 100,000."""
    cfg = plan.cfg
    if plan.checkpoint is not None:
        stored = plan.checkpoint.meta["config"]["optim"]["horizon"]
        return cfg.optim.horizon if cfg.optim.horizon not in (None, stored) else plan.checkpoint.meta["horizon"]
    return cfg.optim.horizon or cfg.train.max_steps or ENDLESS_HORIZON


def run_config(plan: RunPlan, folder: RunFolder, meta: dict[str, Any], *, parameters: int) -> dict[str, Any]:
    """Content of config.json; a resume adds to the history and keeps the first command."""
    before = folder.read_config() if plan.resumes_in_place else {}
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    event = {
        "at": now,
        "start": meta["starts"][-1][1],
        "command": plan.command,
        "from_step": plan.checkpoint.step if plan.checkpoint else 0,
        "from_checkpoint": str(plan.checkpoint.path) if plan.checkpoint else None,
        "hardware": meta["hardware"],
        "git_commit": meta["git_commit"],
        "changes": plan.changes,
    }
    return {
        "run_id": meta["run_id"],
        "created": before.get("created", now),
        "command": before.get("command", plan.command),
        "state": "running",
        "sweep": plan.sweep or before.get("sweep"),
        "overrides": plan.overrides or (None if plan.changes else before.get("overrides")),
        "job": plan.job or before.get("job"),
        "parameters": parameters,
        **{
            key: meta[key]
            for key in ("git_commit", "data_manifest_hash", "environment", "hardware", "horizon", "starts")
        },
        "choices": plan.choices,
        "config": plan.config_dict(),
        "history": [*before.get("history", []), event],
    }
