"""The training loop."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoct import shards, state
from dinoct.checkpoint import Checkpoint
from dinoct.config import TrainConfig
from dinoct.console import log, progress
from dinoct.data.batch import CropBatch
from dinoct.data.dataset import SliceViews, train_loader
from dinoct.data.index import SliceIndex
from dinoct.errors import DinoctError
from dinoct.faults import explain, is_lost_rank, is_out_of_memory
from dinoct.guard import FiniteGuard, StepNote, skip_on_device
from dinoct.hardware import Hardware
from dinoct.looks import Looks
from dinoct.memory import advice
from dinoct.models.backbone import parameter_count
from dinoct.models.ssl import SelfDistillation
from dinoct.optim import apply_schedule
from dinoct.parallel import Parallel
from dinoct.records import Records, Scalars
from dinoct.rng import restore_rng, rng_state
from dinoct.rundir import RunFolder
from dinoct.saving import Saver
from dinoct.schedules import BEHIND_HORIZON, Schedules
from dinoct.stopping import StopRequest, deaf_to_children
from dinoct.tracking import Tracker

SIGNAL_GRACE_S = 0.5
GRAM_SHARE_EVERY = 10  # records between two looks at the Gram term's share of the gradient


class TrainingError(DinoctError):
    """Training cannot go on; the message says what is saved."""


class NonFiniteError(TrainingError):
    """The loss or a gradient is NaN or infinite; the optimiser has not moved."""


@dataclass
class Result:
    step: int
    exit_status: int  # 0 done, 130 or 143 stopped by a signal
    mean_percentile_rank: float | None  # best of the in-training evaluations


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
        parallel: Parallel | None = None,
    ):
        self.parallel = parallel or Parallel()
        self.cfg, self.model, self.optimizer, self.schedules = cfg, model, optimizer, schedules
        self.hardware, self.train_data, self.meta = hardware, train_data, meta
        self.records = Records(cfg, hardware, horizon=schedules.horizon, tracker=tracker)
        self.saver = Saver(run.path, cfg.ckpt, self.parallel)
        self.looks = Looks(cfg, hardware, val_index, train_data, run, tracker, self.parallel)
        self.step = 0
        self.samples_seen = 0
        self._begun = 0  # the step that this process began with
        self.guard = FiniteGuard(hardware.device, optimizer)
        self._note = StepNote(0, 0, {}, [], {})  # on the current update
        self._forward = self.parallel.wrap(model)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Train until max_steps or a signal; returns with the state saved.

        Raises:
            NonFiniteError: on NaN or Inf, before the optimiser moves, with an emergency checkpoint written.
            TrainingError: on any other failure, with the state of the last finished step saved where that is possible.
        """
        cfg, teacher = self.cfg, self.model.teacher.backbone
        self.model.train()
        self.model.teacher.eval()
        with StopRequest(patient=self.parallel.world > 1) as stop, progress("steps") as bar:
            task = bar.add_task("train", total=cfg.train.max_steps, completed=self.step)
            self.looks.start(self.step)
            self.records.start(self.step, self.samples_seen)
            try:
                batches = self.stream()
                while not self._finished() and not self._stops(stop):
                    scalars = self.update(batches)
                    if self.step == self.schedules.horizon and not self._finished():
                        log.warning("%s; resume=auto optim.horizon=N stretches them", BEHIND_HORIZON % self.step)
                    evaluated = self._due(cfg.eval.every)  # by all ranks, though it may fail on some
                    self._report(scalars, self._judge() if evaluated else {})
                    bar.update(task, completed=self.step)
                    if not self._finished():
                        self._save(regular=self._due(cfg.ckpt.every), best=evaluated and self._improved())
                    if self._due(cfg.monitor.every):
                        self.looks.draw(teacher, self.step)
            except NonFiniteError:
                raise
            except Exception as error:
                with deaf_to_children():
                    time.sleep(SIGNAL_GRACE_S)  # a signal to the whole group may end a loader worker first
                    if self.parallel.world > 1 or not stop.requested:  # a signal ends a rank that waits for a lost one
                        self._rescue(error)
                    log.debug("ended by the signal", exc_info=True)
                    restore_rng(self._rng())
            batches = None  # end the loader: a worker that dies from here on must not interrupt the save
            try:
                self._end()
            except DinoctError:
                raise
            except Exception as error:  # another rank is lost
                self._rescue(error)
        if stop.requested:
            log.info("stopped by signal %d at step %d, state saved in %s", stop.signal, self.step, self.saver.saved)
        elif self.parallel.leads:
            log.info("done: step %d, %s", self.step, self.saver.name_final())
        return Result(self.step, stop.exit_status, self.looks.best_rank)

    def _end(self) -> None:
        """What is left to do behind the last step."""
        self._settle()
        self._flush()
        if self.parallel.led(self.saver.saved_step() != self.step):
            self.saver.save(self.state_dict(), self._meta())
        if self._finished() and self._due(self.cfg.eval.every) and self._improved():
            self.saver.keep_best(self.state_dict(), self._meta())

    def update(self, batches: Iterator[CropBatch]) -> Scalars:
        """One optimiser update from `accumulation_steps` micro-batches; returns what the log may want of it."""
        s, step, accumulation = self.schedules, self.step, self.hardware.accumulation_steps
        lr, decay, momentum = s.lr(step), s.weight_decay(step), s.teacher_momentum(step)
        apply_schedule(self.optimizer, lr=lr, weight_decay=decay, frozen=s.last_layer_frozen(step))
        note = self._note = StepNote(step, self.samples_seen, rng_state(), [], {})
        means: Scalars = {}
        # --- one step -----------------------------------------------------------------------------------------------
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(accumulation):
            batch = self._next(batches).to(self.hardware.device)
            with self.parallel.accumulating(last=i == accumulation - 1):
                with self.hardware.autocast():
                    terms = self._forward(batch, teacher_temperature=s.teacher_temperature(step))
                if i == 0 and self.records.due(step + 1, every=GRAM_SHARE_EVERY) and self.parallel.whole:
                    means["Train/gram_gradient_share"] = self.model.gram_share(terms)
                (terms.total / accumulation).backward()
            for name, value in terms.scalars.items():
                means[name] = means.get(name, 0.0) + value / accumulation
        means = self.parallel.mean(means)
        norm = self.parallel.clip(self.model.student.parameters(), self.cfg.optim.clip)
        self.model.gather_sums()  # the last exchange: a rank that is lost behind it has lost nothing
        finite = self._check_finite(means, norm, note)
        skip_on_device(self.optimizer, finite)
        with deaf_to_children():  # all of it moves, or nothing
            self.optimizer.step()
            self.step += 1
            self.model.end_update(
                step=self.step, horizon=s.horizon, momentum=momentum, finite=finite if self.guard.deferred else None
            )
            self.samples_seen += self.parallel.world * accumulation * self.hardware.batch_size
        # ------------------------------------------------------------------------------------------------------------
        return means | {
            "Train/gradient_norm": norm.detach(),
            "Train/gram_teacher_age": self.model.gram_teacher_age(self.step),
            "Train/lr": lr,
            "Train/weight_decay": decay,
            "Train/teacher_momentum": momentum,
            "Train/teacher_temperature": s.teacher_temperature(step),
        }

    def stream(self) -> Iterator[CropBatch]:
        """Micro-batches from `samples_seen` on, endlessly."""
        h = self.hardware
        return iter(
            train_loader(
                self.train_data,
                start=self.samples_seen,
                batch_size=h.batch_size,
                num_workers=h.num_workers,
                pin_memory=h.pin_memory,
                rank=self.parallel.rank,
                world=self.parallel.world,
            )
        )

    def _next(self, batches: Iterator[CropBatch]) -> CropBatch:
        start = time.perf_counter()
        batch = next(batches)
        self.records.waited += time.perf_counter() - start
        self._note.positions += batch.positions
        return batch

    def _finished(self) -> bool:
        limit = self.cfg.train.max_steps
        return limit is not None and self.step >= limit

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _stops(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop: all of them stop behind the same step."""
        agreed = self.parallel.highest(stop.signal or 0)
        if agreed and not stop.requested:  # never taken back: a signal may come while the ranks are asked
            stop.signal = agreed
        return agreed > 0

    def _judge(self) -> dict[str, float]:
        """View retrieval of the teacher as it is now."""
        if self.saver.lost_best:  # what counts as the best is what the folder holds
            self.saver.lost_best = False
            self.looks.resume()
        return self.looks.judge(self.model.teacher.backbone, self.step)

    def _improved(self) -> bool:
        return self.parallel.led(self.looks.improved)

    # --- health -----------------------------------------------------------------------------------------------------

    def _check_finite(self, means: Scalars, norm: Tensor, note: StepNote) -> Tensor:
        """The Gram term must be there; loss and gradients must be finite before anything moves.

        Returns:
            The verdict as a 0-d boolean on the device; where it is known to be bad, this raises.
        """
        if "loss/gram" not in means:
            raise DinoctError("the objective has no Gram term: Gram anchoring is always on")
        finite = torch.isfinite(means["loss/total"]) & torch.isfinite(norm)
        note.losses = {name: value for name, value in means.items() if name.startswith("loss/")}
        failed = self.guard.put(finite, note)
        if failed is not None:
            self._halt(failed)
        return finite

    def _settle(self) -> None:
        """Know that every step so far was finite, before it is saved or shown."""
        failed = self.guard.settle()
        if failed is not None:
            self._halt(failed)

    def _halt(self, note: StepNote) -> None:
        """Back to before the step that was not finite, an emergency checkpoint, and the error."""
        self.model.discard_update()
        self.step, self.samples_seen, self._note = note.step, note.samples_seen, note
        what = [name for name, value in note.losses.items() if not torch.isfinite(value)]
        path = self.parallel.led(self.saver.emergency(self.state_dict(note.rng), self._meta(emergency=True)))
        message = (
            f"step {self.step + 1}: {', '.join(what) or 'the gradient'} is not finite; training stopped before the "
        )
        if path is None:
            raise NonFiniteError(f"{message}weights moved, and the state of step {self.step} could not be saved")
        raise NonFiniteError(
            f"{message}weights moved, the state of step {self.step} is in {path}: look at the step again with "
            f"dinoct-train replay={path}, go on from it with resume={path} and a lower optim.lr or optim.clip"
        )

    def _save(self, *, regular: bool, best: bool) -> None:
        """The checkpoint that is due, and that of the best encoder so far; a failure is reported."""
        if not regular and not best:
            return
        self._settle()
        if regular and self.cfg.ckpt.sharded and not self.parallel.whole:
            share = shards.share_of(self.model, self.optimizer)
            self.saver.try_save_shards(share, state.gather_generators(self.parallel, rng_state()), self._meta())
            regular = False
        if regular or best:
            self.saver.save_behind(self.state_dict(), self._meta(), regular=regular, best=best)

    def _rng(self) -> dict[str, Any]:
        """Generators as of the last finished step: those before an update that failed on its way."""
        return self._note.rng if self._note.step == self.step and self._note.rng else rng_state()

    def _rescue(self, error: Exception) -> None:
        """Save the last finished step, if the memory still holds it, and say what happened."""
        log.debug("traceback", exc_info=error)
        if is_lost_rank(error) and self.hardware.device.type == "cuda":
            # The card waits for the lost rank for good, and what it holds by now is not the last finished step's.
            message = f"{explain(error)}; go on from the newest checkpoint with resume=auto"
            raise TrainingError(f"step {self.step + 1}: {message}") from error
        self._settle()  # a step that was not finite is what went wrong first
        if is_out_of_memory(error):
            count = parameter_count(self.model.student)
            message = advice(self.cfg, self.hardware, parameters=count)
        else:
            message = explain(error)
        if not (self.parallel.leads and self.parallel.whole):
            raise TrainingError(f"step {self.step + 1}: {message}") from error
        if self.step == self._begun or self.saver.saved_step() == self.step:
            raise TrainingError(f"step {self.step + 1}: {message}") from error
        try:  # a failed update moved nothing but the generators
            own = state.own(self.model, self.optimizer, self.parallel, rng=self._rng())
            saved = self.saver.save(own, self._meta())
        except Exception as second:
            raise TrainingError(f"step {self.step + 1}: {message}; and not saved: {second}") from error
        raise TrainingError(f"step {self.step + 1}: {message}; the state of step {self.step} is in {saved}") from error

    # --- reporting --------------------------------------------------------------------------------------------------

    def _report(self, scalars: Scalars, judged: dict[str, float]) -> None:
        self.records.add(self.step, self.samples_seen, scalars | judged, last=self._finished())
        if self._due(self.cfg.eval.every) or self.records.due(self.step) or self._finished():
            self._flush()

    def _flush(self) -> None:
        if self.records.waiting:
            self._settle()
            if self.records.write(self.samples_seen):
                self.saver.alarm(self.state_dict(), self._meta(emergency=True))

    # --- what is written --------------------------------------------------------------------------------------------

    def state_dict(self, rng: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole state (`dinoct.state`), the generators as of now or in `rng`; of several ranks all must ask."""
        return state.gather(self.model, self.optimizer, self.parallel, rng=rng or rng_state())

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, of one file or of shares; its tensors are let go."""
        if checkpoint.path.is_dir():
            shards.load_into(checkpoint, self.model, self.optimizer)
        self.load_state_dict(checkpoint.state, checkpoint.meta)
        self.saver.resume(checkpoint.path, checkpoint.step)
        checkpoint.state = {}

    def load_state_dict(self, saved: dict[str, Any], meta: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        state.restore(saved, self.model, self.optimizer, self.parallel)
        self.records.anomalies.load(meta["anomalies"])
        self.step = self._begun = meta["step"]
        self.samples_seen = meta["samples_seen"]
        if meta["config"]["loss"]["gram"]["teacher"] != self.cfg.loss.gram.teacher:
            self.model.forget_gram_teacher()
        self.looks.resume()

    def _meta(self, *, emergency: bool = False) -> dict[str, Any]:
        meta = {"step": self.step, "samples_seen": self.samples_seen, "anomalies": self.records.state()}
        meta["best_rank"] = self.looks.best_rank
        if emergency:
            meta["positions"] = [at for found in self.parallel.each(self._note.positions) for at in found]
        return self.meta | meta
