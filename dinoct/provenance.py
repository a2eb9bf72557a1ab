"""Where a result comes from: code, data, machine."""

import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import dinoct
from dinoct.data.index import SliceIndex


def git_commit() -> str:
    """First 12 hex digits of the commit of dinoct's source, ``-dirty`` behind it where files differ, or "unknown"."""
    folder = Path(dinoct.__file__).parent

    def git(*args: str) -> str:
        run = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=30, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed inside somebody's repository is not part of it
        commit = git("rev-parse", "HEAD")[:12]
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def data_manifest_hash(train: SliceIndex, val: SliceIndex) -> str:
    """16 hex digits that change with any slice to train on and any move of a patient between the sides."""
    digest = hashlib.sha256(train.content_hash().encode())
    for side in (train, val):
        digest.update(b"|" + ",".join(sorted(side.patients)).encode())
    return digest.hexdigest()[:16]


def data_seen(meta: Mapping[str, Any]) -> list[str | None]:
    """`data_manifest_hash` of all that a checkpoint's weights were trained on, None among them where some is not known.

    Earlier versions wrote down that of the last start alone.
    """
    if "data_seen" in meta:
        return meta["data_seen"]
    known = meta.get("train_patients") and not meta["config"]["model"].get("init_from")
    return [meta["data_manifest_hash"]] if known else [None]


def driver_version() -> str | None:
    """The card's kernel driver, where the system tells."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with suppress(OSError):
            return Path(path).read_text(encoding="utf-8").splitlines()[0].strip()
    return None


def environment() -> dict[str, Any]:
    """Versions that a result can depend on."""
    return {
        "dinoct": dinoct.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "hip": torch.version.hip,
        "driver": driver_version(),
        "system": sys.platform,
    }
