"""The same slices, backbone, updates and batch with a peer's recipe, judged by dinoct's view retrieval.

    pip install lightly stable-pretraining lightly-train        # beside dinoct
    python scripts/bench/peers.py --peer lightly --data-root ROOT --updates 1000 --seed 0 --out DIR
    python scripts/bench/peers.py --peer lightly --variant tuned --data-root ROOT --out DIR optim.lr=5e-4

ROOT is a folder that dinoct-prepare wrote. The peer trains dinoct's demo model (ViT 128 x 2, patch 16, 64 px) on its
training patients: slices in the middle window of dinoct's views as 8-bit RGB images, views as the peer ships them at
64 px (local ones at 32 px). DIR receives `teacher.safetensors`, the EMA teacher in timm's names with one channel, which
`dinoct-train model.init_from=` takes, and `result.json`: view retrieval on the validation patients, settings, times.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_table
from PIL import Image
from recipes import IMAGENET, Task, Trained
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinoct.config import DataConfig, TrainConfig, WindowConfig, to_object
from dinoct.data.dataset import open_split, read_slice
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore
from dinoct.data.views import window
from dinoct.errors import ConfigError, DinoctError
from dinoct.evals.judge import ProbeData, judge
from dinoct.hardware import resolve
from dinoct.models.backbone import Backbone, normalise
from dinoct.models.load import initial_weights

# By peer: the package to install, its module, the recipe of ours, and what the recipe is told.
PEERS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "lightly": ("lightly", "lightly", "lightly", {}),
    "lightly-train": ("lightly-train", "lightly_train", "lightly_train", {}),
    "stable-pretraining": ("stable-pretraining", "stable_pretraining", "stable_pretraining", {"method": "DINO"}),
    "stable-pretraining-v2": ("stable-pretraining", "stable_pretraining", "stable_pretraining", {"method": "DINOv2"}),
}
LOCAL_SIZE = 32
SIDES = "teacher", "student"


class SliceImages(Dataset):
    """Slices as 8-bit RGB images under a transform. Images are kept: the time of an update is the peer's own."""

    def __init__(self, index: SliceIndex, store: SliceStore, shown: WindowConfig, transform: Callable):
        center, width = (sum(values) / 2 for values in (shown.center, shown.width))
        self.index, self.store, self.transform = index, store, transform
        self.low, self.high = center - width / 2, center + width / 2
        self.image = cache(self._image)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        return self.transform(self.image(i))

    def _image(self, i: int) -> Image.Image:
        grey = window(read_slice(self.index, self.store, i), self.low, self.high)
        return Image.fromarray((grey * 255).round().astype(np.uint8)).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--variant", choices=("default", "tuned"), default="default")
    parser.add_argument("--data-root", required=True, help="what dinoct-prepare wrote")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="of dinoct's demo, which `tuned` takes: optim.lr=5e-4 ...")
    args = parser.parse_args()
    package, module, recipe, told = PEERS[args.peer]
    if find_spec(module) is None:
        sys.exit(f"{args.peer} is not installed: pip install {package}")
    train = partial(import_module(f"recipes.{recipe}").train, **told)
    torch.set_num_threads(args.threads)
    try:
        report = compare(args, train, demo_settings(args.data_root, args.overrides))
    except DinoctError as error:
        sys.exit(str(error))
    columns = ("mean_percentile_rank", "top1", "ratio", "feature_std", "mean_cosine", "effective_rank")
    rows = [[side, *(f"{report[side][column]:.4f}" for column in columns)] for side in SIDES if side in report]
    print_table([f"{args.peer} {args.variant}, seed {args.seed}", *columns], rows)
    wall, cpu = report["seconds_per_update"], report["cpu_seconds_per_update"]
    print(f"{wall:.3f} s per update, {cpu:.3f} s of processor time; {args.out / 'result.json'}")


def demo_settings(root: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """dinoct's demo as dinoct-train would compose it."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module("dinoct.conf", version_base="1.3"):
            settings = to_object(compose("train", overrides=["experiment=demo", "hardware=cpu", *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)}: {error}") from error
    settings.data = DataConfig(root=root)
    return settings


def compare(args: argparse.Namespace, recipe: Callable[[Task], Trained], settings: TrainConfig) -> dict[str, Any]:
    """Train, write, judge."""
    train, val, store, _ = open_split(settings.data)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    task = Task(
        settings,
        images=lambda transform: SliceImages(train, store, settings.aug.window, transform),
        tuned=args.variant == "tuned",
        updates=args.updates,
        batch_size=args.batch_size,
        local_size=LOCAL_SIZE,
    )
    trained = recipe(task)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "peer": args.peer,
        "variant": args.variant,
        "seed": args.seed,
        "overrides": args.overrides,
        "updates": args.updates,
        "batch_size": args.batch_size,
        "train_slices": len(train),
        "versions": {name: version(name) for name in (PEERS[args.peer][0], "torch", "torchvision", "timm", "dinoct")},
        "used": trained.used,
        "judged_on": "mean of the patch tokens" if trained.patch_mean else "class token",
        "threads": args.threads,
        "seconds_per_update": trained.clock.wall / args.updates,
        "cpu_seconds_per_update": trained.clock.cpu / args.updates,
        "loss": [float(np.mean(part)) for part in np.array_split(trained.losses, 10) if len(part)],
    }
    for side in SIDES:
        vit = getattr(trained, side)
        if vit is not None:
            path = args.out / f"{side}.safetensors"
            save_one_channel(vit, path)
            data = ProbeData(val, store, train)
            report[side] = judged(path, settings, data, patch_mean=trained.patch_mean, baselines=side == "teacher")
    (args.out / "result.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


class PatchMean(nn.Module):
    """A backbone whose class token is the mean of its patch tokens."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.backbone(x)[1]
        return patches.mean(dim=1), patches


def judged(path: Path, settings: TrainConfig, data: ProbeData, *, patch_mean: bool, baselines: bool) -> dict[str, Any]:
    """dinoct's verdict on the weights in a file, on all slices of the validation side."""
    backbone = Backbone(settings.model)
    initial_weights(backbone, path)
    return judge(
        PatchMean(backbone) if patch_mean else backbone,
        settings.model,
        settings.probe,
        data,
        n=len(data.val),
        hardware=resolve(settings.hardware),
        baselines=baselines,
    )


def save_one_channel(vit: nn.Module, path: Path) -> None:
    """Write a timm ViT that was trained on ImageNet-normalised RGB as one that takes dinoct's one channel.

    On a grey image both give the same tokens: the two normalisations are linear, so they fold into the weights and the
    bias of the patch embedding.
    """
    from safetensors.torch import save_file

    weights: dict[str, Tensor] = {name: value.detach().clone() for name, value in vit.state_dict().items()}
    zero, one = normalise(torch.tensor([0.0, 1.0]))
    mean, std = (torch.tensor(IMAGENET[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    kernel = weights["patch_embed.proj.weight"] / std  # [D, 3, p, p]
    grey = -zero / (one - zero)  # the value in [0, 1] that dinoct's normalisation takes to 0
    weights["patch_embed.proj.bias"] += (kernel * (grey - mean)).sum(dim=(1, 2, 3))
    weights["patch_embed.proj.weight"] = kernel.sum(dim=1, keepdim=True) / (one - zero)
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


if __name__ == "__main__":
    main()
