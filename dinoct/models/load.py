"""Weights from files: the encoder of a checkpoint, and starting points from elsewhere."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoct import checkpoint as checkpoints
from dinoct.checkpoint import Checkpoint
from dinoct.config import ModelConfig
from dinoct.errors import CheckpointError
from dinoct.models.backbone import Backbone

TEACHER = "teacher.backbone."


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture that a checkpoint holds, read as data: keys that this version does not know are left out."""
    stored = checkpoint.meta["config"]["model"]
    known = {item.name for item in fields(ModelConfig)}
    return ModelConfig(**{key: value for key, value in stored.items() if key in known})


def load_backbone(checkpoint: Checkpoint) -> Backbone:
    """The EMA teacher's backbone, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: if weights are missing or do not fit.
    """
    if "model" not in checkpoint.state:
        raise CheckpointError(f"{checkpoint.path} is sharded: resume it with parallel=none, which writes one file")
    backbone = Backbone(model_config(checkpoint))
    weights = {
        name.removeprefix(TEACHER): value
        for name, value in checkpoint.state["model"].items()
        if name.startswith(TEACHER)
    }
    fill(backbone, weights, source=checkpoint.path)
    return backbone.eval().requires_grad_(False)


def random_backbone(cfg: ModelConfig, *, seed: int) -> Backbone:
    """An untrained backbone of the same shape, from a seed of its own; the global generators are left as they were."""
    card = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=card):
        torch.manual_seed(seed)
        return Backbone(cfg).eval().requires_grad_(False)


def fill(backbone: Backbone, weights: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy weights into a backbone, all of them or none.

    Raises:
        CheckpointError: listing the first names that are missing, left over, or of another shape.
    """
    own = backbone.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not known" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:5])}{more}")
    backbone.load_state_dict(weights)


def initial_weights(backbone: Backbone, path: str | Path) -> list[str]:
    """Start a backbone from a dinoct checkpoint, or from a timm-style state dict (.safetensors, .pth).

    An RGB patch embedding is folded to one channel by its sum (a grey image gives the same tokens), the position
    embedding is resampled to this model's grid. A mask token that the file lacks keeps its initial values, and so do
    register tokens; both are named in the result.

    Returns:
        What was changed on the way, for the log.
    Raises:
        CheckpointError: if anything else is missing, left over, or of another shape.
    """
    path = Path(path)
    notes: list[str] = []
    weights = _read(path)
    if f"{TEACHER}mask_token" in weights:
        weights = {k.removeprefix(TEACHER): v for k, v in weights.items() if k.startswith(TEACHER)}
    else:
        weights = {f"vit.{k.removeprefix('vit.')}": v for k, v in weights.items() if k not in ("mask_token",)}
        weights = {k: v for k, v in weights.items() if not k.startswith(("vit.head.", "vit.fc_norm."))}
    own = backbone.state_dict()
    for name in ("mask_token", "vit.reg_token"):
        if name in own and name not in weights:
            weights[name] = own[name]
            notes.append(f"{name} is not in the file and keeps its random start")
    _fold_channels(weights, notes)
    _resample_positions(backbone, weights, notes)
    try:
        fill(backbone, weights, source=path)
    except CheckpointError as error:
        hint = "give model.dim, model.depth, model.patch as the file has them"
        raise CheckpointError(f"model.init_from: {error}; {hint}") from error
    return notes


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        files = checkpoints.list_checkpoints(path)
        hint = f"; name one of the folder's, such as {files[-1]}" if files else ""
        raise CheckpointError(f"model.init_from: there is no file at {path}{hint}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise CheckpointError(f"model.init_from: {path} cannot be read ({error})") from error
    try:
        return dict(checkpoints.load(path).state["model"])
    except CheckpointError as not_ours:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise not_ours from error
    for key in ("model", "state_dict", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"model.init_from: {path} holds no state dict")
    return {key.removeprefix("module.").removeprefix("backbone."): value for key, value in content.items()}


def _fold_channels(weights: dict[str, Tensor], notes: list[str]) -> None:
    name = "vit.patch_embed.proj.weight"
    if name in weights and weights[name].ndim == 4 and weights[name].shape[1] == 3:
        weights[name] = weights[name].sum(dim=1, keepdim=True)
        notes.append("patch embedding folded from 3 channels to 1")


def _resample_positions(backbone: Backbone, weights: dict[str, Tensor], notes: list[str]) -> None:
    from timm.layers import resample_abs_pos_embed

    name, vit = "vit.pos_embed", backbone.vit
    if name not in weights or weights[name].shape == vit.pos_embed.shape or weights[name].ndim != 3:
        return
    if weights[name].shape[-1] != vit.pos_embed.shape[-1]:
        return  # another width: `fill` says so
    before = weights[name].shape[1]
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    has_class = round((before - 1) ** 0.5) ** 2 == before - 1
    grid = list(vit.patch_embed.grid_size)
    if has_class and prefix > 1:  # the file has no registers: their positions start at zero
        empty = torch.zeros(1, prefix - 1, weights[name].shape[-1])
        weights[name] = torch.cat([weights[name][:, :1], empty, weights[name][:, 1:]], dim=1)
    weights[name] = resample_abs_pos_embed(weights[name], new_size=grid, num_prefix_tokens=prefix)
    notes.append(f"position embedding resampled from {before} to {weights[name].shape[1]} tokens")
