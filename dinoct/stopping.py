"""Signals: finish the step, save, leave.

SIGUSR1 and SIGUSR2 are on loan: where a launcher of jobs listens to one of them (submitit, to have the job requeued),
it gets the signal once the state is saved, by `hand_on`.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPING = b"\nfinishing the step, then the state is saved; Ctrl+C again ends at once, without it\n"
ON_LOAN = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl+C, which interrupts as that does."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by signal {number} before the first step: nothing was trained")
        self.signal = number


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt what is made ready, as Ctrl+C does: it has no state to save yet."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)


class StopRequest:
    """While active, SIGINT, SIGTERM and SIGHUP only ask for a stop; a second SIGINT interrupts at once.

    So do SIGUSR1 and SIGUSR2, where something in this process listens to them. A rank that a launcher started gets each
    signal twice, from the terminal and from the launcher: with `patient` it counts once, and behind the block too.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *ON_LOAN)

    def __init__(self, *, patient: bool = False) -> None:
        self.signal: int | None = None
        self._patient = patient
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started with nohup: a hang-up is meant to do nothing
            if number in ON_LOAN and not callable(signal.getsignal(number)):
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._patient and self.requested else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT and not self._patient:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.signal is None and not self._patient:
            with suppress(OSError):  # of a terminal that is gone; print may be at work where the signal came
                os.write(2, STOPPING)
        self.signal = number

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells have it; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def deaf_to_children() -> Iterator[None]:
    """torch's loader raises from a handler of SIGCHLD when a worker dies, wherever the main thread is: not in here."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def hand_on(exit_status: int) -> None:
    """Give the signal that ended a run to the one who lent it; a launcher that requeues the job does not return.

    Args:
        exit_status: `StopRequest.exit_status`; any other status does nothing.
    Raises:
        Exception: what the launcher raises, such as submitit where the job had its share of timeouts.
    """
    number = exit_status - 128
    if number in ON_LOAN:
        signal.raise_signal(number)
