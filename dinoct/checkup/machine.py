"""Facts about the machine: memory, cores, disks. Where the system does not tell, the answer is ``None``."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
SHM = Path("/dev/shm")
TEST_FILE = 64 * 2**20  # bytes


class Space(NamedTuple):
    """Bytes of a memory or a disk."""

    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"


def size_text(count: float) -> str:
    """Bytes as a person says them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.0f} kB"


def ram() -> Space | None:
    """Memory that processes may take: the machine's, or what is left to this container."""
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = table["MemAvailable"], table["MemTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    with suppress(OSError, ValueError, KeyError):  # "max" is no number: no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat["inactive_file"])  # cache that gives way
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return Space(free, total)


def card_memory() -> Space:
    """Memory of the card that torch takes, what this process holds but does not use counted as free.

    A card that shares the host's memory may say that more is free than it has, and than the host has.
    """
    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    host = ram()
    if host is not None and torch.cuda.get_device_properties(torch.cuda.current_device()).is_integrated:
        free = min(free, total, host.free)
    return Space(free, total)


def card_room() -> int:
    """Bytes of the card that this process may have in all, those that it has included."""
    return card_memory().free + torch.cuda.memory_allocated()


def usable_cores() -> float:
    """Cores that this process may use: fewer than the machine has under taskset, Slurm or a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists: where its disk can be asked."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def disk(path: Path) -> Space:
    """Free and total space of the disk that `path` is on or would be on. Raises OSError where it is gone."""
    usage = shutil.disk_usage(existing_parent(path))
    return Space(usage.free, usage.total)


def disk_speed(folder: Path, *, size: int = TEST_FILE) -> tuple[float, float]:
    """Write and read a temporary file of `size` bytes in `folder`; it is removed.

    Returns:
        Bytes per second of writing with fsync, and of reading with the system's cache dropped where it allows that.
    Raises:
        OSError: where the folder cannot be written or is full.
    """
    block = os.urandom(min(size, 2**22))  # compressed file systems are not fooled
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(0, size, len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        wrote = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        read = time.perf_counter() - start
    return size / max(wrote, 1e-9), size / max(read, 1e-9)
