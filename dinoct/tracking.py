"""One `Tracker.log(step, scalars)` for metrics.jsonl, TensorBoard and W&B, with the same tags."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from dinoct.config import TrackerConfig
from dinoct.console import log
from dinoct.turnback import FROM_START, Rewound


class Sink(Protocol):
    """A place that keeps scalars."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object per record, steps strictly rising."""

    def __init__(self, path: Path):
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  line by line, closed by close()
        self.waiting: list[bytes] = []  # records that a full disk did not take

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append a record; what the disk refuses is kept and tried again with the next one."""
        self.waiting.append((json.dumps({"step": step} | dict(scalars)) + "\n").encode())
        size = os.fstat(self.file.fileno()).st_size
        data = b"".join(self.waiting)
        try:
            if self.file.write(data) < len(data):
                raise OSError("a part of the records was written")
            self.waiting.clear()
        except OSError as error:
            os.ftruncate(self.file.fileno(), size)
            if len(self.waiting) == 1:
                log.critical("metrics.jsonl cannot be written, records wait in memory: %s", error)

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    def __init__(self, folder: Path, *, rewound: Rewound):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=rewound.step + 1)  # of a start that was killed, too
        for record in rewound.back:
            self.log(record["step"], {tag: value for tag, value in record.items() if tag != "step"})

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self.writer.close()


# W&B reports exceptions, whose tracebacks quote paths, and its own use to its makers, from offline runs too.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


class Wandb:
    """W&B, offline unless asked otherwise; argv, paths and the host's name are not recorded."""

    def __init__(
        self, cfg: TrackerConfig, folder: Path, *, run_id: str | None, config: Mapping[str, Any], job_type: str
    ):
        import wandb

        self.wants_images = cfg.images
        settings = wandb.Settings(
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            host="-",
            silent=True,
            console="off",
        )
        self.run = wandb.init(
            project=cfg.project,
            dir=str(folder.absolute()),  # its service may have another current directory
            id=run_id,
            resume="allow" if cfg.wandb == "online" else None,
            name=cfg.name or folder.name,
            group=cfg.group,
            job_type=job_type,
            tags=list(cfg.tags),
            config=dict(config),
            mode=cfg.wandb,
            settings=settings,
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")  # W&B's own step restarts at a resume

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log({"step": step} | dict(scalars))

    def images(self, step: int, pictures: Mapping[str, Path]) -> None:
        import wandb

        self.run.log({"step": step} | {tag: wandb.Image(str(path)) for tag, path in pictures.items()})

    def close(self) -> None:
        self.run.finish()


def open_wandb(cfg: TrackerConfig, folder: Path, **run: Any) -> Wandb:
    """W&B; offline where its server cannot be reached. A key that is missing is an error."""
    import wandb

    try:
        return Wandb(cfg, folder, **run)
    except wandb.errors.CommError as error:
        if cfg.wandb != "online" or isinstance(error, wandb.errors.AuthenticationError):
            raise
        wandb.teardown()  # its service holds the run's id as in use
        reason = " ".join(str(error).split())[:160]
        log.warning("W&B cannot be reached and writes offline, wandb sync sends it later: %s", reason)
        return Wandb(replace(cfg, wandb="offline"), folder, **run)


class Tracker:
    """Passes every record to all sinks.

    metrics.jsonl is the record of the run: what a full disk refuses waits in memory. Another sink that fails, such as a
    W&B service that died, is reported, dropped, and training goes on.
    """

    def __init__(self, record: JsonLines | None, others: list[Sink]):
        self.record, self.others = record, others

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Keep the scalars of a step; the tags are the dictionary's keys."""
        if self.record is not None:
            self.record.log(step, scalars)
        for sink in list(self.others):
            self._try(sink, lambda sink=sink: sink.log(step, scalars))

    def images(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Pictures of slices go to W&B, and only where tracker.images asks for it."""
        for sink in list(self.others):
            if isinstance(sink, Wandb) and sink.wants_images:
                self._try(sink, lambda sink=sink: sink.images(step, pictures))

    def close(self) -> None:
        for sink in list(self.others):
            self._try(sink, sink.close)
        if self.record is not None:
            self.record.close()

    def _try(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.others.remove(sink)
            log.warning("%s failed and is dropped, metrics.jsonl goes on: %s", type(sink).__name__, error)


def build_tracker(
    cfg: TrackerConfig, folder: Path, *, run_id: str, config: Mapping[str, Any], rewound: Rewound = FROM_START
) -> Tracker:
    """The tracker of a training run in `folder`, whose metrics.jsonl was `rewound` to where it goes on."""
    record = JsonLines(folder / "metrics.jsonl")
    sinks: list[Sink] = []
    if cfg.tensorboard:
        sinks.append(TensorBoard(folder / "tb", rewound=rewound))
    if cfg.wandb != "disabled":
        sinks.append(open_wandb(cfg, folder, run_id=run_id, config=config, job_type="train"))
    return Tracker(record, sinks)


def track_evaluation(
    cfg: TrackerConfig, folder: Path, run: str, meta: Mapping[str, Any], report: Mapping[str, Any], *, picture: Path
) -> None:
    """An evaluation as a W&B run of its own (job type eval), in the group of the run that it judges.

    Args:
        folder: where wandb/ is written.
        run: name of the run that is judged.
        meta: its checkpoint's.
        report: the figures; those of the encoder become ``Eval/...``.
        picture: the summary, sent only where tracker.images asks for it.
    """
    if cfg.wandb == "disabled":
        return
    group = cfg.group or meta["config"]["tracker"].get("group") or run
    cfg = replace(cfg, group=group, name=cfg.name or f"{run}-eval")
    tracker = Tracker(None, [open_wandb(cfg, folder, run_id=None, config=meta["config"], job_type="eval")])
    tracker.log(report["step"], {f"Eval/{k}": float(v) for k, v in report.items() if isinstance(v, float | bool)})
    tracker.images(report["step"], {"Eval/summary": picture})
    tracker.close()
