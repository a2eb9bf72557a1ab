"""The model card of an encoder: where it comes from, what it expects, how good it was.

The same facts stand in the exported file, for `dinoct.load_encoder`, and beside it in Markdown, for people. A card
holds no path: only names of files, hashes and settings.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dinoct
from dinoct.checkpoint import Checkpoint
from dinoct.config import ModelConfig, WindowConfig
from dinoct.data.pixels import HU_MAX, HU_MIN
from dinoct.data.views import middle_window
from dinoct.errors import CheckpointError
from dinoct.models.backbone import normalise
from dinoct.models.load import model_config

CARD_FORMAT = 1
METADATA_KEY = "dinoct"  # the card's key in the metadata of safetensors, ONNX and Parquet
LICENCE = (
    "dinoct's code is Apache-2.0. These weights were made from images: what the images' licence, consent and data use "
    "agreement say of models made from them holds for this file. Look there before you share it."
)
INTENDED_USE = (
    "Research on CT: features for retrieval, probes and further training. Not a medical device, not for diagnosis or "
    "treatment. A network may remember what it was trained on; that was not measured."
)


@dataclass(frozen=True)
class ModelCard:
    """What an encoder file says of itself."""

    checkpoint: str  # the file's name
    step: int
    samples_seen: int
    git_commit: str  # of dinoct when it trained
    data_manifest_hash: str  # index and split of the training data
    model: dict[str, Any]  # the architecture: fields of ModelConfig
    window_hu: tuple[float, float]  # low and high: the middle of the run's range
    initialised_from: str | None  # name of the file with the weights that training began from; None: random
    evaluation: dict[str, Any] | None  # of these weights, that with the most slices beside the checkpoint
    weights_sha256: str  # see `fingerprint`
    not_judged: str = ""  # why there is no evaluation
    dinoct: str = dinoct.__version__

    @classmethod
    def of(cls, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> "ModelCard":
        """The card of a training checkpoint, of whose EMA teacher's backbone `weights` are the state dict."""
        meta, model = checkpoint.meta, model_config(checkpoint)
        start, weights_sha256 = model.init_from, fingerprint(weights)
        evaluation, not_judged = find_evaluation(checkpoint.path.parent, checkpoint.step, weights_sha256)
        return cls(
            checkpoint=checkpoint.path.name,
            step=checkpoint.step,
            samples_seen=meta["samples_seen"],
            git_commit=meta["git_commit"],
            data_manifest_hash=meta["data_manifest_hash"],
            model={key: value for key, value in asdict(model).items() if key != "init_from"},
            window_hu=middle_window(WindowConfig(**meta["config"]["aug"]["window"])),
            initialised_from=Path(start).name if start else None,
            evaluation=evaluation,
            weights_sha256=weights_sha256,
            not_judged=not_judged,
        )

    def to_json(self, holds: str) -> str:
        """The machine-readable form for a file that `holds` an encoder, or weights for timm, or a graph."""
        words = {"licence": LICENCE, "intended_use": INTENDED_USE}
        return json.dumps({"card_format": CARD_FORMAT, "holds": holds, **asdict(self), **words})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path, *, holds: str) -> "ModelCard":
        """The card in a file's metadata.

        Raises:
            CheckpointError: if there is none, or the file holds something else.
        """
        try:
            content = json.loads(metadata[METADATA_KEY])
            found, version = content["holds"], content["card_format"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{path} holds no encoder of dinoct's; weights from elsewhere can start a run: model.init_from={path}"
            ) from None
        if version != CARD_FORMAT:
            raise CheckpointError(f"{path} has card format {version}; this dinoct reads {CARD_FORMAT}")
        if found != holds:
            raise CheckpointError(
                f"{path} holds {found}: its card {path.name}.md says how to load it; for dinoct.load_encoder, "
                "dinoct-export with format=safetensors"
            )
        try:
            low, high = content["window_hu"]
            ModelConfig(**content["model"])
            known = {item.name for item in fields(cls)}
            facts = {key: value for key, value in content.items() if key in known}
            return cls(**facts | {"window_hu": (float(low), float(high))})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its card is incomplete ({error})") from error


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of a state dict: safetensors has no checksum of its own."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def find_evaluation(folder: Path, step: int, weights_sha256: str) -> tuple[dict[str, Any] | None, str]:
    """The figures of the view retrieval of these weights, among the files of a folder: on patients that training is
    known not to have seen rather than on others, then with the most slices, then with the most probes.

    The step alone does not say whose figures they are: a run that was turned back comes by it again with other weights.

    Returns:
        ``file``; ``window``, the range of windows of the views; ``patients_unseen``, known or not; ``verdict``,
        a line per condition of a pass; ``encoder`` and ``untrained``, figures by name (those of a probe as
        ``probe/figure``). Or ``None``, and why.
    """
    found: list[tuple[bool, int, int, str, dict[str, Any]]] = []
    others: list[str] = []
    for path in sorted(folder.glob(f"view_retrieval_step{step:08d}_N*.json")):
        if "_earlier" in path.name:  # of other settings, and superseded
            continue
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if report.get("weights_sha256") == weights_sha256:
                known, probes = report.get("patients_unseen") is True, len(report.get("probes", {}))
                found.append((known, int(report["n"]), probes, path.name, report))
            else:
                others.append(path.name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # a file that is being written, or is none of ours: the card does without
    if others and not found:
        return None, f"`{others[-1]}` is of other weights, or does not say of which: run `dinoct-eval` again"
    if not found:
        return None, "no result of `dinoct-eval` for this step lay beside the checkpoint"
    *_, name, report = max(found, key=lambda item: item[:4])
    checks = report.get("checks", {}).items()
    evaluation = {
        "file": name,
        "window": report.get("window"),
        "patients_unseen": report.get("patients_unseen") is True,
        "verdict": [f"{'pass' if check['passed'] else 'FAIL'} {key}: {check['says']}" for key, check in checks],
        "encoder": _figures(report) | _probe_figures(report, "trained"),
        "untrained": _figures(report.get("baselines", {}).get("random_init", {}))
        | _probe_figures(report, "random_init"),
    }
    return evaluation, ""


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in report.items() if isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if key != "step" and not isinstance(value, bool)}


def _probe_figures(report: Mapping[str, Any], encoder: str) -> dict[str, float]:
    probes = report.get("probes", {}).items()
    return {f"{name}/{key}": x for name, probe in probes for key, x in _figures(probe.get(encoder, {})).items()}


def to_markdown(card: ModelCard, *, file: str, holds: str, howto: str) -> str:
    """The card for people.

    Args:
        card: the facts.
        file: name of the exported file.
        holds: what it holds, in words.
        howto: Markdown that says how to load it.
    """
    m = card.model
    low, high = card.window_hu
    mean, std = normalisation()
    start = f"weights of `{card.initialised_from}`" if card.initialised_from else "random weights"
    facts = {
        "from": f"`{card.checkpoint}`: EMA teacher's backbone at step {card.step} ({card.samples_seen} slices seen, "
        "repeats counted), "
        f"begun from {start}",
        "architecture": f"{m['name']}: ViT, patch {m['patch']}, width {m['dim']}, depth {m['depth']}, "
        f"{m['heads']} heads, {m['registers']} register tokens, one input channel",
        "input": f"{m['img_size']} x {m['img_size']} pixels; a slice that is not square is padded with air",
        "window": f"{low:g} to {high:g} HU becomes 0 to 1, clipped (HU are first clipped to {HU_MIN} to {HU_MAX})",
        "normalisation": f"(x - {mean:g}) / {std:g} after the window",
        "training data": f"manifest hash `{card.data_manifest_hash}`",
        "code": f"dinoct {card.dinoct}, git `{card.git_commit}`",
        "weights": f"SHA-256 `{card.weights_sha256}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"# {file}\n\nA vision encoder for CT slices, trained without labels by dinoct. {holds}\n\n"
        f"| | |\n|---|---|\n{table}\n\n## How to load it\n\n{howto}\n\n## How good it was\n\n{_judgement(card)}\n\n"
        f"## Licence\n\n{LICENCE}\n\n## Intended use\n\n{INTENDED_USE}\n"
    )


def normalisation() -> tuple[float, float]:
    """Mean and standard deviation that `normalise` takes away, read off it."""
    at_0, at_1 = normalise(0.0), normalise(1.0)
    std = 1.0 / (at_1 - at_0)
    return -at_0 * std, std


def _judgement(card: ModelCard) -> str:
    if card.evaluation is None:
        return f"Not judged: {card.not_judged or 'there was no result of `dinoct-eval`'}."
    encoder, untrained = card.evaluation["encoder"], card.evaluation["untrained"]
    verdict = "".join(f"- {line}\n" for line in card.evaluation["verdict"])
    rows = "".join(f"| {name} | {value:.4g} | {_cell(untrained.get(name))} |\n" for name, value in encoder.items())
    whom = "patients that training did not see"
    if not card.evaluation.get("patients_unseen"):
        whom = "patients of whom **it is not known that training did not see them**"
    return (
        f"`{card.evaluation['file']}`: `dinoct-eval` on {whom}. {_judged_in(card)}\n\n"
        f"{verdict}\n"
        f"| figure | this encoder | untrained |\n|---|---|---|\n{rows}".rstrip()
    )


def _judged_in(card: ModelCard) -> str:
    """The windows of the figures: all encoders are judged in the same ones, which need not be the file's."""
    window = card.evaluation.get("window")
    if window is None:
        return "In which windows is not known."
    (c0, c1), (w0, w1) = window["center"], window["width"]
    low, high = middle_window(WindowConfig(**window))
    own = "which is" if (low, high) == card.window_hu else "which is not"
    return (
        f"The views had windows of {w0:g} to {w1:g} HU around {c0:g} to {c1:g} HU (`probe.window`), whole slices "
        f"{low:g} to {high:g} HU, {own} the window of this file."
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
