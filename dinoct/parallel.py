"""One process, and what each of its steps means where several ranks share the work (`dinoct.ranks`).

The engine and the objective are written once, against `Parallel`. One process has no process group and pays nothing.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Parallel:
    """One process."""

    rank, world = 0, 1
    device: torch.device | None = None  # None: whatever the hardware's settings name
    whole = True  # each rank holds the whole model

    @property
    def leads(self) -> bool:
        """Whether this rank writes, tracks and reports."""
        return self.rank == 0

    # --- what the objective needs -----------------------------------------------------------------------------------

    def sum_(self, *tensors: Tensor) -> None:
        """Add each tensor up over the ranks, in place."""

    def logsumexp(self, x: Tensor) -> Tensor:
        """log of the sum over the ranks of exp(x), element by element."""
        return x

    def rows(self, x: Tensor) -> Tensor:
        """Rows ``[N, ...]`` of all ranks, in their order; each brings as many. Only a rank's own carry a gradient."""
        return x

    def own(self, loss: Tensor) -> Tensor:
        """A loss over `rows`, the same on all ranks: its value stays, its gradient is such that the mean over the ranks
        is the whole gradient."""
        return loss

    # --- what the engine needs --------------------------------------------------------------------------------------

    def shard(self, model: nn.Module, *, amp: bool) -> None:
        """Cut the model into the ranks' shares, before it goes to the device and the optimiser is built."""

    def wrap(self, model: nn.Module) -> Callable[..., Any]:
        """What is called in place of the model; gradients of its parameters are the mean over the ranks."""
        return model

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of a micro-batch; gradients are exchanged in the `last` one."""
        return nullcontext()

    def mean(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars as their mean over the ranks; NaN on one rank is NaN on all."""
        return scalars

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
        """Clip the gradients to a norm of `largest`; returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, largest)

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number

    def led(self, value: Any) -> Any:
        """Rank 0's value."""
        return value

    def each(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        return [value]


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one of FSDP2's (a DTensor); asked so that one process need not import them."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    tensor = tensor.detach()
    return tensor.to_local() if sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all ranks; all of them must ask."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def like(full: Tensor, share: Tensor) -> Tensor:
    """A whole tensor, cut as `share` is: every rank takes its part of what it holds, nothing is sent."""
    if not sharded(share) or sharded(full) or full.shape != share.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(share.device), share.device_mesh, share.placements, src_data_rank=None)
