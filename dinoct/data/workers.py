"""Run functions over files in processes that may hang, crash or be killed without taking the run with them.

A task is a function over a list of steps (files). Before each step the worker notes in memory that it shares with the
pool which one it begins, and starts a timer that the kernel enforces: a step that hangs in C code ends the worker,
orphaned or not. The pool then names the step that was lost, starts another worker, and leaves it to the caller to
submit the rest again.
"""

import errno
import logging
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from ctypes import c_longlong
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from dinoct.errors import DinoctError

StepHook = Callable[[int], None]
LOOK_EVERY_S = 0.1  # how often the pool looks how far its workers are


class Task(NamedTuple):
    """`function(payload, step)` calls `step(i)` before it touches item i, and `step(-1)` to stop the clock.

    The function travels by name, so it is a top-level one.
    """

    function: Callable[[Any, StepHook], Any]
    payload: Any
    tag: Any = None  # for the caller


class Finished(NamedTuple):
    task: Task
    result: Any


class Lost(NamedTuple):
    """The worker died (or ran out of memory) in step `step` of the task, which has no result."""

    task: Task
    step: int
    reason: str


class InProcess:
    """The same interface without processes: no time limit, no memory limit, no isolation."""

    def __init__(self) -> None:
        self._again: deque[Task] = deque()

    def again(self, task: Task) -> None:
        self._again.append(task)

    def run(self, tasks: Iterable[Task], on_step: StepHook) -> Iterator[Finished | Lost]:
        source = iter(tasks)
        while (task := self._again.popleft() if self._again else next(source, None)) is not None:
            yield Finished(task, task.function(task.payload, on_step))

    def close(self) -> None:
        pass


class WorkerPool:
    """`workers` spawned processes, each with a time limit per step and a cap on the memory it may add.

    Spawned and not forked: a fork would inherit locks and threads of whatever the parent has imported.
    """

    def __init__(self, workers: int, *, timeout_s: float, memory_mb: int):
        self._limits = (timeout_s, memory_mb)
        self._again: deque[Task] = deque()
        self._workers = [_Worker(*self._limits) for _ in range(workers)]

    def again(self, task: Task) -> None:
        """Submit a task from within a `run` loop; it comes before those not yet taken."""
        self._again.append(task)

    def run(self, tasks: Iterable[Task], on_step: StepHook) -> Iterator[Finished | Lost]:
        """Yield what became of each task, in the order they end. `on_step(i)` is called soon after a step began.

        Raises DinoctError if a task failed for a reason that is not the fault of its item (disk full, a bug).
        """
        source = iter(tasks)
        exhausted = False
        ended: list[Finished | Lost] = []
        while True:
            for place, worker in enumerate(self._workers):
                if worker.task is None and not (exhausted and not self._again):
                    task = self._again.popleft() if self._again else next(source, None)
                    exhausted = task is None
                    if task is not None:
                        self._workers[place] = worker = worker.fresh()
                        worker.submit(task)
            yield from ended  # behind the submission: no worker waits while the caller is at work
            busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
            if not busy and not self._again:
                return
            ended = [busy[connection].receive(on_step) for connection in wait(list(busy), LOOK_EVERY_S)] if busy else []
            for worker in busy.values():
                worker.look(on_step)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()


class _Worker:
    def __init__(self, timeout_s: float, memory_mb: int):
        self._limits = (timeout_s, memory_mb)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._step = context.RawValue("q", -1)  # that the worker is at
        args = (theirs, self._step, os.getpid(), *self._limits)
        self._process = context.Process(target=serve, args=args, daemon=True)
        self._process.start()
        theirs.close()
        self.task: Task | None = None
        self._seen = -1  # the last step that the caller was told of
        self._dead = False

    def fresh(self) -> "_Worker":
        """Return this worker, or a new one in its place if it died."""
        return _Worker(*self._limits) if self._dead else self

    def submit(self, task: Task) -> None:
        self.task, self._step.value, self._seen = task, -1, -1
        with suppress(OSError):  # it died between two tasks; receive() finds the end of the pipe and says so
            self.connection.send((task.function, task.payload))

    def look(self, on_step: StepHook) -> None:
        """Tell of the steps that began since the last look."""
        at = self._step.value
        while self._seen < at:
            self._seen += 1
            on_step(self._seen)

    def receive(self, on_step: StepHook) -> Finished | Lost:
        """What became of the task, once the connection has something to read or is closed."""
        task = self.task
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            kind, value = "lost", None
        self.look(on_step)
        self.task = None
        if kind == "lost":
            return self._lost(task)
        if kind == "memory":
            return Lost(task, self._step.value, "out of memory")
        if kind == "failed":
            raise DinoctError(value)
        return Finished(task, value)

    def _lost(self, task: Task) -> Lost:
        code = self._process.exitcode
        self._dead = True
        self.connection.close()
        if self._step.value < 0:
            raise DinoctError(
                f"a worker process ended (exit code {code}) before it read a file: is the machine out of memory?"
            )
        return Lost(task, self._step.value, death_reason(code, self._limits[0]))

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def death_reason(code: int, timeout_s: float) -> str:
    """Put an exit code into words, for the table of rejects."""
    if code == -signal.SIGALRM:
        return f"took longer than {timeout_s:g} s"
    if code == -signal.SIGKILL:
        return "killed while it was read (out of memory?)"
    return (
        f"crashed its decoder ({signal.Signals(-code).name})" if code < 0 else f"ended its process (exit code {code})"
    )


def serve(connection: Connection, at: c_longlong, parent: int, timeout_s: float, memory_mb: int) -> None:
    """The life of a worker: receive a function and its payload, run it, send the result, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C goes to the whole group; the parent decides what ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import dinoct.data.jobs  # noqa: F401  its libraries map memory that the cap must not count

    limit_memory(memory_mb)

    def step(i: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for the result
        if i >= 0:
            at.value = i
        signal.setitimer(signal.ITIMER_REAL, timeout_s if i >= 0 else 0)

    while True:
        try:
            function, payload = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("done", function(payload, step))
        except MemoryError:
            answer = ("memory", None)
        except Exception as error:
            reason = getattr(error, "strerror", None) or type(error).__name__  # its text may quote a path
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            cure = "free some on the disk of data.root" if full else "prepare.workers=0 shows where"
            answer = ("failed", f"a worker failed: {reason} ({cure})")
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(answer)
        except OSError:
            return


def limit_memory(memory_mb: int) -> None:
    """Cap the address space at what is mapped now plus `memory_mb`; no effect where the system has no such limit."""
    try:
        import resource

        with open("/proc/self/statm") as handle:
            mapped = int(handle.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = mapped + memory_mb * 2**20
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    except (ImportError, OSError, ValueError):
        pass
