"""Faults, one by one: what the user sees, what is saved, and that the run goes on as if nothing had happened."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TINY, losses, metrics, run, start
from torch._inductor.exc import InvalidCxxCompiler

from dinoct import checkpoint as checkpoints
from dinoct.checkup.machine import Space
from dinoct.config import CkptConfig
from dinoct.data.dataset import SliceViews
from dinoct.engine import Engine
from dinoct.errors import CheckpointError
from dinoct.faults import explain, is_lost_rank, is_out_of_memory
from dinoct.guard import FiniteGuard
from dinoct.models.ssl import SelfDistillation
from dinoct.resume import has_checkpoint
from dinoct.rundir import RunFolder
from dinoct.saving import Saver
from dinoct.stopping import StopRequest

HERE = ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]


def train(root, folder, *overrides: str) -> int:
    return run("train", *TINY, f"data.root={root}", f"run_dir={folder}", *overrides)


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = (checkpoints.load(path).state["model"] for path in (a, b))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def whole(phantom_root, tmp_path_factory):
    """An undisturbed run of 40 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(phantom_root, folder, "train.max_steps=40") == 0
    return folder


def assert_equals(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert_same_weights(folder / "checkpoint_00000040.pth", whole / "checkpoint_00000040.pth")


# --- NaN ------------------------------------------------------------------------------------------------------------


def poison(monkeypatch, call: int) -> None:
    forward, calls = SelfDistillation.forward, []

    def poisoned(self, batch, **kwargs):
        terms = forward(self, batch, **kwargs)
        calls.append(1)
        if len(calls) == call:
            terms.total = terms.total * float("inf")
            terms.scalars["loss/total"] = terms.total.detach()
        return terms

    monkeypatch.setattr(SelfDistillation, "forward", poisoned)


def test_a_card_stops_one_step_later_with_the_weights_of_the_last_healthy_step(
    phantom_root, workplace, capfd, monkeypatch
):
    """The path for cards, on the CPU: the verdict is read a step later, the optimiser and the teacher skip."""
    assert train(phantom_root, workplace / "plain", "train.max_steps=2", "optim.horizon=6", "ckpt.every=1") == 0
    init = FiniteGuard.__init__
    monkeypatch.setattr(
        FiniteGuard, "__init__", lambda self, *args: (init(self, *args), setattr(self, "deferred", True))[0]
    )
    poison(monkeypatch, call=3)
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=6", "ckpt.every=100", "tracker.every=100") == 1
    assert "step 3: loss/total is not finite" in capfd.readouterr().err
    emergency = checkpoints.load(folder / "emergency_00000002.pth")
    assert (emergency.step, emergency.meta["samples_seen"]) == (2, 16)
    assert emergency.meta["positions"] == list(range(16, 24))
    healthy = checkpoints.load(workplace / "plain" / "checkpoint_00000002.pth").state["model"]
    for name, value in emergency.state["model"].items():
        assert torch.allclose(value.float(), healthy[name].float(), atol=1e-6), name


def test_a_bad_batch_can_be_replayed(phantom_root, workplace, capfd, monkeypatch):
    plain = SliceViews.__getitem__

    def broken(self, position):
        item = plain(self, position)
        if position == 19:
            item["global"][0, 0, 0] = float("nan")
        return item

    folder = workplace / "run"
    with monkeypatch.context() as patch:
        patch.setattr(SliceViews, "__getitem__", broken)
        assert train(phantom_root, folder, "train.max_steps=5") == 1
        emergency = folder / "emergency_00000002.pth"
        assert f"dinoct-train replay={emergency}" in capfd.readouterr().err
        before = sorted(path.name for path in folder.iterdir())
        assert run("train", f"replay={emergency}", *HERE) == 2
        out = capfd.readouterr().out
        assert "input: NOT FINITE" in out
        assert "step 3 is not finite here either" in out
    assert run("train", f"replay={emergency}", *HERE) == 0
    assert "step 3 is finite here" in capfd.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == before


def test_replay_wants_an_emergency_checkpoint(whole, workplace, capfd):
    assert run("train", f"replay={whole / 'checkpoint_00000040.pth'}", *HERE) == 1
    assert "is not an emergency checkpoint" in capfd.readouterr().err


# --- the machine ----------------------------------------------------------------------------------------------------


def test_a_full_disk_does_not_end_the_run_before_its_end(phantom_root, workplace):
    """Every checkpoint fails half-way through its write; training goes on, and the end says that nothing is saved."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = [*TINY, f"data.root={phantom_root}", "run_dir=run", "train.max_steps=6", "ckpt.every=2"]
    process = start("train", *command, cwd=workplace, preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "not saved at step 2, training goes on: cannot write" in out
    assert "not saved at step 4" in out
    assert len(err.splitlines()) == 1
    assert [row["step"] for row in metrics(workplace / "run")] == [1, 2, 3, 4, 5, 6]
    assert not [p.name for p in (workplace / "run").iterdir() if ".pth" in p.name]


def test_a_disk_without_room_for_two_checkpoints_is_refused_before_the_run(phantom_root, workplace, capfd, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("dinoct.saving.shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert train(phantom_root, workplace / "run", "train.max_steps=1") == 1
    assert "free some space" in capfd.readouterr().err


def loader_workers(pid: int) -> list[int]:
    """The processes below one, without the servers that Python puts between (a fork server, a tracker)."""
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    found = [worker for child in below for worker in loader_workers(child) or [child]]
    return [worker for worker in found if b"resource_tracker" not in Path(f"/proc/{worker}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # the defaults before Python 3.14 and from there on
def test_kill_9_leaves_no_loader_worker(phantom_root, workplace, method):
    code = f"import multiprocessing as m; m.set_start_method({method!r}); from dinoct.train import cli; cli()"
    command = [*TINY, f"data.root={phantom_root}", "run_dir=run", "train.max_steps=100000", "hardware.num_workers=2"]
    process = subprocess.Popen([sys.executable, "-c", code, *command], cwd=workplace, stdout=subprocess.DEVNULL)
    try:
        wait_for_step(process, workplace / "run", 3)
        workers = loader_workers(process.pid)
        assert len(workers) == 2
    finally:
        process.kill()
        process.wait()
    until = time.monotonic() + 60
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.2)
    left = [worker for worker in workers if is_alive(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def test_a_killed_loader_worker_costs_nothing(phantom_root, workplace, whole):
    folder = workplace / "run"
    command = [*TINY, f"data.root={phantom_root}", "run_dir=run", "train.max_steps=40", "hardware.num_workers=1"]
    process = start("train", *command, cwd=workplace)
    try:
        wait_for_step(process, folder, 5)
        os.kill(loader_workers(process.pid)[0], signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "a loader worker died" in err
    assert "the state of step" in err
    assert run("train", f"resume={folder}", *HERE) == 0
    assert_equals(folder, whole)


def test_a_loader_worker_may_be_mourned_twice(phantom_root, workplace, whole, capfd, monkeypatch):
    """Its pipe breaks, and while the state is about to be saved torch raises again, from its SIGCHLD handler."""
    folder, original = workplace / "run", Engine._next

    broke = threading.Event()

    def mourn(*_: object) -> None:
        if broke.is_set():  # and not for git, which is asked for the commit
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def broken(self, batches):
        if self.step == 5:
            broke.set()
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGCHLD)).start()
            raise ConnectionResetError(104, "Connection reset by peer")
        return original(self, batches)

    before = signal.signal(signal.SIGCHLD, mourn)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_next", broken)
            assert train(phantom_root, folder, "train.max_steps=40") == 1
        broke.clear()
        assert signal.getsignal(signal.SIGCHLD) is mourn
    finally:
        signal.signal(signal.SIGCHLD, before)
    err = capfd.readouterr().err
    assert "a loader worker died" in err
    assert "the state of step 5 is in" in err
    assert run("train", f"resume={folder}", *HERE) == 0
    assert_equals(folder, whole)


def test_a_vanished_data_disk_costs_nothing(phantom_root, workplace, whole, capfd, monkeypatch):
    root, folder = workplace / "data", workplace / "run"
    shutil.copytree(phantom_root, root)
    update = Engine.update

    def pull_the_plug(self, batches):
        if self.step == 4:
            (root / "store").rename(root / "gone")
            self.train_data.store._handles.clear()
        return update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", pull_the_plug)
        assert train(root, folder, "train.max_steps=40") == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "step 5: series" in err
    assert "the state of step 4 is in" in err
    (root / "gone").rename(root / "store")
    assert run("train", f"resume={folder}", *HERE) == 0
    assert_equals(folder, whole)


def test_out_of_memory_names_three_settings(phantom_root, workplace, capfd, monkeypatch):
    def full(self, batch, **_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(SelfDistillation, "forward", full)
    assert train(phantom_root, workplace / "run", "train.max_steps=2") == 1
    err = capfd.readouterr().err
    assert "train.batch_size=4 train.accumulation_steps=2" in err
    assert "train.grad_checkpoint=true" in err
    assert "train.amp=true" in err
    assert "GB less" in err
    assert len(err.splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, where the test may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_and_is_freed_costs_nothing(phantom_root, workplace, whole, small_disk, capfd, monkeypatch):
    """Full at step 10, freed at step 20: the saves between are missed, the run is the same."""
    folder, update = small_disk / "run", Engine.update
    saved = (whole / "checkpoint_00000040.pth").stat().st_size
    assert 5 * saved < 8e6

    def fill_and_free(self, batches):
        self.saver.wait()  # the checkpoints of steps 10 and 20 meet the disk as it was then
        if self.step == 10:
            (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - saved // 2))
        if self.step == 20:
            (small_disk / "ballast").unlink()
        return update(self, batches)

    monkeypatch.setattr(Engine, "update", fill_and_free)
    assert train(phantom_root, folder, "train.max_steps=40", "ckpt.every=5", "ckpt.keep_last=2") == 0
    out = capfd.readouterr().out
    assert "not saved at step 15, training goes on" in out
    assert "free some space" in out
    assert "saved checkpoint_00000025.pth" in out
    assert_equals(folder, whole)


def test_a_run_folder_that_is_read_only_is_one_line(phantom_root, workplace, small_disk, capfd):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert train(phantom_root, small_disk / "run", "train.max_steps=1") == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "Read-only file system" in err
    assert "run_dir=" in err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(5, "Input/output error"), "check data.root and run_dir"),
        (
            OSError(
                "Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: [Errno 24] Too many open files"
            ),
            "ulimit",
        ),
        (
            OSError("Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: [Errno 5] Input/output error"),
            "data.root",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "hardware.num_workers"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "--shm-size"),
        (InvalidCxxCompiler(), "train.compile=false"),
        (ValueError("two\nlines"), "ValueError: two lines"),
    ],
)
def test_what_the_machine_did_becomes_one_line_with_a_cure(error, says):
    assert says in explain(error)
    assert "\n" not in explain(error)


def test_a_run_folder_that_cannot_be_made_is_one_line(phantom_root, workplace, capfd):
    (workplace / "file").write_text("")
    assert train(phantom_root, workplace / "file" / "run", "train.max_steps=1") == 1
    assert "run_dir=" in capfd.readouterr().err


def test_a_look_that_fails_does_not_end_the_run(phantom_root, workplace, capfd, monkeypatch):
    monkeypatch.setattr("dinoct.looks.draw_monitor", lambda *_, **__: 1 / 0)
    assert train(phantom_root, workplace / "run", "train.max_steps=3", "monitor.every=1") == 0
    assert "draw failed at step 1, training goes on: division by zero" in capfd.readouterr().out


# --- signals and kills ----------------------------------------------------------------------------------------------


def wait_for_step(process, folder: Path, step: int) -> None:
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_the_second_ctrl_c_is_at_once():
    """The first only asks; the second does not wait for the step."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.exit_status == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_is_not_lost_while_the_ranks_are_asked():
    def asked(number: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return number

    engine = SimpleNamespace(parallel=SimpleNamespace(highest=asked))
    with StopRequest() as stop:
        assert not Engine._stops(engine, stop)  # the others do not know of it yet
        assert stop.signal == signal.SIGTERM
        assert Engine._stops(engine, stop)


def test_a_save_that_does_not_verify_deletes_nothing(tmp_path, monkeypatch):
    """The disk took the bytes and gives others back: the rotation must not trust them."""
    saver = Saver(tmp_path, CkptConfig(keep_last=1))
    for step in (1, 2):
        good = saver.save({"w": torch.ones(64)}, {"step": step})
    write = checkpoints.save

    def rotten(path, state, meta):
        size = write(path, state, meta)
        path.write_bytes(path.read_bytes()[:-40])
        return size

    monkeypatch.setattr(checkpoints, "save", rotten)
    saver.save_behind({"w": torch.ones(64)}, {"step": 3})
    assert saver.saved_step() == 2
    assert checkpoints.load(good).step == 2
    found, warnings = checkpoints.find_latest([tmp_path])
    assert found.step == 2
    assert "checkpoint_00000003.pth" in warnings[0]


def test_alarms_that_come_and_go_do_not_fill_the_disk(tmp_path, capfd, monkeypatch):
    """The first and the newest are kept, those of an earlier process too, and never in the place of a checkpoint."""
    (tmp_path / "emergency_00000001.pth").touch()
    saver, state = Saver(tmp_path, CkptConfig()), {"w": torch.ones(64)}
    for step in (2, 4, 6, 8):
        saver.alarm(state, {"step": step})
    assert sorted(int(path.stem[-8:]) for path in tmp_path.iterdir()) == [1, 2, 8]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("dinoct.saving.shutil.disk_usage", lambda _: usage._replace(free=400))
    saver.alarm(state, {"step": 10})  # 256 bytes, and a checkpoint has as many
    saver.save(state, {"step": 10})
    assert sorted(int(path.stem[-8:]) for path in tmp_path.iterdir()) == [1, 2, 8, 10]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_milestones_are_kept_of_shares_too_and_found_by_a_requeued_job(tmp_path):
    saver, state = (
        Saver(tmp_path, CkptConfig(keep_last=1, keep_every=2)),
        {"model": {"w": torch.ones(4)}, "optimizer": {}},
    )
    for step in range(1, 6):
        saver.try_save_shards(state, {"rng": {}}, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"sharded_{step:08d}" for step in (2, 4, 5)]
    assert has_checkpoint(tmp_path)


def test_a_first_step_that_fails_leaves_the_checkpoint_that_was_resumed(phantom_root, workplace, whole, monkeypatch):
    """With the settings that failed in it, no later resume would come back to the run's own."""
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=2", "optim.horizon=40") == 0
    before = (folder / "checkpoint_00000002.pth").read_bytes()

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(SelfDistillation, "forward", full)
        assert run("train", f"resume={folder}", "train.batch_size=64", "train.max_steps=40", *HERE) == 1
    assert (folder / "checkpoint_00000002.pth").read_bytes() == before
    assert run("train", f"resume={folder}", "train.max_steps=40", *HERE) == 0
    assert_equals(folder, whole)


def test_a_checkpoint_holds_the_step_it_fell_due_at_while_training_goes_on(
    phantom_root, workplace, whole, capfd, monkeypatch
):
    """Its write begins only when the run is three steps further."""
    folder, further = workplace / "run", threading.Event()
    write, update = checkpoints.save, Engine.update

    def held(path, state, meta):
        assert path.name.startswith("emergency") or further.wait(60), "training waits for the write"
        return write(path, state, meta)

    def release(self, batches):
        scalars = update(self, batches)
        if self.step == 13 and not further.is_set():
            assert not list(folder.glob("checkpoint_*.pth"))
            further.set()
        return scalars

    monkeypatch.setattr(checkpoints, "save", held)
    monkeypatch.setattr(Engine, "update", release)
    assert train(phantom_root, folder, "train.max_steps=40", "ckpt.every=10") == 0
    assert "not saved" not in capfd.readouterr().out
    assert_equals(folder, whole)
    assert run("train", f"resume={folder / 'checkpoint_00000010.pth'}", "run_dir=again", *HERE) == 0
    assert losses(workplace / "again") == losses(whole)[10:]
    assert_same_weights(workplace / "again" / "checkpoint_00000040.pth", whole / "checkpoint_00000040.pth")


def test_an_interrupted_wait_does_not_lose_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    """Python takes a thread for ended when a signal's handler raises while it is joined."""
    saver, write, release = Saver(tmp_path, CkptConfig()), checkpoints.save, threading.Event()

    def held(path, state, meta):
        assert release.wait(60)
        return write(path, state, meta)

    def raises(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", held)
    saver.save_behind({"w": torch.ones(4)}, {"step": 1})
    before = signal.signal(signal.SIGALRM, raises)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            saver.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "checkpoint" in [thread.name for thread in threading.enumerate()]
    release.set()
    assert saver.saved_step() == 1
    assert checkpoints.load(tmp_path / "checkpoint_00000001.pth").step == 1


def test_without_a_thread_to_be_had_training_waits_too(tmp_path, monkeypatch):
    def refused(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    saver = Saver(tmp_path, CkptConfig())
    saver.save_behind({"w": torch.ones(4)}, {"step": 1})
    assert saver.saved_step() == 1


def test_emergencies_of_two_branches_at_one_step_are_both_kept(tmp_path):
    saver = Saver(tmp_path, CkptConfig())
    first = saver.emergency({"w": torch.ones(4)}, {"step": 1})
    again = saver.emergency({"w": torch.ones(4)}, {"step": 1})  # the same state, of a start that failed again
    other = saver.emergency({"w": torch.zeros(4)}, {"step": 1})
    assert [path.name for path in (first, again, other)] == [
        "emergency_00000001.pth", "emergency_00000001.pth", "emergency_00000001x.pth",
    ]  # fmt: skip
    assert checkpoints.load(first).state["w"].tolist() == [1] * 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_best_encoder_that_could_not_be_kept_does_not_raise_the_bar(phantom_root, workplace, monkeypatch):
    from dinoct import looks

    given = iter([0.4, 0.2, 0.3, 0.5])
    monkeypatch.setattr(looks, "judge", lambda *_, **__: {"mean_percentile_rank": next(given), "top1": 0.0, "n": 4})
    write, folder = checkpoints.save, workplace / "r"

    def full(path, state, meta):
        if path.name == "checkpoint_best_00000002.pth":
            raise CheckpointError("No space left on device")
        return write(path, state, meta)

    monkeypatch.setattr(checkpoints, "save", full)
    assert train(phantom_root, folder, "eval.every=1", "ckpt.every=100", "train.max_steps=4") == 0
    assert [path.name for path in folder.glob("*best*")] == ["checkpoint_best_00000003.pth"]


def test_a_loader_worker_that_dies_within_an_update_does_not_cut_it(phantom_root, workplace, monkeypatch):
    """torch's handler raises wherever the main thread is: behind the optimiser's step the teacher has not moved yet."""
    folder, end_update, armed = workplace / "run", SelfDistillation.end_update, threading.Event()

    def died(*_):
        if armed.is_set():  # and not for git, which is asked for the commit
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def interrupted(self, **more):
        if more["step"] == 2:
            armed.set()
            os.kill(os.getpid(), signal.SIGCHLD)
            armed.clear()
        end_update(self, **more)

    monkeypatch.setattr(SelfDistillation, "end_update", interrupted)
    before = signal.signal(signal.SIGCHLD, died)
    try:
        assert train(phantom_root, folder, "train.max_steps=3") == 0
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_run_whose_last_word_cannot_be_written_is_done_all_the_same(phantom_root, workplace, monkeypatch, capfd):
    """Whoever waits for the exit status, such as a scheduler that requeues the job, is to have the right one."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "set_state", full)
    assert train(phantom_root, workplace / "run", "train.max_steps=1") == 0
    assert "config.json still says that the run goes on" in capfd.readouterr().out


def test_a_damaged_line_of_the_metrics_stops_no_resume(phantom_root, workplace):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=2") == 0
    with open(folder / "metrics.jsonl", "r+b") as file:
        file.write(b"\xff")
    assert run("train", f"resume={folder}", "train.max_steps=3", *HERE) == 0
    assert metrics(folder)[-1]["step"] == 3


def test_a_loader_worker_that_dies_when_a_write_begins_is_not_taken_for_a_thread_that_is_not_to_be_had(
    tmp_path, monkeypatch
):
    """torch tells its death by a RuntimeError, from its SIGCHLD handler: two writers would share one temporary file."""
    start, writers = threading.Thread.start, []

    def interrupted(self):
        start(self)
        os.kill(os.getpid(), signal.SIGCHLD)

    def died(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    write = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *args: writers.append(threading.current_thread()) or write(*args))
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    before = signal.signal(signal.SIGCHLD, died)
    try:
        saver = Saver(tmp_path, CkptConfig())
        saver.save_behind({"w": torch.ones(4)}, {"step": 1})
        assert saver.saved_step() == 1
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert [thread.name for thread in writers] == ["checkpoint"]


def test_without_memory_for_a_copy_training_waits_for_the_checkpoint(
    phantom_root, workplace, whole, capfd, monkeypatch
):
    monkeypatch.setattr("dinoct.saving.ram", lambda: Space(free=1_000_000, total=2_000_000_000))
    steps, write, update = [], checkpoints.save, Engine.update

    def counted(self, batches):
        steps.append(self.step)
        return update(self, batches)

    def slow(path, state, meta):
        before = len(steps)
        time.sleep(0.5)
        assert len(steps) == before
        return write(path, state, meta)

    monkeypatch.setattr(Engine, "update", counted)
    monkeypatch.setattr(checkpoints, "save", slow)
    assert train(phantom_root, workplace / "run", "train.max_steps=40", "ckpt.every=20") == 0
    out = capfd.readouterr().out
    assert "no room to copy" in out
    assert "not saved" not in out
    assert_equals(workplace / "run", whole)


@pytest.mark.parametrize(
    ("number", "group", "status"),
    [(signal.SIGTERM, False, 143), (signal.SIGTERM, True, 143), (signal.SIGHUP, True, 129), (signal.SIGINT, True, 130)],
)
def test_signals_save_and_leave(phantom_root, workplace, whole, number, group, status):
    """To the process alone, or to the whole group with its loader workers, as terminals and Slurm do."""
    folder = workplace / "run"
    command = [*TINY, f"data.root={phantom_root}", "run_dir=run", "train.max_steps=40", "hardware.num_workers=1"]
    process = start("train", *command, cwd=workplace, start_new_session=True)
    try:
        wait_for_step(process, folder, 3)
        (os.killpg if group else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, err
    assert f"stopped by signal {number:d} at step" in out
    assert run("train", f"resume={folder}", *HERE) == 0
    assert_equals(folder, whole)


def kill_and_restart(phantom_root, workplace, whole, *, kills: int, seed: int) -> None:
    """Kill -9 at random moments, saves included, and start again until it is through."""
    folder = workplace / "outputs" / "runs" / "20260101_000000"
    draw = random.Random(seed)
    first = [*TINY, f"data.root={phantom_root}", f"run_dir={folder}", "train.max_steps=40", "ckpt.every=1"]
    command, done = first, 0
    while done < kills:
        process = start("train", *command, cwd=workplace)
        try:
            step = len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0
            if step < 38:
                wait_for_step(process, folder, min(step + draw.randrange(1, 3), 39))
            time.sleep(draw.uniform(0, 0.05))
        finally:
            process.kill()
            process.communicate()
        done += 1
        command = ["resume=auto", *HERE] if list(folder.glob("checkpoint_*.pth")) else first
        if step >= 36:  # begin anew, or late kills would find the work done
            shutil.rmtree(folder)
            command = first
        elif command is first:
            shutil.rmtree(folder, ignore_errors=True)
    process = start("train", *command, cwd=workplace)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_equals(folder, whole)
    assert not [path.name for path in folder.iterdir() if ".pth.tmp-" in path.name]


def test_killed_four_times_ends_with_the_same_weights(phantom_root, workplace, whole):
    kill_and_restart(phantom_root, workplace, whole, kills=4, seed=0)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_fifty_times_ends_with_the_same_weights(phantom_root, workplace, whole):
    kill_and_restart(phantom_root, workplace, whole, kills=50, seed=1)


def test_a_signal_before_the_first_step_leaves_no_run_that_seems_to_go_on(phantom_root, workplace, capfd, monkeypatch):
    def while_it_is_made_ready(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("dinoct.run.build_tracker", while_it_is_made_ready)
    assert train(phantom_root, workplace / "run", "train.max_steps=40") == 143
    assert capfd.readouterr().err == "interrupted by signal 15 before the first step: nothing was trained\n"
    assert json.loads((workplace / "run" / "config.json").read_text())["state"] == "failed"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nohup_is_heeded(phantom_root, workplace):
    """A hang-up does nothing to a run that was started to ignore it."""
    command = [*TINY, f"data.root={phantom_root}", "run_dir=run", "train.max_steps=12"]
    process = start("train", *command, cwd=workplace, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    try:
        wait_for_step(process, workplace / "run", 2)
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert len(losses(workplace / "run")) == 12


def test_a_console_that_vanishes_does_not_end_the_run(phantom_root, workplace):
    """`dinoct-train | head -1`: the pipe breaks, the run goes on."""
    command = [*TINY, f"data.root={phantom_root}", "run_dir=run", "train.max_steps=12"]
    process = start("train", *command, cwd=workplace)
    try:
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert (workplace / "run" / "checkpoint_final_00000012.pth").exists()


def test_going_on_behind_the_schedules_is_said(phantom_root, workplace, capfd):
    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=2") == 0
    assert "the schedules end" not in capfd.readouterr().out
    assert run("train", f"resume={folder}", "train.max_steps=4", *HERE) == 0
    assert "the schedules end at step 2" in capfd.readouterr().out


def test_a_run_without_end_says_when_its_schedules_end(phantom_root, workplace):
    """Before it starts, on the way, and when it goes on behind them."""
    command, folder = [*TINY, f"data.root={phantom_root}", "train.max_steps=null"], workplace / "run"
    for typed, said in (([*command, "optim.horizon=5", "run_dir=run"], 2), (["resume=run", *HERE], 2)):
        process = start("train", *typed, cwd=workplace)
        try:
            wait_for_step(process, folder, 8 if "resume=run" not in typed else len(losses(folder)) + 2)
            process.terminate()
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 143, err
        assert out.count("the schedules end at step 5: behind it the learning rate is optim.min_lr") == said
    assert "optim.horizon=10 stretches them" in out


def test_config_survives_and_names_every_resume(phantom_root, workplace, whole, capfd):
    from dinoct.runs import main

    folder = workplace / "run"
    assert train(phantom_root, folder, "train.max_steps=2", "optim.horizon=4") == 0
    assert run("train", f"resume={folder}", "train.max_steps=3", *HERE) == 0
    capfd.readouterr()
    assert main(["show", str(folder)]) == 0
    out = capfd.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    for words in (config["git_commit"], config["data_manifest_hash"], "from step 2", "changed train.max_steps: 2 -> 3"):
        assert words in out
    assert main([str(workplace)]) == 0
    assert main(["show", str(workplace)]) == 1


@pytest.mark.parametrize(
    ("error", "memory", "rank"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("HIP error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'CUDA error: out of memory'"), True, False),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0"), False, True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer"), False, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, False),
    ],
)
def test_no_memory_and_no_neighbour_are_told_apart(error, memory, rank):
    assert (is_out_of_memory(error), is_lost_rank(error)) == (memory, rank)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["false", "selective"])
def test_a_compiled_run_is_the_plain_run(phantom_root, workplace, kind):
    """The same losses, and a checkpoint that goes on without it."""
    settings = ["train.max_steps=6", "aug=multicrop", "model.drop_path=0.1", "model.layer_scale=0.1", "ckpt.every=3"]
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        more = [f"train.compile={compiled}", f"train.grad_checkpoint={kind}", "monitor.every=3"]
        assert train(phantom_root, workplace / name, *settings, *more) == 0
    for a, b in zip(metrics(workplace / "plain"), metrics(workplace / "compiled"), strict=True):
        for loss in ("loss/dino", "loss/koleo", "loss/gram"):
            assert a[loss] == pytest.approx(b[loss], rel=1e-4, abs=1e-6), (a["step"], loss)
    assert (workplace / "compiled" / "monitor" / "step_00000003" / "attention.png").is_file()
    middle = workplace / "compiled" / "checkpoint_00000003.pth"
    assert run("train", f"resume={middle}", f"run_dir={workplace / 'on'}", "train.compile=false", *HERE) == 0
    assert metrics(workplace / "on")[-1]["loss/total"] == pytest.approx(
        metrics(workplace / "plain")[-1]["loss/total"], rel=1e-4
    )
