"""Checkpoints: atomic save, verified load, rotation, find-latest.

A run folder::

    outputs/runs/20260103_120000/
      config.json                      settings, hardware, provenance, history of resumes
      checkpoint_00000100.pth ...      the last ckpt.keep_last, plus every ckpt.keep_every steps
      checkpoint_final_00000384.pth    hard link to the last one of a finished run
      emergency_00000123.pth           healthy weights of the step at which training went wrong
      metrics.jsonl train.log tb/ wandb/ monitor/step_00001000/

A checkpoint is tensors plus JSON in torch's zip container: ``{"meta": str, "state": nested dicts of tensors}``. It is
read with ``weights_only=True`` after the CRC-32 of every record was checked, because a flipped bit loads silently
otherwise; onto the CPU, so that it carries no device. Its config is read as data and never instantiated.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinoct.errors import CheckpointError

FORMAT = 1
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
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"meta": json.dumps(meta | {"format": FORMAT}), "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
        return path.stat().st_size
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not a dinoct checkpoint, or is cut or damaged ({error})") from error
    if broken:
        raise CheckpointError(f"{path} is damaged: the checksum of {broken} is wrong; take an earlier checkpoint")


def load(path: str | Path) -> Checkpoint:
    """Verify and read a checkpoint onto the CPU.

    Raises:
        CheckpointError: if it is missing, damaged, or not one of dinoct's.
    """
    path = Path(path)
    verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        meta = json.loads(content["meta"])
        state = content["state"]
    except (
        Exception
    ) as error:  # a foreign file can fail in any way; torch's advice to load it unsafely is not passed on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a dinoct checkpoint ({reason[:120]})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {meta.get('format')}; this dinoct reads {FORMAT}")
    return Checkpoint(path, meta, state)


def list_checkpoints(folder: Path) -> list[Path]:
    """Regular checkpoints of a run folder, oldest first; not the final link, not emergency files."""
    return sorted(path for path in folder.glob("checkpoint_*.pth") if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name).group(1))


def rotate(folder: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Delete checkpoints older than the last `keep_last`, except milestones; returns what was deleted."""
    doomed = list_checkpoints(folder)[:-keep_last]
    if keep_every:
        doomed = [path for path in doomed if step_of(path) % keep_every]
    for path in doomed:
        path.unlink(missing_ok=True)
    return doomed


def link_final(path: Path) -> Path:
    """Give the last checkpoint its second name: a hard link where the file system has them."""
    final = path.with_name(f"checkpoint_final_{step_of(path):08d}.pth")
    final.unlink(missing_ok=True)
    try:
        os.link(path, final)
    except OSError:
        os.symlink(path.name, final)
    return final


def find_latest(folders: Iterable[Path]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, of the first folder that has one.

    Args:
        folders: run folders, newest first.
    Returns:
        The checkpoint (``None`` where there is none), and a warning for each broken file that was passed over.
    """
    warnings = []
    for folder in folders:
        for path in reversed(list_checkpoints(folder)):
            try:
                return load(path), warnings
            except CheckpointError as error:
                warnings.append(f"skipped: {error}")
    return None, warnings
