"""Several ranks: DDP, where each holds the whole model, and FSDP2, where each holds a share."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dinoct.parallel import Parallel, whole

# A backbone gives back views of its last tensor; nothing writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


class DataParallel(Parallel):
    """Ranks that each hold the whole model and a share of the batch (torch's DistributedDataParallel)."""

    def __init__(self, device: torch.device):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device
        self._wrapped: DistributedDataParallel | None = None

    def sum_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor)

    def logsumexp(self, x: Tensor) -> Tensor:
        return torch.logsumexp(torch.stack(self._gather(x)), dim=0)

    def rows(self, x: Tensor) -> Tensor:
        parts = self._gather(x.detach())
        parts[self.rank] = x
        return torch.cat(parts)

    def own(self, loss: Tensor) -> Tensor:
        return loss + (self.world - 1) * (loss - loss.detach())

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def wrap(self, model: nn.Module) -> Callable[..., Any]:
        # With iBOT the mask token has no gradient in a micro-batch without masks. Looking for what has none makes the
        # host wait for the card in each update.
        self._wrapped = DistributedDataParallel(
            model,
            broadcast_buffers=False,
            find_unused_parameters=model.cfg.ibot.weight > 0,
            gradient_as_bucket_view=True,
        )
        return self._wrapped

    def accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self._wrapped.no_sync()

    def mean(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        values = torch.stack([value.float() for value in scalars.values()])
        dist.all_reduce(values)
        return dict(zip(scalars, (values / self.world).unbind(), strict=True))

    def highest(self, number: int) -> int:
        value = torch.tensor(number)  # on the CPU: the card is not made to wait
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def led(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def each(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


class ShardedParallel(DataParallel):
    """Ranks that each hold a share of every block, gather it when it is used, and let it go (torch's FSDP2).

    Student, EMA teacher and Gram teacher are cut alike, so that the EMA needs no exchange.
    """

    whole = False

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._parts: list[nn.Module] = []

    def shard(self, model: nn.Module, *, amp: bool) -> None:
        mesh = dist.init_device_mesh(self.device.type, (self.world,))
        # Autocast computes attention and MLP in bf16: gather their weights so, and leave norms and the residual stream.
        halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        for backbone in model.backbones:
            for block in backbone.vit.blocks:
                for part in (block.attn, block.mlp):
                    self._parts.append(fully_shard(part, mesh=mesh, mp_policy=halved if amp else exact))
                self._parts.append(fully_shard(block, mesh=mesh, mp_policy=exact))
            self._parts.append(fully_shard(backbone, mesh=mesh, reshard_after_forward=True, mp_policy=exact))
        for side in (model.student, model.teacher):
            for head in filter(None, (side.dino_head, side.ibot_head)):
                self._parts.append(fully_shard(head, mesh=mesh, reshard_after_forward=True))

    def wrap(self, model: nn.Module) -> Callable[..., Any]:
        return model

    def accumulating(self, last: bool) -> AbstractContextManager:
        for part in self._parts:
            part.set_requires_gradient_sync(last, recurse=False)
        return nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
        return whole(nn.utils.clip_grad_norm_(parameters, largest))
