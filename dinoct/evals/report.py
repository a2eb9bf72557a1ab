"""A checkpoint's evaluation, from settings to files."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from dinoct import checkpoint as checkpoints
from dinoct.checkpoint import Checkpoint
from dinoct.cli import DONE, FAILED
from dinoct.config import DataConfig, EvalConfig, ProbeConfig
from dinoct.console import console, log, progress, run_log
from dinoct.data.dataset import data_paths, open_split
from dinoct.data.index import SliceIndex
from dinoct.data.labels import load_split_labels
from dinoct.data.masks import MaskStore
from dinoct.data.store import MASKS, SliceStore
from dinoct.delivery.card import fingerprint
from dinoct.durable import replacing_text
from dinoct.errors import ConfigError
from dinoct.evals.judge import ProbeData, judge
from dinoct.evals.picture import draw_curve, draw_summary
from dinoct.evals.table import print_report
from dinoct.hardware import Hardware, resolve, settle
from dinoct.models.load import load_backbone, model_config
from dinoct.provenance import data_manifest_hash, data_seen
from dinoct.shards import is_sharded
from dinoct.tracking import track_evaluation
from dinoct.validate import validate_probe, validate_rules

UNSAID = ("batch_size", "labels", "masks")  # paths may hold names


def evaluate(cfg: EvalConfig) -> int:
    """Judge the EMA teachers of one or several checkpoints on the validation patients, in the probe's windows.

    Writes a JSON file and a picture beside each checkpoint or into `out`, and a curve of a run that has several.

    Returns:
        0 for a pass, 2 for a fail; of several checkpoints the last step's verdict counts.
    Raises:
        ConfigError, CheckpointError: naming the key to change.
    """
    validate_probe(cfg.probe)
    validate_rules(cfg.probe)
    if cfg.n < 2:
        raise ConfigError(f"n must be at least 2, not {cfg.n}")
    paths = find_checkpoints(cfg.checkpoint)
    folders = report_folders(paths, cfg.out)
    for folder in folders:
        _make_writable(folder)  # said now, and not when all is judged
    hardware = resolve(cfg.hardware)
    settle(hardware)
    reports = [_evaluate_one(path, folder, cfg, hardware) for path, folder in zip(paths, folders, strict=True)]
    for folder in dict.fromkeys(folders):  # one of each run
        of_run = [report for report, place in zip(reports, folders, strict=True) if place == folder]
        if len(of_run) > 1:
            _write_curve(sorted(of_run, key=lambda report: report["step"]), folder)
    return DONE if max(reports, key=lambda report: report["step"])["passed"] else FAILED


def find_checkpoints(value: Any) -> list[Path]:
    """The files that ``checkpoint=FILE``, ``checkpoint=RUN`` (all of its checkpoints) or a list of these means.

    Raises:
        ConfigError: for none, for a path where there is nothing, and for a folder without checkpoints.
    """
    found: list[Path] = []
    if value == []:
        raise ConfigError("checkpoint: name at least one, or a run's folder")
    for item in value if isinstance(value, list) else [value]:
        path = Path(str(item))
        if not path.exists():
            raise ConfigError(f"checkpoint: there is no checkpoint at {path}")
        if not path.is_dir():
            found.append(path)
            continue
        inside = checkpoints.list_checkpoints(path)
        if not inside:
            hint = "; resume it with parallel=none, which writes one file" if is_sharded(path) else ""
            if not hint and (others := sorted(path.glob("*.pth"))):
                hint = f"; name one of its other files, such as checkpoint={others[-1]}"
            raise ConfigError(f"checkpoint: there is no checkpoint_STEP.pth in {path}{hint}")
        found += inside
    files: dict[tuple[int, int], Path] = {}
    for path in found:  # the final and the best checkpoint are other names of one of these
        stat = path.stat()
        files.setdefault((stat.st_dev, stat.st_ino), path)
    return list(files.values())


def report_folders(paths: list[Path], out: str | None) -> list[Path]:
    """Where the report of each checkpoint goes: one folder per run, since two runs have the same steps.

    Raises:
        ConfigError: for two runs of one name that `out` would mix up.
    """
    runs = [path.absolute().parent for path in paths]
    if out is None or len(set(runs)) == 1:
        return [Path(out) if out else path.parent for path in paths]
    if len({run.name for run in set(runs)}) < len(set(runs)):
        raise ConfigError("out: two of the runs have folders of the same name; judge them one by one")
    return [Path(out) / run.name for run in runs]


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be written: {error.strerror}; name another folder") from error


def _evaluate_one(path: Path, out: Path, cfg: EvalConfig, hardware: Hardware) -> dict[str, Any]:
    checkpoint = checkpoints.load(path, lazily=True)
    data = data_of(cfg.data, checkpoint)
    train, val, store, _ = open_split(data)
    unseen, judged_on = check_unseen(checkpoint, train, val)
    probe_data = _probe_data(cfg.probe, data, train, val, store)
    n, backbone = min(cfg.n, len(val)), load_backbone(checkpoint)
    weights_sha256 = fingerprint(backbone.state_dict())
    with run_log(), progress("slices") as bar:
        if n < cfg.n:
            log.warning("n=%d, but the validation split has %d slices: all of them are judged", cfg.n, n)
        joined = _joined(probe_data) if "labels" in cfg.probe.probes else None
        judged = judge(
            backbone,
            model_config(checkpoint),
            cfg.probe,
            probe_data,
            n=n,
            hardware=hardware,
            begin=lambda what, total: partial(bar.advance, bar.add_task(what, total=total)),
        )
    report = {
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "weights_sha256": weights_sha256,  # the model card takes a report of its own weights alone
        "git_commit": checkpoint.meta["git_commit"],
        "data_manifest_hash": checkpoint.meta["data_manifest_hash"],
        "judged_on": judged_on,
        "patients_unseen": unseen,
        "settings": {key: value for key, value in asdict(cfg.probe).items() if key not in UNSAID},
        "window": asdict(cfg.probe.window),
        "labels_joined": joined,
        **judged,
    }
    name = out / f"view_retrieval_step{checkpoint.step:08d}_N{n}"
    _keep_earlier(name, report)
    _write_json(name.with_suffix(".json"), report)
    draw_summary(report, name.with_suffix(".png"))
    track_evaluation(
        cfg.tracker, out, path.absolute().parent.name, checkpoint.meta, report, picture=name.with_suffix(".png")
    )
    print_report(report, name.with_suffix(".json"))
    return report


def _keep_earlier(name: Path, report: Mapping[str, Any]) -> None:
    """A report that stands there with other settings, on other data or labels or of other weights gets another name."""
    same = ("settings", "judged_on", "weights_sha256", "labels_joined")
    try:
        earlier = json.loads(name.with_suffix(".json").read_text(encoding="utf-8"))
        if all(earlier.get(key) == report[key] for key in same):
            return
    except (OSError, ValueError, AttributeError):
        return
    kept = name.with_name(f"{name.name}_earlier")
    while kept.with_suffix(".json").exists():
        kept = kept.with_name(f"{kept.name}x")
    for suffix in (".json", ".png"):
        with suppress(FileNotFoundError):
            name.with_suffix(suffix).replace(kept.with_suffix(suffix))
    console.print(f"the earlier report, of other settings, data or weights: {kept.with_suffix('.json')}", markup=False)


def _probe_data(
    probe: ProbeConfig, data: DataConfig, train: SliceIndex, val: SliceIndex, store: SliceStore
) -> ProbeData:
    """The index's two sides, with labels and masks where there are some.

    Raises:
        ConfigError: where a file was named that is not there.
    """
    root = data_paths(data)[0].absolute().parent.parent
    labels = Path(probe.labels) if probe.labels else root / "_index" / "labels.csv"
    masks = Path(probe.masks) if probe.masks else root / MASKS
    if probe.masks and not masks.is_dir():
        raise ConfigError(f"probe.masks: there is no folder {masks}")
    return ProbeData(
        val,
        store,
        train,
        load_split_labels(labels, train, val) if probe.labels or labels.is_file() else None,
        MaskStore(masks) if masks.is_dir() else None,
    )


def _joined(data: ProbeData) -> dict[str, int | str] | None:
    """How far the table of labels and the data are about the same slices; also said."""
    if data.labels is None:
        return None
    fit, judged = data.labels
    train, val = (int((side.codes >= 0).sum()) for side in (fit, judged))
    log.info("labels: %d of %d training slices and %d of %d held-out ones have one",
             train, len(fit.codes), val, len(judged.codes))  # fmt: skip
    if fit.unknown:
        log.warning("labels: %d of %d keys are no slice_id or series of the data", fit.unknown, fit.keys)
    joined = hashlib.sha256(fit.codes.tobytes() + judged.codes.tobytes() + "\n".join(fit.names).encode())
    found = {"keys": fit.keys, "keys_unknown": fit.unknown, "train_slices": train, "val_slices": val}
    return {"sha256": joined.hexdigest()[:16], **found}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing_text(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def _write_curve(reports: list[dict[str, Any]], out: Path) -> None:
    """Figures over steps, as JSON and as a picture."""
    name = out / f"view_retrieval_curve_N{reports[-1]['n']}"
    keys = ("step", "checkpoint", "mean_percentile_rank", "mean_percentile_rank_95", "top1", "ratio", "feature_std",
            "effective_rank", "passed")  # fmt: skip
    _write_json(name.with_suffix(".json"), {"points": [{key: report[key] for key in keys} for report in reports]})
    draw_curve(reports, name.with_suffix(".png"))
    console.print(f"curve over {len(reports)} checkpoints: {name.with_suffix('.png')}", markup=False)


def data_of(data: DataConfig, checkpoint: Checkpoint) -> DataConfig:
    """The data that was asked for, else that of the checkpoint's run."""
    if data.root or data.index_csv:
        return data
    known = {item.name for item in fields(DataConfig)}
    stored = DataConfig(**{k: v for k, v in checkpoint.meta["config"]["data"].items() if k in known})
    return replace(stored, split_manifest=data.split_manifest or stored.split_manifest)


def check_unseen(checkpoint: Checkpoint, train: SliceIndex, val: SliceIndex) -> tuple[bool, str]:
    """Refuse to judge on patients that the weights were trained on; warn where that cannot be known.

    Keys prove it for one index alone: a PatientID that was written or changed since gives another one.

    Returns:
        Whether it is known that training saw none of them, and the hash of index and split.
    Raises:
        ConfigError: if a patient of the validation side was trained on.
    """
    if seen := val.patients & frozenset(checkpoint.meta["train_patients"]):
        raise ConfigError(
            f"data.split_manifest: {len(seen)} of its {len(val.patients)} validation patients were trained on; "
            "take that of the run, or of the one that its weights came from (model.init_from)"
        )
    judged_on, trained_on = data_manifest_hash(train, val), data_seen(checkpoint.meta)
    if None in trained_on:
        _warn("whom these weights were trained on is not known in full: make sure that they never saw these patients")
    elif trained_on != [judged_on]:
        _warn(
            "index or split differ from those of the training run; by their keys it saw none of these patients: make "
            "sure that none has another key now (another PatientID, another salt)"
        )
    return trained_on == [judged_on], judged_on


def _warn(text: str) -> None:
    console.print(f"WARNING: {text}", style="yellow", markup=False)
