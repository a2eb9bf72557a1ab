"""Memory of a training step by dinoct's formula (dinoct.memory), for the presets: no card is asked.

    python scripts/bench/memory.py                                 # the table of docs/performance.md
    python scripts/bench/memory.py model=vit-large aug=multicrop   # one row: settings as for dinoct-train
    python scripts/bench/memory.py --trace                         # beside it, all tensors of a step followed (minutes)
    python scripts/bench/memory.py --smoke                         # one row, small, traced

bf16 autocast unless train.amp=false is given; one micro-batch, so accumulation changes nothing. The allocator's
fragments and a card's context, 0.5 to 1 GB together, come on top. The trace takes torch's fake tensors, which have a
shape and no content; with iBOT it masks as many patches as may be, the formula as many as there are on average.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from alive import highest
from common import print_table
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dinoct.checkup.machine import size_text
from dinoct.checkup.preflight import student_parameters
from dinoct.cli import explain_config_error
from dinoct.config import TrainConfig, to_object
from dinoct.errors import ConfigError
from dinoct.hardware import Hardware, resolve
from dinoct.memory import estimate
from dinoct.validate import SELECTIVE, validate

SMALL_512, LARGE_512, GIANT_512 = (
    [f"model=vit-{size}", "model.patch=16", "model.img_size=512"] for size in ("small", "large", "giant")
)
ROWS: list[tuple[str, list[str]]] = [
    ("ViT-S/16, 224 px, batch 64", ["model=vit-small", "train.batch_size=64"]),
    ("ViT-S/16, 512 px, batch 64", [*SMALL_512, "train.batch_size=64"]),
    ("ViT-L/14, 224 px, batch 32", ["model=vit-large", "train.batch_size=32"]),
    ("ViT-L/14, 224 px, batch 64 (phase5a)", ["model=vit-large", "train.batch_size=64"]),
    ("ViT-L/14, 224 px, batch 128", ["model=vit-large", "train.batch_size=128"]),
    ("ViT-L/14, 224 + 8 x 98 px, batch 64", ["model=vit-large", "aug=multicrop", "train.batch_size=64"]),
    ("ViT-L/16, 224 px, batch 64", ["model=vit-large", "model.patch=16", "train.batch_size=64"]),
    ("ViT-L/16, 512 px, batch 16 (phase5a_512)", [*LARGE_512, "train.batch_size=16"]),
    ("ViT-g/14, 224 px, batch 16", ["model=vit-giant", "train.batch_size=16"]),
    ("ViT-g/14, 224 px, batch 64", ["model=vit-giant", "train.batch_size=64"]),
    ("ViT-g/14, 224 px, batch 128 (phase5b)", ["model=vit-giant", "train.batch_size=128"]),
    ("ViT-g/16, 512 px, batch 16", [*GIANT_512, "train.batch_size=16"]),
]
SMOKE = ("smoke", ["experiment=demo"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true", help="estimate over trace, of what a micro-batch takes")
    parser.add_argument("--smoke", action="store_true", help="one row, small, traced")
    parser.add_argument("overrides", nargs="*", help="settings of one row")
    args = parser.parse_args()
    rows = [SMOKE] if args.smoke else [(" ".join(args.overrides), args.overrides)] if args.overrides else ROWS
    header = ["setting", "weights, gradients, moments", "without checkpointing", "selective", "with", "less"]
    header += ["estimate / trace, without", "selective", "with"] if args.trace or args.smoke else []
    try:
        table = [row(name, overrides, trace=args.trace or args.smoke) for name, overrides in rows]
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain_config_error(error, TrainConfig, args.overrides)}")
    print_table(header, table)


def row(name: str, overrides: Sequence[str], *, trace: bool) -> list[str]:
    cfg, hardware = settings(overrides)
    kinds = [replace(cfg, train=replace(cfg.train, grad_checkpoint=kind)) for kind in (False, SELECTIVE, True)]
    found = [estimate(kind, hardware, parameters=student_parameters(cfg)) for kind in kinds]
    less = f"{100 * (1 - found[-1].total / found[0].total):.0f} %"
    cells = [name, size_text(found[0].state), *(size_text(memory.total) for memory in found), less]
    if trace:
        for memory, kind in zip(found, kinds, strict=True):
            cells.append(f"{memory.activations / highest(kind, hardware, fake=True):.2f}")
    return cells


def settings(overrides: Sequence[str]) -> tuple[TrainConfig, Hardware]:
    """A run's, as if the machine had bf16."""
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        cfg = to_object(compose("train", overrides=["hardware=cpu", *overrides]))
    validate(cfg)
    return cfg, replace(resolve(cfg.hardware, cfg.train), amp=cfg.train.amp is not False)


if __name__ == "__main__":
    main()
