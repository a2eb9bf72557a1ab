"""Each term against reference numbers computed once from its published formula, and at its edges."""

import math

import pytest
import torch

from dinoct.losses import (
    center_softmax,
    cross_entropy_pairs,
    gram_loss,
    gram_loss_per_patch,
    koleo_loss,
    masked_cross_entropy,
    sinkhorn_knopp,
)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gram_reference():
    assert gram_loss(randn(4, 16, 32, seed=0), randn(4, 16, 32, seed=1)).item() == pytest.approx(0.0562785, rel=1e-5)


def test_gram_is_zero_for_equal_similarities_and_blind_to_rotation_and_scale():
    x = randn(2, 9, 8, seed=0)
    rotation = torch.linalg.qr(randn(8, 8, seed=1))[0]
    assert gram_loss(x, x).item() == 0
    assert gram_loss(x, 3 * x @ rotation).item() < 1e-10


def test_gram_is_per_image():
    x, y = randn(2, 9, 8, seed=0), randn(2, 9, 8, seed=1)
    alone = torch.stack([gram_loss(x[i : i + 1], y[i : i + 1]) for i in range(2)])
    assert torch.allclose(gram_loss_per_patch(x, y).mean(dim=1), alone)


def test_gram_refuses_other_grids():
    with pytest.raises(ValueError, match="same images and patches"):
        gram_loss(randn(1, 9, 8, seed=0), randn(1, 16, 8, seed=0))


def test_dino_reference():
    student, teacher = randn(2, 4, 64, seed=2), randn(8, 64, seed=3)
    q = sinkhorn_knopp(teacher, temperature=0.07)
    assert q[0, 0].item() == pytest.approx(0.00087669, rel=1e-4)
    assert torch.allclose(q.sum(dim=1), torch.ones(8))
    pairs = {"student_logits": student, "teacher_probs": q.view(2, 4, 64), "student_temperature": 0.1}
    assert cross_entropy_pairs(**pairs, skip_same_crop=False).item() == pytest.approx(23.884037, rel=1e-6)
    assert cross_entropy_pairs(**pairs).item() == pytest.approx(24.397808, rel=1e-6)
    centred = center_softmax(teacher, center=torch.zeros(64), temperature=0.07).view(2, 4, 64)
    pairs["teacher_probs"] = centred
    assert cross_entropy_pairs(**pairs, skip_same_crop=False).item() == pytest.approx(24.177620, rel=1e-6)


def test_dino_local_crops_count_as_pairs():
    """One more student crop: the mean over its pairs and the others', computed the long way."""
    student, probs = randn(3, 4, 16, seed=0), torch.softmax(randn(2, 4, 16, seed=1), dim=-1)
    log_p = torch.log_softmax(student / 0.1, dim=-1)
    long_way = [-(probs[t] * log_p[s]).sum(-1).mean() for s in range(3) for t in range(2) if s != t]
    got = cross_entropy_pairs(student_logits=student, teacher_probs=probs, student_temperature=0.1)
    assert got.item() == pytest.approx(torch.stack(long_way).mean().item(), rel=1e-5)


def test_ibot_reference():
    teacher = sinkhorn_knopp(randn(12, 64, seed=4), temperature=0.07)
    assert teacher[0, 1].item() == pytest.approx(0.19617715, rel=1e-5)
    weights = torch.cat([torch.full((8,), 1 / 8), torch.full((4,), 1 / 4)])
    loss = masked_cross_entropy(
        student_logits=randn(12, 64, seed=5),
        teacher_probs=teacher,
        weights=weights,
        n_images=4,
        student_temperature=0.1,
    )
    assert loss.item() == pytest.approx(11.965471, rel=1e-6)


def test_koleo_reference():
    assert koleo_loss(randn(8, 32, seed=6)).item() == pytest.approx(-0.19535118, rel=1e-5)


def test_koleo_with_duplicate_rows_has_bounded_gradients():
    x = randn(8, 32, seed=0)
    x[1] = x[0]
    x[3] = x[2] + 1e-7
    x.requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert math.isfinite(loss.item())
    assert x.grad.norm() < 1e2


def test_koleo_never_takes_a_neighbour_of_the_same_series():
    x = randn(6, 8, seed=0)
    x[1] = x[0] + 1e-3 * randn(8, seed=1)
    groups = torch.tensor([0, 0, 1, 2, 3, 4])
    assert koleo_loss(x, groups=groups) < koleo_loss(x)
    assert koleo_loss(x, groups=torch.zeros(6, dtype=torch.long)).item() == 0


def test_sinkhorn_stays_finite_at_any_logit():
    for scale in (1.0, 1e3, 1e6):
        q = sinkhorn_knopp(scale * randn(16, 32, seed=0), temperature=0.04)
        assert torch.isfinite(q).all()
        assert torch.allclose(q.sum(dim=1), torch.ones(16), atol=1e-5)


def test_sinkhorn_uses_all_prototypes_where_softmax_collapses():
    logits = 0.1 * randn(64, 16, seed=0)
    logits[:, 0] += 5.0  # every sample prefers prototype 0
    used = sinkhorn_knopp(logits, temperature=0.1).mean(dim=0)
    assert torch.softmax(logits / 0.1, dim=-1).mean(dim=0)[0] > 0.99
    assert used.max() < 2 / 16


def test_uniform_outputs_give_ln_k():
    probs = torch.full((2, 4, 8192), 1 / 8192)
    loss = cross_entropy_pairs(student_logits=torch.zeros(2, 4, 8192), teacher_probs=probs, student_temperature=0.1)
    assert loss.item() == pytest.approx(9.0109, abs=1e-4)
