"""A checkpoint's pictures, from settings to files."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dinoct import checkpoint as checkpoints
from dinoct.checkpoint import Checkpoint
from dinoct.config import AugConfig, IbotConfig, MonitorConfig, WindowConfig
from dinoct.console import console
from dinoct.data.dataset import SliceViews, middle_slice, open_split, read_slice
from dinoct.data.index import SliceIndex
from dinoct.data.store import SliceStore
from dinoct.data.views import ViewMaker
from dinoct.errors import ConfigError
from dinoct.evals.report import data_of
from dinoct.hardware import resolve, settle
from dinoct.models.load import load_backbone, model_config
from dinoct.viz import PICTURES, draw_monitor, draw_views, first_views, sample_slices, views_title

Schema = TypeVar("Schema")


def monitor_checkpoint(cfg: MonitorConfig) -> dict[str, Any]:
    """The pictures of a held-out slice, views.png of the training side, and stats.json.

    They are written beside the checkpoint, or into `out`.

    Raises:
        ConfigError, CheckpointError: naming the key to change.
    """
    checkpoint = checkpoints.load(cfg.checkpoint, lazily=True)
    hardware = resolve(cfg.hardware)
    settle(hardware)
    train, val, store, _ = open_split(data_of(cfg.data, checkpoint))
    i = _chosen(val, cfg.slice_id)
    out = Path(cfg.out) if cfg.out else checkpoint.path.parent / "monitor" / f"step_{checkpoint.step:08d}"
    aug = stored_aug(checkpoint)
    stats = draw_monitor(
        load_backbone(checkpoint).to(hardware.device),
        read_slice(val, store, i),
        window=aug.window,
        size=model_config(checkpoint).img_size,
        device=hardware.device,
        out=out,
        title=f"step {checkpoint.step}, slice {val.slice_id[i]}",
        patch=cfg.patch,
        sample=sample_slices(val, store),
    )
    draw_views(first_views(_training_views(checkpoint, aug, train, store)), out / "views.png", views_title(aug))
    for name in (*PICTURES, "views"):
        console.print(str(out / f"{name}.png"), markup=False)
    console.print(str(out / "stats.json"), markup=False)
    verdict = "expected above 0.001" if stats["std"] > 0.001 else "BELOW 0.001: the features may have collapsed"
    console.print(f"std {stats['std']:.5f} ({verdict}), normalised {stats['std_normalised']:.3f}", markup=False)
    return stats


def _chosen(val: SliceIndex, slice_id: str | None) -> int:
    if slice_id is None:
        return middle_slice(val)
    found = np.flatnonzero(val.slice_id == slice_id)
    if not len(found):
        raise ConfigError(f"slice_id={slice_id} is not in the validation split")
    return int(found[0])


def stored_aug(checkpoint: Checkpoint) -> AugConfig:
    """The augmentation that a checkpoint was trained with."""
    stored = checkpoint.meta["config"]["aug"]
    return _known(AugConfig, stored | {"window": _known(WindowConfig, stored["window"])})


def _training_views(checkpoint: Checkpoint, aug: AugConfig, train: SliceIndex, store: SliceStore) -> SliceViews:
    config = checkpoint.meta["config"]
    ibot = _known(IbotConfig, config["loss"]["ibot"])
    return SliceViews(train, store, ViewMaker(aug, model_config(checkpoint), ibot), seed=config["seed"])


def _known(schema: type[Schema], stored: dict[str, Any]) -> Schema:
    """A config read as data: keys that this version does not know are left out."""
    names = {item.name for item in fields(schema)}
    return schema(**{key: value for key, value in stored.items() if key in names})
