"""The folder of a run: created exclusively, locked while a process writes it, described by its config.json."""

import json
import time
from pathlib import Path
from typing import Any

from dinoct.durable import replacing_text
from dinoct.errors import ConfigError
from dinoct.locking import lock

RUNS = Path("outputs/runs")


class RunFolder:
    """A run's folder. Hold it as a context: the lock keeps a second process out."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: Any = None
        self.locked = False

    @classmethod
    def create(cls, run_dir: str | None, *, resumes: bool = False) -> "RunFolder":
        """Make the folder of a new run, or open the one that a resume goes on in.

        Raises:
            ConfigError: if a new run is pointed at a folder that holds a run.
        """
        if run_dir is None:
            return cls(_fresh_folder(RUNS))
        path = Path(run_dir)
        kept = any(path.glob("checkpoint_*.pth")) or any(path.glob("sharded_*"))
        if not resumes and (path / "config.json").exists():
            cure = f"take resume={path} to go on with it" if kept else "it ended before a checkpoint: remove the folder"
            raise ConfigError(f"run_dir={path} holds a run already: {cure}, or take another run_dir")
        if not resumes and kept:
            raise ConfigError(
                f"run_dir={path} holds checkpoints, which the run's own would replace: take another run_dir"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir={path} cannot be made: {error.strerror}") from error
        return cls(path)

    def __enter__(self) -> "RunFolder":
        try:
            self._lock = open(self.path / ".lock", "w")
            self.locked = lock(self._lock)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is training in {self.path}: stop it, or take another run_dir"
            ) from error
        except OSError as error:
            raise ConfigError(f"run_dir={self.path} cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def read_config(self) -> dict[str, Any]:
        """config.json, or an empty dict."""
        try:
            return json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def write_config(self, content: dict[str, Any]) -> None:
        """Replace config.json as a whole."""
        with replacing_text(self.path / "config.json") as file:
            file.write(json.dumps(content, indent=2) + "\n")

    def set_state(self, state: str, step: int) -> None:
        """Note how the run stands: running, done, stopped or failed."""
        self.write_config(self.read_config() | {"state": state, "step": step})


def _fresh_folder(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir is {parent}/TIME, which cannot be made: {error.strerror}") from error
    stamp = time.strftime("%Y%m%d_%H%M%S")
    for suffix in ("", *(f"_{i}" for i in range(1, 100))):
        path = parent / f"{stamp}{suffix}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"run_dir is {path}, which cannot be made: {error.strerror}") from error
    raise ConfigError(f"no free run folder in {parent}: give run_dir=...")


def newest_runs(parent: Path = RUNS) -> list[Path]:
    """Run folders, the one that was made last first, whatever they are called."""
    runs = [path for path in parent.iterdir() if (path / "config.json").is_file()] if parent.is_dir() else []
    return sorted(runs, key=lambda path: (_created(path), path.name), reverse=True)


def _created(path: Path) -> str:
    """When a run began, as its config.json says; of a broken one, when that was written."""
    config = RunFolder(path).read_config()
    written = time.localtime((path / "config.json").stat().st_mtime)
    return str(config.get("created") or time.strftime("%Y-%m-%dT%H:%M:%S", written))
