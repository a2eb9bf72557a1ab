"""What differs between runs, which columns say so, and what makes a comparison unfair. Pure functions."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from dinoct.compare.read import RANK, Run
from dinoct.errors import ConfigError

PLACES = ("run_dir", "resume", "replay", "tracker")  # settings and groups that say where and not what
FIGURES = ("rank", "last rank", "loss", "gram", "feature std", "duration")
ALIASES = {"name": "run", "best": "rank", "best rank": "rank", "std": "feature std", "time": "duration"}

Cell = str | int | float | None


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs, without those that say where a run lies."""
    keys = {key for run in runs for key in run.settings if key.split(".")[0] not in PLACES}
    return sorted(key for key in keys if _differs(runs, key))


def differing_choices(runs: Sequence[Run]) -> list[str]:
    """Groups, such as ``aug``, of which the runs took different options."""
    groups = {group for run in runs for group in run.choices if group not in PLACES}
    return sorted(group for group in groups if len({run.choices[group] for run in runs if group in run.choices}) > 1)


def _differs(runs: Sequence[Run], key: str) -> bool:
    return len({json.dumps(run.settings.get(key)) for run in runs if run.begun or key in run.settings}) > 1


def telling(runs: Sequence[Run]) -> list[str]:
    """The fewest columns that say what differs: choices, and the settings that no choice explains.

    ``aug=multicrop`` beside ``aug=intensity_only`` changes eight settings, and one column says all of it. A setting
    that was typed, or that differs between runs of the same choice, has its own.
    """
    groups = differing_choices(runs)
    typed = {key for run in runs for key in _typed(run)}

    def explained(key: str) -> bool:
        above = [group for group in groups if group == "experiment" or key.startswith(f"{group}.")]
        return key not in typed and any(not _differs_within(runs, group, key) for group in above)

    return [*groups, *(key for key in differing_settings(runs) if not explained(key))]


def _differs_within(runs: Sequence[Run], group: str, key: str) -> bool:
    options = {run.choices.get(group) for run in runs}
    return any(_differs([run for run in runs if run.choices.get(group) == option], key) for option in options)


def _typed(run: Run) -> Iterator[str]:
    """Keys on the command lines of the run."""
    for command in (run.config.get("command"), *(event.get("command") for event in run.history)):
        with suppress(ValueError):
            yield from (word.lstrip("+").split("=", 1)[0] for word in shlex.split(str(command)) if "=" in word)


def columns(runs: Sequence[Run]) -> list[str]:
    """The columns that a person wants to see, in order."""
    return ["run", "state", "step", *telling(runs), *FIGURES]


def every_column(runs: Sequence[Run]) -> list[str]:
    """The columns with all that differs, for a file."""
    return ["run", "state", "step", *differing_choices(runs), *differing_settings(runs), *FIGURES]


def cell(run: Run, column: str) -> Cell:
    """What stands in a column: a number, a text, or ``None`` where nothing is known. Durations are in seconds."""
    figures: dict[str, Cell] = {
        "run": run.name,
        "state": run.state,
        "step": run.step,
        "rank": run.best_rank,
        "last rank": run.last.get(RANK),
        "loss": run.last.get("loss/total"),
        "gram": run.last.get("loss/gram"),
        "feature std": run.last.get("Train/feature_std"),
        "duration": run.duration_s,
    }
    if column in figures:
        return figures[column]
    if column in run.settings:
        return _setting(run.settings[column])
    option = run.choices.get(column)
    return None if option == "None" else option


def _setting(value: Any) -> Cell:
    """A setting as one would type it; numbers stay numbers, so that they sort."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return value
    return json.dumps(value)


def short_names(keys: Sequence[str], *, taken: Sequence[str] = ()) -> dict[str, str]:
    """The last parts of dotted keys, as few as tell them apart: ``optim.lr`` is ``lr``."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        others = {other for other in keys if other != key} | set(taken)
        names[key] = next(
            (end for end in ends if not any(other == end or other.endswith(f".{end}") for other in others)), key
        )
    return names


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names of runs: a sweep's job is its number, since the rest of its folder's name repeats the settings."""
    short = [re.sub(r"(^|/)(\d+)_[^/]*$", r"\1\2", run.name) if run.config.get("sweep") else run.name for run in runs]
    return short if len(set(short)) == len(short) else [run.name for run in runs]


def sort_runs(runs: Sequence[Run], column: str = "rank") -> list[Run]:
    """Runs in the order of a column (see `column_of`), smallest first, what is unknown last."""

    def key(run: Run) -> tuple[Any, ...]:
        value = cell(run, column)
        number = isinstance(value, int | float) and value == value  # NaN is no place in an order
        order = (0, value, ()) if number else (1, 0, natural(value)) if isinstance(value, str) else (2, 0, ())
        return *order, natural(run.name)

    return sorted(runs, key=key)


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A key that puts job 2 before job 10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part)


def column_of(runs: Sequence[Run], typed: str) -> str:
    """The column that is meant by its name, by an alias, or by a setting's name, whole or shortened.

    Raises:
        ConfigError: listing the columns, if there is none.
    """
    shown = columns(runs)
    column = ALIASES.get(typed, typed)
    if column in shown or any(column in run.settings for run in runs):
        return column
    for key, name in short_names(telling(runs), taken=["run", "state", "step", *FIGURES]).items():
        if name == column:
            return key
    raise ConfigError(f"--sort {typed}: there is no such column; there are {', '.join(shown)}")


def commits(run: Run) -> str:
    """The code that the run was made by; more than one where it was resumed with another.

    A start left nothing of its code where later ones took all of its steps again: it ended before a checkpoint, say; or
    where the run went on from a branch that it is not of.
    """
    line = _starts(run)
    events = [event for event in run.history if event.get("start") is None or not line or event["start"] in line]
    from_step = [event.get("from_step") for event in events]
    from_step = [step if isinstance(step, int) else 0 for step in from_step]
    each = [
        str(event["git_commit"])
        for i, event in enumerate(events)
        if event.get("git_commit") and all(later > from_step[i] for later in from_step[i + 1 :])
    ]
    return ", ".join(dict.fromkeys(each or [str(run.config.get("git_commit", "unknown"))]))


def _starts(run: Run) -> set[str]:
    """Ids of the starts that led to where the run is. (`dinoct.lineage`, which reads them too, brings torch along.)"""
    starts = run.config.get("starts")
    pairs = starts if isinstance(starts, list) else []
    return {str(pair[1]) for pair in pairs if isinstance(pair, list) and len(pair) == 2}


def data_hash(run: Run) -> str:
    """The hash of the data and of the split that the run was made from."""
    return str(run.config.get("data_manifest_hash", "unknown"))


def unfair(runs: Sequence[Run]) -> list[str]:
    """Sentences on what makes a comparison unfair: other data, other code, another way of judging."""
    begun = [run for run in runs if run.begun]
    found = []
    for read, what, so in (
        (data_hash, "saw different data (data_manifest_hash", "their figures cannot be compared"),
        (commits, "were made by different code (git_commit", "a difference may come from it"),
    ):
        counts = Counter(map(read, begun))
        if len(counts) > 1:
            found.append(f"the runs {what} {_counted(counts)}): {so}")
    judged = [run for run in begun if run.best_rank is not None]
    keys = [key for key in differing_settings(judged) if key.startswith("probe.") or key == "eval.n"]
    if keys:
        found.append(f"the runs were judged differently ({', '.join(keys)}): their ranks cannot be compared")
    return found


def _counted(counts: Mapping[str, int], *, most: int = 4) -> str:
    some = ", ".join(f"{value} in {count}" for value, count in Counter(counts).most_common(most))
    return some + (f" and {len(counts) - most} others" if len(counts) > most else "")
