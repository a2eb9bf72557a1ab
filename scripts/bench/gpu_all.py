"""All rows that need a card, on phantom data, through dinoct's own commands: one table, to be pasted into the docs.

    python scripts/bench/gpu_all.py                 # everything, most important first
    python scripts/bench/gpu_all.py --part 1 2      # some parts; each stays under nine minutes on an H100-class card
    python scripts/bench/gpu_all.py --smoke         # the same commands, tiny, on the CPU: does the script work?

Figures come from the runs' metrics.jsonl: the last record of a run, so that warm-up and compilation stay out.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

OUT = Path("outputs/bench/gpu")
QUIET = ["tracker.wandb=disabled", "tracker.tensorboard=false", "monitor.every=null", "ckpt.every=100000"]
LARGE = ["model=vit-large", "train.batch_size=64", "train.accumulation_steps=1"]
PARTS: dict[int, list[tuple[str, list[str]]]] = {
    1: [
        ("ViT-L/14, 2x224, batch 64", LARGE),
        ("ViT-L/14, 2x224, batch 64, selectively checkpointed", [*LARGE, "train.grad_checkpoint=selective"]),
        ("ViT-L/14, 2x224, batch 64, checkpointed", [*LARGE, "train.grad_checkpoint=true"]),
        ("ViT-L/14, 2x224 + 8x98, batch 64", [*LARGE, "aug=multicrop"]),
        ("ViT-L/14, 2x224 + 8x98, batch 64, checkpointed", [*LARGE, "aug=multicrop", "train.grad_checkpoint=true"]),
    ],
    2: [
        (
            "ViT-g/14, 2x224, batch 128, checkpointed",
            ["model=vit-giant", "train.batch_size=128", "train.accumulation_steps=1", "train.grad_checkpoint=true"],
        ),
        (
            "ViT-L/16, 2x512, batch 16",
            [
                "model=vit-large",
                "model.patch=16",
                "model.img_size=512",
                "train.batch_size=16",
                "train.accumulation_steps=1",
            ],
        ),
    ],
    3: [("phase5a", ["experiment=phase5a"])],
    4: [
        (
            "ViT-g/14, 2x224, batch 64, checkpointed, FSDP2 on one card",
            [
                "model=vit-giant",
                "train.batch_size=64",
                "train.accumulation_steps=1",
                "train.grad_checkpoint=true",
                "parallel=fsdp",
                "parallel.processes=1",
            ],
        ),
        (
            "ViT-g/14, 2x224, batch 64, checkpointed, one process without it",
            ["model=vit-giant", "train.batch_size=64", "train.accumulation_steps=1", "train.grad_checkpoint=true"],
        ),
    ],
    5: [
        ("ViT-L/14, 2x224, batch 64, compiled", [*LARGE, "train.compile=true"]),
        (
            "ViT-L/14, 2x224, batch 64, selectively checkpointed, compiled",
            [*LARGE, "train.grad_checkpoint=selective", "train.compile=true"],
        ),
        (
            "ViT-L/14, 2x224, batch 64, checkpointed, compiled",
            [*LARGE, "train.grad_checkpoint=true", "train.compile=true"],
        ),
        (
            "ViT-L/14, 2x224 + 8x98, batch 64, selectively checkpointed, compiled",
            [*LARGE, "aug=multicrop", "train.grad_checkpoint=selective", "train.compile=true"],
        ),
    ],
}
SMOKE = ["experiment=demo", "train.batch_size=8", "hardware=cpu", "hardware.num_workers=1"]


def call(*command: str) -> float:
    """Run a command to its end; returns seconds. Exit status 2 is an evaluation that failed, and a result too."""
    print("$", *command, flush=True)
    start = time.perf_counter()
    status = subprocess.run(command).returncode
    if status not in (0, 2):
        sys.exit(f"{command[0]} ended with {status}")
    return time.perf_counter() - start


def train(name: str, overrides: list[str], data: Path, *, steps: int | None) -> tuple[Path, dict, float]:
    """One run; its folder, its last record, and its seconds."""
    folder = OUT / "".join(c if c.isalnum() else "_" for c in name)
    shutil.rmtree(folder, ignore_errors=True)
    limit = (
        []
        if steps is None
        else [f"train.max_steps={steps}", "optim.horizon=1000", f"tracker.every={max(steps // 3, 1)}"]
    )
    seconds = call("dinoct-train", *overrides, f"data.root={data}", f"run_dir={folder}", *QUIET, *limit)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for path in folder.glob("*.pth"):
        if steps is not None:
            path.unlink()  # 5 to 16 GB each
    return folder, last, seconds


def row(name: str, last: dict, seconds: float) -> str:
    memory, used = last.get("Train/peak_memory_gb"), last.get("Train/utilisation")
    return (
        f"| {name} | {last['Train/samples_per_s']:.1f} | {'-' if used is None else f'{100 * used:.0f} %'} | "
        f"{'-' if memory is None else f'{memory:.1f}'} | "
        f"{100 * last['Train/data_wait_share']:.1f} % | {last['loss/total']:.4f} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, nargs="+", choices=sorted(PARTS), default=sorted(PARTS))
    parser.add_argument("--steps", type=int, default=30, help="updates per row")
    parser.add_argument("--smoke", action="store_true", help="tiny and on the CPU")
    typed = parser.parse_args()
    data = OUT / "data"
    sizes = ["phantom.patients=6", "phantom.slices=8", "phantom.size=96"] if typed.smoke else ["phantom.patients=16"]
    if not (data / "_index" / "index.csv").exists():
        call("dinoct-prepare", "source=phantom", f"data.root={data}", "split.val_fraction=0.25", *sizes)
    table = [
        "| what | slices/s | utilisation | peak GB | waiting for data | loss | s in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in typed.part:
        for name, overrides in PARTS[part]:
            whole = part == 3 and not typed.smoke
            settings = SMOKE if typed.smoke else overrides
            folder, last, seconds = train(
                name, settings, data, steps=None if whole else 6 if typed.smoke else typed.steps
            )
            table.append(row(name, last, seconds))
            if whole:
                call("dinoct-eval", f"checkpoint={next(folder.glob('checkpoint_final_*.pth'))}")
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
