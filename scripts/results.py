"""Tables and pictures of docs/results.md from sweeps: every run judged by dinoct-eval, seeds put together.

    python scripts/results.py outputs/sweeps/NAME --data-root ROOT --out docs/results --name aug

Each run's last checkpoint is judged with all probes on the CPU, unless its report is there already. Settings that
differ, without the seed, make the rows; a cell is the mean over the seeds and, in brackets, the least and the largest.
"""

import argparse
import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dinoct.checkpoint import list_checkpoints
from dinoct.compare.differ import cell, short_names, telling
from dinoct.compare.read import Run, find_runs

NOT_ROWS = ("seed", "aug.local_size", "train.max_steps", "ckpt", "eval", "hardware", "tracker", "data", "experiment")
LEFT = 0.99  # of ln K: below it the loss has left the start

Report = dict[str, Any]
FIGURES: dict[str, Callable[[Run, Report], float | None]] = {
    "rank ↓": lambda run, r: r["mean_percentile_rank"],
    "top1 ↑": lambda run, r: r["top1"],
    "std": lambda run, r: r["feature_std"],
    "patch rank ↓": lambda run, r: r["probes"]["correspondence"]["trained"]["mean_percentile_rank"],
    "patch gap ↑": lambda run, r: r["probes"]["correspondence"]["trained"]["gap"],
    "Dice ↑": lambda run, r: r["probes"]["masks"].get("trained", {}).get("dice"),
    "place ↑": lambda run, r: r["probes"]["position"].get("trained", {}).get("spearman"),
    "loss / ln K": lambda run, r: run.last["loss/dino"] / run.last["Train/ln_K"],
    "left ln K": lambda run, r: step_left(run.folder / "metrics.jsonl"),
}


def step_left(metrics: Path) -> float | None:
    """First record whose DINO loss is under 99 % of ln K; ``None`` where it never was."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("loss/dino", math.inf) < LEFT * record.get("Train/ln_K", 0):
            return record["step"]
    return None


def judged(run: Run, data_root: str) -> Report:
    """The report of the run's last checkpoint; made by dinoct-eval where it is not there."""
    last = list_checkpoints(run.folder)[-1]
    reports = f"view_retrieval_step{last.stem[-8:]}_N*[0-9].json"  # not those that others took the place of
    found = sorted(run.folder.glob(reports))
    if not found:
        arguments = [f"checkpoint='{last}'", f"data.root={data_root}", "hardware=cpu", "hardware.num_workers=0"]
        subprocess.run([sys.executable, "-m", "dinoct.eval", *arguments], check=False, capture_output=True)
        found = sorted(run.folder.glob(reports))
    return json.loads(found[-1].read_text(encoding="utf-8"))


def baselines(report: Report) -> list[list[str]]:
    """Rows for what needs no training."""
    rows = []
    for name in report["baselines"]:
        as_trained = {
            **report,
            **report["baselines"][name],
            "feature_std": report["baselines"][name].get("feature_std"),
            "probes": {key: {"trained": found.get(name, {})} for key, found in report["probes"].items()},
        }
        values = []
        for title, read in FIGURES.items():
            try:
                values.append(None if title.endswith("ln K") else read(None, as_trained))
            except KeyError:
                values.append(None)
        rows.append([name.replace("_", " "), *(_cell([v]) for v in values)])
    return rows


def _cell(values: Sequence[float | None]) -> str:
    """Mean and range of what was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    form = "{:.0f}" if all(isinstance(value, int) for value in known) else "{:.3f}"
    text = form.format(sum(known) / len(known))
    if len(known) > 1:
        text += f" ({form.format(min(known))}-{form.format(max(known))})"
    return text + (f", {len(values) - len(known)} never" if len(known) < len(values) else "")


def group_runs(runs: Sequence[Run]) -> tuple[list[str], dict[tuple[str, ...], list[Run]]]:
    """Keys that differ besides the seed, and the runs of each combination of their values."""
    keys = [key for key in telling(runs) if not key.startswith(NOT_ROWS)]
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(str(cell(run, key)) for key in keys)].append(run)
    return keys, groups


def draw(groups: dict[tuple[str, ...], list[Run]], untrained: Report, path: Path, title: str) -> None:
    """Mean percentile rank in training over the steps: mean of the seeds, and their range as a band.

    `untrained` are the baselines of a report.
    """
    from dinoct.viz.figures import SMALL, TINY, axes_at, new_figure, save

    figure = new_figure(8.2, 4.6, title)
    axis = axes_at(figure, 0.7, 0.6, 4.9, 3.4)
    for number, (values, runs) in enumerate(groups.items()):
        curves = [_ranks(run) for run in runs]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        columns = [[curve[step] for curve in curves] for step in steps]
        colour = f"C{number % 10}"
        line = "-" if number < 10 else "--"
        axis.plot(
            steps, [sum(c) / len(c) for c in columns], line, color=colour, label=" ".join(values), marker="o", ms=3
        )
        axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15)
    for name, line in (("random_init", "--"), ("pixels", "-.")):
        rank = untrained[name]["mean_percentile_rank"]
        axis.axhline(rank, color="black", linestyle=line, linewidth=1, label=name.replace("_", " "))
    axis.set_xlabel("step", fontsize=SMALL)
    axis.set_ylabel("mean percentile rank (0 best, 0.5 chance)", fontsize=SMALL)
    axis.tick_params(labelsize=TINY)
    axis.legend(fontsize=TINY, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    save(figure, path)


def _ranks(run: Run) -> dict[int, float]:
    records = map(json.loads, (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {r["step"]: r["Eval/mean_percentile_rank"] for r in records if "Eval/mean_percentile_rank" in r}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    typed = parser.parse_args()
    runs = [run for run in find_runs([typed.sweep]) if run.state == "done"]
    keys, groups = group_runs(runs)
    names = short_names(keys)
    reports = {run.folder: judged(run, typed.data_root) for run in runs}
    rows = []
    for values, members in groups.items():
        figures = [_cell([read(run, reports[run.folder]) for run in members]) for read in FIGURES.values()]
        rows.append([*values, str(len(members)), *figures])
    header = [*(names[key] for key in keys), "seeds", *FIGURES]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    first = next(iter(reports.values()))
    blank = [""] * len(keys)
    lines += ["| " + " | ".join([row[0], *blank[1:], "-", *row[1:]]) + " |" for row in baselines(first)]
    typed.out.mkdir(parents=True, exist_ok=True)
    (typed.out / f"{typed.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    title = f"{typed.name}: {len(runs)} runs, {first['n']} slices of {first['patients']} patients"
    draw(groups, first["baselines"], typed.out / f"{typed.name}.png", title)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
