"""Gram anchoring (Siméoni et al. 2025, DINOv3, arXiv:2508.10104): patches keep the teacher's mutual similarities."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def gram_loss_per_patch(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the two matrices of cosine similarities between patches, row by row.

    The matrices are per image, ``P x P``: over a whole batch they would take B times the memory and compare patches
    of different patients.

    Args:
        student: patch tokens ``[B, P, D]`` after the final norm.
        teacher: patch tokens ``[B, P, D']`` of the same crops, no gradient; D' may differ.
    Returns:
        ``[B, P]``, float32: for each patch, over its similarities to all patches; 0 where they are the same.
    Raises:
        ValueError: if the two sides have different numbers of images or patches.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"gram_loss needs the same images and patches, got {student.shape} and {teacher.shape}")
    s = F.normalize(student.float(), dim=-1)
    t = F.normalize(teacher.float(), dim=-1)
    difference = s @ s.transpose(1, 2) - t @ t.transpose(1, 2)  # [B, P, P]
    return torch.linalg.vecdot(difference, difference) / difference.shape[2]  # square() keeps two matrices more


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of `gram_loss_per_patch` over patches and images: a scalar."""
    return gram_loss_per_patch(student, teacher).mean()


def resize_patches(tokens: Tensor, *, patches: int) -> Tensor:
    """Bring the patch tokens of a larger image onto a coarser grid, before they are normalised.

    Bicubic with an antialiasing filter, as for pictures: each coarse patch is a smooth mean of the fine ones under it.

    Args:
        tokens: ``[B, Q, D]``, row-major on a square grid.
        patches: patches of the square grid wanted.
    Returns:
        ``[B, patches, D]``, float32.
    """
    side, wanted = math.isqrt(tokens.shape[1]), math.isqrt(patches)
    grid = tokens.float().transpose(1, 2).unflatten(2, (side, side))  # [B, D, q, q]
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=True)
    return grid.flatten(2).transpose(1, 2)
