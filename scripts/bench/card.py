"""Milliseconds of an update on one card, by work and way: one synthetic batch, no loader, no log, no files.

    python scripts/bench/card.py                       # everything, most important first, and the card's own ceilings
    python scripts/bench/card.py --work plain --ways kept selective,compiled --seconds 120
    python scripts/bench/card.py --ways kept,compiled kept,compiled,cudnn   # a lever that dinoct does not pull
    python scripts/bench/card.py --ways checkpointed checkpointed,8bit      # optim.moments=8bit
    python scripts/bench/card.py --smoke               # tiny and on the CPU

A row is what `Engine.update` queues: teacher and student forward, losses, backward, clipping, AdamW, EMA; `gpu_all.py`
shows that `dinoct-train` takes as long. Parts lie between events in the card's queue. Utilisation is model FLOPs
(`dinoct.flops`) over time over the card's peak. Ceilings and attention kernels stand before the rows.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from common import print_table
from hydra import compose, initialize_config_module
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinoct.checkup.batchsize import synthetic_batch
from dinoct.config import TrainConfig, to_object
from dinoct.data.batch import CropBatch
from dinoct.faults import is_out_of_memory
from dinoct.flops import peak_flops, slice_flops
from dinoct.hardware import card_name, resolve, settle
from dinoct.models import block
from dinoct.models.block import attend
from dinoct.models.ssl import SelfDistillation
from dinoct.optim import apply_schedule, build_optimizer

WORK = {
    "multicrop": ("ViT-L/14, 2 x 224 + 8 x 98, batch 64", 64, ["model=vit-large", "aug=multicrop"]),
    "plain": ("ViT-L/14, 2 x 224, batch 64", 64, ["model=vit-large"]),
    "fine": ("ViT-L/16, 2 x 512, batch 16", 16, ["model=vit-large", "model.patch=16", "model.img_size=512"]),
    "giant": ("ViT-g/14, 2 x 224, batch 128", 128, ["model=vit-giant"]),
}
WAYS = ["kept,compiled", "kept", "selective", "selective,compiled", "checkpointed", "checkpointed,compiled"]
LEVERS = [f"{way},cudnn" for way in WAYS] + [f"{way},8bit" for way in WAYS]  # attention by cuDNN; moments in 8 bits
RECOMPUTE = {"kept": False, "selective": "selective", "checkpointed": True}
WARM, TIMED = 3, 6  # updates
SMOKE = ["model=vit-tiny", "model.depth=2", "hardware=cpu"]
PARTS = ["teacher", "student", "losses", "backward", "clip, AdamW, EMA"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--ways", nargs="+", choices=WAYS + LEVERS, default=WAYS)
    parser.add_argument("--seconds", type=float, default=540, help="no row begins behind it")
    parser.add_argument("--smoke", action="store_true", help="tiny and on the CPU")
    args = parser.parse_args()
    end = time.perf_counter() + args.seconds
    if not args.smoke:
        print_table(["ceiling", "figure"], [*ceilings(), *attention()])
    rows = []
    for work in args.work:
        rows += rows_of(work, args.ways, end, smoke=args.smoke)
    print(f"\n{time.strftime('%Y-%m-%d')}, {card_name('cpu' if args.smoke else 'cuda')}, torch {torch.__version__}\n")
    print_table(["work", "way", "ms", "slices/s", "utilisation", "peak GB", *PARTS, "first 3, s", "loss"], rows)


def rows_of(work: str, ways: list[str], end: float, *, smoke: bool) -> list[list[str]]:
    """The rows of one model, built once; a row that runs out of memory says so."""
    name, batch_size, overrides = WORK[work]
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        cfg = to_object(compose("train", overrides=[*overrides, *(SMOKE if smoke else [])]))
    update = Update(cfg, 2 if smoke else batch_size)
    rows = []
    for way in ways:
        if time.perf_counter() > end:
            break
        try:
            rows.append([name, way, *update.measure(way)])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows.append([name, way, "out of memory"])
        print(*rows[-1], flush=True)
    return rows


class Update:
    """Optimiser updates of a model on one batch."""

    def __init__(self, cfg: TrainConfig, batch_size: int):
        self.cfg, self.hardware = cfg, resolve(cfg.hardware)
        settle(self.hardware)
        torch.manual_seed(0)
        self.model = SelfDistillation(cfg.model, cfg.loss).to(self.hardware.device).train()
        self.model.teacher.eval()
        batch = synthetic_batch(cfg, batch_size)
        batch.global_crops = torch.rand_like(batch.global_crops)
        batch.local_crops = None if batch.local_crops is None else torch.rand_like(batch.local_crops)
        self.batch: CropBatch = batch.to(self.hardware.device)
        self.flops = batch_size * slice_flops(cfg)
        self.count = batch_size

    def measure(self, way: str) -> list[str]:
        """Cells of the table."""
        kind, *extra = way.split(",")
        block.attend = cudnn_attend if "cudnn" in extra else attend
        torch.compiler.reset()
        for backbone in self.model.backbones:
            backbone.grad_checkpoint = RECOMPUTE[kind]
            for one in backbone.vit.blocks:
                one._compiled_call_impl = None
            if "compiled" in extra:
                backbone.compile_blocks()
        on_card = self.hardware.platform != "cpu"
        optim = replace(self.cfg.optim, moments="8bit" if "8bit" in extra else "float32")
        self.optimizer = build_optimizer(self.model.student, depth=self.cfg.model.depth, cfg=optim)
        apply_schedule(self.optimizer, lr=1e-5, weight_decay=0.04, frozen=False)
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(WARM):
            self.take()
        synchronise()
        first, start = time.perf_counter() - start, time.perf_counter()
        marks = [self.take() for _ in range(TIMED)]
        synchronise()
        seconds = (time.perf_counter() - start) / TIMED
        peak = peak_flops(self.hardware.card, amp=self.hardware.amp)
        parts = [sum(between(m[i], m[i + 1]) for m in marks) / TIMED for i in range(len(PARTS))]
        return [
            f"{1000 * seconds:.1f}",
            f"{self.count / seconds:.1f}",
            "-" if peak is None else f"{100 * self.flops / seconds / peak:.1f} %",
            f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if on_card else "-",
            *(f"{ms:.1f}" for ms in parts),
            f"{first:.1f}",
            f"{self.loss.item():.4f}",
        ]

    def take(self) -> list:
        """One update; the moments between its parts."""
        model, marks = self.model, [now()]
        teach, losses = model._teach, model._losses
        model._teach = lambda *args: (teach(*args), marks.append(now()))[0]
        model._losses = lambda *args: (marks.append(now()), losses(*args))[1]
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with self.hardware.autocast():
                terms = model(self.batch, teacher_temperature=0.04)
        finally:
            del model._teach, model._losses
        marks.append(now())
        terms.total.backward()
        marks.append(now())
        norm = torch.nn.utils.clip_grad_norm_(model.student.parameters(), self.cfg.optim.clip)
        self.optimizer.step()
        model.end_update(step=1, horizon=1000, momentum=0.99, finite=torch.isfinite(norm))
        marks.append(now())
        self.loss = terms.total.detach()
        return marks


def cudnn_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`dinoct.models.block.attend`, but by cuDNN where it takes flash attention."""
    if k.shape[2] <= block.SHORT:
        return attend(q, k, v)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v)


def now() -> float | torch.cuda.Event:
    """A moment in the card's queue, or on the host."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Milliseconds."""
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], object], *, warm: int = 3, times: int = 10) -> float:
    """Mean milliseconds of a call, its results thrown away."""
    for _ in range(warm):
        function()
    start = now()
    for _ in range(times):
        function()
    end = now()
    synchronise()
    return between(start, end) / times


def ceilings() -> list[list[str]]:
    """What the card does at best: products of random bf16 matrices, and copying."""
    found = []
    for m, k, n in ((8192, 8192, 8192), (32896, 1024, 4096), (32896, 1024, 1024)):
        x, w = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
        found.append([f"product {m} x {k} x {n}", f"{2 * m * k * n / timed(lambda: F.linear(x, w)) / 1e9:.0f} TFLOP/s"])  # noqa: B023
    x = torch.empty(2**31, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    found.append(["copy, read and written", f"{2 * x.nbytes / timed(lambda: y.copy_(x)) / 1e9:.2f} TB/s"])
    return found


def attention() -> list[list[str]]:
    """Forward and backward pass of one layer's attention, 16 heads of 64, by kernel."""
    found = []
    for batch, tokens in ((128, 257), (512, 50), (32, 1025)):
        for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            torch.manual_seed(0)
            x = torch.randn(batch, tokens, 3, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

            def layer(kind: SDPBackend = kind, x: torch.Tensor = x) -> None:
                with sdpa_kernel(kind):
                    out = F.scaled_dot_product_attention(*x.permute(2, 0, 3, 1, 4).unbind(0))
                torch.autograd.grad(out.float().square().mean(), x)

            found.append([f"attention {batch} x {tokens}, {kind.name}", f"{timed(layer):.2f} ms"])
    return found


if __name__ == "__main__":
    main()
