"""Backbone, heads and the three networks: equal to timm, moved once per update, whole after loading."""

import copy
from dataclasses import replace

import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
from timm.models.vision_transformer import VisionTransformer
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from dinoct.config import GramConfig, IbotConfig, LossConfig, ModelConfig, OptimConfig
from dinoct.data.batch import CropBatch, mask_fields
from dinoct.errors import CheckpointError
from dinoct.losses import resize_patches
from dinoct.models.backbone import Backbone, normalise
from dinoct.models.block import drop_path_factors
from dinoct.models.head import PrototypeHead
from dinoct.models.load import initial_weights
from dinoct.models.ssl import SelfDistillation
from dinoct.optim import build_optimizer, load_optimizer_state, optimizer_state, parameter_groups

TINY = ModelConfig(patch=16, dim=32, depth=2, heads=2, img_size=64, registers=2, layer_scale=1e-2)


def tiny_loss(**terms) -> LossConfig:
    return LossConfig(out_dim=64, hidden_dim=32, bottleneck_dim=16, **terms)


def batch(n: int = 6, *, seed: int = 0, masked: bool = False, local: int = 0) -> CropBatch:
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2 * n, 16, dtype=torch.bool)
    masks[::2, :5] = True
    return CropBatch(
        global_crops=torch.rand(2 * n, 1, 64, 64, generator=g),
        local_crops=torch.rand(local * n, 1, 32, 32, generator=g) if local else None,
        **mask_fields(masks if masked else None),
        groups=torch.arange(n),
        positions=list(range(n)),
    )


def make(loss: LossConfig | None = None, model: ModelConfig = TINY, **kwargs) -> SelfDistillation:
    torch.manual_seed(0)
    return SelfDistillation(model, loss or tiny_loss(), **kwargs).train()


def test_backbone_is_timm_around_its_blocks():
    torch.manual_seed(0)
    backbone = Backbone(TINY).eval()
    x = torch.rand(2, 1, 64, 96)
    cls, patches = backbone(x)
    tokens = backbone.vit.forward_features(normalise(x))
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 3:])
    other = torch.rand(2, 1, 32, 96)
    assert backbone(other)[1].shape == (2, 12, 32)


def test_masked_patches_do_not_see_their_pixels():
    backbone = Backbone(TINY).eval()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 0] = True
    x, y = torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64)
    y[..., 16:, :], y[..., :16, 16:] = x[..., 16:, :], x[..., :16, 16:]  # they differ in patch 0 alone
    assert torch.equal(backbone(x, mask)[1], backbone(y, mask)[1])
    assert not torch.equal(backbone(x)[1], backbone(y)[1])


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_the_block_computes_what_timms_does(layer_scale):
    """Forward and gradients, with timm's own blocks in place of ours and the same weights."""
    torch.manual_seed(0)
    backbone = Backbone(replace(TINY, layer_scale=layer_scale))
    plain = VisionTransformer(
        img_size=64, patch_size=16, in_chans=1, num_classes=0, global_pool="", embed_dim=32, depth=2, num_heads=2,
        reg_tokens=2, init_values=layer_scale, dynamic_img_size=True,
    )  # fmt: skip
    plain.load_state_dict(backbone.vit.state_dict())
    assert type(plain.blocks[0]) is not type(backbone.vit.blocks[0])
    x = torch.rand(2, 1, 64, 64)
    tokens = plain.forward_features(normalise(x))
    cls, patches = backbone(x)
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 3:])
    weights = torch.randn(32)
    (patches @ weights).sum().backward()
    (tokens[:, 3:] @ weights).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in backbone.vit.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name, rtol=1e-4, atol=1e-4)


def test_bf16_norms_cost_no_accuracy():
    """Features and gradients under autocast are as near to float64's as with timm's blocks, whose norms are float32."""
    torch.manual_seed(0)
    cfg = ModelConfig(patch=16, dim=64, depth=6, heads=4, img_size=64, registers=2, layer_scale=0.1)
    ours = Backbone(cfg)
    timms = VisionTransformer(
        img_size=64, patch_size=16, in_chans=1, num_classes=0, global_pool="", embed_dim=64, depth=6, num_heads=4,
        reg_tokens=2, init_values=0.1, dynamic_img_size=True,
    )  # fmt: skip
    timms.load_state_dict(ours.vit.state_dict())
    exact = copy.deepcopy(timms).double()
    x, weights = torch.rand(8, 1, 64, 64), torch.randn(64)

    def seen(model, features, dtype=torch.float32):
        out = features(x.to(dtype))
        (out.to(dtype) @ weights.to(dtype)).square().mean().backward()
        grads = [p.grad.flatten() for n, p in model.named_parameters() if "mask_token" not in n and "cls" not in n]
        return out.detach().double().flatten(), torch.cat(grads).double()

    true = seen(exact, lambda x: exact.forward_features(normalise(x))[:, 3:], torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = seen(ours.vit, lambda x: ours(x)[1])
        other = seen(timms, lambda x: timms.forward_features(normalise(x))[:, 3:])
    for mine, theirs, reference in zip(own, other, true, strict=True):
        error, usual = ((found - reference).norm() / reference.norm() for found in (mine, theirs))
        assert 0 < error < 1.2 * usual
        assert error < 0.02


def test_drop_path_leaves_out_branches_and_keeps_their_mean():
    torch.manual_seed(0)
    rates = torch.tensor([0.0, 0.5, 0.2])
    factors = drop_path_factors(rates, 4000)  # [3, 2, 4000]
    assert torch.equal(factors[0], torch.ones(2, 4000))
    torch.testing.assert_close((factors == 0).float().mean(dim=2), rates.view(3, 1).expand(3, 2), rtol=0, atol=0.03)
    torch.testing.assert_close(factors.mean(dim=2), torch.ones(3, 2), rtol=0, atol=0.06)
    assert (factors[1, 0] != factors[1, 1]).any()  # attention and MLP have draws of their own


def test_a_slice_whose_branches_are_left_out_passes_the_block_as_it_is():
    block = Backbone(replace(TINY, layer_scale=0.1)).vit.blocks[0]
    x = torch.randn(3, 7, 32)
    factors = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    for recompute in (False, "selective", True):
        out = block(x, factors, recompute=recompute)
        assert torch.equal(out[0], x[0])
        torch.testing.assert_close(out[1], block(x)[1])
        assert not torch.allclose(out[2], out[1])


def test_all_blocks_are_compiled_as_one():
    """Each block has its own drop path rate; compiled one by one, ViT-L would take minutes to start."""
    torch.compiler.reset()
    counter = CompileCounter()
    backbone = Backbone(replace(TINY, depth=5, drop_path=0.3)).train()
    with torch._dynamo.config.patch(), torch._functorch.config.patch():  # compile_blocks sets some: back behind it
        backbone.compile_blocks(backend=counter)
        for _ in range(2):
            backbone(torch.rand(2, 1, 64, 64))[1].sum().backward()
        assert counter.frame_count == 1
        backbone(torch.rand(2, 1, 32, 32), class_only=True)[0].sum().backward()
        assert counter.frame_count == 3  # another size, and its last block for the class token alone
    torch.compiler.reset()


@pytest.mark.parametrize("kind", [False, "selective", True])
def test_the_class_token_alone_is_the_same_class_token(kind):
    torch.manual_seed(0)
    backbone = Backbone(replace(TINY, layer_scale=0.1), grad_checkpoint=kind)
    x, weights = torch.rand(2, 1, 64, 64), torch.randn(32)
    grads = []
    for class_only in (False, True):
        cls, patches = backbone(x, class_only=class_only)
        assert patches.shape == (2, 0 if class_only else 16, 32)
        backbone.zero_grad()
        (cls @ weights).sum().backward()
        grads.append([cls.detach(), *(p.grad for p in backbone.vit.parameters())])
    for whole, alone in zip(*grads, strict=True):
        torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for flag in (False, "selective", True):
        model = make(model=replace(TINY, drop_path=0.3, layer_scale=0.1), grad_checkpoint=flag)
        torch.manual_seed(1)
        model(batch(local=2), teacher_temperature=0.05).total.backward()
        grads.append([p.grad for p in model.student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def test_gram_starts_at_exactly_zero_with_the_ema_teacher_and_grows_with_a_mask():
    model = make()
    assert model(batch(), teacher_temperature=0.05).scalars["loss/gram"] == 0
    masked = make(tiny_loss(ibot=IbotConfig(weight=1.0)))
    assert masked(batch(masked=True), teacher_temperature=0.05).scalars["loss/gram"] > 0


def test_losses_are_float32_under_autocast(monkeypatch):
    """A matrix product of float32 tensors is bf16 inside autocast: the terms must be computed outside of it."""
    from dinoct import losses

    seen = []
    for name in ("gram_loss_per_patch", "koleo_loss", "cross_entropy_pairs", "masked_cross_entropy"):
        plain = getattr(losses, name)

        def spy(*args, plain=plain, **kwargs):
            seen.append(torch.is_autocast_enabled("cpu"))
            return plain(*args, **kwargs)

        monkeypatch.setattr(losses, name, spy)
    model = make(tiny_loss(ibot=IbotConfig(weight=1.0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model(batch(masked=True, local=2), teacher_temperature=0.05)
        assert torch.is_autocast_enabled("cpu")
    assert len(seen) == 5
    assert not any(seen)
    assert terms.total.dtype == torch.float32
    terms.total.backward()
    assert all(p.grad.isfinite().all() for p in model.student.parameters() if p.grad is not None)


def test_scores_are_cosines_with_the_prototypes():
    torch.manual_seed(0)
    head = PrototypeHead(24, out_dim=300, hidden_dim=32, bottleneck_dim=16)
    with torch.no_grad():
        head.prototypes.weight.mul_(torch.logspace(-6, 3, 300)[:, None])  # only their direction counts
    features, wanted = torch.randn(9, 24), torch.randn(9, 300)
    scores = head(features)
    (scores * wanted).sum().backward()
    prototypes = head.prototypes.weight.detach().double().requires_grad_()
    bottleneck = head.mlp(features).detach().double()
    cosines = F.cosine_similarity(bottleneck[:, None], prototypes[None], dim=-1)  # torch's own, written another way
    (cosines * wanted).sum().backward()
    torch.testing.assert_close(scores.double(), cosines, rtol=0, atol=1e-6)
    lengths = prototypes.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        head.prototypes.weight.grad * lengths, prototypes.grad * lengths, rtol=1e-4, atol=1e-5, check_dtype=False
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert head(features).dtype == torch.float32


def test_no_gradient_reaches_a_teacher():
    model = make(tiny_loss(gram=GramConfig(teacher="lagged"), ibot=IbotConfig(weight=1.0)))
    model(batch(masked=True, local=2), teacher_temperature=0.05).total.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is None for p in model.gram_teacher.parameters())
    used = {n for n, p in model.student.named_parameters() if p.grad is not None}
    assert used == {n for n, _ in model.student.named_parameters()}


def test_first_gradients_are_of_ordinary_size():
    """A zero mask token under a small LayerScale gives gradients of order 1e3 here."""
    model = make(tiny_loss(ibot=IbotConfig(weight=1.0)), model=ModelConfig(**{**vars(TINY), "layer_scale": 1e-5}))
    terms = model(batch(masked=True), teacher_temperature=0.05)
    grads = torch.autograd.grad(terms.gram, list(model.student.backbone.parameters()), allow_unused=True)
    assert torch.nn.utils.get_total_norm([g for g in grads if g is not None]) < 10


def test_teacher_and_centre_move_once_per_update_by_the_momentum():
    model = make()
    before = [p.clone() for p in model.teacher.parameters()]
    for p in model.student.parameters():
        p.data.add_(1.0)
    first = model(batch(seed=0), teacher_temperature=0.05)
    model(batch(seed=1), teacher_temperature=0.05)
    assert all(torch.equal(a, b) for a, b in zip(before, model.teacher.parameters(), strict=True))
    assert model.dino_center.abs().max() == 0
    with torch.no_grad():
        logits = [model.teacher.dino_head(model.teacher.backbone(batch(seed=s).global_crops)[0]) for s in (0, 1)]
    model.end_update(step=1, horizon=10, momentum=0.9)
    assert torch.allclose(model.dino_center, 0.1 * torch.cat(logits).mean(dim=0), atol=1e-6)
    for a, b in zip(before, model.teacher.parameters(), strict=True):
        assert torch.allclose(b, a + 0.1 * (b.new_ones(()) * 1.0), atol=1e-5)
    assert first.total.isfinite()


def test_micro_batches_add_up_to_the_whole_batch_where_the_objective_allows_it():
    """Softmax centring, no KoLeo: 1 x 8 and 4 x 2 give the same gradient. Sinkhorn and KoLeo look across the batch."""
    from dinoct.config import KoleoConfig

    whole = batch(8)

    def part(i: int) -> CropBatch:
        rows = torch.tensor([v * 8 + b for v in (0, 1) for b in (2 * i, 2 * i + 1)])
        return CropBatch(
            whole.global_crops[rows], None, **mask_fields(None), groups=whole.groups[2 * i : 2 * i + 2], positions=[]
        )

    grads = []
    for batches in ([whole], [part(i) for i in range(4)]):
        model = make(tiny_loss(koleo=KoleoConfig(weight=0.0)))
        for one in batches:
            (model(one, teacher_temperature=0.05).total / len(batches)).backward()
        model.end_update(step=1, horizon=10, momentum=0.9)
        grads.append(([p.grad for p in model.student.parameters() if p.grad is not None], model.dino_center))
    for a, b in zip(grads[0][0], grads[1][0], strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-6)


def test_a_gram_teacher_that_sees_more_pixels_is_resized_to_the_students_grid():
    model, fine = make(tiny_loss(gram=GramConfig(teacher_px=128))), batch()
    fine.gram_crops = torch.nn.functional.interpolate(fine.global_crops, size=128, mode="bilinear")
    own = model.teacher.backbone(fine.global_crops)[1]
    assert model._gram_patches(fine, own).shape == own.shape
    rows, cols = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    got = resize_patches(torch.stack([rows, cols], dim=-1).view(1, 64, 2), patches=16).view(4, 4, 2)
    assert got[1:3, 1:3, 0].tolist() == [pytest.approx([2.5, 2.5], abs=0.06), pytest.approx([4.5, 4.5], abs=0.06)]
    assert torch.allclose(got[..., 1], got[..., 0].T)
    terms = model(fine, teacher_temperature=0.05)
    assert terms.scalars["loss/gram"] > 0  # the same weights, another view of the same crop
    assert torch.equal(model._gram_patches(batch(), own), own)


def test_lagged_gram_teacher_ages_and_is_renewed():
    model = make(tiny_loss(gram=GramConfig(teacher="lagged", lag=0.5)))
    taken = []
    for step in range(1, 41):
        model.end_update(step=step, horizon=100, momentum=0.5)
        taken.append(int(model.gram_taken_at))
    ages = [step - t for step, t in zip(range(1, 41), taken, strict=True)]
    assert max(ages[20:]) > max(ages[:10])
    assert len(set(taken)) > 3


def test_snapshot_gram_teacher_stops_at_its_share_of_the_horizon():
    model = make(tiny_loss(gram=GramConfig(teacher="snapshot", snapshot_at=0.2)))
    for step in range(1, 10):
        for p in model.student.parameters():
            p.data.add_(0.1)
        model.end_update(step=step, horizon=20, momentum=0.5)
    assert int(model.gram_taken_at) == 4
    assert not torch.equal(model.gram_teacher.mask_token, model.teacher.backbone.mask_token)


def test_weight_decay_and_learning_rates_go_where_they_belong():
    model = make()
    groups = parameter_groups(model.student, depth=2, cfg=OptimConfig(layer_decay=0.5, patch_embed_lr=0.2))
    by_name = {name: group for group in groups for name in group["names"]}
    learns = [name for name, _ in model.student.named_parameters() if name != "backbone.mask_token"]  # without iBOT
    assert sorted(by_name) == sorted(learns)
    plain = ("bias", "token", "pos_embed", "norm", "gamma")
    for name, group in by_name.items():
        assert group["decays"] == (not any(word in name for word in plain)), name
    assert by_name["backbone.vit.patch_embed.proj.weight"]["lr_factor"] == pytest.approx(0.2 * 0.5**3)
    assert by_name["backbone.vit.blocks.0.attn.qkv.weight"]["lr_factor"] == pytest.approx(0.5**2)
    assert by_name["backbone.vit.blocks.1.attn.qkv.weight"]["lr_factor"] == pytest.approx(0.5)
    assert by_name["dino_head.prototypes.weight"]["lr_factor"] == 1.0
    assert by_name["dino_head.prototypes.weight"]["last_layer"]


def test_optimizer_state_survives_other_groups():
    """Changed layer decay regroups the parameters; each must find its own moments again."""
    model = make()
    first = build_optimizer(model.student, depth=2, cfg=OptimConfig(layer_decay=0.5))
    model(batch(), teacher_temperature=0.05).total.backward()
    first.step()
    second = build_optimizer(model.student, depth=2, cfg=OptimConfig(layer_decay=1.0))
    load_optimizer_state(second, optimizer_state(first))
    for name, state in optimizer_state(second).items():
        assert torch.equal(state["exp_avg"], optimizer_state(first)[name]["exp_avg"])
    assert {group["lr_factor"] for group in second.param_groups} == {1.0, 0.2}


def rgb_vit(img_size: int = 96) -> VisionTransformer:
    return VisionTransformer(img_size=img_size, patch_size=16, embed_dim=32, depth=2, num_heads=2, init_values=1e-2)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_start_from_a_timm_model(tmp_path, suffix):
    """Grey slices through the folded model equal grey RGB through the original, registers aside."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source = rgb_vit(64).eval()
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else lambda s, p: torch.save(s, p))(source.state_dict(), path)
    backbone = Backbone(ModelConfig(**{**vars(TINY), "registers": 0})).eval()
    notes = initial_weights(backbone, path)
    assert any("folded" in note for note in notes)
    assert any("mask_token" in note for note in notes)
    x = torch.rand(2, 1, 64, 64)
    assert torch.allclose(backbone(x)[0], source.forward_features(normalise(x).expand(-1, 3, -1, -1))[:, 0], atol=1e-5)


def test_start_resamples_positions_and_names_registers(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(rgb_vit(96).state_dict(), path)
    notes = initial_weights(Backbone(TINY), path)
    assert any("resampled" in note for note in notes)
    assert any("reg_token" in note for note in notes)


def test_start_from_another_shape_lists_what_does_not_fit(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(rgb_vit(64).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"model\.init_from: .*blocks\.2\.\S+ is missing.*model\.dim"):
        initial_weights(Backbone(ModelConfig(**{**vars(TINY), "depth": 3})), path)
