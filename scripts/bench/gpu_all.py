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
ONE = "train.accumulation_steps=1"
LARGE = ["model=vit-large", "train.batch_size=64", ONE]
WORK = {
    "ViT-L/14, 2x224, batch 64": LARGE,
    "ViT-L/14, 2x224 + 8x98, batch 64": [*LARGE, "aug=multicrop"],
    "ViT-L/16, 2x512, batch 16": [
        "model=vit-large",
        "model.patch=16",
        "model.img_size=512",
        "train.batch_size=16",
        ONE,
    ],
    "ViT-g/14, 2x224, batch 128": ["model=vit-giant", "train.batch_size=128", ONE],
    "ViT-g/14, 2x224, batch 64": ["model=vit-giant", "train.batch_size=64", ONE],
}
PLAIN, MULTICROP, FINE, GIANT, GIANT_64 = WORK
WAYS = {
    "all kept": ["train.grad_checkpoint=false"],
    "selective": ["train.grad_checkpoint=selective"],
    "checkpointed": ["train.grad_checkpoint=true"],
    "compiled": ["train.compile=true"],
    "FSDP2 on one card": ["parallel=fsdp", "parallel.processes=1"],
}


def rows(work: str, *ways: str) -> list[tuple[str, list[str]]]:
    """Name and settings of runs of the same work."""
    found = []
    for way in ways:
        found.append((f"{work}, {way}", WORK[work] + [item for name in way.split(", ") for item in WAYS[name]]))
    return found


PARTS: dict[int, list[tuple[str, list[str]]]] = {
    1: [
        *rows(PLAIN, "all kept", "selective", "checkpointed"),
        *rows(MULTICROP, "all kept", "selective", "checkpointed"),
    ],
    2: [*rows(GIANT, "checkpointed", "selective"), *rows(FINE, "all kept", "selective", "checkpointed")],
    3: [
        *rows(MULTICROP, "all kept, compiled", "selective, compiled", "checkpointed, compiled"),
        *rows(PLAIN, "all kept, compiled", "selective, compiled"),
    ],
    4: [("phase5a", ["experiment=phase5a"])],
    5: [*rows(GIANT, "checkpointed, compiled"), *rows(FINE, "all kept, compiled", "checkpointed, compiled")],
    6: rows(GIANT_64, "checkpointed", "checkpointed, FSDP2 on one card"),
}
TAKEN_APART = {1: MULTICROP, 2: FINE}  # by part: the work whose updates are taken apart at its end
SAVES = 4  # the part at whose end it is measured what a checkpoint costs
FAILED = "failed, see above"
SMOKE = ["experiment=demo", "train.batch_size=8", "hardware=cpu", "hardware.num_workers=1"]


def call(*command: str) -> tuple[int, float]:
    """Run a command to its end; its exit status, and seconds."""
    print("$", *command, flush=True)
    start = time.perf_counter()
    return subprocess.run(command).returncode, time.perf_counter() - start


def train(name: str, overrides: list[str], data: Path, *, steps: int | None) -> tuple[Path, str]:
    """One run; its folder, and its row of the table."""
    folder = OUT / "".join(c if c.isalnum() else "_" for c in name)
    shutil.rmtree(folder, ignore_errors=True)
    limit = []
    if steps is not None:
        limit = [f"train.max_steps={steps}", "optim.horizon=1000", f"tracker.every={max(steps // 3, 1)}"]
    status, seconds = call("dinoct-train", *overrides, f"data.root={data}", f"run_dir={folder}", *QUIET, *limit)
    for path in folder.glob("*.pth"):
        if steps is not None:
            path.unlink()  # 6 to 20 GB each
    if status:  # out of memory is a result, too; the line above says so
        return folder, f"| {name} | {FAILED} | - | - | - | - | {seconds:.0f} |"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    memory, used = last.get("Train/peak_memory_gb"), last.get("Train/utilisation")
    return folder, (
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
    steps = 6 if typed.smoke else typed.steps
    data = OUT / "data"
    sizes = ["phantom.patients=6", "phantom.slices=8", "phantom.size=96"] if typed.smoke else ["phantom.patients=16"]
    if not (data / "_index" / "index.csv").exists():
        status, _ = call("dinoct-prepare", "source=phantom", f"data.root={data}", "split.val_fraction=0.25", *sizes)
        if status:
            sys.exit("error: no data to train on")
    table = [
        "| what | slices/s | utilisation | peak GB | waiting for data | loss | s in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in typed.part:
        for name, overrides in PARTS[part]:
            whole = part == 4 and not typed.smoke
            folder, row = train(name, SMOKE if typed.smoke else overrides, data, steps=None if whole else steps)
            print(row, flush=True)
            table.append(row)
            for final in folder.glob("checkpoint_final_*.pth"):  # there is one where the run was whole
                call("dinoct-eval", f"checkpoint={final}")
        if part in TAKEN_APART:
            script = str(Path(__file__).with_name("breakdown.py"))
            settings = SMOKE if typed.smoke else WORK[TAKEN_APART[part]]
            length = [] if typed.smoke else ["train.max_steps=25"]
            call(sys.executable, script, "--kernels", "20", *settings, f"data.root={data}", *length)
        if part == SAVES:
            script = str(Path(__file__).with_name("save.py"))
            call(sys.executable, script, "model=vit-tiny" if typed.smoke else "model=vit-large", "--rounds", "1")
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}\n")
    print("\n".join(table))
    sys.exit(any(FAILED in row for row in table))


if __name__ == "__main__":
    main()
