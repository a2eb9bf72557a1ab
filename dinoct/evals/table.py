"""A report on the console."""

from pathlib import Path
from typing import Any

from rich.table import Table

from dinoct.console import console

# One row of the second table: (title, probe, figure); the arrow points to where better is
PROBES = (
    ("one per series, rank ↓", "one_per_series", "mean_percentile_rank"),
    ("slices beside, top1 ↑", "hard_negatives", "top1"),
    ("patches, two views, rank ↓", "correspondence", "mean_percentile_rank"),
    ("patches, two views, gap ↑", "correspondence", "gap"),
    ("place in body, Spearman ↑", "position", "spearman"),
    ("labels, linear ↑", "labels", "linear_balanced_accuracy"),
    ("labels, nearest ↑", "labels", "knn_balanced_accuracy"),
    ("masks, Dice ↑", "masks", "dice"),
    ("shortcut, vendor read ↓", "scanner_manufacturer", "balanced_accuracy"),
    ("shortcut, kernel read ↓", "scanner_kernel", "balanced_accuracy"),
    ("neighbours of one series", "purity", "purity"),
)
ENCODERS = ("trained", "random_init", "pixels", "histogram")


def print_report(report: dict[str, Any], path: Path) -> None:
    """Retrieval, the other probes, and which of the conditions failed."""
    console.print(_retrieval(report))
    console.print(f"chance: top1 {report['baseline']:.5f}, mean rank 0.5 (0 is best); 95 %: {report['intervals']}")
    measured, missing = split_probes(report["probes"])
    console.print(_probes(report["probes"], measured))
    for reason, titles in missing.items():
        console.print(f"not measured, {reason}: {'; '.join(titles)}", markup=False)
    for name, check in report["checks"].items():
        console.print(f"{'pass' if check['passed'] else 'FAIL'}  {name}: {check['says']}", markup=False)
    verdict = "PASS" if report["passed"] else "FAIL"
    console.print(f"{verdict}  {path}", style="green" if report["passed"] else "red", markup=False)


def split_probes(probes: dict[str, Any]) -> tuple[list[tuple[str, ...]], dict[str, list[str]]]:
    """Rows of PROBES that were measured, and the titles of the others by reason."""
    measured, missing = [], {}
    for row in PROBES:
        found = probes.get(row[1])
        if found is not None and "not_measured" not in found:
            measured.append(row)
        elif found is not None:
            missing.setdefault(found["not_measured"], []).append(row[0])
    return measured, missing


def counted_patients(report: dict[str, Any]) -> str:
    return f"{report['patients']} patient{'s' if report['patients'] > 1 else ''}"


def _retrieval(report: dict[str, Any]) -> Table:
    title = f"view retrieval, step {report['step']}, n={report['n']} slices of {counted_patients(report)}"
    table = Table(title=title, title_justify="left")
    table.add_column("encoder")
    for column in ("top1", "top5", "ratio", "rank", "95 %", "std", "cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in [("trained", report), *report["baselines"].items()]:
        figures = [row["top1"], row["top5"], row["ratio"], row["mean_percentile_rank"]]
        cells = [f.format(v) for f, v in zip(("{:.3f}", "{:.3f}", "{:.1f}", "{:.3f}"), figures, strict=True)]
        interval = row["mean_percentile_rank_95"]
        cells.append("{:.3f}-{:.3f}".format(*interval) if interval else "-")
        spread = [row.get("feature_std"), row.get("mean_cosine")]
        table.add_row(name.replace("_", " "), *cells, *("-" if v is None else f"{v:.3f}" for v in spread))
    return table


def _probes(probes: dict[str, Any], measured: list[tuple[str, ...]]) -> Table:
    table = Table(title="probes", title_justify="left")
    table.add_column("figure", no_wrap=True)
    for name in (*ENCODERS, "chance"):
        table.add_column(name.split("_")[0], justify="right", no_wrap=True)
    for title, probe, figure in measured:
        found = probes[probe]
        cells = [f"{found[name][figure]:.3f}" if name in found else "-" for name in ENCODERS]
        chance = found["trained"].get("chance")
        table.add_row(title, *cells, "-" if chance is None else f"{chance:.3f}")
    return table
