"""Where the time of an update goes: `dinoct-train` as typed, with a stopwatch around the parts of its updates.

    python scripts/bench/breakdown.py model=vit-small hardware=cpu train.batch_size=8
    python scripts/bench/breakdown.py --kernels 15 model=vit-large train.batch_size=64     # and torch's own view of it
    python scripts/bench/breakdown.py --smoke                                              # small, on the CPU

Without data.root a phantom is made. On a card a part's time lies between two events in the card's queue, so that the
host's work is in it only where the card has to wait for it; what the host takes to queue the part stands beside it. The
first updates are left out, as are judging, pictures and checkpoints. The Gram term's own time, forward and backward, is
measured behind the run, alone, on noise of its shapes. With --kernels the last three updates run under torch's profiler
and are not among those timed.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import print_table
from torch.profiler import ProfilerActivity, profile

from dinoct import losses, train
from dinoct.data.batch import CropBatch
from dinoct.engine import Engine
from dinoct.models.ssl import SelfDistillation
from dinoct.parallel import Parallel

WARM_UP, PROFILED = 5, 3  # updates
PARTS: list[tuple[Any, str, str]] = [  # where a function is, and what it does when what it calls is taken out
    (Engine, "update", "the rest"),
    (Engine, "_report", "log, tracker, signs of collapse"),
    (Engine, "_next", "waiting for data"),
    (CropBatch, "to", "to the device"),
    (SelfDistillation, "forward", "student, forward"),
    (SelfDistillation, "_teach", "teacher, forward, and its targets"),
    (SelfDistillation, "_gram_patches", "Gram teacher, forward"),
    (SelfDistillation, "_losses", "losses: the others, forward"),
    (losses, "gram_loss_per_patch", "losses: Gram, forward"),
    (SelfDistillation, "gram_share", "Gram's share of the gradient"),
    (torch.Tensor, "backward", "backward"),
    (Parallel, "clip", "clipping"),
    (Engine, "_check_finite", "finite?"),
    (torch.optim.AdamW, "step", "AdamW"),
    (SelfDistillation, "end_update", "EMA teacher, centres"),
]
QUIET = ["eval.every=null", "monitor.every=null", "ckpt.every=1000000", "tracker.wandb=disabled"]
SMOKE = ["experiment=demo", "train.batch_size=4", "hardware=cpu", "hardware.num_workers=0", "train.max_steps=9"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=int, default=0, help="how many of torch's operators or kernels to list")
    parser.add_argument("--smoke", action="store_true", help="small, on the CPU")
    parser.add_argument("overrides", nargs="*", help="settings as for dinoct-train")
    args = parser.parse_args()
    typed = [*SMOKE, *args.overrides] if args.smoke else args.overrides
    if "hardware=cpu" in typed:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    watch, gram = Stopwatch(), losses.gram_loss_per_patch
    sides = keep_arguments(losses, "gram_loss_per_patch")
    for place, name, label in PARTS:
        watch.around(place, name, label)
    updates = Updates(watch, profiled=PROFILED if args.kernels else 0)
    updates.follow()
    with tempfile.TemporaryDirectory() as folder, data_root(typed, Path(folder)) as data:
        length = [] if any(item.startswith("train.max_steps=") for item in typed) else ["train.max_steps=25"]
        sys.argv = ["dinoct-train", *QUIET, *length, *data, f"run_dir={folder}/run", *typed]
        try:
            train.cli()
        except SystemExit as end:
            if end.code:
                raise
    report(updates, gram_alone(gram, sides))
    if updates.profiler is not None:
        kernels(updates.profiler, args.kernels)


@cache
def on_card() -> bool:
    return torch.cuda.is_available()


@contextmanager
def data_root(typed: list[str], folder: Path) -> Iterator[list[str]]:
    """The override that names the data; a phantom's where none was typed."""
    if any(item.startswith("data.root=") for item in typed):
        yield []
        return
    root = f"data.root={folder / 'data'}"
    size = "phantom.size=96" if "experiment=demo" in typed else "phantom.size=512"
    subprocess.run(["dinoct-prepare", "source=phantom", root, "phantom.patients=8", size], check=True)
    yield [root]


@dataclass(frozen=True)
class Mark:
    """A moment on the host and, on a card, in its queue."""

    host: float
    event: torch.cuda.Event | None

    @classmethod
    def now(cls) -> "Mark":
        if not on_card():
            return cls(time.perf_counter(), None)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return cls(time.perf_counter(), event)

    def until(self, later: "Mark") -> tuple[float, float]:
        """Milliseconds on the device and on the host."""
        host = 1000 * (later.host - self.host)
        return (host if self.event is None else self.event.elapsed_time(later.event)), host


class Stopwatch:
    """Own times of functions: what they call and is watched, too, is taken out."""

    def __init__(self) -> None:
        self.running = False
        self.calls: list[tuple[str, str | None, Mark, Mark]] = []  # label, and its caller's
        self._open: list[str] = []

    def around(self, place: Any, name: str, label: str) -> None:
        """Watch the function `name` of a class or module."""
        plain = getattr(place, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return plain(*args, **kwargs)
            caller = self._open[-1] if self._open else None
            self._open.append(label)
            start = Mark.now()
            try:
                return plain(*args, **kwargs)
            finally:
                self._open.pop()
                self.calls.append((label, caller, start, Mark.now()))

        setattr(place, name, watched)

    def own(self) -> dict[str, tuple[float, float]]:
        """Milliseconds on the device and on the host, by label."""
        synchronise()
        found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for label, caller, start, end in self.calls:
            for side, ms in enumerate(start.until(end)):
                found[label][side] += ms
                if caller is not None:
                    found[caller][side] -= ms
        return {label: (device, host) for label, (device, host) in found.items()}


class Updates:
    """Lets the first updates of a run go by, has the next timed, and the last profiled where that is asked for."""

    def __init__(self, watch: Stopwatch, *, profiled: int):
        self.watch, self.profiled = watch, profiled
        self.timed = 0
        self.profiler: profile | None = None

    def follow(self) -> None:
        """From here on, every run in this process."""
        plain = Engine.update

        def update(engine: Engine, batches: Iterator[CropBatch]) -> Any:
            left = engine.cfg.train.max_steps - engine.step
            last = left <= self.profiled
            if last and self.profiler is None:
                card = [ProfilerActivity.CUDA] if on_card() else []
                self.profiler = profile(activities=[ProfilerActivity.CPU, *card])
                self.profiler.start()
            self.watch.running = engine.step >= WARM_UP and not last
            self.timed += self.watch.running
            out = plain(engine, batches)
            if last and left == 1:
                synchronise()
                self.profiler.stop()
            return out

        Engine.update = update


def synchronise() -> None:
    if on_card():
        torch.cuda.synchronize()


def keep_arguments(place: Any, name: str) -> list[Any]:
    """The last call's arguments of a function, tensors without their gradient, as they come to be known."""
    plain, kept = getattr(place, name), []

    def keeping(*args: torch.Tensor) -> Any:
        kept[:] = [(tensor.shape, tensor.dtype) for tensor in args]
        return plain(*args)

    setattr(place, name, keeping)
    return kept


def report(updates: Updates, gram: float) -> None:
    """Print the table of parts; `gram` are the milliseconds of that term alone."""
    count = updates.timed
    if not count:
        sys.exit(f"error: no update was timed: train.max_steps must be over {WARM_UP + updates.profiled}")
    own = {label: (ms / count, host / count) for label, (ms, host) in updates.watch.own().items()}
    whole, queued = (sum(side) for side in zip(*own.values(), strict=True))
    rows = [
        [label, f"{ms:.2f}", f"{100 * ms / whole:.2f} %", f"{host:.2f}"]
        for label, (ms, host) in sorted(own.items(), key=lambda item: -item[1][0])
    ]
    rows.append(["**an update**", f"{whole:.2f}", "100 %", f"{queued:.2f}"])
    columns = 4 if on_card() else 3  # without a card both clocks are one
    name = torch.cuda.get_device_name() if on_card() else "CPU"
    print(f"\n{count} updates, {name}, torch {torch.__version__}\n")
    print_table(["part", "ms", "share", "host ms"][:columns], [row[:columns] for row in rows])
    print(f"\nthe Gram term alone, forward and backward: {gram:.2f} ms, {100 * gram / whole:.2f} % of an update\n")


def gram_alone(term: Callable[..., torch.Tensor], sides: Sequence[tuple[torch.Size, torch.dtype]]) -> float:
    """Milliseconds of the term's forward and backward pass on noise of these shapes; the best of ten."""
    student, teacher = (
        torch.randn(shape, device="cuda" if on_card() else "cpu", dtype=dtype) for shape, dtype in sides
    )
    student.requires_grad_()
    best = math.inf
    for _ in range(10):
        start = Mark.now()
        term(student, teacher).mean().backward()
        end = Mark.now()
        synchronise()
        best = min(best, start.until(end)[0])
    return best


def kernels(profiler: profile, count: int) -> None:
    """Print what torch's profiler saw: kernels on a card, operators on the CPU."""
    found = [
        (event.self_device_time_total if on_card() else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if not on_card() or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    whole = sum(us for us, _, _ in found)
    rows = [
        [f"`{key[:90]}`", n // PROFILED, f"{us / 1000 / PROFILED:.2f}", f"{100 * us / whole:.1f} %"]
        for us, n, key in sorted(found, reverse=True)[:count]
    ]
    print_table(["kernel" if on_card() else "operator", "calls", "ms", "share"], rows)


if __name__ == "__main__":
    main()
