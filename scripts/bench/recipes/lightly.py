"""lightly's DINO: the recipe of its tutorial, with its transform, head, loss and schedule."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer

from dinoct.schedules import Schedules
from recipes import Clock, Task, Trained, endless, rgb_vit


class LightlyDINO:
    """Student and teacher of the tutorial; views of one size go through the networks together."""

    def __init__(self, vit: VisionTransformer, head: dict[str, int]):
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.student, self.teacher = vit, copy.deepcopy(vit)
        self.student_head = DINOProjectionHead(input_dim=vit.embed_dim, freeze_last_layer=1, **head)
        self.teacher_head = DINOProjectionHead(input_dim=vit.embed_dim, **head)  # a start of its own, as there
        for module in (self.teacher, self.teacher_head):
            deactivate_requires_grad(module)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.student.parameters(), *self.student_head.parameters()]

    def follow(self, momentum: float) -> None:
        """Move the teacher."""
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, m=momentum)
        update_momentum(self.student_head, self.teacher_head, m=momentum)

    def loss(self, views: list[torch.Tensor], criterion: Callable, epoch: int) -> torch.Tensor:
        """Loss of views ``[B, 3, s, s]``, the two global ones first."""
        crops = torch.cat(views[:2]), torch.cat(views[2:])
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher(crops[0]))
        student = torch.cat([self.student_head(self.student(x)) for x in crops])
        return criterion(list(teacher.chunk(2)), list(student.chunk(len(views))), epoch=epoch)


@dataclass
class Plan:
    """What the two variants differ in. The functions are of (step, epoch)."""

    head: dict[str, int]
    temperature: float
    optimizer: type[torch.optim.Optimizer]
    weight_decay: float
    clip: float
    lr: Callable[[int, int], float]
    momentum: Callable[[int, int], float]
    frozen: Callable[[int, int], bool]  # the last layer of the head


def tutorial(task: Task, epochs: int) -> Plan:
    """Adam at a constant 1e-3, momentum 0.996 -> 1 by epoch, K 2048, the last layer frozen in the first epoch."""
    from lightly.utils.scheduler import cosine_schedule

    return Plan(
        head={"hidden_dim": 512, "bottleneck_dim": 64, "output_dim": 2048},
        temperature=0.04,
        optimizer=torch.optim.Adam,
        weight_decay=0.0,
        clip=float("inf"),
        lr=lambda step, epoch: 1e-3,
        momentum=lambda step, epoch: cosine_schedule(epoch, epochs, 0.996, 1),
        frozen=lambda step, epoch: epoch == 0,
    )


def tuned(task: Task, epochs: int) -> Plan:
    """dinoct's demo."""
    loss, optim = task.settings.loss, task.settings.optim
    plan = Schedules(optim, loss.dino, horizon=task.updates)
    return Plan(
        head={"hidden_dim": loss.hidden_dim, "bottleneck_dim": loss.bottleneck_dim, "output_dim": loss.out_dim},
        temperature=loss.dino.teacher_temperature,
        optimizer=torch.optim.AdamW,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        lr=lambda step, epoch: plan.lr(step),
        momentum=lambda step, epoch: plan.teacher_momentum(step),
        frozen=lambda step, epoch: plan.last_layer_frozen(step),
    )


def train(task: Task) -> Trained:
    """Train by the tutorial's loop, with the numbers of a plan."""
    from lightly.loss import DINOLoss
    from lightly.transforms import DINOTransform

    model_config = task.settings.model
    loader = task.loader(DINOTransform(global_crop_size=model_config.img_size, local_crop_size=task.local_size))
    epochs = task.epochs(loader)
    plan = (tuned if task.tuned else tutorial)(task, epochs)
    model = LightlyDINO(rgb_vit(model_config), plan.head)
    optimizer = plan.optimizer(model.parameters(), weight_decay=plan.weight_decay)
    criterion = DINOLoss(
        output_dim=plan.head["output_dim"],
        teacher_temp=plan.temperature,
        warmup_teacher_temp=plan.temperature,
        warmup_teacher_temp_epochs=5,
    )
    losses, clock = [], Clock()
    for step, (epoch, views) in enumerate(endless(loader, task.updates)):
        optimizer.param_groups[0]["lr"] = plan.lr(step, epoch)
        model.follow(plan.momentum(step, epoch))
        loss = model.loss(views, criterion, epoch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        model.student_head.cancel_last_layer_gradients(0 if plan.frozen(step, epoch) else 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    clock.stop()
    used = {"head": plan.head, "teacher_temperature": plan.temperature, "clip": str(plan.clip), "epochs": epochs}
    used |= {"optimizer": plan.optimizer.__name__, "weight_decay": plan.weight_decay}
    middle, last = task.updates // 2, task.updates - 1
    for name in ("lr", "momentum"):
        used[name] = [getattr(plan, name)(step, step // len(loader)) for step in (0, middle, last)]
    return Trained(model.teacher, model.student, used, clock, losses)
