"""Which starts led to a checkpoint: tells the lines of a run apart that went on from one step in several ways.

Each start of a run has an id. A checkpoint's meta keeps the starts that it came by, in order, each with the step that
it went on from: ``"starts": [[0, "a3f0c9d2"], [20, "77e1b004"]]``. Those of config.json are of the line that goes on.
"""

import secrets
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoct import checkpoint as checkpoints


@dataclass(frozen=True)
class Line:
    """The starts that led to a step. `starts` is None where an earlier version wrote none down.

    Steps that it took have no start's id, and count as one line's.
    """

    starts: tuple[tuple[int, str], ...] | None
    step: int

    @classmethod
    def of(cls, meta: Mapping[str, Any], step: int) -> "Line":
        """That of a checkpoint's meta, or of a run's config.json."""
        starts = meta.get("starts")
        return cls(None if starts is None else tuple((int(at), str(name)) for at, name in starts), step)

    def start_of(self, step: int) -> str | None:
        """Id of the start that took a step; None where an earlier version did."""
        starts = self.starts or ()
        at = bisect_left([begun for begun, _ in starts], step)
        return starts[at - 1][1] if at else None

    def shares(self, other: "Line", step: int) -> bool:
        """Whether a step of two lines is the same one."""
        return self.start_of(step) == other.start_of(step)

    def came_by(self, other: "Line") -> bool:
        """Whether another line's end lies on this one."""
        return other.step <= self.step and self.shares(other, other.step)

    def then(self) -> list[list[int | str]]:
        """The starts of a run that goes on from here, the new one last, as JSON holds them."""
        return [*map(list, self.starts or ()), [self.step, secrets.token_hex(4)]]


def line_to(path: Path, step: int) -> Line:
    """The line that led to a checkpoint, of a file or of shares; an unknown one where it cannot be read."""
    return Line.of(checkpoints.peek(path), step)
