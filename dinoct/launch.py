"""From the plan of a run to the processes that carry it out: this one, or ranks that torch elastic or torchrun starts.

``parallel.processes=N`` starts N ranks on this machine. Under torchrun, or whatever else sets RANK, this process is one
of the ranks already. The settings were composed before, once; a rank gets the plan.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import torch

from dinoct.checkpoint import load
from dinoct.cli import Outcome
from dinoct.errors import ConfigError, DinoctError
from dinoct.hardware import detect_platform
from dinoct.parallel import Parallel
from dinoct.plan import RunPlan
from dinoct.run import execute
from dinoct.stopping import ON_LOAN, StopRequest

STOP_GRACE_S = 600  # for the ranks to finish a step and to write a checkpoint, before they are killed
EXCHANGE_LIMIT = timedelta(minutes=30)  # rank 0 may be writing a checkpoint while the others wait


def launch(plan: RunPlan) -> Outcome:
    """Train as planned.

    Raises:
        ConfigError: where ``parallel`` does not fit the machine.
        DinoctError: the first error of any rank.
    """
    if plan.cfg.parallel.name == "none":
        return execute(plan)
    return _join(plan, "env://") if "RANK" in os.environ else _start(plan)


def _start(plan: RunPlan) -> Outcome:
    """Start the ranks on this machine, and wait for them. No port is opened but what the exchange itself needs."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = _processes(plan.cfg.parallel.processes)
    if plan.checkpoint is not None:
        plan.checkpoint.state = {}  # each rank reads the file; this process need not hold it meanwhile
    for name in list(logging.root.manager.loggerDict):  # what goes wrong is said in one line below
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    heard = [n for n, h in before.items() if h != signal.SIG_IGN and (n not in ON_LOAN or callable(h))]
    with tempfile.TemporaryDirectory() as folder, _environment():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/rendezvous",
            rdzv_configs={"store_type": "file"},
            max_restarts=0,
            start_method="spawn",
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=f"{folder}/logs"),
            signals_to_handle=",".join(signal.Signals(number).name for number in heard),
        )
        try:
            outcomes = elastic_launch(config, _rank)(plan, f"file://{folder}/group")
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 128:
                return Outcome(failure.exitcode)
            raise DinoctError(f"rank {rank} of {count}: {_reason(failure.message, failure.exitcode)}") from error
        except SignalException as stopped:
            return Outcome(128 + int(stopped.sigval))
        finally:  # elastic leaves its own
            for number, handler in before.items():
                signal.signal(number, handler)
    return outcomes[0]


def _processes(typed: int | None) -> int:
    cards = torch.cuda.device_count() if detect_platform() != "cpu" else 0
    if typed is None and not cards:
        raise ConfigError("parallel.processes is needed on a machine without a card: give parallel.processes=2")
    if cards and typed is not None and typed > cards:
        raise ConfigError(f"parallel.processes={typed}, but this machine has {cards} cards")
    return typed or cards


@contextmanager
def _environment() -> Iterator[None]:
    """What elastic and the ranks of one machine go by: they talk over the loopback, and it opens no port of its own."""
    ours = {
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_GRACE_S),  # torch 2.11 does not read it and gives 30 s
    }
    before = {key: os.environ.get(key) for key in ours}
    os.environ.update({key: value for key, value in ours.items() if before[key] is None})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)


def _travelling(plan: RunPlan) -> RunPlan:
    """The plan without the checkpoint's tensors: each rank reads the file."""
    return plan if plan.checkpoint is None else replace(plan, checkpoint=replace(plan.checkpoint, state={}))


def _reason(message: str | dict, code: int) -> str:
    """An error's own words, without the name of its class; or what killed the process."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; resume=auto goes on from the newest checkpoint"
    text = message["message"] if isinstance(message, dict) else message
    if text.startswith("To enable traceback"):  # it left no word
        return f"ended with exit status {code}; resume=auto goes on from the newest checkpoint"
    return text.split(": ", 1)[-1]


def _rank(plan: RunPlan, store: str) -> Outcome:
    """The life of a rank that `_start` started."""
    for number in ON_LOAN:  # the launcher sends them on: they ask for a stop, whoever listens to them
        signal.signal(number, lambda *_: None)
    outcome = _join(plan, store)
    if outcome.status:  # stopped by a signal; so was the launcher, perhaps, which asks for no result then
        sys.exit(outcome.status)
    return outcome


def _join(plan: RunPlan, store: str) -> Outcome:
    """Meet the other ranks, and train.

    Args:
        plan: of the run; rank 0's counts.
        store: where they meet: a file, or env:// for MASTER_ADDR and MASTER_PORT.
    """
    import torch.distributed as dist

    from dinoct.ranks import DataParallel, ShardedParallel

    rank, world, place = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_card = plan.cfg.hardware.device != "cpu" and detect_platform() != "cpu"
    device = torch.device("cuda", place) if on_card else torch.device("cpu")
    if on_card:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_card else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world, timeout=EXCHANGE_LIMIT)
    made = DataParallel if plan.cfg.parallel.name == "ddp" else ShardedParallel
    parallel: Parallel = made(device)
    own = plan.checkpoint  # with its tensors where this process planned, without where it was started
    plan = parallel.led(_travelling(plan))
    if plan.checkpoint is not None:
        read_already = own is not None and own.state and own.path == plan.checkpoint.path
        plan.checkpoint = own if read_already else load(plan.checkpoint.path)
    outcome = execute(plan, parallel)
    dist.destroy_process_group()
    return outcome
