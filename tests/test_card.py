"""An update on a card, without the card: torch's fake tensors know device, type and shape, and have no content.

They show what no machine without a card shows otherwise: an operation on tensors of two devices, and a host that
waits for the device (``item``, ``bool``, a size that depends on content, a copy). torch runs no backward pass on a
card that is not there, so gradients are made up; all else of `Engine.update` is dinoct's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch
from test_memory import IBOT, settings
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dinoct.checkup.batchsize import synthetic_batch
from dinoct.engine import Engine, TrainingError
from dinoct.guard import FiniteGuard
from dinoct.hardware import resolve
from dinoct.models.ssl import SelfDistillation
from dinoct.optim import build_optimizer
from dinoct.parallel import Parallel
from dinoct.schedules import Schedules

CARD = torch.device("cuda", 0)
MULTICROP = ["aug=multicrop", "aug.local_size=48"]


class Copies(TorchDispatchMode):
    """Notes the copies between devices: (from, to, elements)."""

    def __init__(self, expected: list[tuple[str, str, int]]):
        super().__init__()
        self.found: list[tuple[str, str, int]] = []
        self.expected = expected

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        source = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}.get(func.overloadpacket)
        if source is not None and args[source].device != out.device:
            self.found.append((args[source].device.type, out.device.type, out.numel()))
        return out


@contextmanager
def fake_card() -> Iterator[FakeTensorMode]:
    """torch believes that there is a card."""
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        patch("torch.cuda.Event", Mock),
        patch.object(FiniteGuard, "settle", lambda guard: None),  # the one place that waits, a step later
        patch("torch.autograd.grad", lambda _, parameters, **__: [torch.empty_like(p) for p in parameters]),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        yield mode


def updates(*overrides: str, steps: int = 2) -> tuple[dict, Copies]:
    """What the last of some updates gives the log, and the copies of all of them."""
    cfg = settings(*overrides)
    hardware = replace(
        resolve(cfg.hardware), platform="cuda", device=CARD, batch_size=4, accumulation_steps=2, amp=True
    )
    batch = synthetic_batch(cfg, hardware.batch_size)
    with torch.device("meta"):
        model = SelfDistillation(cfg.model, cfg.loss, grad_checkpoint=cfg.train.grad_checkpoint)
    model._taken_at = 0  # what the host knows of a Gram teacher from the start on
    with fake_card() as mode:
        model.to_empty(device=CARD).train()
        model.teacher.eval()
        weights = list(model.student.parameters())

        def backward(loss: torch.Tensor) -> None:
            assert loss.device == CARD
            for weight in weights:
                weight.grad = torch.empty_like(weight)

        engine = Engine.__new__(Engine)  # without run folder, data and judging: update needs none of them
        engine.cfg, engine.model, engine.hardware, engine.parallel = cfg, model, hardware, Parallel()
        engine.optimizer = build_optimizer(model.student, depth=cfg.model.depth, cfg=cfg.optim)
        engine.schedules = Schedules(cfg.optim, cfg.loss.dino, 100)
        engine.records = Mock(waited=0.0, due=lambda *_, **__: True)
        engine.guard, engine._forward = FiniteGuard(CARD, engine.optimizer), model
        engine.step = engine.samples_seen = 0
        sent = [("cpu", "cuda", value.numel()) for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        with patch.object(torch.Tensor, "backward", backward), Copies(sent * 2 * steps) as copies:
            for _ in range(steps):
                scalars = engine.update(iter([batch._map(mode.from_tensor) for _ in range(2)]))
    return scalars, copies


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*MULTICROP, *IBOT, "train.grad_checkpoint=true", "loss.gram.teacher=lagged", "loss.gram.teacher_px=192"],
        [*MULTICROP, "loss.dino.centering=softmax", "loss.gram.teacher=snapshot", "loss.koleo.weight=0"],
    ],
    ids=["default", "all terms", "softmax, snapshot"],
)
def test_an_update_stays_on_the_card_and_never_waits_for_it(overrides):
    scalars, copies = updates(*overrides)
    tensors = {name: value for name, value in scalars.items() if isinstance(value, torch.Tensor)}
    assert {"loss/gram", "Train/gradient_norm", "Train/gram_gradient_share"} <= set(tensors)
    assert {value.device for value in tensors.values()} == {CARD}
    to_host = [copy for copy in copies.found if copy[:2] == ("cuda", "cpu")]
    assert to_host == [("cuda", "cpu", 1)] * 2  # the verdict of each update, whether it was finite: not waited for
    assert [copy for copy in copies.found if copy[0] == "cpu"] == copies.expected  # the micro-batches, and nothing else


def test_behind_a_lost_rank_nothing_is_waited_for():
    """The card's queue stands still for good; what it holds is no finished step, so nothing is saved either."""
    engine = Engine.__new__(Engine)
    engine.hardware = replace(resolve(settings().hardware), platform="cuda", device=CARD)
    engine.step = 7
    with pytest.raises(TrainingError, match=r"step 8: another rank is gone .*resume=auto"):
        engine._rescue(RuntimeError("[gloo/transport/tcp] Connection closed by peer"))


def test_waiting_for_the_card_is_noticed(monkeypatch):
    plain = SelfDistillation._losses
    monkeypatch.setattr(
        SelfDistillation, "_losses", lambda self, *args: (terms := plain(self, *args), float(terms.total.detach()))[0]
    )
    with pytest.raises(DataDependentOutputException):
        updates()


def test_a_tensor_on_the_wrong_device_is_noticed(monkeypatch):
    plain = SelfDistillation._koleo
    monkeypatch.setattr(SelfDistillation, "_koleo", lambda self, views, groups: plain(self, views, groups.cpu()))
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        updates()
