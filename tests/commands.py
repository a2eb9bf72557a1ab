"""Running dinoct's commands as a user types them: in this process where speed matters, else in their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = [
    "experiment=demo",
    "model.img_size=32",
    "model.dim=32",
    "loss.out_dim=64",
    "loss.hidden_dim=32",
    "train.batch_size=8",
    "hardware=cpu",
    "hardware.num_workers=0",
    "hardware.threads=1",
    "tracker.every=1",
    "tracker.wandb=disabled",
    "tracker.tensorboard=false",
]


def run(command: str, *arguments: str) -> int:
    """Run a command in this process; returns its exit status."""
    from importlib import import_module

    module = import_module(f"dinoct.{command}")
    before, sys.argv = sys.argv, [f"dinoct-{command}", *arguments]
    try:
        module.cli()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def start(command: str, *arguments: str, cwd: Path, **options) -> subprocess.Popen:
    """Start a command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", f"dinoct.{command}", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"preexec_fn": _as_from_a_terminal, **options},
    )


def _as_from_a_terminal() -> None:
    """The tests may run under nohup, which ignores hang-ups for all that it starts."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss/total"], row["Train/gradient_norm"]) for row in metrics(folder)]
