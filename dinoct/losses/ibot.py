"""Masked-patch self-distillation (Zhou et al. 2022, arXiv:2111.07832)."""

from torch import Tensor
from torch.nn import functional as F


def masked_cross_entropy(
    *, student_logits: Tensor, teacher_probs: Tensor, weights: Tensor, n_images: int, student_temperature: float
) -> Tensor:
    """Cross-entropy at the masked patches: mean over the patches of an image, then over all images.

    Args:
        student_logits: ``[M, K]`` at the masked patches, image by image.
        teacher_probs: ``[M, K]`` at the same patches, no gradient.
        weights: ``[M]``, 1 / (masked patches of the patch's image).
        n_images: images in the batch, with and without a mask.
        student_temperature: student temperature.
    Returns:
        A scalar.
    """
    log_p = F.log_softmax(student_logits.float() / student_temperature, dim=-1)  # [M, K]
    per_patch = -(teacher_probs * log_p).sum(dim=-1)  # [M]
    return (per_patch * weights).sum() / n_images
