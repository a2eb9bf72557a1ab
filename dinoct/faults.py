"""What the machine did, as one line that says what to do about it."""

import errno

import torch

from dinoct.errors import DinoctError


def explain(error: BaseException) -> str:
    """One line for an exception of the training loop."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if "Caught" in text and "DataLoader worker" in text:  # the worker's traceback comes along: its last line says it
        text = str(error).strip().splitlines()[-1]
        if "DinoctError: " in text:
            return "loading failed: " + text.split("DinoctError: ", 1)[1]
        name = "loading failed"
    elif isinstance(error, DinoctError):
        return text
    if isinstance(error, ConnectionError | EOFError):  # of the pipe between the loader and one of its workers
        return f"a loader worker died ({text[:160]}): out of memory? lower hardware.num_workers or train.batch_size"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        reason = text.split(" Set TORCH")[0][:200]
        return f"torch.compile cannot work here ({reason}): train.compile=false and optim.moments=float32 go without it"
    if is_lost_rank(error):
        return f"another rank is gone ({text[:120]})"
    if "Too many open files" in text or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return "too many open files: raise the limit (ulimit -n 65536) or lower hardware.num_workers"
    gone = [errno.EIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN]
    if getattr(error, "errno", None) in gone or any(f"[Errno {number}]" in text for number in gone):
        return f"the disk is gone or failing ({text[:120]}): check data.root and run_dir"
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return f"a loader worker died ({text[:160]}): out of memory? lower hardware.num_workers or train.batch_size"
    if "bus error" in text.lower() or "shared memory" in text.lower():
        return f"shared memory is full ({text[:120]}): raise it (docker --shm-size) or lower hardware.num_workers"
    return f"{name}: {text[:300]}" if text else name


def is_lost_rank(error: BaseException) -> bool:
    """Whether an exchange failed because another rank is gone: that one knows why."""
    text = str(error)
    if is_out_of_memory(error):  # NCCL says so by the same exception
        return False
    return isinstance(error, torch.distributed.DistBackendError | torch.distributed.DistNetworkError) or any(
        part in text for part in ("Connection closed by peer", "Connection reset by peer", "[gloo", "gloo/transport")
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory."""
    said = ("can't allocate memory", "error: out of memory", "ALLOC_FAILED")  # the host, the driver, cuBLAS and cuDNN
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in said)
