"""Reading run folders: what each one says, whatever state it was left in. Nothing here writes, or imports torch."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STALLED_AFTER_S = 600
DEPTH = 3  # outputs/sweeps/NAME/JOB is found from outputs
RANK = "Eval/mean_percentile_rank"
ODD = "odd"  # state of a run whose config.json says nothing; name of what has another type than it should
NOT_BEGUN = "failed.json"  # what a sweep leaves in the folder of a job that failed before it had a config.json


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    folder: Path
    name: str  # below the folder that was looked through
    state: str  # running, stalled, stopped, failed, done or odd
    config: Mapping[str, Any]  # config.json as it lies there, but for what has another type than it should
    settings: Mapping[str, Any]  # dotted; of a job that failed before it began only those that were overridden
    choices: Mapping[str, str]  # the option taken per group, such as aug: multicrop
    history: Sequence[Mapping[str, Any]]  # one entry per start
    begun: bool
    last: Mapping[str, float]  # last value of every tag, and the last step
    best_rank: float | None  # smallest mean percentile rank, which is what a sweep optimises
    best_step: int | None
    duration_s: float | None  # the time it was up: pauses before a resume do not count

    @property
    def step(self) -> int:
        return int(self.last.get("step", self.config.get("step") or 0))


def read_run(folder: Path, name: str | None = None, *, now: float | None = None) -> Run | None:
    """Read a run folder; ``None`` where it is not one. `now` is in seconds since the epoch."""
    config = _json_object(folder / "config.json")
    begun = isinstance(config.get("config"), dict)
    if not begun:
        config = _json_object(folder / NOT_BEGUN)
        if not isinstance(config.get("settings"), dict):
            if not ((folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()):
                return None
            config = {"state": ODD, "settings": {}, "error": "its config.json cannot be read"}
    config = _as_expected(config)
    history = config["history"]
    last, best_rank, best_step = read_figures(folder / "metrics.jsonl")
    return Run(
        folder=folder,
        name=name or folder.absolute().name,
        state=_state(folder, str(config.get("state", "unknown")), time.time() if now is None else now),
        config=config,
        settings=flatten(config["config"] if begun else config["settings"]),
        choices={key: str(value) for key, value in config["choices"].items() if key != ODD},
        history=history,
        begun=begun,
        last=last,
        best_rank=best_rank,
        best_step=best_step,
        duration_s=read_duration(folder / "train.log", [str(event.get("at")) for event in history]),
    )


def _as_expected(config: dict[str, Any]) -> dict[str, Any]:
    """Types that the rest counts on: what has another one stands under `ODD`, or is left out."""
    events = config.get("history")
    events = [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
    changes = [event.get("changes") for event in events]
    return config | {
        **{key: _object(config.get(key)) for key in ("environment", "hardware", "choices")},
        **{key: value if _is_finite(value := config.get(key)) else None for key in ("parameters", "step")},
        "history": [
            event | {"hardware": _object(event.get("hardware")), "changes": each if isinstance(each, list) else []}
            for event, each in zip(events, changes, strict=True)
        ],
    }


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {} if value is None else {ODD: value}


def find_runs(folders: Sequence[Path], *, depth: int = DEPTH) -> list[Run]:
    """The runs in `folders` and up to `depth` levels below; each run once, under names that tell them apart."""
    found: dict[Path, Run] = {}
    for top in folders:
        for run in _runs_below(top, top, depth):
            found.setdefault(run.folder.resolve(), run)
    runs = list(found.values())
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    return runs


def _runs_below(folder: Path, top: Path, depth: int) -> Iterator[Run]:
    run = read_run(folder, str(folder.relative_to(top)) if folder != top else None)
    if run is not None:
        yield run
    elif depth:
        inside: list[Path] = []
        with suppress(OSError):  # a folder that may not be read holds no runs of ours
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for path in inside:
            yield from _runs_below(path, top, depth - 1)


def records(path: Path) -> Iterator[dict[str, float]]:
    """The records of a metrics.jsonl, numbers only; a line that is no record (cut by a crash) is left out."""
    try:
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115  closed below
    except OSError:
        return
    with file:
        for line in file:
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and _is_finite(record.get("step")):
                    yield {tag: value for tag, value in record.items() if _is_number(value)}


def read_figures(path: Path) -> tuple[dict[str, float], float | None, int | None]:
    """Last value of every tag, the smallest mean percentile rank, and the step of that."""
    last: dict[str, float] = {}
    best, best_step = math.inf, None
    for record in records(path):
        last |= record
        if record.get(RANK, math.nan) < best:
            best, best_step = record[RANK], int(record["step"])
    return last, None if best_step is None else best, best_step


def read_duration(log: Path, starts: Sequence[str]) -> float | None:
    """Seconds that a run was up, by the times in its train.log; ``None`` where they do not say.

    Args:
        log: the run's train.log.
        starts: when it was started, and resumed, as ``YYYY-MM-DDTHH:MM:SS``. A session lasts from its start to the
            last line of the log before the next one.
    """
    starts = [start.replace("T", " ") for start in starts]
    ends = [""] * len(starts)
    session = -1
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            for line in file:
                stamp = line[:19]
                if line[4:5] != "-" or line[10:11] != " ":  # the next line of a traceback
                    continue
                while session + 1 < len(starts) and stamp >= starts[session + 1]:
                    session += 1
                if session >= 0:
                    ends[session] = stamp
        spans = [_epoch(end) - _epoch(start) for start, end in zip(starts, ends, strict=True) if end]
    except (OSError, ValueError):
        return None
    return sum(spans) if spans else None


def _epoch(stamp: str) -> float:
    return time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S"))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        flatten(content if isinstance(content, dict) else {})
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_number(value: Any) -> bool:
    """NaN and infinities are figures of a run gone wrong; an integer that no float holds is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _state(folder: Path, noted: str, now: float) -> str:
    """The state as noted; a run that was killed could not note it, and has given no sign for ten minutes."""
    signs = []
    for name in ("config.json", "metrics.jsonl", "train.log"):
        with suppress(OSError):
            signs.append((folder / name).stat().st_mtime)
    return "stalled" if noted == "running" and now - max(signs, default=0.0) > STALLED_AFTER_S else noted


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists are values. (The one of `dinoct.resume` brings torch along.)"""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
