"""Was the step finite? Asked without making the device wait."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepNote:
    """What is needed to say what went wrong in a step, and to take it back."""

    step: int  # updates finished before it
    samples_seen: int
    rng: dict[str, Any]  # before it
    positions: list[int]
    losses: dict[str, Tensor]


class FiniteGuard:
    """Holds each step's verdict until the host can read it for free.

    On the CPU that is at once, before the optimiser moves. On a card the verdict travels to the host while the next
    step is queued, and the optimiser is told on the device to skip a step that was not finite: the weights stay
    those of the last healthy step until the host knows, one step later. Of an optimiser that cannot be told, the host
    waits for the verdict there too.
    """

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer):
        self.deferred = device.type == "cuda" and bool(optimizer.defaults.get("fused"))
        self._pending: tuple[Tensor, torch.cuda.Event | None, StepNote] | None = None

    def put(self, finite: Tensor, note: StepNote) -> StepNote | None:
        """Take a step's verdict (0-d boolean); returns the note of a step that is now known not to be finite."""
        if not self.deferred:
            return None if finite else note
        failed = self.settle()
        if failed is None:
            event = None
            if finite.is_cuda:
                host = torch.empty((), dtype=torch.bool, pin_memory=True)
                host.copy_(finite, non_blocking=True)
                event = torch.cuda.Event(blocking=True)  # waiting for it leaves the core to the loader's workers
                event.record()
                finite = host
            self._pending = (finite, event, note)
        return failed

    def settle(self) -> StepNote | None:
        """Wait for the verdict that is under way; before anything is saved, and at the end."""
        if self._pending is None:
            return None
        (finite, event, note), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        return None if finite else note


def skip_on_device(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Make the next ``optimizer.step()`` do nothing where `finite` is false, decided on the device.

    The fused optimisers read ``found_inf`` as the gradient scaler sets it.
    """
    optimizer.found_inf = (~finite).float()
