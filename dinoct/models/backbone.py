"""The encoder: timm's VisionTransformer with one input channel, a mask token, and checkpointed blocks."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dinoct.config import ModelConfig
from dinoct.models.block import Attention, Block, Mlp, drop_path_factors

TOKEN_STD = 0.02  # a zero mask token with a small LayerScale gives gradients of order 1e3 at the start


class Backbone(nn.Module):
    """A ViT over one-channel slices windowed to [0, 1].

    ``vit`` is a plain timm model, so that its weights load into timm as they are. The mask token stands beside it.
    """

    def __init__(self, cfg: ModelConfig, *, drop_path: float = 0.0, grad_checkpoint: bool | str = False):
        super().__init__()
        self.vit = VisionTransformer(
            img_size=cfg.img_size,
            patch_size=cfg.patch,
            in_chans=1,
            num_classes=0,
            global_pool="",
            embed_dim=cfg.dim,
            depth=cfg.depth,
            num_heads=cfg.heads,
            mlp_ratio=cfg.mlp_ratio,
            reg_tokens=cfg.registers,
            init_values=cfg.layer_scale,
            dynamic_img_size=True,
            block_fn=Block,
            attn_layer=Attention,
            mlp_layer=Mlp,
        )
        self.mask_token = nn.Parameter(torch.empty(cfg.dim).normal_(std=TOKEN_STD))
        nn.init.normal_(self.vit.cls_token, std=TOKEN_STD)
        if cfg.registers:
            nn.init.normal_(self.vit.reg_token, std=TOKEN_STD)
        self.patch, self.dim, self.depth = cfg.patch, cfg.dim, cfg.depth
        self.grad_checkpoint = grad_checkpoint
        rates = torch.linspace(0.0, drop_path, cfg.depth) if drop_path else None
        self.register_buffer("drop_path_rates", rates, persistent=False)

    def forward(self, x: Tensor, masks: Tensor | None = None, *, class_only: bool = False) -> tuple[Tensor, Tensor]:
        """Encode slices.

        Args:
            x: ``[B, 1, H, W]`` in [0, 1]; H and W multiples of the patch.
            masks: ``[B, P]`` booleans; masked patches are replaced by the mask token.
            class_only: whether the patch tokens are of no use: the last block leaves them out.
        Returns:
            Class token ``[B, D]`` and patch tokens ``[B, P, D]`` (row-major; ``[B, 0, D]`` where `class_only`), both
            after the final norm.
        """
        vit = self.vit
        tokens = self._embed(normalise(x))  # [B, h, w, D]
        if masks is not None:
            masks = masks.view(tokens.shape[:3])
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens)))  # [B, 1 + registers + P, D]
        recompute = self.grad_checkpoint if torch.is_grad_enabled() else False
        factors = self._drop_path(tokens.shape[0])
        with without_copies(x.device.type) if recompute else nullcontext():
            for block, drawn in zip(vit.blocks[:-1], factors, strict=False):
                tokens = block(tokens, drawn, recompute=recompute)
            tokens = vit.blocks[-1](tokens, factors[-1], recompute=recompute, class_only=class_only)
        tokens = vit.norm(tokens)
        return tokens[:, 0], tokens[:, vit.num_prefix_tokens :]

    def _embed(self, x: Tensor) -> Tensor:
        """timm's patch embedding as the matrix product that it is: no convolution library looks for a kernel.

        Args:
            x: ``[B, 1, H, W]``.
        Returns:
            ``[B, H / patch, W / patch, D]``.
        """
        projection, side = self.vit.patch_embed.proj, self.patch
        patches = x.squeeze(1).unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, h, side, w, side]
        return F.linear(patches.transpose(2, 3).flatten(3), projection.weight.flatten(1), projection.bias)

    def _drop_path(self, batch: int) -> Sequence[Tensor | None]:
        """The blocks' factors ``[2, batch]``; none of them where nothing is left out."""
        if self.drop_path_rates is None or not self.training:
            return [None] * self.depth
        return drop_path_factors(self.drop_path_rates, batch)

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Have torch.compile make kernels of a block when one first runs, for all of them; weights and names stay."""
        import torch._dynamo.config
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # the Gram term's share of the gradient goes back a second time
        torch._dynamo.config.recompile_limit = 32  # all blocks share their code: crops, teachers, judging, pictures
        for block in self.vit.blocks:
            block.compile(backend=backend, dynamic=False)  # crops have two sizes: each gets kernels of its own


def without_copies(kind: str) -> torch.autocast:
    """Autocast as it is on the device `kind`, but for the copies of all weights that it holds until its end.

    A backward pass that computes blocks again makes its own: 2 bytes per weight less at the highest moment.
    """
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


def normalise(x: Tensor) -> Tensor:
    """[0, 1] to about zero mean and unit variance, by fixed numbers: they belong to the model, not to the data."""
    return (x - 0.5) / 0.25


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, also on the meta device."""
    return sum(parameter.numel() for parameter in module.parameters())
