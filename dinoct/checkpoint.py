"""Checkpoints: atomic save, verified load, rotation, find-latest.

A run folder::

    outputs/runs/20260103_120000/
      config.json                      settings, hardware, provenance, history of resumes
      checkpoint_00000100.pth ...      the last ckpt.keep_last, plus every ckpt.keep_every steps
      checkpoint_final_00000384.pth    hard link to the last one of a finished run
      checkpoint_best_00000200.pth     best mean percentile rank of the evaluations in training (eval.every)
      emergency_00000123.pth           the state when training went wrong: before a NaN, or at a sign of collapse
      abandoned_00000500.pth           of another line than the checkpoint that the run was resumed from
      abandoned_metrics.jsonl          the records of such lines
      metrics.jsonl train.log tb/ wandb/ monitor/step_00001000/

A checkpoint is tensors plus JSON in torch's zip container: ``{"meta": str, "state": nested dicts of tensors}``. It is
read with ``weights_only=True`` after the CRC-32 of every record was checked, because a flipped bit loads silently
otherwise; onto the CPU, so that it carries no device. Its config is read as data and never instantiated.
"""

import errno
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinoct.durable import link, replacing, sweep
from dinoct.errors import CheckpointError, DinoctError

FORMAT = 2
# What zipfile raises for a file that is none of torch's, cut or damaged.
_NO_CONTAINER = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
)
# The machine's fault, and not the file's.
_NOT_NOW = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)
_OBJECTS = "it holds Python objects, which could run anything: save its tensors alone, as .safetensors"
_NAME = re.compile(r"checkpoint_(\d{8})\.pth")


@dataclass
class Checkpoint:
    path: Path
    meta: dict[str, Any]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]


def checkpoint_name(step: int) -> str:
    return f"checkpoint_{step:08d}.pth"


def save(path: Path, state: dict[str, Any], meta: dict[str, Any]) -> int:
    """Write a checkpoint so that `path` holds either the whole of it or what it held before.

    Args:
        path: target; a temporary file beside it is written, flushed to the disk, and renamed.
        state: nested dicts of tensors and plain numbers.
        meta: what JSON can hold.
    Returns:
        Bytes written.
    Raises:
        CheckpointError: if the disk refuses (full, read-only); nothing is left behind then.
    """
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save({"meta": json.dumps(meta | {"format": FORMAT}), "state": state}, file)
        return path.stat().st_size
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def sweep_temporary(folder: Path) -> None:
    """Remove what a process that was killed in a save left of it; nobody may be writing checkpoints here."""
    for names in ("checkpoint_*", "emergency_*", "sharded_*"):
        sweep(folder, names)


def verify(path: Path) -> None:
    """Check that every record of the file has its checksum.

    Raises:
        CheckpointError: saying what is wrong.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as container:
            broken = container.testzip()
    except _NO_CONTAINER as error:
        if getattr(error, "errno", None) in _NOT_NOW:
            raise DinoctError(f"{path} cannot be read now ({error.strerror}); it may be whole") from error
        raise CheckpointError(f"{path} is not a dinoct checkpoint, or is cut or damaged ({error})") from error
    if broken:
        raise CheckpointError(f"{path} is damaged: the checksum of {broken} is wrong; take an earlier checkpoint")


def load(path: str | Path, *, lazily: bool = False) -> Checkpoint:
    """Verify and read a checkpoint onto the CPU.

    Args:
        path: the file; or the folder of a sharded checkpoint, whose state stays on the disk (`dinoct.shards`).
        lazily: map the file and read a tensor when it is used; for those who want a part of it.
    Raises:
        CheckpointError: if it is missing, damaged, or not one of dinoct's.
        DinoctError: if this machine cannot read it now (memory, open files): the file may be whole.
    """
    path = Path(path)
    if path.is_dir():
        from dinoct.shards import is_sharded, read

        if inside := list_checkpoints(path):
            raise CheckpointError(f"{path} is a run folder: name one of its checkpoints, such as {inside[-1]}")
        if not is_sharded(path) and not path.name.startswith("sharded_"):
            raise CheckpointError(f"{path} is a folder without checkpoints: name a checkpoint's file")
        return read(path)
    if path.suffix == ".safetensors" and path.is_file():
        raise CheckpointError(f"{path} is an exported encoder: name the checkpoint (.pth) that it was made of")
    verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
        meta = json.loads(content["meta"])
        state = content["state"]
    except (MemoryError, OSError) as error:
        raise DinoctError(f"{path} cannot be read now ({error or 'out of memory'}); it may be whole") from error
    except Exception as error:  # a foreign file can fail in any way
        reason = _OBJECTS if isinstance(error, pickle.UnpicklingError) else (str(error) or type(error).__name__)
        if "can't allocate memory" in reason:
            raise DinoctError(f"{path} cannot be read now (out of memory); it may be whole") from error
        raise CheckpointError(f"{path} is not a dinoct checkpoint ({' '.join(reason.split())[:160]})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), int) or not 1 <= meta["format"] <= FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise CheckpointError(f"{path} has checkpoint format {found}; this dinoct reads 1 to {FORMAT}")
    for step in range(meta["format"], FORMAT):
        meta = MIGRATIONS[step](meta)
    return Checkpoint(path, meta, state)


def peek(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint, of one file or of shares, with no check of its tensors; empty where it is none."""
    try:
        if path.is_dir():
            return json.loads((path / "meta.json").read_text(encoding="utf-8"))
        return json.loads(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["meta"])
    except Exception:  # a foreign or damaged file can fail in any way
        return {}


def _migrate_1_to_2(meta: dict[str, Any]) -> dict[str, Any]:
    """Format 2 keeps what the anomaly detector has seen, and whom the weights have; both start anew."""
    anomalies = {"losses": [], "was_healthy": False, "wall_since": None, "streaks": {}}
    return meta | {"format": 2, "anomalies": anomalies, "train_patients": []}


MIGRATIONS = {1: _migrate_1_to_2}


def list_checkpoints(folder: Path) -> list[Path]:
    """Regular checkpoints of a run folder, oldest first; not the final link, not emergency files."""
    return sorted(path for path in folder.glob("checkpoint_*.pth") if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name).group(1))


def is_regular(path: Path, step: int) -> bool:
    """Whether a file is its folder's ``checkpoint_{step}.pth``, by this name or by a link's."""
    regular = path.with_name(checkpoint_name(step))
    return regular.is_file() and path.is_file() and regular.samefile(path)


def rotate(folder: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Delete checkpoints older than the last `keep_last`, except milestones; returns what was deleted."""
    steps = {step_of(path): path for path in list_checkpoints(folder)}
    deleted = [steps[step] for step in doomed(steps, keep_last=keep_last, keep_every=keep_every)]
    for path in deleted:
        path.unlink(missing_ok=True)
    return deleted


def doomed(steps: Iterable[int], *, keep_last: int, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints go: neither of the last `keep_last`, nor the first at or behind a multiple of
    `keep_every`, of which ``ckpt.every`` need not be a divisor."""
    gone, span = [], 0
    for step in sorted(steps)[:-keep_last]:
        if keep_every and step // keep_every > span:
            span = step // keep_every
        else:
            gone.append(step)
    return gone


def same_state(path: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, by their checksums; their meta may differ."""
    if path.samefile(other):
        return True
    try:
        return _tensors(path) == _tensors(other)
    except _NO_CONTAINER:
        return False


def _tensors(path: Path) -> list[tuple[str, int]]:
    with zipfile.ZipFile(path) as container:
        records = ((info.filename.partition("/")[2], info.CRC) for info in container.infolist())
        return sorted(record for record in records if record[0].startswith("data/"))


def link_final(path: Path) -> Path:
    """Give the last checkpoint its second name."""
    final = path.with_name(f"checkpoint_final_{step_of(path):08d}.pth")
    link(path, final)
    return final


def best_checkpoint(folder: Path) -> Path | None:
    """``checkpoint_best_*.pth`` of a run folder; of two, which a kill may leave, the newer one."""
    return max(folder.glob("checkpoint_best_*.pth"), default=None)


def later_than(folder: Path, step: int) -> list[Path]:
    """A folder's regular checkpoints and shares behind a step, the newest first; a file before shares of its step."""
    from dinoct import shards

    found = [(step_of(path), 1, path) for path in list_checkpoints(folder)]
    found += [(shards.step_of(path), 0, path) for path in shards.list_sharded(folder)]
    return [path for at, _, path in sorted(found, reverse=True) if at > step]


def find_latest(folders: Iterable[Path], *, behind: int = -1) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, of the first folder that has one.

    Args:
        folders: run folders, newest first.
        behind: steps up to this one do not count.
    Returns:
        The checkpoint (``None`` where there is none), and a warning for each broken file that was passed over.
    """
    warnings = []
    for folder in folders:
        for path in later_than(folder, behind):
            try:
                return load(path), warnings
            except CheckpointError as error:
                warnings.append(f"skipped: {error}")
    return None, warnings
