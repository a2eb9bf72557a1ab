"""Noticing that training went wrong: loss spikes and collapse, from the scalars of the log."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

SPIKE_FACTOR = 2.0
SPIKE_WINDOW = 10
MIN_FEATURE_STD = 0.2  # normalised: 1 is isotropic; collapsed runs measured about 0.1, untrained ones 0.45


@dataclass(frozen=True)
class Anomaly:
    kind: str  # spike | collapse
    message: str
    critical: bool


class AnomalyDetector:
    """Feed it each step's scalars in order; it reports each collapse once until the run has recovered."""

    def __init__(self, *, min_feature_std: float = MIN_FEATURE_STD):
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.min_feature_std = min_feature_std
        self.collapsed = False

    def check_loss(self, step: int, loss: float) -> Anomaly | None:
        """A spike: the loss is above twice the mean of the last ten steps."""
        mean = sum(self.losses) / len(self.losses) if len(self.losses) == SPIKE_WINDOW else None
        self.losses.append(loss)
        if mean is not None and mean > 0 and loss > SPIKE_FACTOR * mean:
            message = f"loss spike at step {step}: {loss:.4f} is more than twice the last ten steps' mean {mean:.4f}"
            return Anomaly("spike", message, critical=False)
        return None

    def check_features(self, step: int, scalars: Mapping[str, float]) -> Anomaly | None:
        """A collapse: the features of different slices are nearly one vector."""
        std, raw = scalars["Train/feature_std"], scalars["Train/feature_std_raw"]
        was, self.collapsed = self.collapsed, std < self.min_feature_std
        if not self.collapsed or was:
            return None
        message = (
            f"feature collapse at step {step}: normalised feature std {std:.3f} is below {self.min_feature_std} "
            f"(raw {raw:.4f}); an emergency checkpoint was saved. Usual cures: a lower optim.lr, "
            "loss.dino.centering=sinkhorn, loss.koleo.weight=0.1, aug=spatial_strong"
        )
        return Anomaly("collapse", message, critical=True)
