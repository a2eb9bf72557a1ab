"""Checkpoints of which every rank writes its share (torch.distributed.checkpoint): quick where a model is large.

A folder ``sharded_{step}/``: torch's files, the generators' states, and meta.json, which comes last and holds the
CRC-32 of every other file. Any number of ranks goes on from it, one process too, which makes one file of it. It is for
resuming on one's own machines: torch reads its table of contents with pickle, so that a folder from elsewhere is not to
be opened.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dinoct.checkpoint import FORMAT, Checkpoint
from dinoct.checksum import file_crc32
from dinoct.durable import sync_folder
from dinoct.errors import CheckpointError
from dinoct.optim import optimizer_state
from dinoct.parallel import Parallel

META, GENERATORS = "meta.json", "generators.pth"
_NAME = re.compile(r"sharded_(\d{8})")
_ASIDE = re.compile(r"abandoned_sharded_\d{8}x*")


def list_sharded(folder: Path) -> list[Path]:
    """Finished sharded checkpoints of a run folder, oldest first; not those that were set aside."""
    return sorted(filter(is_sharded, folder.glob("sharded_*")))


def is_sharded(path: Path) -> bool:
    """Whether a path is a sharded checkpoint, and not a run folder."""
    return bool(_NAME.fullmatch(path.name) or _ASIDE.fullmatch(path.name)) and (path / META).is_file()


def step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name).group(1))


def save(
    folder: Path, state: dict[str, Any], generators: dict[str, Any], meta: dict[str, Any], parallel: Parallel
) -> Path:
    """Write ``sharded_{step}/`` into a run folder, whole or not at all; every rank must call.

    Args:
        folder: that all ranks see.
        state: ``model`` and ``optimizer``, in which each rank holds its shares.
        generators: small tensors, of which rank 0's are written.
        meta: what JSON can hold; rank 0's is written.
        parallel: the ranks.
    Raises:
        CheckpointError: on all ranks, if one of them cannot write; nothing is left behind then.
    """
    import torch.distributed.checkpoint as dcp

    folder = Path(parallel.led(str(folder)))
    step = parallel.led(meta["step"])
    path = folder / f"sharded_{step:08d}"
    temporary = folder / f".{path.name}.tmp"
    reason = None
    if parallel.leads:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        dcp.save(state, checkpoint_id=temporary, no_dist=not dist.is_initialized())
        if parallel.leads:
            torch.save(generators, temporary / GENERATORS)
            content = meta | {"format": FORMAT, "parameters_with_moments": sorted(state["optimizer"])}
            content["files"] = {name.name: file_crc32(name) for name in sorted(temporary.iterdir())}
            with open(temporary / META, "w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            sync_folder(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    failed = next(filter(None, parallel.each(reason)), None)
    if failed:
        if parallel.leads:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write {path}: {failed}")
    return path


def read(path: Path) -> Checkpoint:
    """Check every file of a sharded checkpoint; its state stays on the disk until `load_into`.

    Raises:
        CheckpointError: if it is not one, or is damaged.
    """
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        files, made_by = meta.pop("files"), meta["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a sharded checkpoint, or was not finished") from error
    if made_by != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {made_by}; this dinoct reads {FORMAT}")
    for name, crc in files.items():
        try:
            good = file_crc32(path / name) == crc
        except OSError:
            good = False
        if not good:
            raise CheckpointError(f"{path} is damaged: {name} is missing or has another checksum")
    return Checkpoint(path, meta, {})


def load_into(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill `checkpoint.state` with this rank's shares, cut as the model is now; every rank must call."""
    import torch.distributed.checkpoint as dcp

    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    moments = {
        name: {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameters[name]),
            "exp_avg_sq": torch.zeros_like(parameters[name]),
        }
        for name in checkpoint.meta["parameters_with_moments"]
    }
    state = {"model": model.state_dict(), "optimizer": moments}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no group
        dcp.load(state, checkpoint_id=checkpoint.path, no_dist=not dist.is_initialized())
    generators = torch.load(checkpoint.path / GENERATORS, map_location="cpu", weights_only=True)
    checkpoint.state = state | generators


def share_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's part of the state."""
    return {"model": model.state_dict(), "optimizer": optimizer_state(optimizer)}
