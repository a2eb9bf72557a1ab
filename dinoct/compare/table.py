"""A table of runs: on a terminal of any width, as CSV, as JSON; and all that one run says, line by line."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dinoct.compare.differ import (
    FIGURES,
    Cell,
    cell,
    columns,
    commits,
    data_hash,
    differing_settings,
    labels,
    short_names,
    telling,
    unfair,
)
from dinoct.compare.read import ODD, Run
from dinoct.console import console

WIDEST_CELL = 26  # longer texts are folded
GAP = 2
HOUSEKEEPING = ("ckpt", "monitor", "eval", "hardware")
FORMULA_START = ("=", "+", "-", "@", "\t", "\r", "\n")  # what a spreadsheet runs as a formula (OWASP, "CSV Injection")


def print_table(runs: Sequence[Run], title: str, *, sorted_by: str = "rank") -> None:
    """Print as many columns as the terminal takes, name the others, then what failed and what is unfair."""
    cells, names = readable(runs), headings(runs)
    widths = {key: max(_heading_width(names[key]), *(_cell_width(row[key]) for row in cells)) for key in names}
    shown = fitting(widths, _by_importance(runs, sorted_by), console.width)
    grid = Table(title=Text(printable(title)), title_justify="left", box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for key in (key for key in names if key in shown):
        justify = "left" if is_text(runs, key) else "right"
        grid.add_column(Text(_folded(names[key], widths[key])), width=widths[key], justify=justify, overflow="fold")
    for row in cells:
        grid.add_row(*(Text(row[key]) for key in names if key in shown))
    console.print(grid)
    hidden = [key for key in names if key not in shown]
    if hidden:
        say(f"no room for {', '.join(hidden)}: a wider terminal, --csv and --html show all")
    for run, label in zip(runs, labels(runs), strict=True):
        if run.state in ("failed", ODD):
            say(f"{label} {run.state}: {reason(run)}")


def is_text(runs: Sequence[Run], column: str) -> bool:
    """Whether a column is of words; numbers stand to the right."""
    return any(isinstance(cell(run, column), str) for run in runs)


def say(line: str) -> None:
    console.print(printable(line), markup=False, style="dim")


def reason(run: Run) -> str:
    """Why a run failed, in one line."""
    before = "before it began; its line on the console, or its train.log, says why"
    return printable(str(run.config.get("error", before if not run.begun else "see its train.log")))


def headings(runs: Sequence[Run]) -> dict[str, str]:
    """What stands above each column on a terminal or a page, by column: settings are shortened."""
    return {key: key for key in columns(runs)} | short_names(telling(runs), taken=["run", "state", "step", *FIGURES])


def readable(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The cells of the table as a person reads them, by column."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        row = {key: shown(key, cell(run, key)) for key in columns(runs)}
        rows.append(row | {"run": printable(label)})
    return rows


def shown(column: str, value: Cell) -> str:
    """One cell as a person reads it; ``-`` where nothing is known."""
    if value is None:
        return "-"
    if column == "duration":
        return duration(value)
    if isinstance(value, float):
        return f"{value:.4g}" if column in FIGURES else f"{value:.6g}"
    return printable(str(value))


def duration(seconds: float) -> str:
    """``2d03h``, ``2h05m``, ``3m20s`` or ``45s``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d{h:02d}h" if days else f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def printable(text: str) -> str:
    """Text of a file that cannot move the cursor, nor break the console's encoding."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def fitting(widths: dict[str, int], by_importance: Sequence[str], room: int) -> set[str]:
    """The columns that fit into `room` characters, the more important ones first."""
    taken, used = set(), 0
    for key in by_importance:
        if not taken or used + widths[key] + GAP <= room + GAP:
            taken.add(key)
            used += widths[key] + GAP
    return taken


def _by_importance(runs: Sequence[Run], sorted_by: str) -> list[str]:
    """What was tried and what came of it stand before how it was saved, watched and computed."""
    tried = [key for key in telling(runs) if not key.startswith(HOUSEKEEPING)]
    order = ["run", "rank", sorted_by, "state", *tried, "loss", "step", "duration", "last rank", "feature std", "gram"]
    return [key for key in dict.fromkeys([*order, *telling(runs)]) if key in columns(runs)]


def _pieces(heading: str) -> list[str]:
    return re.findall(r"[^_. ]+[_. ]?", heading)


def _heading_width(heading: str) -> int:
    return max(len(piece.rstrip(" ")) for piece in _pieces(heading))


def _cell_width(text: str) -> int:
    return min(len(text), WIDEST_CELL)


def _folded(heading: str, width: int) -> str:
    """The heading in lines of at most `width`, broken behind an underscore, a dot or a space."""
    lines = [""]
    for piece in _pieces(heading):
        if lines[-1] and len((lines[-1] + piece).rstrip(" ")) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip(" ") for line in lines)


def as_csv(runs: Sequence[Run], keys: Sequence[str]) -> str:
    """The table with the columns `keys` under their whole names; empty where nothing is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_csv_cell("duration_s" if key == "duration" else key) for key in keys])
    for run in runs:
        writer.writerow([_csv_cell(_exact(cell(run, key))) for key in keys])
    return text.getvalue()


def _exact(value: Cell) -> str:
    return "" if value is None else str(value)


def _csv_cell(text: str) -> str:
    """A number stays one, minus and all; any other text that a spreadsheet would run is disarmed."""
    try:
        float(text)
    except ValueError:
        return "'" + printable(text) if text.startswith(FORMULA_START) else printable(text)
    return text


def as_json(runs: Sequence[Run]) -> str:
    """``{"notes": [...], "runs": [...]}``: each run with its figures and those of its settings that differ."""
    settings = differing_settings(runs)
    described = [
        {
            "name": run.name,
            "folder": str(run.folder),
            "state": run.state,
            "step": run.step,
            "duration_s": run.duration_s,
            "git_commit": commits(run),
            "data_manifest_hash": data_hash(run),
            "rank": run.best_rank,
            "rank_step": run.best_step,
            "last": {tag: _finite(value) for tag, value in sorted(run.last.items())},
            "choices": dict(run.choices),
            "settings": {key: _valid(run.settings[key]) for key in settings if key in run.settings},
        }
        for run in runs
    ]
    return json.dumps({"notes": unfair(runs), "runs": described}, indent=2) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _valid(setting: Any) -> Any:
    return _finite(setting) if isinstance(setting, float) else setting


def describe_run(run: Run) -> list[str]:
    """What one run is and where it came from, line by line."""

    def pairs(key: str, joined: str = " ") -> str:
        return ", ".join(f"{name}{joined}{value}" for name, value in run.config[key].items() if value is not None)

    lines = [
        f"run        {run.folder}  ({run.state}, step {run.step})",
        f"command    {run.config.get('command')}",
        f"created    {run.config.get('created')}",
        f"choices    {pairs('choices', '=')}",
    ]
    millions = (run.config.get("parameters") or 0) / 1e6
    if run.begun:
        lines += [
            f"code       git {commits(run)}, dinoct {run.config['environment'].get('dinoct')}",
            f"data       manifest {data_hash(run)}",
            f"machine    {pairs('hardware')}",
            f"versions   {pairs('environment')}",
            f"model      {run.settings.get('model.name')}, {millions:.1f} M parameters",
        ]
    if run.duration_s is not None:
        lines.append(f"duration   {duration(run.duration_s)}")
    if run.best_rank is not None:
        lines.append(f"best       mean percentile rank {run.best_rank:.6g} at step {run.best_step}")
    if run.state in ("failed", ODD):
        lines.append(f"error      {reason(run)}")
    for event in run.history:
        machine = event["hardware"]
        card = f"{machine.get('platform')} ({machine.get('card')})"
        lines.append(
            f"history    {event.get('at')}  from step {event.get('from_step')} on {card}: {event.get('command')}"
        )
        lines += [f"             changed {change}" for change in event["changes"]]
    lines += [f"last       {tag} = {value:.6g}" for tag, value in sorted(run.last.items()) if tag != "step"]
    lines += [f"setting    {key} = {value}" for key, value in sorted(run.settings.items())]
    return [printable(line) for line in lines]
