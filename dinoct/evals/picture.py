"""A report as a picture: what one would rather see than read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoct.evals.table import ENCODERS, counted_patients, split_probes
from dinoct.viz.figures import SMALL, TINY, axes_at, new_figure, save

COLOURS = {"trained": "#1f77b4", "random_init": "#999999", "pixels": "#e08214", "histogram": "#b2abd2"}
WIDTH, HEIGHT = 13.0, 7.4  # inches


def draw_summary(report: dict[str, Any], path: Path) -> None:
    """Retrieval with its intervals, the probes, the spectrum of the features and the verdict, as a PNG."""
    verdict = "PASS" if report["passed"] else "FAIL"
    figure = new_figure(
        WIDTH,
        HEIGHT,
        f"{report['checkpoint']}, step {report['step']}: {verdict}. Judged on {report['n']} slices of "
        f"{counted_patients(report)}{_seen([report])} (data {report['judged_on']}).",
    )
    _retrieval(axes_at(figure, 0.9, 4.35, 3.4, 2.3), report)
    _spectrum(axes_at(figure, 0.9, 0.7, 3.4, 2.5), report)
    _probe_panels(figure, report["probes"])
    says = "\n".join(
        f"{'pass' if c['passed'] else 'FAIL'}  {name}: {c['says']}" for name, c in report["checks"].items()
    )
    figure.text(5.0 / WIDTH, 0.25 / HEIGHT, says, fontsize=TINY, va="bottom", family="monospace", wrap=True)
    save(figure, path)


def _rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"trained": report, **report["baselines"]}


def _retrieval(axis: Any, report: dict[str, Any]) -> None:
    rows = _rows(report)
    for place, (name, row) in enumerate(reversed(rows.items())):
        value = row["mean_percentile_rank"]
        low, high = row["mean_percentile_rank_95"] or (value, value)
        axis.barh(place, value, color=COLOURS[name], height=0.6)
        axis.plot([low, high], [place, place], color="black", linewidth=1.2)
        axis.text(max(value, high) + 0.01, place, f"{value:.3f}", va="center", fontsize=TINY)
    axis.set_yticks(range(len(rows)), [name.replace("_", " ") for name in reversed(rows)], fontsize=SMALL)
    axis.axvline(0.5, color="black", linestyle=":", linewidth=1)
    ends = [(row["mean_percentile_rank_95"] or [row["mean_percentile_rank"]])[-1] for row in rows.values()]
    axis.set_xlim(0, max(0.62, *(end + 0.1 for end in ends)))
    axis.set_xlabel("mean percentile rank of the other view: 0 best, 0.5 chance", fontsize=SMALL)
    axis.set_title(f"view retrieval, 95 %: {report['intervals']}", fontsize=SMALL)
    axis.tick_params(labelsize=TINY)


def _spectrum(axis: Any, report: dict[str, Any]) -> None:
    values = report["singular_values"]
    axis.semilogy(range(1, len(values) + 1), [max(value, 1e-8) for value in values], color=COLOURS["trained"])
    axis.set_ylim(bottom=max(min(values), 1e-6) / 2)
    axis.set_xlabel("singular value of the features (share of the sum)", fontsize=SMALL)
    axis.set_title(
        f"effective rank {report['effective_rank']:.1f} of {len(values)}, feature std {report['feature_std']:.2f}, "
        f"mean cosine {report['mean_cosine']:.2f}",
        fontsize=SMALL,
    )
    axis.tick_params(labelsize=TINY)


def _probe_panels(figure: Any, probes: dict[str, Any]) -> None:
    """One small panel of bars per figure that was measured."""
    shown, missing = split_probes(probes)
    for place, (title, probe, key) in enumerate(shown[:12]):
        column, line = place % 3, place // 3
        axis = axes_at(figure, 5.0 + column * 2.7, 5.65 - line * 1.5, 2.2, 0.85)
        found = probes[probe]
        names = [name for name in ENCODERS if name in found]
        values = [found[name][key] for name in names]
        axis.bar(range(len(names)), values, color=[COLOURS[name] for name in names], width=0.65)
        for x, value in enumerate(values):
            axis.text(x, max(value, 0), f"{value:.3f}", ha="center", va="bottom", fontsize=TINY)
        if (chance := found["trained"].get("chance")) is not None:
            axis.axhline(chance, color="black", linestyle=":", linewidth=1)
        axis.set_ylim(min(0.0, *values) * 1.2, max(*values, 1e-3) * 1.3)
        axis.set_xticks(range(len(names)), [name.split("_")[0] for name in names], fontsize=TINY)
        axis.set_yticks([])
        axis.set_title(title, fontsize=SMALL)
    says = "\n".join(f"not measured, {reason}: {'; '.join(titles)}" for reason, titles in missing.items())
    figure.text(5.0 / WIDTH, 1.0 / HEIGHT, says, fontsize=TINY, wrap=True)


def _seen(reports: Sequence[dict[str, Any]]) -> str:
    if all(report["patients_unseen"] for report in reports):
        return " that training never saw"
    return ", of which it is not known whether training saw them"


def draw_curve(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean percentile rank, top1 and effective rank over the steps of a run, with the baselines, as a PNG."""
    figure = new_figure(12.6, 4.0, f"{len(reports)} checkpoints, {reports[-1]['n']} slices{_seen(reports)}")
    steps = [report["step"] for report in reports]
    for place, (key, title) in enumerate(
        (
            ("mean_percentile_rank", "mean percentile rank: 0 best, 0.5 chance"),
            ("top1", "top1"),
            ("effective_rank", "effective rank (RankMe)"),
        )
    ):
        axis = axes_at(figure, 0.7 + place * 4.1, 0.6, 3.4, 2.7)
        axis.plot(steps, [report[key] for report in reports], "o-", color=COLOURS["trained"], label="trained")
        intervals = [report["mean_percentile_rank_95"] for report in reports]
        if key == "mean_percentile_rank" and all(intervals):
            low, high = zip(*intervals, strict=True)
            axis.fill_between(steps, low, high, color=COLOURS["trained"], alpha=0.2, linewidth=0)
        for name, row in reports[-1]["baselines"].items():
            if key in row:
                axis.axhline(row[key], color=COLOURS[name], linestyle="--", label=name.replace("_", " "))
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=SMALL)
        axis.set_xlabel("step", fontsize=SMALL)
        axis.tick_params(labelsize=TINY)
        axis.legend(fontsize=TINY)
    save(figure, path)
