"""What an encoder makes of a slice, as arrays on the grid of its patches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

EPSILON = 1e-12
QUANTILES = (0.02, 0.98)  # of a component, become dark and bright


@dataclass(frozen=True)
class Seen:
    """What an encoder makes of one image of ``h x w`` patches."""

    tokens: np.ndarray  # [h, w, D] behind the final norm
    norms: np.ndarray  # [h, w] before it
    heads: np.ndarray  # [heads, h, w] attention of the class token to the patches in the last block
    on_class: float  # its attention to itself, mean of the heads
    on_registers: float | None  # None: the model has none


def see(backbone: nn.Module, image: np.ndarray, device: torch.device, *, amp: bool = False) -> Seen:
    """Encode an image ``[S, S]`` in [0, 1]; the backbone, which is on `device`, is left in the mode that it was in.

    `amp`: in bf16, where its weights are gathered so.
    """
    training = backbone.training
    try:
        with class_attention(backbone.eval()) as attention:
            norms, tokens = patch_norms(backbone, image, device, amp=amp)
    finally:
        backbone.train(training)
    rows = attention()  # [heads, 1 + registers + P]
    prefix = rows.shape[1] - norms.size
    return Seen(
        tokens=tokens.reshape(*norms.shape, -1),
        norms=norms,
        heads=rows[:, prefix:].reshape(-1, *norms.shape),
        on_class=float(rows[:, 0].mean()),
        on_registers=float(rows[:, 1:prefix].sum(axis=1).mean()) if prefix > 1 else None,
    )


@torch.inference_mode()
def patch_norms(
    backbone: nn.Module, image: np.ndarray, device: torch.device, *, amp: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """L2 norms ``[h, w]`` of the patch tokens of an image ``[S, S]`` in [0, 1], and the tokens ``[P, D]``.

    The norms are taken before the final LayerNorm, which makes all of them nearly the same.
    """
    before: list[Tensor] = []
    hook = backbone.vit.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            patches = backbone(torch.from_numpy(image)[None, None].to(device))[1][0].float().cpu()  # [P, D]
    finally:
        hook.remove()
    raw = before[0][0, -len(patches) :].float().cpu()  # [P, D]; class and register tokens stand in front
    grid = (image.shape[0] // backbone.patch, image.shape[1] // backbone.patch)
    return raw.norm(dim=-1).view(grid).numpy(), patches.numpy()


@contextmanager
def class_attention(backbone: nn.Module) -> Iterator[Callable[[], np.ndarray]]:
    """Record the class token's attention in the last block while the backbone runs.

    A fused attention kernel never holds its weights, so they are computed again from the queries and keys that it is
    given: softmax(q k / sqrt(d)), Vaswani et al. 2017 (arXiv:1706.03762), equation 1.

    Yields:
        A function, to be called behind the forward pass: attention of the first image ``[heads, 1 + registers + P]``,
        where each head sums to 1; the class token itself stands first.
    """
    block = backbone.vit.blocks[-1]
    attention = block.attn
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda _module, _inputs, output: seen.__setitem__(name, output[0].detach().float())  # [heads, N, d]

    # they stand behind the split into heads, as nn.Identity where the model has no norm of queries and keys
    compiled = block._compiled_call_impl is not None
    hooks = [attention.q_norm.register_forward_hook(keep("q")), attention.k_norm.register_forward_hook(keep("k"))]
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():  # it would go by the hooks
            yield lambda: _softmax_rows(seen["q"][:, :1], seen["k"], attention.scale)[:, 0].cpu().numpy()
    finally:
        for hook in hooks:
            hook.remove()


def _softmax_rows(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    return (queries * scale @ keys.transpose(-2, -1)).softmax(dim=-1)  # [heads, queries, N]


def principal_colours(tokens: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components of patch tokens as red, green and blue.

    As in Oquab et al. 2023 (arXiv:2304.07193), figure 1, with the foreground known from the HU. Each component is
    scaled from its 2nd to its 98th percentile; its sign is that which makes its largest loading positive, so that equal
    tokens have equal colours.

    Args:
        tokens: ``[h, w, D]``.
        shown: ``[h, w]`` booleans; the components are those of these patches, and the others stay transparent.
    Returns:
        Colours ``[h, w, 4]`` in [0, 1], and the shares ``[3]`` of the variance that the components explain.
    """
    colours, explained = np.zeros((*shown.shape, 4)), np.zeros(3)
    if not shown.any():
        return colours, explained
    rows = tokens[shown].astype(np.float64)
    rows -= rows.mean(axis=0)
    _, singular, loadings = np.linalg.svd(rows, full_matrices=False)
    k = min(3, len(singular))
    loadings = loadings[:k]
    loadings *= np.sign(loadings[np.arange(k), np.abs(loadings).argmax(axis=1)])[:, None]
    variance = np.square(singular)
    explained[:k] = variance[:k] / max(float(variance.sum()), np.finfo(float).tiny)
    components = np.full((len(rows), 3), 0.5)
    components[:, :k] = rows @ loadings.T
    low, high = np.quantile(components, QUANTILES, axis=0)
    spread = np.where(high > low, high - low, np.inf)  # a component without spread stays mid-grey
    colours[shown, :3] = np.where(high > low, np.clip((components - low) / spread, 0, 1), 0.5)
    colours[shown, 3] = 1
    return colours, explained


def cosine_to(tokens: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """Cosine similarity ``[h, w]`` of the tokens ``[h, w, D]`` to that of one patch (row, column)."""
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True).clip(EPSILON)
    return unit @ unit[patch]


def dispersion(tokens: np.ndarray) -> dict[str, float]:
    """Standard deviations over the patches of tokens ``[h, w, D]``, mean over D: of unit tokens, raw and times sqrt(D);
    and of the tokens as they are."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(EPSILON)
    raw = float(unit.std(axis=0).mean())
    scaled = raw * rows.shape[1] ** 0.5
    return {"std": raw, "std_normalised": scaled, "token_std": float(rows.std(axis=0).mean())}
