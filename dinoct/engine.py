"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinoct import checkpoint as checkpoints
from dinoct.anomaly import AnomalyDetector
from dinoct.clock import Clock
from dinoct.config import TrainConfig
from dinoct.console import log, progress
from dinoct.data.dataset import SliceViews, middle_slice, read_slice, train_loader
from dinoct.data.index import SliceIndex
from dinoct.errors import DinoctError
from dinoct.evals.judge import judge
from dinoct.hardware import Hardware
from dinoct.models.ssl import CropBatch, SelfDistillation
from dinoct.optim import apply_schedule, load_optimizer_state, optimizer_state
from dinoct.rng import restore_rng, rng_state
from dinoct.rundir import RunFolder
from dinoct.schedules import Schedules
from dinoct.stopping import StopRequest
from dinoct.tracking import Tracker
from dinoct.viz import draw_monitor

MIN_SLICES = 8  # the spread of features over fewer slices says nothing
GRAM_SHARE_EVERY = 10  # records between two looks at the Gram term's share of the gradient


Scalars = dict[str, Tensor | float]  # tensors are 0-d and stay on the device until a record is due


class NonFiniteError(DinoctError):
    """The loss or a gradient is NaN or infinite; the optimiser has not moved."""


@dataclass
class Result:
    step: int
    exit_status: int  # 0 done, 130 or 143 stopped by a signal
    mean_percentile_rank: float | None  # of the last in-training evaluation
    checkpoint: Path | None


class Engine:
    """Trains a model. A step is one optimiser update, whatever the accumulation."""

    def __init__(
        self,
        *,
        cfg: TrainConfig,
        model: SelfDistillation,
        optimizer: torch.optim.Optimizer,
        schedules: Schedules,
        hardware: Hardware,
        train_data: SliceViews,
        val_index: SliceIndex,
        run: RunFolder,
        tracker: Tracker,
        meta: dict[str, Any],
    ):
        self.cfg, self.model, self.optimizer, self.schedules = cfg, model, optimizer, schedules
        self.hardware, self.train_data, self.val_index = hardware, train_data, val_index
        self.run, self.tracker, self.meta = run, tracker, meta
        self.anomalies = AnomalyDetector()
        self.step = 0
        self.samples_seen = 0
        self.best_rank: float | None = None
        self._pending: list[tuple[int, Scalars]] = []
        self._waited = 0.0
        self._positions: list[int] = []  # samples of the current update
        self._clock = Clock()

    # --- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Train until max_steps or a signal; returns with the state saved.

        Raises:
            NonFiniteError: on NaN or Inf, before the optimiser moves, with an emergency checkpoint written.
        """
        cfg, saved = self.cfg, None
        self.model.train()
        self.model.teacher.eval()
        batches = self._stream()
        with StopRequest() as stop, progress("steps") as bar:
            task = bar.add_task("train", total=cfg.train.max_steps, completed=self.step)
            self._clock.start(self.step, self.samples_seen)
            while not self._finished() and not stop.requested:
                scalars = self.update(batches)
                judged = self._aside(self.judge) if self._due(cfg.eval.every) else {}
                self._report(scalars, judged)
                bar.update(task, completed=self.step)
                if self._due(cfg.ckpt.every):
                    saved = self.save()
                if self._due(cfg.monitor.every):
                    self._aside(self.draw)
            self._flush()
            if saved is None or checkpoints.step_of(saved) != self.step:
                saved = self.save()
        if stop.requested:
            log.info("stopped by signal %d at step %d, state saved in %s", stop.signal, self.step, saved)
        else:
            final = checkpoints.link_final(saved)
            log.info("done: step %d, %s", self.step, final)
        return Result(self.step, stop.exit_status, self.best_rank, saved)

    def update(self, batches: Iterator[CropBatch]) -> Scalars:
        """One optimiser update from `accumulation_steps` micro-batches; returns what the log may want of it."""
        s, step, accumulation = self.schedules, self.step, self.hardware.accumulation_steps
        lr, decay, momentum = s.lr(step), s.weight_decay(step), s.teacher_momentum(step)
        apply_schedule(self.optimizer, lr=lr, weight_decay=decay, frozen=s.last_layer_frozen(step))
        rng, means = rng_state(), {}
        self._positions.clear()
        # --- one step -----------------------------------------------------------------------------------------------
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(accumulation):
            batch = self._next(batches).to(self.hardware.device)
            with self.hardware.autocast():
                terms = self.model(batch, teacher_temperature=s.teacher_temperature(step))
            if i == 0 and self._record_due(step + 1, every=GRAM_SHARE_EVERY):
                means["Train/gram_gradient_share"] = self._gram_share(terms.total, terms.gram)
            (terms.total / accumulation).backward()
            for name, value in terms.scalars.items():
                means[name] = means.get(name, 0.0) + value / accumulation
        norm = nn.utils.clip_grad_norm_(self.model.student.parameters(), self.cfg.optim.clip)
        self._check_finite(means, norm, rng)
        self.optimizer.step()
        self.step += 1
        self.model.end_update(step=self.step, horizon=s.horizon, momentum=momentum)
        self.samples_seen += accumulation * self.hardware.batch_size
        # ------------------------------------------------------------------------------------------------------------
        return means | {
            "Train/gradient_norm": norm.detach(),
            "Train/lr": lr,
            "Train/weight_decay": decay,
            "Train/teacher_momentum": momentum,
            "Train/teacher_temperature": s.teacher_temperature(step),
        }

    def _stream(self) -> Iterator[CropBatch]:
        h = self.hardware
        return iter(
            train_loader(
                self.train_data,
                start=self.samples_seen,
                batch_size=h.batch_size,
                num_workers=h.num_workers,
                pin_memory=h.pin_memory,
            )
        )

    def _next(self, batches: Iterator[CropBatch]) -> CropBatch:
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        self._positions += batch.positions
        return batch

    def _finished(self) -> bool:
        limit = self.cfg.train.max_steps
        return limit is not None and self.step >= limit

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    # --- health -----------------------------------------------------------------------------------------------------

    def _check_finite(self, means: dict[str, Tensor], norm: Tensor, rng: dict[str, Any]) -> None:
        """The Gram term must be there; loss and gradients must be finite before anything moves."""
        if "loss/gram" not in means:
            raise DinoctError("the objective has no Gram term: Gram anchoring is always on")
        if torch.isfinite(means["loss/total"]) & torch.isfinite(norm):
            return
        what = [name for name, value in means.items() if name.startswith("loss/") and not torch.isfinite(value)]
        self.model.discard_update()
        path = self.save(emergency=True, rng=rng)
        raise NonFiniteError(
            f"step {self.step + 1}: {', '.join(what) or 'the gradient'} is not finite; training stopped before the "
            f"optimiser moved, the state of step {self.step} is in {path}. Usual cures: a lower optim.lr or optim.clip"
        )

    def _gram_share(self, total: Tensor, gram: Tensor) -> Tensor:
        """Norm of the weighted Gram term's gradient over the whole gradient's, in the last block."""
        last = list(self.model.student.backbone.vit.blocks[-1].parameters())

        def norm(loss: Tensor) -> Tensor:
            grads = torch.autograd.grad(loss, last, retain_graph=True, allow_unused=True)
            return nn.utils.get_total_norm([g for g in grads if g is not None])

        return (self.cfg.loss.gram.weight * norm(gram) / norm(total).clamp_min(1e-12)).detach()

    # --- reporting --------------------------------------------------------------------------------------------------

    def _record_due(self, step: int, every: int = 1) -> bool:
        return step == 1 or step % (self.cfg.tracker.every * every) == 0

    def _report(self, scalars: Scalars, judged: dict[str, float]) -> None:
        """Note the step; on every tracker.every-th, fetch what was noted from the device at once and pass it on."""
        self._pending.append((self.step, scalars | judged))
        if self._clock.line_due() or self._finished():
            log.info(self._clock.line(self.step, self.samples_seen, float(scalars["loss/total"])))
        if judged or self._record_due(self.step) or self._finished():
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        losses = torch.stack([scalars["loss/total"] for _, scalars in self._pending]).tolist()
        for (step, _), loss in zip(self._pending, losses, strict=True):
            spike = self.anomalies.check_loss(step, loss)
            if spike:
                log.warning(spike.message)
        step, last = self._pending[-1]
        self._pending.clear()
        tensors = {name: value for name, value in last.items() if isinstance(value, Tensor)}
        fetched = torch.stack([value.float() for value in tensors.values()]).tolist()  # one transfer for all
        record = last | dict(zip(tensors, fetched, strict=True))
        record |= self._clock.rates(step, self.samples_seen, self._waited)
        record["Train/ln_K"] = math.log(self.cfg.loss.out_dim)
        self.tracker.log(step, record)
        collapse = self.anomalies.check_features(step, record)
        if collapse and self.hardware.batch_size >= MIN_SLICES:
            log.critical(collapse.message)
            self.save(emergency=True)

    # --- what is written --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors of the whole state; on whatever device, `load` brings them back through the CPU."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        restore_rng(state["rng"])
        self.step, self.samples_seen = meta["step"], meta["samples_seen"]

    def save(self, *, emergency: bool = False, rng: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint and rotate old ones; an emergency file stands outside the rotation."""
        start = time.perf_counter()
        name = f"emergency_{self.step:08d}.pth" if emergency else checkpoints.checkpoint_name(self.step)
        path = self.run.path / name
        state = self.state_dict() | ({"rng": rng} if rng else {})
        meta = self.meta | {"step": self.step, "samples_seen": self.samples_seen}
        if emergency:
            meta |= {"positions": list(self._positions)}
        size = checkpoints.save(path, state, meta)
        if not emergency:
            checkpoints.rotate(self.run.path, keep_last=self.cfg.ckpt.keep_last, keep_every=self.cfg.ckpt.keep_every)
        log.info("saved %s (%.1f MB, %.1f s)", path.name, size / 1e6, time.perf_counter() - start)
        return path

    def _aside(self, look: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run something that only looks at the model: what goes wrong there is reported and training goes on."""
        try:
            return look()
        except Exception as error:
            log.warning("%s failed at step %d, training goes on: %s", look.__name__, self.step, error)
            log.debug("traceback", exc_info=True)
            return {}

    def draw(self) -> dict[str, float]:
        """input.png, heatmap.png and stats.json of the first validation series' middle slice, by the EMA teacher."""
        out = self.run.path / "monitor" / f"step_{self.step:08d}"
        draw_monitor(
            self.model.teacher.backbone,
            read_slice(self.val_index, self.train_data.store, middle_slice(self.val_index)),
            window=self.cfg.aug.window,
            size=self.cfg.model.img_size,
            device=self.hardware.device,
            out=out,
            title=f"step {self.step}",
        )
        return {}

    def judge(self) -> dict[str, float]:
        """View retrieval of the EMA teacher on a fixed small set of held-out slices."""
        report = judge(
            self.model.teacher.backbone,
            self.cfg.model,
            self.cfg.probe,
            index=self.val_index,
            store=self.train_data.store,
            n=self.cfg.eval.n,
            hardware=self.hardware,
            baselines=False,
        )
        rank = report["mean_percentile_rank"]
        self.best_rank = rank if self.best_rank is None else min(rank, self.best_rank)
        log.info(
            "step=%6d eval: top1=%.4f mean_percentile_rank=%.4f n=%d", self.step, report["top1"], rank, report["n"]
        )
        return {f"Eval/{name}": value for name, value in report.items() if isinstance(value, float)}
