"""Going on from a checkpoint that is not the newest of its run folder: what is not of its line gets another name.

The files of a run folder that are called ``checkpoint_*`` or ``sharded_*``, and the records of its metrics.jsonl, are
those of one line of training, whose newest checkpoint is what ``resume=auto`` goes on from. Those of a line that was
left are called ``abandoned_*``, until the run goes on from one of them.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dinoct import checkpoint as checkpoints
from dinoct.durable import link, linking, replacing_text
from dinoct.errors import CheckpointError
from dinoct.lineage import Line, line_to

_IN_LINE = re.compile(r"checkpoint(_best|_final)?_(\d{8})\.pth|sharded_(\d{8})")
_LEFT = re.compile(r"abandoned_((?:best_|final_|sharded_)?(\d{8}))x*(?:\.pth)?")
LEFT_RECORDS = "abandoned_metrics.jsonl"


class Turned(NamedTuple):
    """New paths: of the files that were set aside, and of those that a run had left and are of its line again."""

    left: list[Path]
    taken_up: list[Path]


class Rewound(NamedTuple):
    """Records up to `step` stayed where they were; `back` are those behind it that had been set aside before."""

    step: int = 0
    back: tuple[dict[str, Any], ...] = ()


FROM_START = Rewound()


def turn_back(folder: Path, going_on: Path, line: Line) -> Turned:
    """Make a checkpoint the newest of its run folder, and leave no file of another line under a regular name.

    Set aside are those of later steps, of this step those of another state, and earlier ones that this checkpoint did
    not come by. Where it had been set aside itself, the files that it came by have their names again. It keeps its
    name, and gets the regular one beside it where that is none of this state, so that a kill from here on leaves a
    folder that goes on from there.

    Args:
        folder: of the run.
        going_on: the checkpoint in it.
        line: that led to it.

    Raises:
        CheckpointError: if the disk refuses.
    """
    step, regular = line.step, folder / checkpoints.checkpoint_name(line.step)
    moved: list[Path] = []

    def is_it(path: Path) -> bool:  # another line may have come to the same state, and is another one in what follows
        return path.is_file() and checkpoints.same_state(path, going_on) and line.came_by(line_to(path, step))

    if not going_on.is_dir() and not is_it(regular):
        with linking(going_on, regular):
            others = [path for path in folder.iterdir() if _step(path) == step and not is_it(path)]
            moved += _set_aside(others, keep=regular)  # it is replaced: until then the folder goes on from there
    moved += _set_aside(path for path in folder.iterdir() if _step(path) > step)
    before = [path for path in folder.iterdir() if 0 <= _step(path) < step]
    moved += _set_aside(path for path in before if not line.came_by(line_to(path, _step(path))))
    turned = going_on.name.startswith(("abandoned_", "emergency_"))
    return Turned(moved, _take_up(folder, line) if turned else [])


def rewind(path: Path, was: Line, now: Line) -> Rewound:
    """Leave in a metrics.jsonl the records of a checkpoint's line; those of it that were set aside come back.

    What is cut goes to abandoned_metrics.jsonl beside it. What is no record, such as half a line, which a power cut
    leaves, or a damaged one, is dropped.

    Args:
        path: of metrics.jsonl; it need not exist.
        was: the line whose records it holds.
        now: the line of the checkpoint.
    """
    aside = path.with_name(LEFT_RECORDS)
    old = {(record.pop("start", None), record["step"]): record for record in _records(aside)}
    known, kept, cut = len(old), {}, []
    for record in _records(path):
        step = record["step"]
        if step <= now.step and was.shares(now, step):
            kept[step] = record
        else:
            cut.append(step)
            old.setdefault((was.start_of(step), step), record)  # a kill may have left another line's record here
    back = {
        step: record
        for (start, step), record in old.items()
        if start == now.start_of(step) and step <= now.step and step not in kept
    }
    if len(old) > known:  # first, that a kill loses none
        _write(aside, ({"start": start} | record for (start, _), record in old.items()))
    if path.exists() or back:
        _write(path, (record for _, record in sorted((kept | back).items())))
    return Rewound(min([now.step, *(step - 1 for step in (*cut, *back))]), tuple(back[step] for step in sorted(back)))


def aside(folder: Path) -> list[Path]:
    """What ``resume=FOLDER`` does not look at: emergencies' checkpoints, second names, lines that were left."""
    names = ("emergency_*.pth", "abandoned_*", "checkpoint_best_*", "checkpoint_final_*")
    return sorted(path for name in names for path in folder.glob(name))


def _step(path: Path) -> int:
    found = _IN_LINE.fullmatch(path.name)
    return int(found[2] or found[3]) if found else -1


def _set_aside(left: Iterable[Path], *, keep: Path | None = None) -> list[Path]:
    """Rename files, the newest last, so that until then it is what a kill leaves the folder to go on from."""
    moved = []
    for path in sorted(left, key=lambda path: ("_final_" not in path.name, _step(path))):
        try:
            if "_final_" in path.name and (checkpoints.is_regular(path, _step(path)) or not path.exists()):
                path.unlink()  # a second name of one that is set aside by its first
            else:
                moved.append(set_aside(path, keep=path == keep))
        except OSError as error:
            raise CheckpointError(f"cannot set aside {path}: {error.strerror}") from error
    return moved


def set_aside(path: Path, *, keep: bool = False) -> Path:
    """Call a file of a run folder abandoned, by a second name if it is to `keep` the first; returns the new path."""
    target = path.with_name(f"abandoned_{path.name.removeprefix('checkpoint_')}")
    while target.exists() and not (keep and target.samefile(path)):  # of an earlier turn back
        target = target.with_name(f"{target.stem}x{target.suffix}")
    if keep:
        link(path, target)
    else:
        os.replace(path, target)
    return target


def _take_up(folder: Path, line: Line) -> list[Path]:
    """Give the files that this line came by, and that were set aside for another one, their names again."""
    names: dict[str, Path] = {}
    for path in sorted(folder.glob("abandoned_*")):
        found = _LEFT.fullmatch(path.name)
        at = line_to(path, int(found[2])) if found else Line(None, 0)
        if at.starts is not None and line.came_by(at):  # of those of an earlier version nobody knows
            sharded = found[1].startswith("sharded_")
            names.setdefault(found[1] if sharded else f"checkpoint_{found[1]}.pth", path)
    best = max((name for name in names if "_best_" in name), default=None)  # the older ones are of earlier times
    taken_up = []
    for name, path in names.items():
        if ("_best_" not in name or name == best) and not (folder / name).exists():
            try:
                os.replace(path, folder / name)
            except OSError as error:
                raise CheckpointError(f"cannot rename {path}: {error.strerror}") from error
            taken_up.append(folder / name)
    return taken_up


def _records(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            found.append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with replacing_text(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
