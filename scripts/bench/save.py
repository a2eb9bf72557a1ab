"""What a checkpoint costs the training beside it: written while it waits, and written behind it.

    python scripts/bench/save.py                 # ViT-L's state, 5 GB; needs 16 GB of memory and 15 GB of disk
    python scripts/bench/save.py model=vit-small

Each way takes as many steps of some 0.1 s, with one checkpoint that falls due behind the second: what that takes longer
than without one is what training lost. On a card a step is products of matrices. Without a card the process sleeps, as
one does whose card computes; with --busy one thread computes products on the CPU. The ways take turns; best of the
rounds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import print_table
from hydra import compose, initialize_config_module

from dinoct.config import CkptConfig, to_object
from dinoct.models.ssl import SelfDistillation
from dinoct.saving import Saver, state_bytes

STEP_S = 0.1
LEAST_S_PER_GB = 12  # longer than a checkpoint takes
WAYS = ("no checkpoint", "training waits", "written behind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["model=vit-large"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="on the disk of interest; default: the system's for temporary files"
    )
    parser.add_argument("--busy", action="store_true", help="without a card: steps compute, and do not sleep")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    state = training_state(arguments.overrides, device)
    step = products(device) if device.type == "cuda" or arguments.busy else lambda: time.sleep(STEP_S)
    steps = max(4, round(LEAST_S_PER_GB * state_bytes(state) / 1e9 / STEP_S))
    best = dict.fromkeys(WAYS, float("inf"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(arguments.rounds):
            for way in WAYS:
                best[way] = min(best[way], timed(way, state, step, steps, Path(folder)))
    print(f"{state_bytes(state) / 1e9:.2f} GB of state, {steps} steps, {device}")
    lost = {way: best[way] - best[WAYS[0]] for way in WAYS}
    rows = [[way, f"{best[way]:.2f}", f"{lost[way]:.2f}", f"{lost[way] / lost[WAYS[1]]:.2f}"] for way in WAYS]
    print_table(["checkpoint", "s", "training lost, s", "x waiting"], rows)


def training_state(overrides: list[str], device: torch.device) -> dict:
    """Student, teacher and heads as the settings make them, and AdamW's two moments."""
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        cfg = to_object(compose("train", overrides=overrides))
    model = SelfDistillation(cfg.model, cfg.loss).to(device)
    moments = {name: [torch.rand_like(p) for _ in range(2)] for name, p in model.student.named_parameters()}
    pairs = {name: {"exp_avg": first, "exp_avg_sq": second} for name, (first, second) in moments.items()}
    return {"model": dict(model.state_dict()), "optimizer": pairs}


def products(device: torch.device) -> Callable[[], None]:
    """A step of some `STEP_S` on the device."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.rand(size, size, device=device)

    def step(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step(1)
    start = time.perf_counter()
    step(4)
    count = max(1, round(STEP_S / ((time.perf_counter() - start) / 4)))
    return lambda: step(count)


def timed(way: str, state: dict, step: Callable[[], None], steps: int, folder: Path) -> float:
    """Seconds of all steps, with a checkpoint behind the second."""
    saver = Saver(folder, CkptConfig(keep_last=1))
    start = time.perf_counter()
    for number in range(1, steps + 1):
        step()
        if number == 2 and way == "training waits":
            saver.save(state, {"step": number})
        elif number == 2 and way == "written behind":
            saver.save_behind(state, {"step": number})
    taken = time.perf_counter() - start
    saver.wait()
    if time.perf_counter() - start > taken + 0.1:
        print("the steps ended before the checkpoint was written: the figure is too small")
    return taken


if __name__ == "__main__":
    main()
