"""Looking at a model while it trains: pictures and view retrieval of the EMA teacher. Nothing here changes the run."""

from collections.abc import Callable

import numpy as np

from dinoct.checkpoint import best_checkpoint, load
from dinoct.config import TrainConfig
from dinoct.console import log
from dinoct.data.dataset import SliceViews, middle_slice, read_slice
from dinoct.data.index import SliceIndex
from dinoct.errors import DinoctError
from dinoct.evals.features import choose_slices
from dinoct.evals.judge import ProbeData, judge
from dinoct.faults import explain
from dinoct.hardware import Hardware
from dinoct.models.backbone import Backbone
from dinoct.parallel import Parallel
from dinoct.rundir import RunFolder
from dinoct.tracking import Tracker
from dinoct.viz import PICTURES, draw_monitor, draw_views, first_views, sample_slices, views_title

FAILED = "%s failed at step %d, training goes on: %s"


class Looks:
    """Looks at the held-out slices of a run; what goes wrong there is reported, and training goes on."""

    def __init__(
        self,
        cfg: TrainConfig,
        hardware: Hardware,
        index: SliceIndex,
        train_data: SliceViews,
        run: RunFolder,
        tracker: Tracker,
        parallel: Parallel | None = None,
    ):
        self.parallel = parallel or Parallel()
        self.cfg, self.hardware, self.run, self.tracker = cfg, hardware, run, tracker
        self.index, self.store, self.train_data = index, train_data.store, train_data
        self.best_rank: float | None = None  # mean percentile rank
        self.improved = False  # by the last evaluation

    def start(self, step: int) -> None:
        """monitor/views.png: what the model is about to learn from."""
        if self.cfg.monitor.every is not None:
            self._aside("draw", step, lambda: self._views(step))

    def resume(self) -> None:
        """Go on from the figure of the best encoder that the folder holds, by its own record: the run may have been
        killed before it kept a better one."""
        self.best_rank, best = None, best_checkpoint(self.run.path)
        if best is None:
            return
        try:
            self.best_rank = load(best, lazily=True).meta.get("best_rank")
        except DinoctError as error:
            log.warning("the next encoder that is judged counts as the best so far: %s", error)

    def draw(self, backbone: Backbone, step: int) -> None:
        """The pictures and stats.json of the first series' middle slice (see `dinoct.viz`)."""
        if self._all_can("draw", step, self._shown):
            self._aside("draw", step, lambda: self._draw(backbone, step))

    def judge(self, backbone: Backbone, step: int) -> dict[str, float]:
        """View retrieval on a fixed small set of slices: ``Eval/...`` scalars, none where it failed."""
        self.improved = False
        if not self._all_can("judge", step, self._read_judged):
            return {}
        return self._aside("judge", step, lambda: self._judge(backbone, step)) or {}

    def _all_can(self, name: str, step: int, read: Callable[[], object]) -> bool:
        """Whether all ranks can read what they are to look at. Where the model is cut into shares a rank that gives up
        between two layers would hold up the others, so that they agree before."""
        if self.parallel.whole:
            return True
        reason = None
        try:
            read()
        except Exception as error:
            reason = explain(error)
        reason = next(filter(None, self.parallel.each(reason)), None)
        if reason:
            log.warning(FAILED, name, step, reason)
        return reason is None

    def _aside(self, name: str, step: int, look: Callable[[], dict[str, float] | None]) -> dict[str, float] | None:
        try:
            return look()
        except Exception as error:
            if name == "judge" and not self.parallel.whole:  # the others may wait for this rank's shares
                raise DinoctError(f"the evaluation failed ({explain(error)}); eval.every=null leaves it out") from error
            log.warning(FAILED, name, step, error)
            log.debug("traceback", exc_info=True)
            return None

    def _shown(self) -> tuple[np.ndarray, list[np.ndarray]]:
        return read_slice(self.index, self.store, middle_slice(self.index)), sample_slices(self.index, self.store)

    def _read_judged(self) -> None:
        for i in choose_slices(self.index, self.cfg.eval.n, self.cfg.probe.seed):
            read_slice(self.index, self.store, int(i))

    def _views(self, step: int) -> None:
        path = self.run.path / "monitor" / "views.png"
        draw_views(first_views(self.train_data), path, views_title(self.cfg.aug))
        self.tracker.images(step, {"Monitor/views": path})

    def _draw(self, backbone: Backbone, step: int) -> None:
        out = self.run.path / "monitor" / f"step_{step:08d}"
        hu, sample = self._shown()
        draw_monitor(
            backbone,
            hu,
            window=self.cfg.aug.window,
            size=self.cfg.model.img_size,
            device=self.hardware.device,
            amp=self.hardware.amp,
            out=out,
            title=f"step {step}",
            sample=sample,
        )
        self.tracker.images(step, {f"Monitor/{name}": out / f"{name}.png" for name in PICTURES})

    def _judge(self, backbone: Backbone, step: int) -> dict[str, float]:
        report = judge(
            backbone,
            self.cfg.model,
            self.cfg.probe,
            ProbeData(self.index, self.store),
            n=self.cfg.eval.n,
            hardware=self.hardware,
            baselines=False,
        )
        rank = report["mean_percentile_rank"]
        self.improved = self.best_rank is None or rank < self.best_rank
        self.best_rank = rank if self.improved else self.best_rank
        log.info("step=%6d eval: top1=%.4f mean_percentile_rank=%.4f n=%d", step, report["top1"], rank, report["n"])
        return {f"Eval/{name}": value for name, value in report.items() if isinstance(value, float)}
