"""What a resumed run is made of: the checkpoint's config, then what was typed, with the hardware fresh."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoct.checkpoint import Checkpoint, find_latest, list_checkpoints, load
from dinoct.config import TrainConfig
from dinoct.errors import CheckpointError, ConfigError
from dinoct.rundir import RUNS, newest_runs
from dinoct.shards import is_sharded, list_sharded
from dinoct.turnback import aside

FRESH = (
    "hardware",
    "engine",
    "parallel",
    "run_dir",
    "resume",
    "replay",
    "preflight",
)  # never from the checkpoint; a stored _target_ least of all
RETIRED = ("probe.bootstrap",)  # stand in checkpoints of earlier versions, and nothing reads them any more
SHAPES = (  # keys that decide the tensors' shapes
    "model.patch",
    "model.dim",
    "model.depth",
    "model.heads",
    "model.mlp_ratio",
    "model.img_size",
    "model.registers",
    "model.layer_scale",
    "loss.out_dim",
    "loss.hidden_dim",
    "loss.bottleneck_dim",
)


def find_checkpoint(resume: str, run_dir: str | None = None) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that ``resume=auto``, ``resume=FOLDER`` or ``resume=FILE`` means, and warnings to print.

    Raises:
        CheckpointError: if there is none, or the named file is broken.
    """
    path = Path(resume)
    path = path.resolve() if path.is_symlink() and path.is_file() else path
    if resume != "auto" and not path.exists():
        raise CheckpointError(f"resume={resume}: there is no checkpoint at {path}; auto goes on with the newest run")
    if resume != "auto" and (not path.is_dir() or is_sharded(path)):
        return load(path), []
    runs = newest_runs()
    folders = [path] if resume != "auto" else [Path(run_dir)] if run_dir else runs[:1]
    found, warnings = find_latest(folders)
    if found is None:
        place = folders[0] if folders else RUNS
        skipped = f" ({'; '.join(warnings)})" if warnings else ""
        older = next((str(run) for run in runs[1:] if has_checkpoint(run)), None) if resume == "auto" else None
        hint = f"; an older run is resumed by name: resume={older}" if older else ""
        if folders and (others := aside(folders[0])):
            hint = f"; there is {others[-1].name}, which is resumed by name: resume={others[-1]}"
        raise CheckpointError(f"resume={resume}: no usable checkpoint in {place}{skipped}{hint}")
    return found, warnings


def refuse_overtaken(resume: str | None, checkpoint: Checkpoint) -> None:
    """Whether the newest checkpoint of its folder is still the newest, now that no other process trains there.

    Args:
        resume: as it was typed; None for a job that was started again.
        checkpoint: that was found.
    Raises:
        ConfigError: if one has trained on meanwhile, so that this start would leave what it did.
    """
    if resume not in (None, "auto") and (not Path(resume).is_dir() or is_sharded(Path(resume))):
        return  # a file: it was named
    found, _ = find_latest([checkpoint.path.parent], behind=checkpoint.step)
    if found is not None:
        raise ConfigError(f"another process went on to {found.path} meanwhile: start again, from there")


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint, of one file or of shares."""
    return bool(list_checkpoints(folder) or list_sharded(folder))


def merge_config(
    stored: Mapping[str, Any],
    composed: DictConfig,
    *,
    defaults: DictConfig,
    overrides: Sequence[str],
    choices: Mapping[str, str],
    stored_choices: Mapping[str, str],
) -> TrainConfig:
    """The config of a resumed run.

    Args:
        stored: the checkpoint's config, as data.
        composed: what Hydra composed from this command line.
        defaults: what Hydra composes from an empty one; tells what an experiment file sets.
        overrides: the overrides as typed.
        choices: option taken per group on this command line.
        stored_choices: the same for the command that made the checkpoint. A group typed again with the same option
            changes nothing: the checkpoint's values, with the overrides of that time, stay.
    Raises:
        CheckpointError: if the stored config does not fit the schema.
    """
    base = OmegaConf.structured(TrainConfig)
    try:
        base = OmegaConf.merge(base, _without_retired(stored))
    except OmegaConfBaseException as error:
        raise CheckpointError(
            f"the checkpoint's config does not fit this version: {str(error).splitlines()[0]}"
        ) from error
    now, before = flatten(composed), flatten(defaults)
    for override in overrides:
        key = override.lstrip("+").split("=", 1)[0]
        if below := typed_below(override):
            keys = [name for name in below if name in now]
        elif key in choices:
            if choices[key] == stored_choices.get(key):
                continue
            keys = [k for k in now if now[k] != before.get(k)] if key == "experiment" else _below(now, key)
        else:
            keys = [key] if key in now else []
        for name in keys:
            OmegaConf.update(base, name, now[name])
    for key in FRESH:
        OmegaConf.update(base, key, OmegaConf.select(composed, key), merge=False)
    return OmegaConf.to_object(base)


def _place(path: str | None) -> Path | None:
    return None if path is None else Path(path).absolute()


def _without_retired(stored: Mapping[str, Any]) -> DictConfig:
    kept = OmegaConf.create(dict(stored))
    for key in RETIRED:
        group, _, name = key.rpartition(".")
        if (node := OmegaConf.select(kept, group)) is not None:
            node.pop(name, None)
    return kept


def typed_below(override: str) -> list[str]:
    """The settings that ``train={max_steps:6}`` names, not all that there are under train; none of another override."""
    if "={" not in override:
        return []
    parsed = OverridesParser.create().parse_override(override)
    value = parsed.value()
    return list(flatten(value, f"{parsed.key_or_group}.")) if isinstance(value, dict) else []


def _below(flat: Mapping[str, Any], key: str) -> list[str]:
    return [name for name in flat if name == key or name.startswith(f"{key}.")]


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as ``{"a.b.c": value}``; lists are values."""
    plain = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    out: dict[str, Any] = {}
    for key, value in plain.items():
        name = f"{prefix}{key}"
        out |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return out


def changes(stored: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for the settings that differ, without those that are always fresh.

    A setting that is younger than the checkpoint had its default then.
    """
    old = flatten(OmegaConf.structured(TrainConfig)) | flatten(dict(stored))
    new = flatten(dict(cfg))
    keys = [key for key in new if key.split(".")[0] not in FRESH]
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in keys if old.get(key) != new[key]]


def lost_changes(history: Sequence[Mapping[str, Any]], step: int, now: Sequence[str]) -> list[str]:
    """What was changed when a run last went on from a step, and is not changed now.

    Args:
        history: of the run, from its config.json.
        step: that the run goes on from; the last start came to no checkpoint where it is that one's too.
        now: `changes` of this start.
    """
    last = history[-1] if history else {}
    if last.get("from_step") != step:
        return []
    typed = {change.split(":")[0] for change in now}
    return [change for change in last.get("changes", []) if change.split(":")[0] not in typed]


def check_shapes(stored: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    """Refuse settings that the checkpoint's tensors do not fit.

    Raises:
        ConfigError: naming each key with both values.
    """
    old, new = flatten(dict(stored)), flatten(dict(cfg))
    wrong = [f"{key}={new[key]} (checkpoint: {old[key]})" for key in SHAPES if old.get(key) != new[key]]
    if bool(old.get("loss.ibot.weight")) != bool(new["loss.ibot.weight"]):
        wrong.append(f"loss.ibot.weight={new['loss.ibot.weight']} (checkpoint: {old.get('loss.ibot.weight')})")
    if (old.get("loss.gram.teacher") == "ema") != (new["loss.gram.teacher"] == "ema"):
        wrong.append(f"loss.gram.teacher={new['loss.gram.teacher']} (checkpoint: {old.get('loss.gram.teacher')})")
    if _place(old.get("model.init_from")) != _place(new["model.init_from"]):
        raise ConfigError(
            f"model.init_from={new['model.init_from']} starts a new run, and resume goes on with one: leave one out"
        )
    if wrong:
        raise ConfigError(
            f"cannot resume with {', '.join(wrong)}: leave it out to go on, "
            "or start a new run with model.init_from=CHECKPOINT"
        )
