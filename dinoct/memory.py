"""Memory of a training step by formula: what preflight and the out-of-memory message go by.

Bytes are those of the tensors that live at the same moment; the allocator's fragments, the libraries' workspaces and a
card's context (about half a GB) come on top. Attention is the fused one, whose memory does not grow with the square of
the tokens. What a block keeps is counted as in Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, for this block
(`dinoct.models.block`): float32 residual stream, no dropout, LayerScale in the weights; recomputation as in section 5
there. Against a trace of all tensors of a step, in tests/test_memory.py, the estimate is within 10 %.
"""

from dataclasses import dataclass, replace

from dinoct.checkup.machine import card_room
from dinoct.config import ModelConfig, TrainConfig
from dinoct.flops import local_px, masked_patches, token_count
from dinoct.hardware import Hardware
from dinoct.moments import BLOCK
from dinoct.validate import EIGHT_BIT, SELECTIVE

STATE_BYTES = 20  # per weight: student, teacher, gradient and two Adam moments, float32
MOMENTS_8BIT = 6 - 8 / BLOCK  # of them less: two codes, and two scales per block
KEEP_FREE = 0.08  # of a card: for the allocator's fragments, and for what else wakes up in a long run
FLOAT = 4  # bytes: the residual stream, the norms' statistics and the losses, also under autocast


@dataclass(frozen=True)
class Memory:
    """Estimates in bytes: what is held from step to step, and what a micro-batch takes on top at its highest."""

    state: float
    activations: float

    @property
    def total(self) -> float:
        return self.state + self.activations


def estimate(cfg: TrainConfig, hardware: Hardware, *, parameters: int) -> Memory:
    """Memory of a step.

    Args:
        cfg: the run's settings.
        hardware: its batch size and mixed precision.
        parameters: weights of student backbone and heads.
    """
    gram_teacher = 0.0 if cfg.loss.gram.teacher == "ema" else _backbone_weights(cfg.model)
    state = STATE_BYTES - (MOMENTS_8BIT if cfg.optim.moments == EIGHT_BIT else 0)
    return Memory(state * parameters + FLOAT * gram_teacher, _highest(cfg, hardware, parameters))


def _backbone_weights(model: ModelConfig) -> float:
    """Matrices of the blocks: nearly all weights of the backbone."""
    return model.depth * model.dim**2 * (4 + 2 * model.mlp_ratio)


def block_bytes(model: ModelConfig, *, amp: bool, recompute: bool | str = False) -> float:
    """What one block keeps of a token for its backward pass; `recompute` as in `dinoct.models.block`.

    In the type of the matrix products: the inputs of both norms; where they are not computed again, query, key, value,
    and what attention gives; and where nothing is, the norms' outputs and the MLP before and behind its GELU.
    """
    number = _number(amp) * model.dim
    if recompute is True:
        return 2 * number
    kept = 6 * number + FLOAT * model.heads  # with attention's log-sum-exp
    if recompute == SELECTIVE:
        return kept
    return kept + number * (2 + 2 * model.mlp_ratio) + 4 * FLOAT  # with mean and deviation of both norms


def _highest(cfg: TrainConfig, hardware: Hardware, parameters: int) -> float:
    """The largest of the moments of forward and backward pass that may be the highest."""
    model, batch, amp = cfg.model, hardware.batch_size, hardware.amp
    n_global = batch * cfg.aug.global_crops * token_count(model, model.img_size)
    n_local = batch * cfg.aug.local_crops * token_count(model, local_px(cfg))
    number, stream = _number(amp), FLOAT * model.dim  # bytes: one in a product, the stream of a token
    kind = cfg.train.grad_checkpoint
    kept = block_bytes(model, amp=amp, recompute=kind)
    again = number * model.dim * (1 + 2 * model.mlp_ratio) if kind else 0.0  # the MLP: its norm, around its GELU
    projections = 0 if kind is True else 1 if kind else 1 + model.mlp_ratio  # whose products with LayerScale are kept
    # LayerScale times the weights of a projection, or uncached bf16 of them: each pass of the student has its own.
    own = model.layer_scale is not None or (amp and kind)
    scaled = number * model.depth * model.dim**2 if own else 0.0
    passes = 2 if n_local else 1
    hidden = number * model.dim * model.mlp_ratio
    # Autocast's copies of the weights, which the backward pass takes from the forward pass or makes again.
    copies = number * parameters - scaled * (1 + model.mlp_ratio) if amp and not kind else 0
    blocks = kept * (model.depth * n_global + (model.depth - 1) * n_local) + scaled * projections * passes
    # Local crops' last block has one query: its norm's input, and, where kept, its output, keys and values.
    last = n_local * number * model.dim * (1 if kind is True else 4)
    ended = blocks + last + stream * n_global + _heads(cfg, batch, amp)  # with the last norm's input
    in_forward, between, in_backward = _objective(cfg, batch)
    through = again + 2 * stream + hidden  # of a token, in one block's backward pass
    fine = batch * cfg.aug.global_crops * token_count(model, cfg.loss.gram.teacher_px or model.img_size)
    moments = (
        fine * (3 * stream + 2 * hidden) + n_global * stream,  # in the MLP of a block of the Gram teacher
        copies + ended + in_forward,
        copies + ended + between + n_global * through - FLOAT * parameters,  # Gram's share: no gradient is there yet
        copies + ended + in_backward,
        copies + blocks + n_local * through,  # local crops came last and go first
        copies + model.depth * kept * n_global + scaled * projections + n_global * through,
    )
    return _images(cfg, batch, amp) + max(moments)


def _objective(cfg: TrainConfig, batch: int) -> tuple[float, float, float]:
    """Losses, float32: at their highest in the forward pass, between the passes, at their highest in the backward."""
    model, aug, loss = cfg.model, cfg.aug, cfg.loss
    patches = (model.img_size // model.patch) ** 2
    tokens = batch * aug.global_crops * patches
    teacher = batch * aug.global_crops  # rows of class tokens; then rows of masked patches
    student, masked = teacher + batch * aug.local_crops, batch * masked_patches(cfg)
    scores, features, similarities = FLOAT * loss.out_dim, FLOAT * model.dim, FLOAT * patches  # of one row
    # The student's patches, these normalised, and the difference of the similarities; logarithms and targets.
    between = tokens * (2 * features + similarities) + scores * (student + teacher + 2 * masked)
    forward = max(
        tokens * (4 * features + 3 * similarities),  # the same of the teacher's patches, and both sides' similarities
        between + tokens * features + scores * 2 * (student + masked),  # the teacher's patches; scores and products
    )
    backward = max(
        tokens * (2 * features + 3 * similarities),  # as between the passes, and two gradients of the difference
        tokens * 6 * features,  # patches, these normalised, and four gradients on the way through the normalisation
        tokens * 2 * features + scores * (2 * max(student, masked) + 4 * loss.bottleneck_dim),
    )
    return forward, between, backward


def _heads(cfg: TrainConfig, batch: int, amp: bool) -> float:
    """What the student's heads keep for their backward pass: the MLP's layers, and the normalised prototypes."""
    loss, dim = cfg.loss, cfg.model.dim
    rows = batch * (cfg.aug.global_crops + cfg.aug.local_crops + masked_patches(cfg))
    row = _number(amp) * (dim + 4 * loss.hidden_dim) + 2 * FLOAT * loss.bottleneck_dim
    heads = 2 if loss.ibot.weight else 1
    return rows * row + heads * FLOAT * loss.out_dim * loss.bottleneck_dim


def _images(cfg: TrainConfig, batch: int, amp: bool) -> float:
    """The crops, and the student's again as the patch embedding takes them."""
    model, aug = cfg.model, cfg.aug
    pixels = aug.global_crops * model.img_size**2 + aug.local_crops * local_px(cfg) ** 2
    fine = aug.global_crops * (cfg.loss.gram.teacher_px or 0) ** 2
    return batch * (pixels * (FLOAT + _number(amp)) + fine * FLOAT)


def _number(amp: bool) -> int:
    """Bytes of a number in matrix products."""
    return 2 if amp else FLOAT


def advice(cfg: TrainConfig, hardware: Hardware, *, parameters: int) -> str:
    """What to say when memory is out: what a step needs, and the settings to change (see `remedies`)."""
    now = estimate(cfg, hardware, parameters=parameters)
    options = remedies(cfg, hardware, parameters=parameters)
    return f"out of memory; a step needs about {_gb(now.total)} GB by estimate. Try {options}"


def remedies(cfg: TrainConfig, hardware: Hardware, *, parameters: int) -> str:
    """Up to three settings that need less memory, each with what it would give.

    On a card the first is the largest half, quarter, ... of the batch that fits it by estimate, where one does.
    """
    now = estimate(cfg, hardware, parameters=parameters)
    room = None if hardware.platform == "cpu" else card_room() * (1 - KEEP_FREE)
    options = []
    if hardware.batch_size > 1:
        smaller = [replace(hardware, batch_size=hardware.batch_size >> i) for i in range(1, 32)]
        found = [(h, estimate(cfg, h, parameters=parameters).total) for h in smaller if h.batch_size]
        fitting = [(h, total) for h, total in found if room is not None and total <= room]
        less, total = (fitting or found)[0]
        accumulation = hardware.accumulation_steps * hardware.batch_size // less.batch_size
        options.append(
            f"train.batch_size={less.batch_size} train.accumulation_steps={accumulation} "
            f"(the same effective batch, about {_gb(now.total - total)} GB less)"
        )
    if cfg.train.grad_checkpoint is not True:
        found = {}
        for kind in (SELECTIVE, True):
            checkpointed = replace(cfg, train=replace(cfg.train, grad_checkpoint=kind))
            found[kind] = now.total - estimate(checkpointed, hardware, parameters=parameters).total
        less = "" if cfg.train.grad_checkpoint else f"; selective: {_gb(found[SELECTIVE])} GB less, less slow"
        options.append(f"train.grad_checkpoint=true (about {_gb(found[True])} GB less, slower{less})")
    saved = now.total - estimate(cfg, replace(hardware, amp=True), parameters=parameters).total
    if not hardware.amp and saved > 0:
        options.append(f"train.amp=true (about {_gb(saved)} GB less)")
    if cfg.optim.moments != EIGHT_BIT and cfg.parallel.name != "fsdp":
        options.append(f"optim.moments=8bit (about {_gb(MOMENTS_8BIT * parameters)} GB less; it needs dinoct[lowbit])")
    size = max(cfg.model.patch, cfg.model.img_size * 3 // 4 // cfg.model.patch * cfg.model.patch)
    tiny = replace(cfg, model=replace(cfg.model, img_size=size))
    saved = now.total - estimate(tiny, hardware, parameters=parameters).total
    options.append(f"model.img_size={size} (a new run; about {_gb(saved)} GB less)")
    return "; or ".join(options[:3])


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}"
