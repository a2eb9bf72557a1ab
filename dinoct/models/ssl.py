"""Student, EMA teacher and Gram teacher: crops in, the terms of the objective out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoct import losses
from dinoct.config import LossConfig, ModelConfig
from dinoct.data.batch import CropBatch
from dinoct.models.backbone import Backbone
from dinoct.models.head import PrototypeHead
from dinoct.parallel import Parallel, local


@dataclass
class LossTerms:
    """`total` and `gram` carry the gradient; `scalars` are detached 0-d tensors for the log."""

    total: Tensor
    gram: Tensor
    scalars: dict[str, Tensor]


class Network(nn.Module):
    """Backbone and heads: one side of the distillation."""

    def __init__(self, model: ModelConfig, loss: LossConfig, *, drop_path: float, grad_checkpoint: bool | str):
        super().__init__()
        self.backbone = Backbone(model, drop_path=drop_path, grad_checkpoint=grad_checkpoint)
        dims = {"out_dim": loss.out_dim, "hidden_dim": loss.hidden_dim, "bottleneck_dim": loss.bottleneck_dim}
        self.dino_head = PrototypeHead(model.dim, **dims)
        self.ibot_head = PrototypeHead(model.dim, **dims) if loss.ibot.weight else None


class SelfDistillation(nn.Module):
    """The whole objective. State that moves once per update (teacher, centres, Gram teacher) moves in `end_update`."""

    def __init__(self, model: ModelConfig, loss: LossConfig, *, grad_checkpoint: bool | str = False):
        super().__init__()
        self.cfg = loss
        self.parallel = Parallel()  # one process; where several ranks train, the run puts theirs here
        self.student = Network(model, loss, drop_path=model.drop_path, grad_checkpoint=grad_checkpoint)
        self.student.backbone.mask_token.requires_grad_(loss.ibot.weight > 0)
        self.teacher = Network(model, loss, drop_path=0.0, grad_checkpoint=False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.gram_teacher = None if loss.gram.teacher == "ema" else copy.deepcopy(self.teacher.backbone)
        self.register_buffer("gram_taken_at", torch.zeros((), dtype=torch.int64))
        self._taken_at: int | None = None  # the same for the host, which need not ask the device each step
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_taken_at", None))
        for name in ("dino", "ibot"):
            self.register_buffer(f"{name}_center", torch.zeros(loss.out_dim))
            self.register_buffer(f"{name}_center_sum", torch.zeros(loss.out_dim), persistent=False)
            self.register_buffer(f"{name}_center_count", torch.zeros(()), persistent=False)

    @property
    def backbones(self) -> list[Backbone]:
        """The student's, the EMA teacher's, and the Gram teacher's, where it has one of its own."""
        return [side for side in (self.student.backbone, self.teacher.backbone, self.gram_teacher) if side is not None]

    def forward(self, batch: CropBatch, *, teacher_temperature: float) -> LossTerms:
        """Losses of one micro-batch; no state moves except the sums for the centres.

        The networks run in whatever autocast is on; the losses are computed in float32 outside of it.
        """
        n_slices = len(batch.groups)
        teacher = self._teach(batch, teacher_temperature)
        cls, patches = self.student.backbone(batch.global_crops, batch.masks)
        all_cls = cls
        if batch.local_crops is not None:
            all_cls = torch.cat([cls, self.student.backbone(batch.local_crops, class_only=True)[0]])
        logits = self.student.dino_head(all_cls).float().unflatten(0, (-1, n_slices))  # [Vg + Vl, B, K]
        masked = None
        if self.student.ibot_head is not None:
            masked = self.student.ibot_head(patches.flatten(0, 1)[batch.masked])  # [M, K], M may be 0
        with torch.autocast(cls.device.type, enabled=False):
            return self._losses(batch, teacher, cls, patches, logits, masked)

    def _losses(
        self,
        batch: CropBatch,
        teacher: "TeacherOutput",
        cls: Tensor,
        patches: Tensor,
        logits: Tensor,
        masked: Tensor | None,
    ) -> LossTerms:
        """The terms from the student's class tokens ``[Vg * B, D]``, patch tokens, and prototype scores."""
        cfg, n_slices = self.cfg, len(batch.groups)
        gram = losses.gram_loss_per_patch(patches, teacher.gram_patches)  # [Vg * B, P]
        terms = {
            "dino": losses.cross_entropy_pairs(
                student_logits=logits,
                teacher_probs=teacher.probs.unflatten(0, (-1, n_slices)),
                student_temperature=cfg.dino.student_temperature,
            ),
            "koleo": self._koleo(cls.split(n_slices), batch.groups),
            "gram": gram.mean(),
        }
        if masked is not None:
            terms["ibot"] = losses.masked_cross_entropy(
                student_logits=masked,
                teacher_probs=teacher.patch_probs,
                weights=batch.mask_weights,
                n_images=len(cls),
                student_temperature=cfg.dino.student_temperature,
            )
        total = sum(getattr(cfg, name).weight * value for name, value in terms.items())
        scalars = {f"loss/{name}": value.detach() for name, value in terms.items()} | {"loss/total": total.detach()}
        with torch.no_grad():
            scalars |= distribution_gauges(logits, teacher.probs, terms["dino"], cfg.dino.student_temperature)
            scalars |= feature_gauges(teacher.cls)
            if masked is not None:
                scalars |= gram_gauges(gram, batch.masks)
        return LossTerms(total, terms["gram"], scalars)

    def _koleo(self, views: Sequence[Tensor], groups: Tensor) -> Tensor:
        """Summed over the views ``[B, D]``; neighbours are looked for among the slices of all ranks."""
        ranks = self.parallel
        groups = ranks.rows(groups)
        return ranks.own(sum(losses.koleo_loss(ranks.rows(view.float()), groups=groups) for view in views))

    def gram_share(self, terms: LossTerms) -> Tensor:
        """Norm of the weighted Gram term's gradient over the whole gradient's, in the last block; 0-d."""
        last = list(self.student.backbone.vit.blocks[-1].parameters())

        def norm(loss: Tensor) -> Tensor:
            grads = torch.autograd.grad(loss, last, retain_graph=True, allow_unused=True)
            return nn.utils.get_total_norm([g for g in grads if g is not None])

        return (self.cfg.gram.weight * norm(terms.gram) / norm(terms.total).clamp_min(1e-12)).detach()

    @torch.no_grad()
    def _teach(self, batch: CropBatch, temperature: float) -> "TeacherOutput":
        cls, patches = self.teacher.backbone(batch.global_crops)
        logits = self.teacher.dino_head(cls).float()  # [Vg * B, K]
        out = TeacherOutput(cls.float(), self._target("dino", logits, temperature), self._gram_patches(batch, patches))
        if self.teacher.ibot_head is not None:
            masked = self.teacher.ibot_head(patches.flatten(0, 1)[batch.masked]).float()  # [M, K]
            out.patch_probs = self._target("ibot", masked, temperature)
        return out

    def _gram_patches(self, batch: CropBatch, patches: Tensor) -> Tensor:
        """The Gram teacher's patch tokens ``[Vg * B, P, D]`` on the student's grid; `patches` are the EMA teacher's."""
        waiting = self.cfg.gram.teacher == "snapshot" and not self.taken_at()
        own = self.gram_teacher is None or waiting
        if batch.gram_crops is None:
            return patches if own else self.gram_teacher(batch.global_crops)[1]
        fine = (self.teacher.backbone if own else self.gram_teacher)(batch.gram_crops)[1]
        return losses.resize_patches(fine, patches=patches.shape[1])

    def _target(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        """Teacher logits ``[N, K]`` to probabilities; notes the sum for the centre."""
        getattr(self, f"{name}_center_sum").add_(logits.sum(dim=0))
        getattr(self, f"{name}_center_count").add_(len(logits))
        if self.cfg.dino.centering == "sinkhorn":
            return losses.sinkhorn_knopp(logits, temperature=temperature, over_ranks=self.parallel.logsumexp)
        return losses.center_softmax(logits, center=getattr(self, f"{name}_center"), temperature=temperature)

    def gather_sums(self) -> None:
        """Add the sums for the centres up over the ranks: before the optimiser moves, so nothing waits behind it."""
        for name in ("dino", "ibot"):
            self.parallel.sum_(getattr(self, f"{name}_center_sum"), getattr(self, f"{name}_center_count"))

    @torch.no_grad()
    def end_update(self, *, step: int, horizon: int, momentum: float, finite: Tensor | None = None) -> None:
        """After the optimiser moved: EMA teacher, centres, and the Gram teacher's age. `step` counts this update.

        Where `finite` (0-d boolean that the host does not know yet) is false, the update was skipped on the device and
        nothing moves here.
        """
        teacher, student = ([local(p) for p in side.parameters()] for side in (self.teacher, self.student))
        if finite is None:
            torch._foreach_lerp_(teacher, student, 1.0 - momentum)
        else:
            weight = (1.0 - momentum) * finite
            for own, other in zip(teacher, student, strict=True):
                own.lerp_(other, weight)
        for name in ("dino", "ibot"):
            total, count = getattr(self, f"{name}_center_sum"), getattr(self, f"{name}_center_count")
            center = getattr(self, f"{name}_center")
            usable = count > 0 if finite is None else (count > 0) & finite
            mean = torch.where(usable, total / count.clamp_min(1), center)
            center.lerp_(mean, 1.0 - self.cfg.dino.center_momentum)
            total.zero_()
            count.zero_()
        self._renew_gram_teacher(step, horizon, momentum, finite)

    def gram_teacher_age(self, step: int) -> float:
        """Updates since the Gram teacher was taken; the EMA teacher is always of now."""
        waiting = self.cfg.gram.teacher == "snapshot" and not self.taken_at()
        return 0.0 if self.gram_teacher is None or waiting else float(step - self.taken_at())

    def discard_update(self) -> None:
        """Forget the sums of an update that did not happen."""
        for name in ("dino", "ibot"):
            getattr(self, f"{name}_center_sum").zero_()
            getattr(self, f"{name}_center_count").zero_()

    def _renew_gram_teacher(self, step: int, horizon: int, momentum: float, finite: Tensor | None) -> None:
        """Take a new copy when it is due. Only then the host waits for a verdict that is still on the device."""
        if self.gram_teacher is None:
            return
        gram, taken = self.cfg.gram, self.taken_at()
        if gram.teacher == "lagged":  # never younger than the EMA's own memory
            due = step - taken >= max(gram.lag * step, 1.0 / max(1.0 - momentum, 1e-4))
        else:  # until then the EMA teacher stands in
            due = not taken and step >= gram.snapshot_at * horizon
        if due and (finite is None or bool(finite)):
            self.gram_teacher.load_state_dict(self.teacher.backbone.state_dict())
            self.gram_taken_at.fill_(step)
            self._taken_at = step

    def forget_gram_teacher(self) -> None:
        """It was taken by the rule of another ``loss.gram.teacher``: by this one's, none was taken yet."""
        self.gram_taken_at.zero_()
        self._taken_at = None

    def taken_at(self) -> int:
        """The step at which the Gram teacher was taken, as the host knows it; 0: at the start."""
        if self._taken_at is None:
            self._taken_at = int(self.gram_taken_at)
        return self._taken_at


@dataclass
class TeacherOutput:
    cls: Tensor  # [Vg * B, D] float32
    probs: Tensor  # [Vg * B, K]
    gram_patches: Tensor  # [Vg * B, P, D]
    patch_probs: Tensor | None = None  # [M, K]


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    return -torch.special.xlogy(probs, probs).sum(dim=-1)


def distribution_gauges(
    student_logits: Tensor, teacher_probs: Tensor, cross_entropy: Tensor, student_temperature: float
) -> dict[str, Tensor]:
    """How the prototypes are used. Near ln K on both sides the loss cannot fall; a marginal near 0 is a collapse."""
    student_probs = F.softmax(student_logits[:1] / student_temperature, dim=-1)
    teacher_entropy = entropy(teacher_probs).mean()
    return {
        "Train/Entropy_Teacher": teacher_entropy,
        "Train/Entropy_Student": entropy(student_probs).mean(),
        "Train/Entropy_Marginal": entropy(teacher_probs.mean(dim=0)),
        "Train/KL": cross_entropy.detach() - teacher_entropy,
    }


def gram_gauges(per_patch: Tensor, masks: Tensor | None) -> dict[str, Tensor]:
    """Gram loss on masked and on seen patches, both ``[Vg * B, P]``; 0 where there are none."""
    masked = torch.zeros_like(per_patch) if masks is None else masks.float()
    return {
        "Train/gram_masked": (per_patch * masked).sum() / masked.sum().clamp_min(1),
        "Train/gram_seen": (per_patch * (1 - masked)).sum() / (1 - masked).sum().clamp_min(1),
    }


def feature_gauges(cls: Tensor) -> dict[str, Tensor]:
    """Spread of the teacher's features over the batch.

    ``feature_std`` is the standard deviation of the L2-normalised features per dimension times sqrt(D): 1 when they
    point everywhere, 0 when all are the same. ``feature_std_raw`` is the same without the factor.
    ``participation_ratio`` is (sum of the covariance's eigenvalues) squared over the sum of their squares: the number
    of directions that carry the variance, 1 for a line. It needs no decomposition.
    """
    x = F.normalize(cls, dim=-1)
    raw = x.std(dim=0, correction=0).mean()
    centred = x - x.mean(dim=0)
    gram = centred @ centred.T  # [N, N], same eigenvalues as the covariance up to a factor
    mean_cosine = (x.sum(dim=0).square().sum() - len(x)) / max(len(x) * (len(x) - 1), 1)
    return {
        "Train/feature_std": raw * cls.shape[-1] ** 0.5,
        "Train/feature_std_raw": raw,
        "Train/mean_cosine": mean_cosine,
        "Train/participation_ratio": gram.trace().square() / gram.square().sum().clamp_min(1e-24),
    }
