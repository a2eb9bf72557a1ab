"""Checks of ``dinoct-doctor`` on the machine: torch, card, attention, compiling, processor, memory, disk."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from dinoct.checkup import machine
from dinoct.checkup.findings import FAIL, OK, WARN, Finding
from dinoct.checkup.machine import size_text
from dinoct.config import HardwareConfig
from dinoct.errors import ConfigError
from dinoct.faults import explain
from dinoct.hardware import Hardware, attention_backend, resolve, settle
from dinoct.provenance import driver_version

NOT_RUN = "not run: no ROCm card was there to try it on"
NVIDIA, AMD = Path("/proc/driver/nvidia/version"), Path("/dev/kfd")  # there where the driver is loaded
BUSY_CARD = 0.2  # share of the card that others hold, from which it is said
LEAST_RAM, LEAST_SHM, LEAST_DISK = 4e9, 1e9, 20e9
SLOW_DISK = 50e6  # bytes per second


def torch_build() -> Iterator[Finding]:
    """Which torch this is, and whether it is one for the card whose driver is there."""
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else kind
    text = f"{torch.__version__} ({kind})"
    nvidia, amd = NVIDIA.exists(), AMD.exists()
    if nvidia and not torch.version.cuda:
        yield Finding(WARN, "torch", f"{text}, beside an NVIDIA driver", "install a CUDA build: pytorch.org")
    elif amd and not nvidia and not torch.version.hip:
        yield Finding(WARN, "torch", f"{text}, beside an AMD driver", f"install AMD's build of torch ({NOT_RUN})")
    elif (nvidia or amd) and not torch.cuda.is_available():
        todo = "the driver may be too old for this build, or the device closed to this user or container"
        yield Finding(WARN, "torch", f"{text}, and it finds no card beside the driver", todo)
    else:
        yield Finding(OK, "torch", text)
    yield Finding(OK, "driver", driver_version() or "no card's driver is loaded")


def hardware(cfg: HardwareConfig) -> Iterator[Finding]:
    """Card, its memory, bf16 and attention, as a run with these settings would have them."""
    try:
        found = resolve(cfg)
    except ConfigError as error:
        yield Finding(FAIL, "card", str(error))
        if cfg.device == "rocm":
            yield rocm_attention(amp=True)
        return
    if found.platform == "cpu":
        yield Finding(OK, "card", f"none: runs go to the CPU ({found.reasons['platform']})")
        yield Finding(OK, "bf16", "off: float32 on the CPU")
    else:
        yield Finding(OK, "card", f"{found.card} ({found.platform}, {found.reasons['platform']})")
        room = machine.card_memory()
        busy = room.free < (1 - BUSY_CARD) * room.total
        todo = "other processes hold the rest: nvidia-smi or rocm-smi names them" if busy else ""
        yield Finding(WARN if busy else OK, "card memory", str(room), todo)
        text = "mixed precision is on" if found.amp else "the card has none: float32, twice the memory, and slow"
        yield Finding(OK if found.amp else WARN, "bf16", text)
    yield attention(found)
    if found.platform != "cpu":  # on the CPU it is hardly worth its time
        yield compiling(found.device)


def attention(found: Hardware) -> Finding:
    """Runs scaled_dot_product_attention on the device, and says which kernel it took."""
    if found.platform == "rocm":
        hint = rocm_attention(amp=found.amp)
        if hint.level != OK:
            return hint
    settle(found)  # as a run does
    dtype = torch.bfloat16 if found.amp else torch.float32
    kernel = attention_kernel(found.device, dtype)
    text = f"{kernel} kernel for {str(dtype).removeprefix('torch.')}, tried out on the {found.platform}"
    if kernel == "math" and found.platform != "cpu":
        todo = "slow, and its memory grows with the square of the tokens: take another torch build, or train.amp=true"
        return Finding(WARN, "attention", text, todo)
    return Finding(OK, "attention", text)


def compiling(device: torch.device) -> Finding:
    """Compiles a small function for the device, forward and backward: train.compile=true needs that to work."""
    try:
        small = torch.compile(lambda x: F.gelu(x).sum())
        small(torch.randn(8, 8, device=device, requires_grad=True)).backward()
    except Exception as error:  # a compiler, Python's headers, or Triton may be missing, and each says so its own way
        todo = "to have shorter steps, install a C++ compiler and Python's headers (Debian: g++ python3-dev)"
        return Finding(OK, "torch.compile", explain(error), todo)
    return Finding(OK, "torch.compile", f"tried out on the {device.type}: train.compile=true makes steps shorter")


def rocm_attention(*, amp: bool) -> Finding:
    """What is known of ROCm without trying it."""
    says = attention_backend("rocm", amp)
    if says.startswith("math"):
        return Finding(WARN, "attention", says, f"export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 ({NOT_RUN})")
    return Finding(OK, "attention", f"{says} ({NOT_RUN})")


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """flash, efficient, cudnn or math: what attention of a ViT's shape ran on, by the name of its gradient."""
    query = torch.randn(2, 16, 261, 64, device=device, dtype=dtype, requires_grad=True)
    nodes = [F.scaled_dot_product_attention(query, query, query).grad_fn]
    while nodes:  # a fused kernel is one node of the graph, perhaps behind a view
        node = nodes.pop()
        name = type(node).__name__.lower()
        if "scaleddotproduct" in name:
            return next((kernel for kernel in ("flash", "efficient", "cudnn") if kernel in name), name)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return "math"


def processor(cfg: HardwareConfig) -> Iterator[Finding]:
    """Cores that there are, may be used, and are asked for."""
    try:
        found = resolve(cfg)
    except ConfigError:  # said by `hardware`
        found = resolve(replace(cfg, device="cpu"))
    cores, usable = os.cpu_count() or 1, machine.usable_cores()
    text = f"{cores} cores; hardware.threads={found.threads}, hardware.num_workers={found.num_workers}"
    if usable < cores:
        text += f"; {usable:g} cores may be used here (a container's quota, Slurm or taskset)"
    todo = []
    if found.threads > usable:
        todo.append(f"hardware.threads={max(1, int(usable))}")
    if found.num_workers > usable:
        todo.append(f"hardware.num_workers={max(1, int(usable) - 1)}")
    yield Finding(WARN if todo else OK, "processor", text, " ".join(todo))


def memory() -> Iterator[Finding]:
    """RAM, and the shared memory that loader workers hand their batches over in."""
    room = machine.ram()
    if room is None:
        yield Finding(OK, "memory", "the system does not tell")
    else:
        low = room.free < LEAST_RAM
        todo = "end other programs, or lower train.batch_size and hardware.num_workers" if low else ""
        yield Finding(WARN if low else OK, "memory", str(room), todo)
    if machine.SHM.is_dir():
        shared = machine.disk(machine.SHM)
        low = shared.free < LEAST_SHM
        todo = "docker run --shm-size=8g, or hardware.num_workers=0" if low else ""
        yield Finding(WARN if low else OK, "shared memory", f"{machine.SHM}: {shared}", todo)


def disks(folder: Path) -> Iterator[Finding]:
    """Space and speed of the disk that runs are written to."""
    where, room = machine.existing_parent(folder), machine.disk(folder)
    if room.free < 2 * machine.TEST_FILE:
        yield Finding(FAIL, "disk", f"{folder}: {room}", "free some space, or take run_dir on another disk")
        return
    low = room.free < LEAST_DISK
    todo = "checkpoints of a ViT-L take 5 GB each: lower ckpt.keep_last, or take run_dir on another disk" if low else ""
    yield Finding(WARN if low else OK, "disk", f"{folder}: {room}", todo)
    try:
        write, read = machine.disk_speed(where)
    except OSError as error:
        yield Finding(FAIL, "disk speed", f"{where} cannot be written: {error.strerror}", "take run_dir elsewhere")
        return
    text = f"{size_text(write)}/s written, {size_text(read)}/s read, with a file of {size_text(machine.TEST_FILE)}"
    slow = min(write, read) < SLOW_DISK
    todo = "a checkpoint of a ViT-L takes minutes: raise ckpt.every, or take run_dir on another disk" if slow else ""
    yield Finding(WARN if slow else OK, "disk speed", text, todo)
