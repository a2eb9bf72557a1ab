"""A file has its old content or the whole new one, after an error, a full disk and a power cut."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dinoct import checkpoint, durable, rundir, turnback
from dinoct.compare import report
from dinoct.data import columns, index, masks
from dinoct.data.splits import SplitManifest
from dinoct.delivery import feature_table
from dinoct.delivery.feature_table import FeatureTable
from dinoct.errors import ConfigError
from dinoct.lineage import Line
from dinoct.viz import figures

TABLE = FeatureTable({"series": np.array(["a"]), "patient": np.array(["b"])}, np.zeros((1, 2), np.float32), {})
SPLIT = SplitManifest("id", 0, 0.5, "patient", frozenset("a"), frozenset("b"), "hash", {})


def save_columns(path: Path) -> None:
    path.with_suffix(".csv").write_text("x\n")
    columns.save_columns(path.with_suffix(".csv"), {"row": np.zeros(1, np.int32)}, {})


def rewind(path: Path) -> None:
    path.write_text('{"step": 1}\n')
    turnback.rewind(path, Line(None, 0), Line(None, 1))


WRITERS = {
    "checkpoint_00000001.pth": lambda path: checkpoint.save(path, {}, {"step": 1}),
    "config.json": lambda path: rundir.RunFolder(path.parent).write_config({"state": "done"}),
    "metrics.jsonl": rewind,
    "index.csv": lambda path: index.write_csv(path, ["a"], [["b"]]),
    "index.npy": save_columns,
    "split.json": SPLIT.save,
    "masks.npz": lambda path: masks._write(path, mask=np.zeros(1)),
    "features.npz": lambda path: feature_table.write_features(TABLE, path),
    "features.parquet": lambda path: feature_table.write_features(TABLE, path),
    "runs.csv": lambda path: report.write(str(path), "text"),
    "heatmap.png": lambda path: figures.save(Figure(), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_power_cut_finds_the_old_version_or_the_new_one(tmp_path, monkeypatch, name):
    """Its content is on the disk before it has the name, and the name is before anybody goes on."""
    seen = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append((str(old), str(new))), replace(old, new)))
    WRITERS[name](tmp_path / name)
    temporary = next(old for old, new in (pair for pair in seen if isinstance(pair, tuple)) if new.endswith(name))
    assert seen[-3:] == [temporary, (temporary, str(tmp_path / name)), str(tmp_path)]


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_for_whom_the_umask_says(tmp_path, name):
    """A group that shares a data set reads its masks too; who hides files has them hidden."""
    before = os.umask(0o027)
    try:
        WRITERS[name](tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_old_version_and_nothing_beside_it(tmp_path, monkeypatch):
    def full(figure, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "heatmap.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        figures.save(Figure(), tmp_path / "heatmap.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_table_of_runs_goes_where_it_is_told(tmp_path, capfd):
    """Into the file that a link points to, and into what is no file without putting one in its place."""
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    report.write(str(tmp_path / "link.csv"), "new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "new"
    report.write("/dev/stdout", "said")
    assert capfd.readouterr().out == "said"
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write(str(tmp_path), "text")


def test_a_disk_that_is_gone_says_so_itself(tmp_path, monkeypatch):
    """Not the clearing away behind it."""

    def gone(path, missing_ok=False):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "unlink", gone)
    with pytest.raises(OSError, match="Input/output error"), durable.replacing(tmp_path / "a"):
        raise OSError(errno.EIO, "Input/output error")
