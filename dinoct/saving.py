"""When and where checkpoints of a run are written; what a full disk does, and what it does not."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from dinoct import checkpoint as checkpoints
from dinoct import shards
from dinoct.config import CkptConfig
from dinoct.console import log
from dinoct.errors import CheckpointError
from dinoct.parallel import Parallel

HEADROOM = 1.05


class Saver:
    """Writes the checkpoints of one run folder, and rotates them only behind one that was read back.

    Of several ranks one `writes`; the others are told what it writes, and do nothing.
    """

    def __init__(self, folder: Path, cfg: CkptConfig, parallel: Parallel | None = None):
        self.folder, self.cfg, self.parallel = folder, cfg, parallel or Parallel()
        self.writes = self.parallel.leads

    def save(self, state: dict[str, Any], meta: dict[str, Any]) -> Path:
        """Write ``checkpoint_{step}.pth``, verify it, delete what the rotation no longer keeps.

        Raises:
            CheckpointError: if it cannot be written or does not verify; older checkpoints are all kept then.
        """
        path = self._write(checkpoints.checkpoint_name(meta["step"]), state, meta)
        if not self.writes:
            return path
        checkpoints.verify(path)
        checkpoints.rotate(self.folder, keep_last=self.cfg.keep_last, keep_every=self.cfg.keep_every)
        return path

    def try_save(self, state: dict[str, Any], meta: dict[str, Any]) -> Path | None:
        """`save`, but a failure is reported and training goes on: the state in memory is worth more than an exit."""
        try:
            return self.save(state, meta)
        except CheckpointError as error:
            log.critical("not saved at step %d, training goes on: %s", meta["step"], error)
            return None

    def try_save_shards(self, state: dict[str, Any], generators: dict[str, Any], meta: dict[str, Any]) -> None:
        """`try_save` of the ranks' shares (`dinoct.shards`); every rank must call."""
        start = time.perf_counter()
        try:
            path = shards.save(self.folder, state, generators, meta, self.parallel)
            shards.read(path) if self.parallel.leads else None
        except CheckpointError as error:
            log.critical("not saved at step %d, training goes on: %s", meta["step"], error)
            return
        log.info("saved %s (%d shares, %.1f s)", path.name, self.parallel.world, time.perf_counter() - start)
        for older in shards.list_sharded(self.folder)[: -self.cfg.keep_last] if self.parallel.leads else []:
            shutil.rmtree(older, ignore_errors=True)

    def keep_best(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Keep the state as ``checkpoint_best_{step}.pth`` in place of the older best; a failure is reported."""
        if not self.writes:
            return
        regular = self.folder / checkpoints.checkpoint_name(meta["step"])
        best = self.folder / f"checkpoint_best_{meta['step']:08d}.pth"
        try:
            if not _linked(regular, best):
                checkpoints.verify(self._write(best.name, state, meta))
        except CheckpointError as error:
            log.critical("the best checkpoint is not kept at step %d, training goes on: %s", meta["step"], error)
            return
        for older in self.folder.glob("checkpoint_best_*.pth"):
            if older != best:
                older.unlink(missing_ok=True)

    def emergency(self, state: dict[str, Any], meta: dict[str, Any]) -> Path | None:
        """Write ``emergency_{step}.pth``, outside the rotation; never raises: something went wrong already."""
        try:
            return self._write(f"emergency_{meta['step']:08d}.pth", state, meta)
        except CheckpointError as error:
            log.critical("no emergency checkpoint: %s", error)
            return None

    def _write(self, name: str, state: dict[str, Any], meta: dict[str, Any]) -> Path:
        start, path = time.perf_counter(), self.folder / name
        if not self.writes:
            return path
        check_space(self.folder, state_bytes(state))
        size = checkpoints.save(path, state, meta)
        log.info("saved %s (%.1f MB, %.1f s)", name, size / 1e6, time.perf_counter() - start)
        return path


def _linked(path: Path, second: Path) -> bool:
    """Give a file a second name that outlives the first; False where it is not there, or cannot be linked."""
    try:
        os.link(path, second)
    except FileExistsError:
        return True  # of this step, by a run that was killed right behind it
    except OSError:
        return False
    return True


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(state_bytes, state.values())) if isinstance(state, dict) else 0


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError where the disk of `folder` has less than `needed` bytes, and a little more, free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(f"cannot write into {folder}: {error.strerror}") from error
    if free < HEADROOM * needed:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.1f} GB free and a checkpoint takes {needed / 1e9:.1f} GB: free some space, "
            "lower ckpt.keep_last, or take run_dir on another disk"
        )


def check_space_for_run(folder: Path, needed: int, keep_last: int) -> None:
    """Before a run: two checkpoints must fit (the new one is written before an old one goes); all kept ones should."""
    check_space(folder, 2 * needed)
    free = shutil.disk_usage(folder).free
    if free < HEADROOM * (keep_last + 1) * needed:
        log.warning(
            "%.0f GB free, but ckpt.keep_last=%d checkpoints of %.1f GB and the next one need %.0f GB",
            free / 1e9, keep_last, needed / 1e9, (keep_last + 1) * needed / 1e9,
        )  # fmt: skip
