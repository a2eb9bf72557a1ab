"""Rules that concern several settings. Each error names the key to change."""

import math
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from dinoct.config import AugConfig, LossConfig, ModelConfig, OptimConfig, ProbeConfig, TrainConfig, WindowConfig
from dinoct.errors import ConfigError

AUTO = "auto"  # train.batch_size: the largest that fits, found by trial
SELECTIVE = "selective"  # train.grad_checkpoint: only what is cheap for its memory is computed again
EIGHT_BIT = "8bit"  # optim.moments
RECOMPUTE = (False, SELECTIVE, True)  # values of train.grad_checkpoint, the least memory last
MIN_GRAM_WEIGHT = 0.01
SINKHORN_RATIO = 128  # prototypes per teacher row that still trained as well as 16 (docs/results.md, table c)
KOLEO_SLICES = 16
GRAM_REASON = (
    "Gram anchoring is always on: without it patch features drift apart from the anatomy while the loss still falls"
)
PROBES = ("correspondence", "hard_negatives", "position", "scanner", "purity", "labels", "masks")

SCANNER = ("scanner_manufacturer", "scanner_kernel")  # what the probe named scanner reports
FIGURES = (  # of an evaluation, beside its probes and baselines
    "n",
    "patients",
    "patients_weighing",
    "baseline",
    "top1",
    "top5",
    "ratio",
    "mean_percentile_rank",
    "feature_std",
    "feature_std_raw",
    "mean_cosine",
    "effective_rank",
)


def check_deletions(overrides: Iterable[str]) -> None:
    """Refuse `~loss.gram` and its like before Hydra sees them, with the reason.

    Raises:
        ConfigError: where an override deletes the Gram term or the whole objective.
    """
    for override in overrides:
        if override.startswith(("~loss.gram", "~loss")):
            raise ConfigError(f"{override} is refused. {GRAM_REASON}; lower loss.gram.weight, at least to 0.01")


def validate(cfg: TrainConfig) -> None:
    """Check a training config.

    Raises:
        ConfigError: naming the first key that is wrong.
    """
    _model(cfg.model)
    _loss(cfg.loss)
    _aug(cfg.aug)
    validate_probe(cfg.probe)
    _optim(cfg.optim)
    _crops(cfg)
    _batch_size(cfg.train.batch_size)
    if cfg.train.grad_checkpoint not in RECOMPUTE:
        raise ConfigError(f"train.grad_checkpoint must be true, false or selective, not {cfg.train.grad_checkpoint!r}")
    for key, value in (
        ("train.max_steps", cfg.train.max_steps),
        ("train.accumulation_steps", cfg.train.accumulation_steps),
        ("ckpt.every", cfg.ckpt.every),
        ("ckpt.keep_last", cfg.ckpt.keep_last),
        ("ckpt.keep_every", cfg.ckpt.keep_every),
        ("tracker.every", cfg.tracker.every),
        ("monitor.every", cfg.monitor.every),
        ("eval.every", cfg.eval.every),
        ("optim.horizon", cfg.optim.horizon),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{key} must be at least 1, not {value}")
    if cfg.eval.n < 2:
        raise ConfigError(f"eval.n must be at least 2, not {cfg.eval.n}")
    if not 0 <= cfg.seed < 2**63:
        raise ConfigError(f"seed must be at least 0 and below 2^63, not {cfg.seed}")
    _choice("tracker.wandb", cfg.tracker.wandb, ("offline", "online", "disabled"))
    _choice("hardware.device", cfg.hardware.device, ("auto", "cuda", "rocm", "cpu"))
    _parallel(cfg)


def validate_probe(probe: ProbeConfig) -> None:
    """Check the settings of the evaluation. Raises ConfigError naming the first key that is wrong."""
    _window("probe.window", probe.window)
    _range("probe.scale", probe.scale, low=1e-3, high=1.0)
    _share("probe.flip", probe.flip)
    for key in ("batch_size", "hard_n", "fit_n", "masks_n"):
        if getattr(probe, key) < 1:
            raise ConfigError(f"probe.{key} must be at least 1, not {getattr(probe, key)}")
    for key in ("min_ratio", "min_gain", "min_feature_std", "max_mean_cosine"):
        if math.isnan(getattr(probe, key)):
            raise ConfigError(f"probe.{key} must be a number, not nan")
    if not 0 <= probe.min_gain < 1:
        raise ConfigError(f"probe.min_gain is a share of the untrained rank, from 0 to below 1, not {probe.min_gain:g}")
    if probe.seed < 0:
        raise ConfigError(f"probe.seed must be at least 0, not {probe.seed}")
    for rule in probe.rules:
        parse_rule(rule)
    for name in probe.probes:
        _choice("probe.probes", name, PROBES)
    if not probe.hard_offsets or 0 in probe.hard_offsets:
        raise ConfigError(f"probe.hard_offsets must name neighbours, such as [-1,1], not {probe.hard_offsets}")


def validate_rules(probe: ProbeConfig) -> None:
    """Refuse rules on figures that no report of these probes can have, before anything is computed.

    Raises:
        ConfigError: naming what there is.
    """
    for rule in probe.rules:
        first, *rest = parse_rule(rule)[0].split("/")
        if first != "probes" or not rest:
            _choice("probe.rules", first, (*FIGURES, "baselines", "probes/..."))
            continue
        asked = "scanner" if rest[0] in SCANNER else rest[0]
        _choice("probe.rules: probes", rest[0], ("one_per_series", *SCANNER, *(p for p in PROBES if p != "scanner")))
        if asked != "one_per_series" and asked not in probe.probes:
            raise ConfigError(f'probe.rules: "{rule}" needs {asked} in probe.probes, which is {probe.probes}')


def parse_rule(rule: str) -> tuple[str, str, float]:
    """``"FIGURE >= NUMBER"`` as its three parts.

    Raises:
        ConfigError: for anything else.
    """
    parts = rule.split()
    try:
        path, sign, bound = parts[0], parts[1], float(parts[2])
    except (IndexError, ValueError):
        sign, bound = "", 0.0
    if math.isnan(bound) or sign not in (">=", "<=") or len(parts) != 3:
        raise ConfigError(f'probe.rules: "{rule}" is not FIGURE >= NUMBER or FIGURE <= NUMBER')
    return path, sign, bound


def teach(cfg: TrainConfig, *, batch_size: int) -> list[str]:
    """Warnings on settings that are allowed and seldom meant, each with what to change."""
    out = []
    rows, k = batch_size * cfg.aug.global_crops, cfg.loss.out_dim
    if cfg.loss.dino.centering == "sinkhorn" and k > SINKHORN_RATIO * rows:
        out.append(
            f"Sinkhorn-Knopp shares {k} prototypes among {rows} teacher rows: the teacher's entropy cannot go below "
            f"ln(K/B) = {math.log(k / rows):.2f} of ln K = {math.log(k):.2f}, and accumulation does not help; "
            f"take loss.out_dim={SINKHORN_RATIO * rows} or less, or loss.dino.centering=softmax"
        )
    if cfg.loss.koleo.weight and batch_size < KOLEO_SLICES:
        out.append(
            f"KoLeo looks for neighbours among {batch_size} slices, {KOLEO_SLICES} or more are meant, and accumulation "
            "does not help: raise train.batch_size, or take loss.koleo.weight=0"
        )
    return out


def nearest_multiples(size: int, patch: int) -> list[int]:
    """The multiples of `patch` just below and just above `size`, without 0."""
    below = size // patch * patch
    return [value for value in (below, below + patch) if value > 0]


def local_crop_size(patch: int) -> int:
    """The multiple of `patch` nearest to 96 pixels: 98 for patch 14, 96 for 16."""
    return max(patch, round(96 / patch) * patch)


def _model(m: ModelConfig) -> None:
    for key in ("patch", "dim", "depth", "heads", "img_size"):
        if getattr(m, key) < 1:
            raise ConfigError(f"model.{key} must be at least 1, not {getattr(m, key)}")
    if m.img_size % m.patch:
        good = " or ".join(str(value) for value in nearest_multiples(m.img_size, m.patch))
        raise ConfigError(
            f"model.img_size={m.img_size} is not a multiple of model.patch={m.patch}: "
            f"take model.img_size={good}, or another patch"
        )
    if m.dim % m.heads:
        raise ConfigError(f"model.dim={m.dim} is not a multiple of model.heads={m.heads}")
    if not 0 <= m.drop_path < 1:
        raise ConfigError(f"model.drop_path must be in [0, 1), not {m.drop_path}")
    if m.registers < 0:
        raise ConfigError(f"model.registers must not be negative, not {m.registers}")


def _loss(loss: LossConfig) -> None:
    gram = loss.gram
    if not (math.isfinite(gram.weight) and gram.weight >= MIN_GRAM_WEIGHT):
        raise ConfigError(f"loss.gram.weight={gram.weight:g} is refused, {MIN_GRAM_WEIGHT} is the least. {GRAM_REASON}")
    _choice("loss.gram.teacher", gram.teacher, ("ema", "lagged", "snapshot"))
    _choice("loss.dino.centering", loss.dino.centering, ("softmax", "sinkhorn"))
    for key, value in (
        ("loss.dino.weight", loss.dino.weight),
        ("loss.ibot.weight", loss.ibot.weight),
        ("loss.koleo.weight", loss.koleo.weight),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{key} must be a number of at least 0, not {value}")
    for key in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
        if not getattr(loss.dino, key) > 0:
            raise ConfigError(f"loss.dino.{key} must be above 0, not {getattr(loss.dino, key)}")
    for key in ("out_dim", "hidden_dim", "bottleneck_dim"):
        if getattr(loss, key) < 2:
            raise ConfigError(f"loss.{key} must be at least 2, not {getattr(loss, key)}")
    _range("loss.ibot.mask_ratio", loss.ibot.mask_ratio, low=0.0, high=1.0)
    _share("loss.gram.lag", gram.lag)
    _share("loss.gram.snapshot_at", gram.snapshot_at)
    _share("loss.dino.teacher_warmup", loss.dino.teacher_warmup)
    _share("loss.dino.center_momentum", loss.dino.center_momentum)


def _aug(aug: AugConfig) -> None:
    if aug.global_crops < 2 and aug.local_crops < 1:
        raise ConfigError(f"aug.global_crops={aug.global_crops} leaves one view of a slice: DINO needs at least 2")
    if aug.global_crops < 1 or aug.local_crops < 0:
        raise ConfigError("aug.global_crops must be at least 1 and aug.local_crops at least 0")
    _range("aug.global_scale", aug.global_scale, low=1e-3, high=1.0)
    _range("aug.local_scale", aug.local_scale, low=1e-3, high=1.0)
    for key in ("global_mm", "local_mm"):
        if getattr(aug, key) is not None:
            _range(f"aug.{key}", getattr(aug, key), low=5.0, high=2000.0)
    _range("aug.ratio", aug.ratio, low=0.1, high=10.0)
    _window("aug.window", aug.window)
    for key in ("flip", "blur", "noise", "min_body"):
        _share(f"aug.{key}", getattr(aug, key))


def _optim(optim: OptimConfig) -> None:
    for key in ("lr", "clip"):
        if not (math.isfinite(getattr(optim, key)) and getattr(optim, key) > 0):
            raise ConfigError(f"optim.{key} must be a number above 0, not {getattr(optim, key)}")
    for key in ("weight_decay", "weight_decay_end", "min_lr"):
        if not (math.isfinite(getattr(optim, key)) and getattr(optim, key) >= 0):
            raise ConfigError(f"optim.{key} must be a number of at least 0, not {getattr(optim, key)}")
    if optim.min_lr > optim.lr:
        raise ConfigError(f"optim.min_lr={optim.min_lr:g} is above optim.lr={optim.lr:g}")
    for key in ("warmup", "freeze_last_layer", "layer_decay", "teacher_momentum", "teacher_momentum_end"):
        _share(f"optim.{key}", getattr(optim, key))
    if len(optim.betas) != 2:
        raise ConfigError(f"optim.betas needs two numbers, not {optim.betas}")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas must be from 0 to below 1, not {optim.betas}")
    _choice("optim.moments", optim.moments, ("float32", EIGHT_BIT))
    if optim.moments == EIGHT_BIT and find_spec("torchao") is None:
        raise ConfigError("optim.moments=8bit needs torchao: pip install 'dinoct[lowbit]', or optim.moments=float32")


def _parallel(cfg: TrainConfig) -> None:
    name, processes = cfg.parallel.name, cfg.parallel.processes
    _choice("parallel.name", name, ("none", "ddp", "fsdp"))
    if processes is not None and processes < 1:
        raise ConfigError(f"parallel.processes must be at least 1, not {processes}")
    if name == "none" and processes not in (None, 1):
        raise ConfigError(f"parallel.processes={processes} needs parallel=ddp, or parallel=fsdp for a model too large")
    if name != "none" and cfg.train.batch_size == AUTO:
        raise ConfigError("train.batch_size=auto tries out one card: find the size with parallel=none, then give it")
    if name == "fsdp" and cfg.optim.moments == EIGHT_BIT:
        raise ConfigError("optim.moments=8bit and parallel=fsdp do not go together: add optim.moments=float32")
    if name == "fsdp" and cfg.train.compile:
        raise ConfigError("train.compile=true and parallel=fsdp do not go together: add train.compile=false")


def _batch_size(value: int | str | None) -> None:
    if isinstance(value, str) and value != AUTO:
        raise ConfigError(f"train.batch_size must be a whole number, auto or null, not {value}")
    if isinstance(value, int) and value < 1:
        raise ConfigError(f"train.batch_size must be at least 1, not {value}")


def _crops(cfg: TrainConfig) -> None:
    fine = cfg.loss.gram.teacher_px
    if fine is not None and (fine < cfg.model.img_size or fine % cfg.model.patch):
        raise ConfigError(
            f"loss.gram.teacher_px={fine} must be a multiple of model.patch={cfg.model.patch} and at least "
            f"model.img_size={cfg.model.img_size}"
        )
    size, patch = cfg.aug.local_size, cfg.model.patch
    if cfg.aug.local_crops and size is not None and size % patch:
        good = " or ".join(str(value) for value in nearest_multiples(size, patch))
        raise ConfigError(f"aug.local_size={size} is not a multiple of model.patch={patch}: take {good}, or null")


def _choice(key: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ConfigError(f"{key} must be one of {', '.join(options)}, not {value}")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{key} must be between 0 and 1, not {value}")


def _range(key: str, value: Sequence[float], *, low: float, high: float) -> None:
    if len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise ConfigError(f"{key} must be two rising numbers between {low:g} and {high:g}, not {list(value)}")


def _window(key: str, window: WindowConfig) -> None:
    _range(f"{key}.center", window.center, low=-1024, high=3071)
    _range(f"{key}.width", window.width, low=1, high=8192)
