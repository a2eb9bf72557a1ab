"""A checkpoint's evaluation and pictures, from settings to files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from dinoct import checkpoint as checkpoints
from dinoct.checkpoint import Checkpoint
from dinoct.cli import DONE, FAILED
from dinoct.config import DataConfig, EvalConfig, MonitorConfig, WindowConfig
from dinoct.console import console, log, progress, run_log
from dinoct.data.dataset import middle_slice, open_split, read_slice
from dinoct.data.index import SliceIndex
from dinoct.errors import ConfigError
from dinoct.evals.judge import judge
from dinoct.hardware import resolve
from dinoct.models.load import load_backbone, model_config
from dinoct.provenance import data_manifest_hash
from dinoct.validate import validate_probe
from dinoct.viz import draw_monitor


def evaluate_checkpoint(cfg: EvalConfig) -> int:
    """View retrieval of the EMA teacher on the validation patients; writes the JSON beside the checkpoint.

    Returns:
        0 for a pass, 2 for a fail.
    Raises:
        ConfigError, CheckpointError: naming the key to change.
    """
    validate_probe(cfg.probe)
    if cfg.n < 2:
        raise ConfigError(f"n must be at least 2, not {cfg.n}")
    checkpoint = checkpoints.load(cfg.checkpoint, lazily=True)
    hardware = resolve(cfg.hardware)
    torch.set_num_threads(hardware.threads)
    train, val, store, _ = open_split(data_of(cfg.data, checkpoint))
    check_unseen(checkpoint, train, val)
    n = min(cfg.n, len(val))
    with run_log(), progress("slices") as bar:
        if n < cfg.n:
            log.warning("n=%d, but the validation split has %d slices: all of them are judged", cfg.n, n)
        task = bar.add_task("eval", total=n)
        report = judge(
            load_backbone(checkpoint),
            model_config(checkpoint),
            cfg.probe,
            index=val,
            store=store,
            n=n,
            hardware=hardware,
            advance=lambda count: bar.advance(task, count),
        )
    report = {
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "git_commit": checkpoint.meta["git_commit"],
        "data_manifest_hash": checkpoint.meta["data_manifest_hash"],
        "patients": len(np.unique(val.patient)),
        **report,
    }
    out = Path(cfg.out) if cfg.out else checkpoint.path.parent
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"view_retrieval_step{checkpoint.step:08d}_N{n}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report, path)
    return DONE if report["passed"] else FAILED


def data_of(data: DataConfig, checkpoint: Checkpoint) -> DataConfig:
    """The data that was asked for, else that of the checkpoint's run."""
    if data.root or data.index_csv:
        return data
    stored = DataConfig(**checkpoint.meta["config"]["data"])
    return replace(stored, split_manifest=data.split_manifest or stored.split_manifest)


def check_unseen(checkpoint: Checkpoint, train: SliceIndex, val: SliceIndex) -> None:
    """Refuse to judge on patients that the weights were trained on; warn where that cannot be known.

    Raises:
        ConfigError: if a patient of the validation side was trained on.
    """
    sides = [frozenset(np.array(side.patient_names)[np.unique(side.patient)].tolist()) for side in (train, val)]
    seen = sides[1] & frozenset(checkpoint.meta["train_patients"])
    if seen:
        raise ConfigError(
            f"data.split_manifest: {len(seen)} of its {len(sides[1])} validation patients were trained on; "
            "take the manifest that the run was trained with"
        )
    if data_manifest_hash(train.content_hash(), *sides) != checkpoint.meta["data_manifest_hash"]:
        console.print(
            "WARNING: index or split differ from those of the training run; make sure that it never saw these patients",
            style="yellow",
        )


def print_report(report: dict[str, Any], path: Path) -> None:
    """The table, and which of the conditions failed."""
    table = Table(
        title=f"view retrieval, n={report['n']} slices of {report['patients']} patients", title_justify="left"
    )
    for column in ("encoder", "top1", "top5", "ratio", "mean rank", "feature std", "mean cosine"):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for name, row in [("trained", report), *report["baselines"].items()]:
        figures = [row["top1"], row["top5"], row["ratio"], row["mean_percentile_rank"]]
        spread = [row.get("feature_std"), row.get("mean_cosine")]
        formats = ["{:.4f}", "{:.4f}", "{:.1f}", "{:.4f}", "{:.3f}", "{:.3f}"]
        values = [*figures, *spread]
        cells = ["-" if v is None else f.format(v) for f, v in zip(formats, values, strict=True)]
        table.add_row(name.replace("_", " "), *cells)
    console.print(table)
    console.print(f"baseline (chance) top1 {report['baseline']:.5f}; mean rank: 0 best, 0.5 chance")
    for name, check in report["checks"].items():
        console.print(f"{'pass' if check['passed'] else 'FAIL'}  {name}: {check['says']}", markup=False)
    verdict = "PASS" if report["passed"] else "FAIL"
    console.print(f"{verdict}  {path}", style="green" if report["passed"] else "red", markup=False)


def monitor_checkpoint(cfg: MonitorConfig) -> dict[str, Any]:
    """input.png, heatmap.png and stats.json beside the checkpoint, or into `out`."""
    checkpoint = checkpoints.load(cfg.checkpoint, lazily=True)
    hardware = resolve(cfg.hardware)
    torch.set_num_threads(hardware.threads)
    _, val, store, _ = open_split(data_of(cfg.data, checkpoint))
    i = middle_slice(val)
    if cfg.slice_id is not None:
        found = np.flatnonzero(val.slice_id == cfg.slice_id)
        if not len(found):
            raise ConfigError(f"slice_id={cfg.slice_id} is not in the validation split")
        i = int(found[0])
    out = Path(cfg.out) if cfg.out else checkpoint.path.parent / "monitor" / f"step_{checkpoint.step:08d}"
    model = model_config(checkpoint)
    window = checkpoint.meta["config"]["aug"]["window"]
    stats = draw_monitor(
        load_backbone(checkpoint).to(hardware.device),
        read_slice(val, store, i),
        window=WindowConfig(**window),
        size=model.img_size,
        device=hardware.device,
        out=out,
        title=f"step {checkpoint.step}, slice {val.slice_id[i]}",
    )
    for name in ("input.png", "heatmap.png", "stats.json"):
        console.print(str(out / name), markup=False)
    verdict = "expected above 0.001" if stats["std"] > 0.001 else "BELOW 0.001: the features may have collapsed"
    console.print(f"std {stats['std']:.5f} ({verdict}), normalised {stats['std_normalised']:.3f}", markup=False)
    return stats


def checkpoint_summary(path: str | Path) -> list[str]:
    """Lines on one checkpoint: step, centre, weights, entropy hints. For `scripts/check_checkpoint.py`."""
    checkpoint = checkpoints.load(path, lazily=True)
    meta, model = checkpoint.meta, checkpoint.state["model"]
    k = meta["config"]["loss"]["out_dim"]
    center = model["dino_center"].float()
    temperature = meta["config"]["loss"]["dino"]["teacher_temperature"]
    probs = torch.softmax(center / temperature, dim=0)
    entropy = float(-torch.special.xlogy(probs, probs).sum())
    lines = [
        f"{checkpoint.path}",
        f"  step {meta['step']}  samples {meta['samples_seen']}  model {meta['config']['model']['name']}  "
        f"git {meta['git_commit']}  data {meta['data_manifest_hash']}",
        f"  centre: norm {float(center.norm()):.4f}  std {float(center.std()):.5f}  min {float(center.min()):.4f}  "
        f"max {float(center.max()):.4f}",
        f"  entropy of softmax(centre / {temperature:g}): {entropy:.4f} of ln K = {math.log(k):.4f}"
        + ("  (near uniform)" if entropy > 0.99 * math.log(k) else ""),
    ]
    for side in ("student", "teacher"):
        weights = {n: v.float() for n, v in model.items() if n.startswith(f"{side}.")}
        bad = [n for n, v in weights.items() if not torch.isfinite(v).all()]
        count = sum(v.numel() for v in weights.values())
        mean = sum(float(v.sum()) for v in weights.values()) / count
        std = (sum(float((v - mean).square().sum()) for v in weights.values()) / count) ** 0.5
        largest = max(float(v.abs().max()) for v in weights.values())
        state = f"NOT FINITE: {', '.join(bad[:3])}" if bad else "finite"
        lines.append(
            f"  {side}: {count / 1e6:.1f} M weights  mean {mean:+.5f}  std {std:.5f}  largest {largest:.3f}  {state}"
        )
    gap = sum(
        float((model[f"student.{n}"].float() - v.float()).square().sum())
        for n, v in ((n.removeprefix("teacher."), v) for n, v in model.items() if n.startswith("teacher."))
    )
    lines.append(f"  distance student - teacher: {gap**0.5:.4f}")
    return lines
