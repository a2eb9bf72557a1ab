"""Reading run folders: a table of runs, also printed at the end of a sweep."""

import argparse
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table

from dinoct.console import console
from dinoct.resume import flatten

STALLED_AFTER_S = 600
FIGURES = {  # column: tag in metrics.jsonl
    "loss": "loss/total",
    "gram": "loss/gram",
    "feature std": "Train/feature_std",
    "rank": "Eval/mean_percentile_rank",
}


def read_run(folder: Path) -> dict[str, Any] | None:
    """What a run folder says: config, state, last figures; ``None`` where it is not one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    last: dict[str, float] = {}
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                last |= json.loads(line)
            except ValueError:
                continue
    state = config.get("state", "unknown")
    if state == "running" and metrics.exists() and time.time() - metrics.stat().st_mtime > STALLED_AFTER_S:
        state = "stalled"
    return {"folder": folder, "state": state, "config": config, "last": last, "settings": flatten(config["config"])}


def differing_keys(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that are not the same in all runs, without those that differ always."""
    keys = {key for run in runs for key in run["settings"]}
    skip = ("run_dir", "resume", "tracker.")
    return sorted(k for k in keys if not k.startswith(skip) and len({str(r["settings"].get(k)) for r in runs}) > 1)


def rows(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, best mean percentile rank first where it was measured, else by name."""
    keys = differing_keys(runs)
    header = ["run", "state", "step", *keys, *FIGURES]

    def rank(run: Mapping[str, Any]) -> tuple[float, str]:
        return run["last"].get(FIGURES["rank"], float("inf")), run["folder"].name

    table = []
    for run in sorted(runs, key=rank):
        figures = [run["last"].get(tag) for tag in FIGURES.values()]
        shown = ["-" if value is None else f"{value:.4g}" for value in figures]
        settings = [str(run["settings"].get(key)) for key in keys]
        table.append([run["folder"].name, run["state"], str(run["last"].get("step", 0)), *settings, *shown])
    return header, table


def print_table(header: Sequence[str], table: Sequence[Sequence[str]], title: str) -> None:
    grid = Table(title=title, title_justify="left")
    for column in header:
        grid.add_column(column, overflow="fold")
    for row in table:
        grid.add_row(*row)
    console.print(grid)


class SweepSummary(Callback):
    """At the end of a sweep: a table of its runs on the console and as summary.csv in its folder."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(str(config.hydra.sweep.dir))
        runs = [run for path in sorted(folder.iterdir()) if (run := read_run(path))] if folder.is_dir() else []
        if not runs:
            return
        header, table = rows(runs)
        print_table(header, table, f"sweep {folder}")
        with open(folder / "summary.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *table])


def show(run: Mapping[str, Any]) -> list[str]:
    """What one run is and where it came from, line by line."""
    config = run["config"]
    lines = [
        f"run        {run['folder']}  ({run['state']}, step {run['last'].get('step', config.get('step', 0))})",
        f"command    {config['command']}",
        f"created    {config['created']}",
        f"code       git {config['git_commit']}, dinoct {config['environment']['dinoct']}",
        f"data       manifest {config['data_manifest_hash']}",
        "machine    " + ", ".join(f"{key} {value}" for key, value in config["hardware"].items()),
        "versions   " + ", ".join(f"{key} {value}" for key, value in config["environment"].items() if value),
        f"model      {config['config']['model']['name']}, {config['parameters'] / 1e6:.1f} M parameters",
        "choices    " + ", ".join(f"{key}={value}" for key, value in config["choices"].items()),
    ]
    if "error" in config:
        lines.append(f"error      {config['error']}")
    for event in config["history"]:
        machine = f"{event['hardware']['platform']} ({event['hardware']['card']})"
        lines.append(f"history    {event['at']}  from step {event['from_step']} on {machine}: {event['command']}")
        lines += [f"             changed {change}" for change in event["changes"]]
    lines += [f"last       {tag} = {value:.6g}" for tag, value in sorted(run["last"].items()) if tag != "step"]
    lines += [f"setting    {key} = {value}" for key, value in sorted(run["settings"].items())]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """``dinoct-runs FOLDER`` prints a table of runs, ``dinoct-runs show RUN`` all about one."""
    parser = argparse.ArgumentParser(prog="dinoct-runs", description=main.__doc__)
    parser.add_argument("words", nargs="+", metavar="FOLDER | show RUN")
    parser.add_argument("--csv", metavar="FILE", help="write the table into FILE too")
    typed = parser.parse_args(arguments)
    if typed.words[0] == "show" and len(typed.words) == 2:
        run = read_run(Path(typed.words[1]))
        if run is None:
            print(f"error: {typed.words[1]} is not a run folder (it has no config.json)", file=sys.stderr)
            return 1
        for line in show(run):
            console.print(line, markup=False)
        return 0
    if len(typed.words) != 1:
        parser.error("give one folder of runs, or: show RUN")
    folder = Path(typed.words[0])
    runs = [run for path in sorted(folder.glob("*/config.json")) if (run := read_run(path.parent))]
    if not runs:
        print(f"error: there is no run in {folder}", file=sys.stderr)
        return 1
    header, table = rows(runs)
    print_table(header, table, str(folder))
    if typed.csv:
        with open(typed.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *table])
    return 0


def cli() -> None:
    """Entry point of ``dinoct-runs``."""
    sys.exit(main())
