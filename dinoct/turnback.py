"""Going on from a checkpoint that is not the newest of its run folder: what comes later is kept under another name.

The files of a run folder that are called ``checkpoint_*`` or ``sharded_*`` are those of one line of training, whose
newest is what ``resume=auto`` goes on from. Those of a line that was left are called ``abandoned_*``.
"""

import os
import re
from contextlib import nullcontext
from pathlib import Path

from dinoct import checkpoint as checkpoints
from dinoct.durable import linking
from dinoct.errors import CheckpointError

_IN_LINE = re.compile(r"checkpoint(_best|_final)?_(\d{8})\.pth|sharded_(\d{8})")


def turn_back(folder: Path, going_on: Path, step: int) -> list[Path]:
    """Make a checkpoint the newest of its run folder; returns the new paths of those that were set aside for it.

    They are those of later steps, and of this step those of another state. The file keeps its name, and gets the
    regular one beside it where that is none of this state, so that a kill from here on leaves a folder that goes on
    from there.

    Raises:
        CheckpointError: if the disk refuses.
    """
    regular = folder / checkpoints.checkpoint_name(step)
    left = [path for path in folder.iterdir() if _step(path) > step]
    if going_on.is_dir() or (regular.is_file() and checkpoints.same_state(regular, going_on)):
        ready = nullcontext()
    else:
        ready = linking(going_on, regular)
        of_step = (path for path in folder.iterdir() if _step(path) == step)
        left += [path for path in of_step if not (path.is_file() and checkpoints.same_state(path, going_on))]
    moved = []
    with ready:
        for path in sorted(left, key=lambda path: ("_final_" not in path.name, -_step(path))):
            try:
                if "_final_" in path.name and (checkpoints.is_regular(path, _step(path)) or not path.exists()):
                    path.unlink()  # a second name of one that is set aside by its first
                else:
                    moved.append(_set_aside(path))
            except OSError as error:
                raise CheckpointError(f"cannot set aside {path}: {error.strerror}") from error
    return moved


def aside(folder: Path) -> list[Path]:
    """What ``resume=FOLDER`` does not look at: emergencies' checkpoints, second names, lines that were left."""
    names = ("emergency_*.pth", "abandoned_*", "checkpoint_best_*", "checkpoint_final_*")
    return sorted(path for name in names for path in folder.glob(name))


def _step(path: Path) -> int:
    found = _IN_LINE.fullmatch(path.name)
    return int(found[2] or found[3]) if found else -1


def _set_aside(path: Path) -> Path:
    target = path.with_name(f"abandoned_{path.name.removeprefix('checkpoint_')}")
    while target.exists():  # of an earlier turn back
        target = target.with_name(f"{target.stem}x{target.suffix}")
    os.replace(path, target)
    return target
