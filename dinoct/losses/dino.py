"""Self-distillation between crops (Caron et al. 2021, arXiv:2104.14294) and its two ways to centre the teacher."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def center_softmax(logits: Tensor, *, center: Tensor, temperature: float) -> Tensor:
    """Teacher probabilities by centring and sharpening.

    Args:
        logits: teacher logits ``[..., K]``.
        center: running mean of the teacher's logits ``[K]``.
        temperature: teacher temperature; lower is sharper.
    Returns:
        Probabilities ``[..., K]``, float32.
    """
    return F.softmax((logits.float() - center) / temperature, dim=-1)


def sinkhorn_knopp(
    logits: Tensor, *, temperature: float, iterations: int = 3, over_ranks: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Teacher probabilities with equal use of all prototypes over the batch (Caron et al. 2020, arXiv:2006.09882).

    Works on logarithms: no exponential is taken before the scale is known, so that logits of any size are safe.

    Args:
        logits: teacher logits ``[N, K]``; the balance is over all N rows.
        temperature: teacher temperature.
        iterations: rounds of prototype and sample normalisation.
        over_ranks: where several ranks hold rows of the batch: log of the sum over the ranks of exp, for ``[1, K]``.
    Returns:
        Probabilities ``[N, K]``, float32; rows sum to 1.
    """
    log_q = logits.float() / temperature  # [N, K]
    for _ in range(iterations):
        log_q = log_q - over_ranks(torch.logsumexp(log_q, dim=0, keepdim=True))  # every prototype the same mass
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)  # every sample mass 1
    return log_q.exp()


def cross_entropy_pairs(
    *, student_logits: Tensor, teacher_probs: Tensor, student_temperature: float, skip_same_crop: bool = True
) -> Tensor:
    """Mean cross-entropy over all pairs (student crop, teacher crop) of the same slice.

    Args:
        student_logits: ``[S, B, K]``; the first T crops are the teacher's own.
        teacher_probs: ``[T, B, K]``, no gradient.
        student_temperature: student temperature.
        skip_same_crop: leave out the T pairs in which both sides see the same crop.
    Returns:
        A scalar, the mean over the pairs and the batch.
    """
    n_student, batch, _ = student_logits.shape
    n_teacher = teacher_probs.shape[0]
    log_p = F.log_softmax(student_logits.float() / student_temperature, dim=-1)  # [S, B, K]
    # Cross-entropy is linear in the teacher: the sum over teacher crops comes first, one [B, K] product per crop.
    total = -(log_p * teacher_probs.sum(dim=0)).sum()
    pairs = n_student * n_teacher
    if skip_same_crop:
        total = total + (log_p[:n_teacher] * teacher_probs).sum()
        pairs -= min(n_student, n_teacher)
    if pairs == 0:
        raise ValueError("cross_entropy_pairs needs at least one pair of different crops")
    return total / (pairs * batch)
