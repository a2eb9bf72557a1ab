"""What a checkpoint file holds, without running it."""

import math
from pathlib import Path

import torch

from dinoct import checkpoint as checkpoints


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
