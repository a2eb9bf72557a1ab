"""A transformer block with timm's weights that keeps less for its backward pass, and computes only what is asked for.

It computes what timm's own block computes. LayerScale's g is multiplied into the weights of the projection before it:
so no branch's output is kept for the gradient of g, and a branch that is computed again for its backward pass (Chen et
al. 2016, arXiv:1604.06174) ends before its last matrix product. Behind that stand drop path and the sum, which need no
more than a number per slice. What is random in drop path is drawn outside: all blocks are one and the same program.
Under autocast the norms read and write the type of the matrix products, and sum in float32; the stream is float32.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from timm.layers import Mlp as TimmMlp
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dinoct.validate import SELECTIVE

SHORT = 64  # tokens


def run(function: Callable[[Tensor], Tensor], x: Tensor, *, again: bool) -> Tensor:
    """Call it; `again`: its backward pass calls it once more, instead of keeping what it needs.

    It must draw nothing at random.
    """
    if not again:
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class Block(timm_vit.Block):
    """timm's pre-norm block; `attn` and `mlp` take their norm and LayerScale along, which stay the block's own."""

    def forward(
        self,
        x: Tensor,
        factors: Tensor | None = None,
        *,
        recompute: bool | str = False,
        class_only: bool = False,
    ) -> Tensor:
        """One block.

        Args:
            x: tokens ``[B, N, D]``, the class token first.
            factors: ``[2, B]``, by which what attention and MLP add is multiplied (see `drop_path_factors`).
            recompute: what the backward pass computes again. ``"selective"``: the norms, the MLP's first layer and its
                GELU; 12 bytes per token and dimension are kept instead of 32 (bf16), for a third of the block's matrix
                products. True: both branches but for their last products, one after the other; 4 bytes are kept, both
                norms' inputs, for seven twelfths.
            class_only: whether nobody asks for more than the class token.
        Returns:
            ``[B, N, D]``, or ``[B, 1, D]`` where `class_only`.
        """
        branch = self.attn(x, self.norm1, getattr(self.ls1, "gamma", None), recompute=recompute, class_only=class_only)
        x = add(x[:, :1] if class_only else x, branch, factors, 0)
        return add(x, self.mlp(x, self.norm2, getattr(self.ls2, "gamma", None), recompute=recompute), factors, 1)


class Attention(timm_vit.Attention):
    """Self-attention of normed tokens, with LayerScale in its projection."""

    def forward(
        self, x: Tensor, norm: nn.Module, gamma: Tensor | None, *, recompute: bool | str, class_only: bool
    ) -> Tensor:
        def branch(x: Tensor) -> Tensor:
            return scaled(self.proj, self._seen(x, norm, recompute == SELECTIVE, class_only), gamma)

        return run(branch, lowered(x), again=recompute is True)

    def _seen(self, x: Tensor, norm: nn.Module, again: bool, class_only: bool) -> Tensor:
        """What the tokens ``[B, N, D]`` see of each other, all heads side by side."""
        if class_only:
            q, k, v = self._one_query(normed(norm, x))
        else:
            q, k, v = self._heads(run(lambda x: self.qkv(normed(norm, x)), x, again=again), 3)
        x = attend(self.q_norm(q), self.k_norm(k), v)  # [B, heads, N, D / heads]
        return x.transpose(1, 2).flatten(2)

    def _one_query(self, x: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of all tokens, the class token's query."""
        dims, bias = [x.shape[-1], 2 * x.shape[-1]], self.qkv.bias
        (one, rest), biases = self.qkv.weight.split(dims), (None, None) if bias is None else bias.split(dims)
        queries = self._heads(F.linear(x[:, :1], one, biases[0]), 1)
        return *queries, *self._heads(F.linear(x, rest, biases[1]), 2)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``[B, N, parts * D]`` to as many of ``[B, heads, N, D / heads]``."""
        return x.unflatten(2, (parts, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(TimmMlp):
    """Both layers on normed tokens, with LayerScale in the second."""

    def forward(self, x: Tensor, norm: nn.Module, gamma: Tensor | None, *, recompute: bool | str) -> Tensor:
        def branch(x: Tensor) -> Tensor:
            return scaled(self.fc2, self.act(self.fc1(normed(norm, x))), gamma)

        return run(branch, lowered(x), again=bool(recompute))


def scaled(linear: nn.Linear, x: Tensor, gamma: Tensor | None) -> Tensor:
    """``linear(x) * gamma``; `gamma` ``[D]`` scales the weights."""
    if gamma is None:
        return linear(x)
    return F.linear(x, linear.weight * gamma.unsqueeze(1), linear.bias * gamma)


def lowered(x: Tensor) -> Tensor:
    """In the type that matrix products take under autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm in the type of `x`, its sums in float32; autocast would have it read, write and keep float32."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over ``[B, heads, N, d]``, by the kernel that is fastest for the length.

    A local crop has some 50 tokens, of which flash attention makes blocks of 128: the memory-efficient kernel takes
    half its time there (docs/performance.md).
    """
    short = q.is_cuda and torch.version.hip is None and k.shape[2] <= SHORT
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if short else nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


def add(x: Tensor, branch: Tensor, factors: Tensor | None, i: int) -> Tensor:
    """``[B, N, D]`` and a branch of it, times row `i` of the factors ``[2, B]``."""
    return x + (branch if factors is None else branch * factors[i].to(branch.dtype).view(-1, 1, 1))


def drop_path_factors(rates: Tensor, batch: int) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382), per slice and branch.

    Args:
        rates: probability ``[depth]`` that a block's branch is left out.
        batch: slices.
    Returns:
        ``[depth, 2, batch]``: 0, or 1 / (1 - rate).
    """
    keep = (1.0 - rates).view(-1, 1, 1).expand(-1, 2, batch)
    return torch.bernoulli(keep) / keep
