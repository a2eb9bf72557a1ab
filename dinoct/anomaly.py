"""Noticing that training went wrong, from the scalars of the log: loss spikes and five signs of collapse."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SPIKE_FACTOR = 2.0
SPIKE_WINDOW = 10
MIN_FEATURE_STD = 0.2  # normalised: 1 is isotropic; collapsed runs measured about 0.1, untrained ones 0.45
MAX_MEAN_COSINE = 0.97  # collapsed runs measured 0.97 to 1; a healthy one on 32 slices touched 0.954
MIN_PARTICIPATION = 1.1  # directions that carry the variance; 1 is a line, healthy short runs were seen at 1.3
MIN_MARGINAL = 0.25  # entropy of the mean assignment over ln(min(K, rows)); 0 is one prototype for all
WALL = 0.99  # loss and teacher entropy over ln K
WALL_STEPS = 200
MIN_SLICES = 8  # the spread of features over fewer slices says nothing
PATIENCE = 2  # records in a row
CURES = {
    "std": "a lower optim.lr, loss.koleo.weight=0.1, aug=spatial_strong",
    "cosine": "a lower optim.lr, loss.koleo.weight=0.1, aug=spatial_strong",
    "rank": "loss.koleo.weight=0.1, a lower optim.lr",
    "peaked": "loss.dino.centering=sinkhorn, a higher loss.dino.teacher_temperature",
    "wall": "optim.lr=1e-3, loss.dino.centering=sinkhorn with loss.out_dim=2048, a lower loss.dino.teacher_temperature",
}


@dataclass(frozen=True)
class Anomaly:
    kind: str  # spike, or one of the five signs
    message: str


class AnomalyDetector:
    """Feed it each step's loss and each record, in order. A sign is reported once, until it has gone.

    An untrained encoder looks collapsed: its class token hardly depends on the slice. So the signs count from the
    first record without any on, and without one from the end of the `grace` steps.
    """

    def __init__(self, *, out_dim: int, slices: int, crops: int, grace: int):
        self.ln_k, self.slices = math.log(out_dim), slices
        self.marginal_limit = math.log(min(out_dim, max(slices * crops, 2)))
        self.grace = grace
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.was_healthy = False
        self.wall_since: int | None = None
        self.streaks: dict[str, int] = {}

    def check_loss(self, step: int, loss: float) -> Anomaly | None:
        """A spike: the loss is above twice the mean of the last ten steps."""
        mean = sum(self.losses) / len(self.losses) if len(self.losses) == SPIKE_WINDOW else None
        self.losses.append(loss)
        if mean is not None and mean > 0 and loss > SPIKE_FACTOR * mean:
            return Anomaly(
                "spike", f"loss spike at step {step}: {loss:.4f} is above twice the last ten's mean {mean:.4f}"
            )
        return None

    def check_record(self, step: int, record: Mapping[str, float]) -> list[Anomaly]:
        """The signs of collapse that are new at this record."""
        signs = self.signs(step, record)
        self.was_healthy = self.was_healthy or not signs
        found = []
        for kind, words in signs.items():
            self.streaks[kind] = self.streaks.get(kind, 0) + 1
            counts = self.was_healthy or step > self.grace
            if not counts:
                self.streaks[kind] = 0
            elif self.streaks[kind] == PATIENCE:
                found.append(Anomaly(kind, f"collapse at step {step}: {words}. Usual cures: {CURES[kind]}"))
        for kind in [kind for kind in self.streaks if kind not in signs]:
            del self.streaks[kind]
        return found

    def signs(self, step: int, record: Mapping[str, float]) -> dict[str, str]:
        """Signs that this record shows, with the sentence for each."""
        std, raw = record["Train/feature_std"], record["Train/feature_std_raw"]
        cosine, rank = record["Train/mean_cosine"], record["Train/participation_ratio"]
        marginal = record["Train/Entropy_Marginal"] / self.marginal_limit
        loss, teacher = record["loss/dino"] / self.ln_k, record["Train/Entropy_Teacher"] / self.ln_k
        walled = loss > WALL and teacher > WALL
        self.wall_since = None if not walled else step if self.wall_since is None else self.wall_since
        out = {}
        if self.slices >= MIN_SLICES:
            if std < MIN_FEATURE_STD:
                out["std"] = f"normalised feature std {std:.3f} is below {MIN_FEATURE_STD} (raw {raw:.4f})"
            if cosine > MAX_MEAN_COSINE:
                out["cosine"] = f"mean cosine between slices {cosine:.3f} is above {MAX_MEAN_COSINE}"
            if rank < MIN_PARTICIPATION:
                out["rank"] = f"the features lie on a line (participation ratio {rank:.2f})"
            if marginal < MIN_MARGINAL:
                out["peaked"] = (
                    f"the teacher gives nearly all slices to one prototype (marginal entropy {marginal:.2f})"
                )
        if self.wall_since is not None and step - self.wall_since >= WALL_STEPS:
            out["wall"] = (
                f"loss and teacher entropy within 1 % of ln K = {self.ln_k:.4f} for {step - self.wall_since} steps"
            )
        return out

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint: a resumed run notices what an uninterrupted one would."""
        return {
            "losses": list(self.losses),
            "was_healthy": self.was_healthy,
            "wall_since": self.wall_since,
            "streaks": dict(self.streaks),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.was_healthy, self.wall_since = state["was_healthy"], state["wall_since"]
        self.streaks = dict(state["streaks"])
