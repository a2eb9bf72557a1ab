"""Seconds of one training step: dinoct beside the DINO of its peers, in one run on the CPU.

    pip install lightly stable-pretraining        # beside dinoct; a peer that is not there is left out
    python scripts/bench/step.py [--threads 2] [--rounds 3] [--steps 5]
    python scripts/bench/step.py --grow          # dinoct alone, with more of one thing at a time
    python scripts/bench/step.py --checkpointing # dinoct's ViT-S/16 at 224 px, as the presets have it

ViT 192 wide, 12 blocks, 3 heads, patch 16; 8 slices of 2 views of 96 px and 6 of 48 px; a head of 2048, 2048, 256 and
4096 prototypes; float32. A step is teacher and student forward, loss, backward, clipping, AdamW and the EMA, on views
that are there already. dinoct's has Gram anchoring and KoLeo in it; peers take three channels. All take turns, round by
round. The ratio is to the fastest peer. FLOPs are those of the matrix products, by formula, the backward pass counted
twice the forward pass.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from common import print_table
from hydra import compose, initialize_config_module

from dinoct.config import TrainConfig, to_object
from dinoct.flops import head_flops, slice_flops, vit_flops

GLOBAL, LOCAL = (2, 96), (6, 48)  # views, pixels
BATCH = 8
PLAIN = {"pixels": GLOBAL[1], "local": LOCAL[0], "batch": BATCH}
OVERRIDES = [
    "model=vit-tiny",
    "model.registers=0",
    "model.drop_path=0",
    f"model.img_size={GLOBAL[1]}",
    "loss.out_dim=4096",
    "hardware=cpu",
]
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps per round, after two that are not timed")
    parser.add_argument("--grow", action="store_true", help="how the cost grows with the work")
    parser.add_argument("--checkpointing", action="store_true", help="what checkpointing and compiling cost or save")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.grow:
        grow(args.rounds, args.steps)
        return
    if args.checkpointing:
        checkpointing(args.rounds, args.steps)
        return
    settings = compose_settings()
    entrants: dict[str, Step] = {"dinoct, Gram": dinoct_step(settings)}
    for name, module, build in (
        ("lightly", "lightly", lightly_step),
        ("stable-pretraining", "stable_pretraining", stable_pretraining_step),
    ):
        if find_spec(module):
            entrants[name] = build(settings)
        else:
            print(f"{name} is not installed and is left out: pip install {name}")
    times = measure(entrants, args.rounds, args.steps)
    report(times, settings)


def compose_settings(*more: str) -> TrainConfig:
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        return to_object(compose("train", overrides=[*OVERRIDES, *more]))


def grow(rounds: int, steps: int) -> None:
    """Print what a step costs with more of one thing, in units of the step above."""
    changed: dict[str, tuple[list[str], dict[str, int]]] = {
        "as above": ([], {}),
        "batch 4": ([], {"batch": 4}),
        "batch 16": ([], {"batch": 16}),
        "2 x 192 px, 4 times the patches": (["model.img_size=192"], {"pixels": 192}),
        "no local crops": ([], {"local": 0}),
        "12 local crops": ([], {"local": 12}),
        "K 1,024": (["loss.out_dim=1024"], {}),
        "K 16,384": (["loss.out_dim=16384"], {}),
        "K 65,536": (["loss.out_dim=65536"], {}),
        "lagged Gram teacher": (["loss.gram.teacher=lagged"], {}),
        "Gram teacher at 192 px": (["loss.gram.teacher=lagged", "loss.gram.teacher_px=192"], {}),
        "selectively checkpointed": (["train.grad_checkpoint=selective"], {}),
        "checkpointed": (["train.grad_checkpoint=true"], {}),
    }
    work = {name: (compose_settings(*more), PLAIN | sizes) for name, (more, sizes) in changed.items()}
    entrants = {name: dinoct_step(settings, **sizes) for name, (settings, sizes) in work.items()}
    best = {name: min(found) for name, found in measure(entrants, rounds, steps).items()}
    flops = {name: dinoct_flops(settings, **sizes) for name, (settings, sizes) in work.items()}
    rows = [
        [name, f"{seconds:.3f}", f"{seconds / best['as above']:.2f}", f"{flops[name] / flops['as above']:.2f}"]
        for name, seconds in best.items()
    ]
    print_table(["step", "best s", "x", "x by FLOPs"], rows)


def checkpointing(rounds: int, steps: int) -> None:
    """Print what a step of a preset costs that keeps less for its backward pass, in units of one that keeps all."""
    entrants: dict[str, Step] = {}
    for compiled in ("false", "true"):
        for kind in ("false", "selective", "true"):
            settings = [f"train.grad_checkpoint={kind}", f"train.compile={compiled}", "aug.local_crops=0"]
            with initialize_config_module("dinoct.conf", version_base="1.3"):
                cfg = to_object(compose("train", overrides=["model=vit-small", "hardware=cpu", *settings]))
            entrants[" ".join(settings[:2])] = dinoct_step(cfg, pixels=cfg.model.img_size, local=0)
    best = {name: min(found) for name, found in measure(entrants, rounds, steps).items()}
    plain = next(iter(best.values()))
    print_table(["step", "best s", "x"], [[k, f"{s:.3f}", f"{s / plain:.2f}"] for k, s in best.items()])


def dinoct_flops(settings: TrainConfig, *, pixels: int, local: int, batch: int) -> float:
    """FLOPs of a step by dinoct's own formula."""
    settings.aug.global_crops, settings.aug.local_crops, settings.aug.local_size = GLOBAL[0], local, LOCAL[1]
    settings.model.img_size = pixels
    return batch * slice_flops(settings)


def measure(entrants: dict[str, Step], rounds: int, steps: int) -> dict[str, list[float]]:
    """Mean seconds of a step, by entrant and round."""
    times: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(rounds):
        for name, step in entrants.items():
            for _ in range(2):
                step()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            times[name].append((time.perf_counter() - start) / steps)
    return times


def report(times: dict[str, list[float]], settings: TrainConfig) -> None:
    """Print the table."""
    best = {name: min(found) for name, found in times.items()}
    peers = [seconds for name, seconds in best.items() if not name.startswith("dinoct")]
    rows = []
    for name, found in times.items():
        own = name.startswith("dinoct")
        flops = dinoct_flops(settings, **PLAIN) if own else peer_flops(settings)
        ratio = f"{best[name] / min(peers):.2f}" if peers else "-"
        middle = f"{statistics.median(found):.3f}"
        rows.append([name, f"{best[name]:.3f}", middle, ratio, f"{flops / 1e9:.1f}", f"{flops / best[name] / 1e9:.0f}"])
    print_table(["step", "best s", "median s", "x fastest peer", "GFLOP", "GFLOP/s"], rows)


def views(channels: int, *, pixels: int = GLOBAL[1], local: int = LOCAL[0], batch: int = BATCH) -> list[torch.Tensor]:
    """Random views ``[B, C, s, s]`` in [0, 1], the global ones first."""
    draw = torch.Generator().manual_seed(0)
    sizes = [pixels] * GLOBAL[0] + [LOCAL[1]] * local
    return [torch.rand(batch, channels, size, size, generator=draw) for size in sizes]


def dinoct_step(settings: TrainConfig, **sizes: int) -> Step:
    """What `dinoct.engine` does in an update, less its bookkeeping."""
    from dinoct.data.batch import CropBatch, mask_fields
    from dinoct.models.ssl import SelfDistillation
    from dinoct.optim import apply_schedule, build_optimizer
    from dinoct.schedules import Schedules

    torch.manual_seed(0)
    model = SelfDistillation(settings.model, settings.loss, grad_checkpoint=settings.train.grad_checkpoint)
    for backbone in model.backbones if settings.train.compile else ():
        backbone.compile_blocks()
    optimizer = build_optimizer(model.student, depth=settings.model.depth, cfg=settings.optim)
    plan = Schedules(settings.optim, settings.loss.dino, horizon=1000)
    apply_schedule(optimizer, lr=settings.optim.lr, weight_decay=settings.optim.weight_decay, frozen=False)
    found = views(1, **sizes)
    count, fine = len(found[0]), settings.loss.gram.teacher_px
    batch = CropBatch(
        global_crops=torch.cat(found[: GLOBAL[0]]),
        local_crops=torch.cat(found[GLOBAL[0] :]) if found[GLOBAL[0] :] else None,
        **mask_fields(None),
        groups=torch.arange(count),
        positions=list(range(count)),
        gram_crops=torch.rand(GLOBAL[0] * count, 1, fine, fine) if fine else None,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        terms = model(batch, teacher_temperature=plan.teacher_temperature(0))
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.student.parameters(), settings.optim.clip)
        optimizer.step()
        model.end_update(step=1, horizon=1000, momentum=plan.teacher_momentum(0))

    return step


def lightly_step(settings: TrainConfig) -> Step:
    """lightly's DINO with views of one size together, the fastest way to run it."""
    from lightly.loss import DINOLoss
    from recipes import rgb_vit
    from recipes.lightly import LightlyDINO

    torch.manual_seed(0)
    loss = settings.loss
    head = {"hidden_dim": loss.hidden_dim, "bottleneck_dim": loss.bottleneck_dim, "output_dim": loss.out_dim}
    model, criterion = LightlyDINO(rgb_vit(settings.model), head), DINOLoss(output_dim=loss.out_dim)
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=settings.optim.lr), views(3)

    def step() -> None:
        model.follow(settings.optim.teacher_momentum)
        optimizer.zero_grad()
        model.loss(found, criterion, epoch=1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip)
        optimizer.step()

    return step


def stable_pretraining_step(settings: TrainConfig) -> Step:
    """stable-pretraining's `methods.DINO`, without Lightning's loop around it."""
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    from recipes import rgb_vit
    from stable_pretraining.methods import DINO

    torch.manual_seed(0)
    loss = settings.loss
    sizes = {"projector_hidden_dim": loss.hidden_dim, "projector_bottleneck_dim": loss.bottleneck_dim}
    model = DINO(rgb_vit(settings.model), n_prototypes=loss.out_dim, **sizes)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(learned, lr=settings.optim.lr), views(3)

    def step() -> None:
        optimizer.zero_grad()
        model(global_views=found[: GLOBAL[0]], local_views=found[GLOBAL[0] :]).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, settings.optim.clip)
        optimizer.step()
        for side in (model.backbone, model.projector):
            side.update_teacher()

    return step


def peer_flops(settings: TrainConfig) -> float:
    """FLOPs of a peer's step: the student's three passes over all views, the teacher's one over the global views.

    Peers compute local views whole, and have no Gram term. That they take three channels is left out.
    """
    head = head_flops(settings.model, settings.loss)
    whole, part = (vit_flops(settings.model, pixels) + head for _, pixels in (GLOBAL, LOCAL))
    return BATCH * (GLOBAL[0] * whole * (3 + 1) + LOCAL[0] * part * 3)


if __name__ == "__main__":
    main()
