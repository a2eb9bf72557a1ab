"""When and where checkpoints of a run are written; what a full disk does, and what it does not.

A checkpoint that falls due is written by a thread, from a copy in the host's memory, while training goes on.
"""

import shutil
import time
from copy import deepcopy
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from dinoct import checkpoint as checkpoints
from dinoct import shards
from dinoct.checkup.machine import Space, ram, size_text
from dinoct.config import CkptConfig
from dinoct.console import log
from dinoct.durable import link
from dinoct.errors import CheckpointError
from dinoct.faults import is_out_of_memory
from dinoct.parallel import Parallel
from dinoct.stopping import deaf_to_children
from dinoct.turnback import set_aside

HEADROOM = 1.05
SPARE = 2e9  # bytes of the host's memory that a copy of the state leaves free


class Saver:
    """Writes the checkpoints of one run folder, and rotates them only behind one that was read back.

    Of several ranks one `writes`; the others are told what it writes, and do nothing.
    """

    def __init__(self, folder: Path, cfg: CkptConfig, parallel: Parallel | None = None):
        self.folder, self.cfg, self.parallel = folder, cfg, parallel or Parallel()
        self.writes = self.parallel.leads
        self.saved: Path | None = None  # the newest ``checkpoint_{step}.pth`` that was read back
        self.lost_best = False  # the best encoder could not be kept: the folder holds an older one, or none
        self._written = Event()  # what `save_behind` began
        self._written.set()
        self._alarms: list[Path] = []

    def resume(self, path: Path, step: int) -> None:
        """The run goes on from a checkpoint: a regular one of its folder need not be written again."""
        here = path.parent.absolute() == self.folder.absolute()
        regular = here and checkpoints.is_regular(path, step)
        self.saved = self.folder / checkpoints.checkpoint_name(step) if regular else None

    def save(self, state: dict[str, Any], meta: dict[str, Any]) -> Path:
        """Write ``checkpoint_{step}.pth``, verify it, delete what the rotation no longer keeps.

        Raises:
            CheckpointError: if it cannot be written or does not verify; older checkpoints are all kept then.
        """
        self.wait()
        return self._save(state, meta)

    def save_behind(
        self, state: dict[str, Any], meta: dict[str, Any], *, regular: bool = True, best: bool = False
    ) -> None:
        """`save` and `keep_best` while training goes on, from a copy that is taken at once.

        A failure is reported, and training goes on: the state in memory is worth more than an exit. Where the memory
        has no room for the copy, training waits.
        """
        self.wait()
        copy = self._copied(state)
        args = (state if copy is None else copy, deepcopy(meta), regular, best)
        if copy is None:
            self._try(*args)
        else:
            self._written.clear()
            try:  # the interpreter's end waits for a thread
                with deaf_to_children():  # whose deaths would be told by the same exception
                    Thread(target=self._try_behind, args=args, name="checkpoint").start()
            except RuntimeError:  # there is none to be had
                self._try_behind(*args)

    def wait(self) -> None:
        """Until what `save_behind` began is written, or has failed.

        Not by joining the thread: a signal's handler that raises in there makes Python take it for ended.
        """
        self._written.wait()

    def saved_step(self) -> int | None:
        """Step of the newest checkpoint, once it is written."""
        self.wait()
        return None if self.saved is None else checkpoints.step_of(self.saved)

    def try_save_shards(self, state: dict[str, Any], generators: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write the ranks' shares (`dinoct.shards`) while training waits; all must call. A failure is reported."""
        start = time.perf_counter()
        try:
            path = shards.save(self.folder, state, generators, meta, self.parallel)
            shards.read(path) if self.parallel.leads else None
        except CheckpointError as error:
            log.critical("not saved at step %d, training goes on: %s", meta["step"], error)
            return
        log.info("saved %s (%d shares, %.1f s)", path.name, self.parallel.world, time.perf_counter() - start)
        if self.parallel.leads:
            steps = {shards.step_of(path): path for path in shards.list_sharded(self.folder)}
            for step in checkpoints.doomed(steps, keep_last=self.cfg.keep_last, keep_every=self.cfg.keep_every):
                shutil.rmtree(steps[step], ignore_errors=True)

    def keep_best(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Keep the state as ``checkpoint_best_{step}.pth`` in place of the older best; a failure is reported."""
        self.wait()
        self._try(state, meta, False, True)

    def name_final(self) -> Path:
        """Give the newest checkpoint, which is the run's last, its second name; a failure is reported."""
        try:
            return checkpoints.link_final(self.saved)
        except CheckpointError as error:
            log.warning("the last checkpoint keeps one name: %s", error)
            return self.saved

    def emergency(self, state: dict[str, Any], meta: dict[str, Any], *, leaving: int = 0) -> Path | None:
        """Write ``emergency_{step}.pth``, outside the rotation; never raises: something went wrong already.

        Args:
            leaving: checkpoints for which the disk must have room behind it.
        """
        self.wait()
        first = path = self.folder / f"emergency_{meta['step']:08d}.pth"
        while path.exists():  # of a run that came by this step before, perhaps with other weights
            path = path.with_name(f"{path.stem}x.pth")
        try:
            self._write(path.name, state, meta, leaving=leaving)
            if path != first and checkpoints.same_state(path, first):
                path = path.replace(first)
            return path
        except (CheckpointError, OSError) as error:
            log.critical("no emergency checkpoint: %s", error)
            return None

    def alarm(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """`emergency` at a sign of collapse. Signs come and go: the first and the newest are kept, and the disk's last
        room is left to the checkpoints."""
        if path := self.emergency(state, meta, leaving=1):
            self._alarms.append(path)
            if len(self._alarms) > 2:
                self._alarms.pop(1).unlink(missing_ok=True)

    def _copied(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """The state as of now in the host's memory, whatever training does next; None where there is no room."""
        if not self.writes or not self.parallel.whole:
            return state  # nobody reads it, or it was put together from shares and is nobody else's
        needed, room = state_bytes(state), ram()
        try:
            if has_room(needed, room):
                return copied(state)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        log.info("training waits for the checkpoint: no room to copy %s, %s", size_text(needed), room or "")
        return None

    def _try_behind(self, *args: Any) -> None:
        try:
            self._try(*args)
        finally:
            self._written.set()

    def _try(self, state: dict[str, Any], meta: dict[str, Any], regular: bool, best: bool) -> None:
        what = "not saved"
        try:
            if regular:
                self._save(state, meta)
            what = "the best checkpoint is not kept"
            if best:
                self._keep_best(state, meta)
        except Exception as error:
            self.lost_best |= best
            log.critical("%s at step %d, training goes on: %s", what, meta["step"], error)
            log.debug("traceback", exc_info=True)

    def _save(self, state: dict[str, Any], meta: dict[str, Any]) -> Path:
        path = self._write(checkpoints.checkpoint_name(meta["step"]), state, meta)
        if self.writes:
            checkpoints.verify(path)
            checkpoints.rotate(self.folder, keep_last=self.cfg.keep_last, keep_every=self.cfg.keep_every)
        self.saved = path
        return path

    def _keep_best(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        if not self.writes:
            return
        regular = self.folder / checkpoints.checkpoint_name(meta["step"])
        best = self.folder / f"checkpoint_best_{meta['step']:08d}.pth"
        if regular.is_file():
            link(regular, best)
        else:
            checkpoints.verify(self._write(best.name, state, meta))
        for older in self.folder.glob("checkpoint_best_*.pth"):
            if older == best:
                continue
            if _is_of_others_too(older, meta):
                set_aside(older)
            else:
                older.unlink(missing_ok=True)

    def _write(self, name: str, state: dict[str, Any], meta: dict[str, Any], *, leaving: int = 0) -> Path:
        start, path = time.perf_counter(), self.folder / name
        if not self.writes:
            return path
        check_space(self.folder, state_bytes(state), leaving=leaving)
        size = checkpoints.save(path, state, meta)
        log.info("saved %s (%.1f MB, %.1f s)", name, size / 1e6, time.perf_counter() - start)
        return path


def _is_of_others_too(best: Path, meta: dict[str, Any]) -> bool:
    """Whether a best encoder is of a time before this start, and lines that were left go on from it."""
    begun = meta["starts"][-1][0] if "starts" in meta else 0
    return int(best.stem[-8:]) <= begun and any(best.parent.glob("abandoned_[0-9]*.pth"))


def has_room(needed: int, room: Space | None) -> bool:
    """Whether the host's memory takes a copy of the state of `needed` bytes, as far as is known."""
    return room is None or room.free >= needed + SPARE


def copied(state: Any) -> Any:
    """Nested dicts with each tensor copied into the host's memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    return {key: copied(value) for key, value in state.items()} if isinstance(state, dict) else state


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(state_bytes, state.values())) if isinstance(state, dict) else 0


def check_space(folder: Path, needed: int, *, leaving: int = 0) -> None:
    """Raise CheckpointError where the disk of `folder` has less than `needed` bytes, and a little more, free.

    Args:
        folder: that exists.
        needed: bytes of a checkpoint.
        leaving: further ones that must fit behind it.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(f"cannot write into {folder}: {error.strerror}") from error
    if free < HEADROOM * (1 + leaving) * needed:
        raise CheckpointError(
            f"{folder} has {size_text(free)} free, and {1 + leaving} checkpoint{'s' if leaving else ''} of "
            f"{size_text(needed)} must fit: free some space, lower ckpt.keep_last, or take run_dir on another disk"
        )


def check_space_for_run(folder: Path, needed: int, keep_last: int) -> None:
    """Before a run: two checkpoints must fit (the new one is written before an old one goes); all kept ones should."""
    check_space(folder, needed, leaving=1)
    free = shutil.disk_usage(folder).free
    if free < HEADROOM * (keep_last + 1) * needed:
        log.warning(
            "%s free, but ckpt.keep_last=%d checkpoints of %s and the next one need %s",
            size_text(free), keep_last, size_text(needed), size_text((keep_last + 1) * needed),
        )  # fmt: skip
