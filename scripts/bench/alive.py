"""The memory of a training step by following every tensor of it: what dinoct's formula is held against."""

import weakref
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinoct.checkup.batchsize import synthetic_batch
from dinoct.config import TrainConfig
from dinoct.hardware import Hardware
from dinoct.models.backbone import parameter_count
from dinoct.models.ssl import SelfDistillation


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations made and that still live, and the most there ever were.

    Args:
        known: tensors that were there before, and do not count.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return out

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor's storage, once, until it dies."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)
        return tensor

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def highest(cfg: TrainConfig, hardware: Hardware, *, fake: bool = False) -> int:
    """Bytes at the highest moment of an update of two micro-batches on the CPU, without weights and gradients.

    Args:
        cfg: the run's settings.
        hardware: its batch size and mixed precision.
        fake: with tensors that have a shape and no content, for models that the machine does not hold. The sizes are
            the same.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with torch.device("meta") if fake else nullcontext():
        model = SelfDistillation(cfg.model, cfg.loss, grad_checkpoint=cfg.train.grad_checkpoint)
    batches = [synthetic_batch(cfg, hardware.batch_size) for _ in range(2)]
    with mode:
        if fake:
            model.to_empty(device="cpu")
            batches = [batch._map(mode.from_tensor) for batch in batches]
        model.train()
        model.teacher.eval()
        model._taken_at = 0
        with Alive([*model.parameters(), *model.buffers()]) as alive:
            while batches:
                batch = batches.pop()._map(alive.note)
                with hardware.autocast():
                    terms = model(batch, teacher_temperature=0.07)
                if batches:
                    model.gram_share(terms)
                terms.total.backward()
                del batch, terms
    return alive.peak - 4 * parameter_count(model.student)
