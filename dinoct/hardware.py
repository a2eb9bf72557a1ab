"""What the machine is, and what `auto` made of it: every value that was filled is kept with its reason."""

import os
import platform
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dinoct.config import HardwareConfig, StepsConfig
from dinoct.errors import ConfigError
from dinoct.validate import AUTO

EFFECTIVE_BATCH = 256  # what the learning-rate presets are for


@dataclass(frozen=True)
class Hardware:
    """Settings of one run on one machine. `reasons` says, per setting, where the value comes from."""

    platform: str  # cuda | rocm | cpu
    device: torch.device
    card: str
    num_workers: int
    pin_memory: bool
    batch_size: int
    accumulation_steps: int
    amp: bool
    threads: int
    processes: int = 1  # ranks that train together, each with these settings
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def effective_batch(self) -> int:
        """Slices of one optimiser update."""
        return self.batch_size * self.accumulation_steps * self.processes

    def autocast(self) -> torch.autocast:
        """bf16 autocast where `amp`, else a context that does nothing. Never fp16: its scaler skips steps."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def describe(self) -> dict[str, Any]:
        """Plain values for the log, config.json and the checkpoint."""
        return {
            "platform": self.platform,
            "card": self.card,
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
            "batch_size": self.batch_size,
            "accumulation_steps": self.accumulation_steps,
            "amp": "bf16" if self.amp else "off",
            "threads": self.threads,
            "processes": self.processes,
            "attention": attention_backend(self.platform, self.amp),
        }

    def lines(self) -> list[str]:
        """One line per setting, with its reason, for the console."""
        return [
            f"{key:<18} {value!s:<14} {self.reasons.get(key, '')}".rstrip() for key, value in self.describe().items()
        ]


def detect_platform() -> str:
    """cuda, rocm or cpu, as this torch build and this machine have it."""
    if torch.cuda.is_available():
        return "rocm" if torch.version.hip else "cuda"
    return "cpu"


def settle(hardware: Hardware) -> None:
    """Set this process up for the hardware: threads, and what else would be left to a container's settings.

    float32 products are float32: some images switch them to TF32. cuDNN's attention, which torch prefers on Hopper, is
    left out: reports of NaN in its backward pass are open (NVIDIA/cudnn-frontend issue 1072), and flash is there.
    """
    torch.set_num_threads(hardware.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_backend(platform_name: str, amp: bool) -> str:
    """The kernel that scaled_dot_product_attention may take here."""
    if platform_name == "cpu":
        return "sdpa (cpu)"
    experimental = platform_name == "rocm" and not rocm_architecture().startswith("gfx9")  # consumer cards and APUs
    if experimental and os.environ.get("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL") != "1":
        return "math (slow): set TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1"
    if not amp:
        return "sdpa (float32: no flash kernel)"
    return "sdpa (flash allowed)" if torch.backends.cuda.flash_sdp_enabled() else "sdpa (flash switched off)"


def keep_effective_batch(hardware: Hardware, effective: int) -> Hardware:
    """The same hardware with the accumulation that brings an update nearest to `effective` slices."""
    if hardware.effective_batch == effective:
        return hardware
    steps = max(1, round(effective / (hardware.batch_size * hardware.processes)))
    exact = "" if steps * hardware.batch_size * hardware.processes == effective else f", nearest to {effective}"
    reasons = hardware.reasons | {"accumulation_steps": f"keeps the checkpoint's effective batch{exact}"}
    return replace(hardware, accumulation_steps=steps, reasons=reasons)


def resolve(
    hardware: HardwareConfig,
    steps: StepsConfig | None = None,
    *,
    processes: int = 1,
    device: torch.device | None = None,
) -> Hardware:
    """Fill every value that is null or auto. On a card ``train.batch_size=auto`` is the preset's until it was tried out
    (`dinoct.checkup.batchsize`). Of several `processes` on this machine each gets its share of the cores, and its
    `device`.

    Raises:
        ConfigError: if a device is asked for that is not there, or a number is out of range.
    """
    for key, least in (("batch_size", 1), ("threads", 1), ("num_workers", 0)):
        value = getattr(hardware, key)
        if value is not None and value < least:
            raise ConfigError(f"hardware.{key} must be at least {least}, not {value}")
    steps = steps or StepsConfig()
    reasons: dict[str, str] = {}
    found = detect_platform()
    name = found if hardware.device == "auto" else hardware.device
    reasons["platform"] = "detected" if hardware.device == "auto" else f"hardware.device={hardware.device}"
    if name != "cpu" and found != name:
        raise ConfigError(
            f"hardware.device={name} was asked for, but torch {torch.__version__} finds {found} here: "
            "take hardware.device=auto or hardware.device=cpu"
        )
    if processes > 1:
        reasons["processes"] = "ranks, each with these settings"
    preset = f"hardware={hardware.name}"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if processes > 1 else 1
    cores = max(1, (os.cpu_count() or 1) // here)

    def pick(key: str, typed: Any, recommended: Any, source: str, auto: Any, reason: str) -> Any:
        if typed is not None:
            reasons[key] = f"{source or 'hardware'}.{key}"
            return typed
        if recommended is not None:
            reasons[key] = preset
            return recommended
        reasons[key] = f"auto: {reason}"
        return auto

    limits = {"cuda": 8, "rocm": 16, "cpu": 2}
    workers = min(limits[name], max(cores - 1, 0))
    batch = {"cuda": 64, "rocm": 128, "cpu": 32}[name]
    amp = name != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    typed_batch = None if steps.batch_size == AUTO else steps.batch_size
    batch_size = pick("batch_size", typed_batch, hardware.batch_size, "train", batch, f"recommended on {name}")
    if steps.batch_size == AUTO and name == "cpu":
        source = reasons["batch_size"].removeprefix("auto: ")
        reasons["batch_size"] = f"auto: {source}; not tried out on the CPU, where too much swaps and does not fail"
    return Hardware(
        platform=name,
        device=device or torch.device("cpu" if name == "cpu" else "cuda"),
        card=card_name(name),
        num_workers=pick("num_workers", hardware.num_workers, None, "", workers, f"{cores} cores, {name}"),
        pin_memory=pick("pin_memory", hardware.pin_memory, None, "", name == "cuda", f"{name} memory"),
        batch_size=batch_size,
        accumulation_steps=pick(
            "accumulation_steps",
            steps.accumulation_steps,
            None,
            "train",
            max(1, round(EFFECTIVE_BATCH / (batch_size * processes))),
            f"effective batch near {EFFECTIVE_BATCH}",
        ),
        amp=pick("amp", steps.amp, None, "train", amp, "bf16 where the device has it"),
        threads=pick("threads", hardware.threads, None, "", max(1, torch.get_num_threads() // here), "torch's default"),
        processes=processes,
        reasons=reasons,
    )


def rocm_architecture() -> str:
    """AMD's name of the card's architecture, such as gfx1151; empty where there is no such card."""
    if not torch.version.hip or not torch.cuda.is_available():
        return ""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName


def card_name(platform_name: str) -> str:
    """The card's name, or the processor's."""
    return platform.processor() or platform.machine() if platform_name == "cpu" else torch.cuda.get_device_name()
