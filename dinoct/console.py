"""What a run says: lines on the console and in train.log, and a progress display where there is a terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _SteadyConsole(Console):
    """A console that may vanish (a closed terminal, a dead pipe) without taking the run along."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


console = _SteadyConsole(highlight=False, soft_wrap=True)
log = logging.getLogger("dinoct")


class _ConsoleHandler(logging.Handler):
    """Prints through rich, so that lines and the progress display do not tear each other."""

    STYLES: ClassVar = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}

    def emit(self, record: logging.LogRecord) -> None:
        style = self.STYLES.get(record.levelno)
        prefix = f"{record.levelname}: " if style else ""
        with suppress(OSError):
            console.print(prefix + record.getMessage(), style=style, markup=False)


class _LogFile(logging.FileHandler):
    """A log file that a full disk cannot turn into tracebacks on the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def run_log(path: Path | None = None) -> Iterator[logging.Logger]:
    """Log to the console, and to the file `path` with times, until the block ends."""
    handlers: list[logging.Handler] = [_ConsoleHandler(level=logging.INFO)]
    if path is not None:
        file = _LogFile(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    level, propagate = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield log
    finally:
        log.setLevel(level)
        log.propagate = propagate
        for handler in handlers:
            log.removeHandler(handler)
            with suppress(OSError):
                handler.close()


def progress(unit: str) -> Progress:
    """A progress display with a rate-free bar; it draws nothing where the output is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
