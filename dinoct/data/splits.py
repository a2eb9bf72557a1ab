"""Patient-level splits.

Slices of one patient are near copies of each other: a split by slice inflates every figure. The side of a patient is a
function of (patient key, seed) alone, so that adding data moves nobody.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dinoct.data.index import SliceIndex
from dinoct.durable import replacing_text
from dinoct.errors import DinoctError

GROUP_KEY = "patient"
ENOUGH_PATIENTS = 5  # docs/results.md: with three, two of three seeds fail for want of patients


def patient_draw(patient: str, seed: int) -> float:
    """Map (patient key, seed) to a number in [0, 1): below the fraction means validation."""
    digest = hashlib.blake2b(f"{seed}:{patient}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def default_split(folder: Path, seed: int) -> Path:
    """The manifest that is taken unless ``data.split_manifest`` names one: val10, or the only one of that seed."""
    usual = folder / split_file_name(0.1, seed)
    others = list(folder.glob(f"val*_seed{seed}.json"))
    return others[0] if len(others) == 1 and not usual.exists() else usual


def few_held_out(patients: int) -> str:
    """What so few held-out patients mean for a verdict, and what to do; empty where they are enough."""
    if patients >= ENOUGH_PATIENTS:
        return ""
    cure = f"hold out {ENOUGH_PATIENTS} or more: dinoct-prepare with split.val_fraction or split.val_patients"
    if patients == 1:
        return f"one held-out patient proves nothing, and dinoct-eval will not pass; {cure}"
    return f"with {patients} held-out patients dinoct-eval may fail a good encoder; {cure}"


def make_split(
    patients: Iterable[str],
    *,
    seed: int,
    fraction: float,
    val_patients: Sequence[str] = (),
    previous_val: frozenset[str] = frozenset(),
    previous_train: frozenset[str] = frozenset(),
) -> tuple[frozenset[str], frozenset[str]]:
    """Split patient keys into (train, val), at least one on each side.

    `val_patients` names the validation side outright. Otherwise a patient goes where its draw sends it; `previous_*`
    are the sides of an earlier split, which stay as they were (it matters only where the rule "at least one on each
    side" put a patient against its draw). Raises DinoctError for fewer than two patients or unknown names.
    """
    everyone = frozenset(patients)
    if len(everyone) < 2:
        raise DinoctError(f"a split needs two patients and there is {len(everyone)}; add data of another patient")
    if not 0.0 < fraction < 1.0:
        raise DinoctError(f"split.val_fraction must lie between 0 and 1, not {fraction}")
    if val_patients:
        return _named_split(everyone, frozenset(val_patients))
    val = {p for p in everyone if p in previous_val or (p not in previous_train and patient_draw(p, seed) < fraction)}
    by_draw = sorted(everyone, key=lambda p: (patient_draw(p, seed), p))
    if not val:
        val = {by_draw[0]}
    if len(val) == len(everyone):
        val.discard(by_draw[-1])
    return everyone - val, frozenset(val)


def _named_split(everyone: frozenset[str], named: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    unknown = len(named - everyone)
    if unknown:
        raise DinoctError(f"split.val_patients: {unknown} of the names are not among the {len(everyone)} patients")
    if named == everyone:
        raise DinoctError(f"split.val_patients names all {len(everyone)} patients: none is left to train on")
    return everyone - named, named


def split_file_name(fraction: float, seed: int) -> str:
    """`val10_seed0.json` for a fraction of 0.1 and seed 0."""
    return f"val{fraction * 100:g}_seed{seed}.json"


@dataclass(frozen=True)
class SplitManifest:
    """Who is on which side, and of what data. `train` and `val` hold hashed patient keys and are disjoint."""

    dataset_id: str
    seed: int
    fraction: float
    group_key: str
    train: frozenset[str]
    val: frozenset[str]
    index_hash: str
    counts: dict[str, dict[str, int]]
    named: bool = False

    def __post_init__(self) -> None:
        both = len(self.train & self.val)
        if both:
            raise DinoctError(f"{both} patient(s) stand on both sides of the split")

    @classmethod
    def decide(
        cls,
        patients: Sequence[str],
        *,
        dataset_id: str,
        seed: int,
        fraction: float,
        val_patients: Sequence[str] | None = None,
        previous: "SplitManifest | None" = None,
    ) -> "SplitManifest":
        """Split the keys of patients; `of_index` says of what data.

        Args:
            patients: of the data set.
            dataset_id: key of the data set.
            seed: of the draws.
            fraction: of the patients to hold out, about.
            val_patients: None keeps those that `previous` named, newcomers go to train; empty: back to the draws.
            previous: an earlier manifest, which counts where seed, fraction and data set are the same.
        Raises:
            DinoctError: for fewer than two patients, or names that are not among them.
        """
        same = previous is not None and previous.dataset_id == dataset_id
        same = same and (previous.seed, previous.fraction) == (seed, fraction)
        if val_patients is None:
            val_patients = _still_named(previous.val, patients) if same and previous.named else ()
        keep = same and not previous.named
        train, val = make_split(
            patients,
            seed=seed,
            fraction=fraction,
            val_patients=val_patients,
            previous_val=previous.val if keep else frozenset(),
            previous_train=previous.train if keep else frozenset(),
        )
        return cls(dataset_id, seed, fraction, GROUP_KEY, train, val, "", {}, bool(val_patients))

    def of_index(self, index: SliceIndex) -> "SplitManifest":
        """The same sides, with the index's hash and what of it lies on each."""
        sides = zip(("train", "val"), self.masks(index), strict=True)
        counts = {name: _counts(index.select(mask)) for name, mask in sides}
        return replace(self, index_hash=index.content_hash(), counts=counts)

    @classmethod
    def load(cls, path: Path) -> "SplitManifest":
        """Read a manifest. Raises DinoctError if it is missing, is not one, or has a patient on both sides."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                dataset_id=str(data["dataset_id"]),
                seed=int(data["seed"]),
                fraction=float(data["fraction"]),
                group_key=str(data["group_key"]),
                train=frozenset(map(str, data["train"])),
                val=frozenset(map(str, data["val"])),
                index_hash=str(data["index_hash"]),
                counts=dict(data["counts"]),
                named=bool(data.get("named", False)),
            )
        except FileNotFoundError:
            raise DinoctError(f"no split manifest at {path}: run dinoct-prepare, or set data.split_manifest") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DinoctError(f"{path} is not a split manifest ({type(error).__name__})") from error

    def save(self, path: Path) -> None:
        data = {**self.__dict__, "train": sorted(self.train), "val": sorted(self.val)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing_text(Path(path)) as handle:
            json.dump(data, handle, indent=1, sort_keys=True)
            handle.write("\n")

    def masks(self, index: SliceIndex) -> tuple[np.ndarray, np.ndarray]:
        """Return boolean masks [n] (train, val) over `index`.

        Raises DinoctError for a patient on both sides or on neither.
        """
        both = len(self.train & self.val)
        used = [index.patient_names[code] for code in np.unique(index.patient)]
        unknown = sum(name not in self.train and name not in self.val for name in used)
        if both or unknown:
            raise DinoctError(
                f"the split manifest does not fit the index: {unknown} patient(s) unknown to it, {both} on both sides; "
                "run dinoct-prepare again, or set data.split_manifest to the one made with this index"
            )
        in_val = np.array([name in self.val for name in index.patient_names], dtype=bool)
        val = in_val[index.patient] if len(index) else np.zeros(0, dtype=bool)
        return ~val, val


def _still_named(val: frozenset[str], patients: Iterable[str]) -> list[str]:
    left = sorted(val.intersection(patients))
    if not left:
        raise DinoctError(
            f"the {len(val)} held-out patients that split.val_patients named before are not in the data any more, and "
            "nothing was removed from the data set: name others, or split.val_patients=[] to have a hash choose them"
        )
    return left


def _counts(index: SliceIndex) -> dict[str, int]:
    return {
        "patients": len(np.unique(index.patient)),
        "series": len(np.unique(index.series)),
        "slices": len(index),
    }
