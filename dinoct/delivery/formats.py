"""Export: the EMA teacher's backbone as one file that needs no run folder, with its model card.

    safetensors   dinoct's own, for `dinoct.load_encoder`: HU of any size in
    timm          weights for `timm.create_model`: no dinoct needed, the window is the user's to apply
    onnx          a graph: HU of any size in, the window inside; no Python needed

Every export is read back and compared with the encoder it came from before it gets its name.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoct.config import ExportConfig
from dinoct.console import console
from dinoct.data.pixels import HU_MAX, HU_MIN
from dinoct.delivery.card import METADATA_KEY, ModelCard, normalisation, to_markdown
from dinoct.delivery.encoder import HOLDS_ENCODER, Encoder, Features, load_encoder
from dinoct.delivery.onnx_graph import require_onnx, run_onnx, write_onnx
from dinoct.durable import sync_folder
from dinoct.errors import ConfigError, DinoctError

TOLERANCE = 1e-4  # largest difference of a feature between the checkpoint and its export; features are of order 1
TIMM_NAME = "vit_base_patch16_224"  # any plain ViT of timm: what the shape is, the arguments say


@dataclass(frozen=True)
class Format:
    """How one format is written, read back and described."""

    ending: str
    suffix: str  # of the default name, so that formats with the same ending stand side by side
    holds: str  # what the card in the file says
    words: str  # what the card beside it says
    write: Callable[[Path, Encoder, dict[str, str]], None]
    read: Callable[[Path, Encoder, Tensor], Features]  # features of HU by the file alone, as its users get them
    howto: Callable[[ModelCard, str], str]


def export_encoder(cfg: ExportConfig) -> Path:
    """Write the encoder of `cfg.checkpoint` in `cfg.format`, and its card FILE.md beside it.

    Returns:
        The file.
    Raises:
        ConfigError, CheckpointError: naming the key to change.
        DinoctError: if the disk refuses, or the export gives other features than the checkpoint.
    """
    if cfg.format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {cfg.format}")
    form = FORMATS[cfg.format]
    if cfg.format == "onnx":
        require_onnx()
    encoder = load_encoder(cfg.checkpoint)
    out = output_path(cfg, form, encoder.card.step)
    hu = invented_slices()
    with published(out) as temporary:
        form.write(temporary, encoder, {METADATA_KEY: encoder.card.to_json(form.holds)})
        difference = largest_difference(encoder(hu), form.read(temporary, encoder, hu))
        if not difference <= TOLERANCE:
            raise DinoctError(
                f"format={cfg.format}: the export gives features that differ by {difference:.1e} from the checkpoint's "
                f"({TOLERANCE:g} is allowed), nothing was written; check the versions of torch and {cfg.format}"
            )
        card = to_markdown(encoder.card, file=out.name, holds=form.words, howto=form.howto(encoder.card, out.name))
        temporary.with_name(f"{out.name}.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in (out, data_file(out)) if path.exists())
    console.print(f"{out} ({size / 1e6:.1f} MB)", markup=False)
    console.print(f"{out}.md", markup=False)
    console.print(f"read back: features differ from the checkpoint's by {difference:.1e} at most")
    return out


def output_path(cfg: ExportConfig, form: Format, step: int) -> Path:
    """Where the export goes.

    Raises:
        ConfigError: for a wrong ending, and for a file that is there and may not be replaced.
    """
    name = f"encoder_{step:08d}{form.suffix}{form.ending}"
    out = Path(cfg.out) if cfg.out else Path(cfg.checkpoint).expanduser().parent / name
    if out.is_dir():
        out = out / name
    if out.suffix != form.ending:
        raise ConfigError(f"out={out} must end in {form.ending} for format={cfg.format}")
    taken = [path.name for path in (out, out.with_name(f"{out.name}.md"), data_file(out)) if path.exists()]
    if taken and not cfg.overwrite:
        raise ConfigError(f"out: {', '.join(taken)} in {out.parent} would be replaced: overwrite=true, or another out")
    return out


def data_file(out: Path) -> Path:
    """The second file of an ONNX graph of more than 2 GB."""
    return out.with_name(f"{out.name}.data")


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A place for `out` in a hidden folder beside it; what lies there at the end is flushed and renamed into place.

    Files of the same name are replaced one by one, `out` last, so that whoever sees it sees all of it.

    Raises:
        DinoctError: if the disk refuses.
    """
    folder = out.parent / f".{out.name}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        yield folder / out.name
        for path in sorted(folder.iterdir(), key=lambda path: path.name == out.name):
            with open(path, "rb") as file:
                os.fchmod(file.fileno(), folder.stat().st_mode & 0o666)  # as the umask has it: safetensors says 0600
                os.fsync(file.fileno())
            os.replace(path, out.parent / path.name)
        sync_folder(out.parent)
    except OSError as error:
        raise DinoctError(f"out: cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def invented_slices() -> Tensor:
    """Two slices ``[2, 1, 150, 210]`` of HU that no scanner made, not square, with everything between air and bone."""
    noise = torch.rand(2, 1, 150, 210, generator=torch.Generator().manual_seed(0))
    return HU_MIN + (HU_MAX - HU_MIN) * noise


def largest_difference(a: Features, b: Features) -> float:
    """The largest absolute difference of any feature; infinite where shapes differ."""
    if any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, path, metadata=metadata)
    except SafetensorError as error:  # what the disk refused
        raise DinoctError(f"out: cannot write {path.name}: {error}") from error


# ---- dinoct's own


def _write_own(path: Path, encoder: Encoder, metadata: dict[str, str]) -> None:
    _save(encoder.backbone.state_dict(), path, metadata)


def _read_own(path: Path, _: Encoder, hu: Tensor) -> Features:
    return load_encoder(path)(hu)


def _howto_own(card: ModelCard, file: str) -> str:
    m = card.model
    return (
        "```python\nimport torch\nimport dinoct\n\n"
        f'encoder = dinoct.load_encoder("{file}")  # .to("cuda") moves it\n'
        "hu = torch.full((1, 1, 512, 512), -1000.0)  # your slices in HU, of any size\n"
        f"cls, patches = encoder(hu)  # [1, {m['dim']}], [1, {(m['img_size'] // m['patch']) ** 2}, {m['dim']}]\n```\n\n"
        f"`pip install dinoct`. A training starts from these weights with `dinoct-train model.init_from={file}` and "
        "the same model settings."
    )


# ---- timm


def timm_arguments(model: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make ``timm.create_model(TIMM_NAME, ...)`` the architecture of a card."""
    mean, std = normalisation()
    size = model["img_size"]
    arguments = {
        "img_size": size,
        "patch_size": model["patch"],
        "in_chans": 1,
        "num_classes": 0,
        "global_pool": "",
        "embed_dim": model["dim"],
        "depth": model["depth"],
        "num_heads": model["heads"],
        "mlp_ratio": model["mlp_ratio"],
        "reg_tokens": model["registers"],
        "init_values": model["layer_scale"],
        "dynamic_img_size": True,
        "pretrained_cfg_overlay": {"input_size": (1, size, size), "mean": (mean,), "std": (std,)},
    }
    return {key: value for key, value in arguments.items() if value is not None}


def _write_timm(path: Path, encoder: Encoder, metadata: dict[str, str]) -> None:
    _save(encoder.backbone.vit.state_dict(), path, metadata)


def _read_timm(path: Path, encoder: Encoder, hu: Tensor) -> Features:
    import timm

    arguments = timm_arguments(encoder.card.model)
    model = timm.create_model(TIMM_NAME, checkpoint_path=str(path), **arguments).eval()
    mean, std = normalisation()
    with torch.inference_mode():
        tokens = model.forward_features((encoder.image(hu) - mean) / std)
    return Features(tokens[:, 0], tokens[:, model.num_prefix_tokens :])


def _howto_timm(card: ModelCard, file: str) -> str:
    m, (low, high), (mean, std) = card.model, card.window_hu, normalisation()
    size = m["img_size"]
    arguments = "\n".join(f"    {key}={value!r}," for key, value in timm_arguments(m).items()).replace("'", '"')
    return (
        "```python\nimport timm\nimport torch\n\n"
        f'model = timm.create_model(\n    "{TIMM_NAME}",\n    checkpoint_path="{file}",\n{arguments}\n).eval()\n'
        f"hu = torch.full((1, 1, {size}, {size}), -1000.0)  # your slices in HU, resized to {size} x {size}\n"
        f"low, high = {low:g}, {high:g}\n"
        "x = ((hu - low) / (high - low)).clamp(0, 1)  # the window\n"
        "with torch.inference_mode():\n"
        f"    tokens = model.forward_features((x - {mean:g}) / {std:g})  # after the final norm\n"
        f"cls, patches = tokens[:, 0], tokens[:, {1 + m['registers']}:]\n```\n\n"
        "Resize in HU, before the window. The mask token is not in this file."
    )


# ---- ONNX


def _read_onnx(path: Path, _: Encoder, hu: Tensor) -> Features:
    return Features(*(torch.from_numpy(array) for array in run_onnx(path, hu.numpy())))


def _howto_onnx(card: ModelCard, file: str) -> str:
    m = card.model
    return (
        "```python\nimport numpy as np\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{file}")\n'
        "hu = np.full((1, 1, 512, 512), -1000, np.float32)  # your slices in HU, of any size, not windowed\n"
        'cls, patches = session.run(["cls", "patches"], {"hu": hu})\n'
        f"# [1, {m['dim']}], [1, {(m['img_size'] // m['patch']) ** 2}, {m['dim']}]\n```\n\n"
        "Padding, size, window and normalisation are in the graph. Batch, height and width are free. It cannot notice "
        "that something else than HU was given. Graphs of more than 2 GB keep their weights in a second file, "
        f"`{file}.data`, which goes where this one goes."
    )


FORMATS = {
    "safetensors": Format(
        ending=".safetensors",
        suffix="",
        holds=HOLDS_ENCODER,
        words="This file is dinoct's own form: it takes HU.",
        write=_write_own,
        read=_read_own,
        howto=_howto_own,
    ),
    "timm": Format(
        ending=".safetensors",
        suffix="_timm",
        holds="weights for timm",
        words="This file holds weights for timm: the window is yours to apply.",
        write=_write_timm,
        read=_read_timm,
        howto=_howto_timm,
    ),
    "onnx": Format(
        ending=".onnx",
        suffix="",
        holds="an ONNX graph",
        words="This file is an ONNX graph: it takes HU.",
        write=write_onnx,
        read=_read_onnx,
        howto=_howto_onnx,
    ),
}
