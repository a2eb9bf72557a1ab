"""What prepare is asked for, and what it tells."""

from dataclasses import dataclass
from pathlib import Path

from dinoct.data.pixels import HU_MAX, HU_MIN
from dinoct.errors import DinoctError


class PrepareError(DinoctError):
    """prepare cannot go on or should not be trusted; the first line says why, a summary by reason may follow."""


class NoSplit(PrepareError):
    """The index is written, and one patient alone cannot be split; an embedding needs no split."""


@dataclass(frozen=True)
class PrepareOptions:
    """`workers` processes decode (0: this process, without time and memory limits, for debugging).

    `max_reject_fraction` limits refused CT files / (refused CT files + slices). `file_timeout_s` and `memory_mb` hold
    per file. `forget_missing` forgets files that are not there even where a whole source is gone. HU are clipped to
    [hu_min, hu_max]. `val_patients` are PatientIDs, or patient keys of the index; None: those that an earlier run named
    stay, and without such a run, or where it is empty, a hash decides.
    """

    workers: int
    max_reject_fraction: float = 0.25
    file_timeout_s: float = 60.0
    memory_mb: int = 2048
    forget_missing: bool = False
    split_seed: int = 0
    val_fraction: float = 0.1
    val_patients: tuple[str, ...] | None = None
    hu_min: int = HU_MIN
    hu_max: int = HU_MAX

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise PrepareError(f"prepare.workers must be at least 0, not {self.workers}")
        if not 0 <= self.max_reject_fraction <= 1:
            raise PrepareError(f"prepare.max_reject_fraction lies between 0 and 1, not {self.max_reject_fraction}")
        if not 0 < self.file_timeout_s <= 86_400:  # NaN is not either
            raise PrepareError(f"prepare.file_timeout_s lies above 0 and is at most a day, not {self.file_timeout_s}")
        if self.memory_mb <= 0:
            raise PrepareError(f"the memory limit of a file must be above 0, not {self.memory_mb}")
        if not 0 < self.val_fraction < 1:
            raise PrepareError(f"split.val_fraction must lie between 0 and 1, not {self.val_fraction}")
        if not -32_768 <= self.hu_min < self.hu_max <= 32_767:
            raise PrepareError(f"HU cannot be clipped to [{self.hu_min}, {self.hu_max}]")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `done` of `total` files ("scan") or slices ("decode"), since `seconds`."""

    stage: str
    done: int
    total: int
    bytes_in: int
    bytes_out: int
    seconds: float


@dataclass(frozen=True)
class PrepareReport:
    """What a run did. Files and slices count all that the root holds, `slices_new` and the bytes only this run.

    `files_vanished` were forgotten, `files_missing` belong to sources that were not named and are kept. `named_kept`
    counts the held-out patients that an earlier run named and this one did not, `series_nameless` series without a
    PatientID, which count as one patient.
    """

    files_seen: int
    files_with_slices: int
    slices_written: int
    slices_new: int
    rejected: dict[str, int]
    refused_ct_fraction: float
    index_csv: Path
    split_manifest: Path
    patients_train: int
    patients_held_out: int
    index_hash: str
    seconds: float
    bytes_in: int
    bytes_out: int
    files_vanished: int
    files_missing: int
    series_left: int
    named_kept: int
    series_nameless: int
