"""Several ranks: the same losses, gradients and weights as one process with the same batch; one lost rank ends all.

Ranks are processes of this machine that talk over the loopback (gloo). Every command has a hard time limit, behind
which its whole process group is killed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import TINY, metrics, run, start

from dinoct import checkpoint as checkpoints
from dinoct import launch
from dinoct.checkpoint import list_checkpoints
from dinoct.data.dataset import StreamSampler
from dinoct.errors import CheckpointError
from dinoct.hardware import Hardware, keep_effective_batch

LIMIT_S = 240
EVERY_TERM = [
    "loss=dinov3",
    "loss.out_dim=64",
    "loss.hidden_dim=32",
    "loss.ibot.mask_probability=0.3",  # some micro-batches of a rank have no mask at all
    "loss.gram.teacher=lagged",
    "aug=multicrop",
    "model.drop_path=0",
    "model.layer_scale=0.1",
    "train.accumulation_steps=2",
    "monitor.every=null",
]
TOLERANCE = 1e-5


def train(root, folder, *overrides: str, status: int = 0) -> str:
    """Train in processes of their own; returns what was said on stderr."""
    process = begin(root, folder, *overrides)
    try:
        _, said = process.communicate(timeout=LIMIT_S)
    finally:
        end(process)
    assert process.returncode == status, said
    return said


def begin(root, folder, *overrides: str) -> subprocess.Popen:
    return start(
        "train", *TINY, f"data.root={root}", f"run_dir={folder}", *overrides, cwd=folder.parent, start_new_session=True
    )


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ranks(kind: str, batch: int, *, processes: int = 2) -> list[str]:
    return [f"parallel={kind}", f"parallel.processes={processes}", f"train.batch_size={batch}"]


def assert_same_course(folder, other, *, from_step: int = 1) -> None:
    """Every loss, the gradient's norm and the weights of all networks."""
    pairs = [(a, b) for a, b in zip(metrics(folder), metrics(other), strict=True) if a["step"] >= from_step]
    assert pairs
    for a, b in pairs:
        names = [name for name in a if name.startswith("loss/")] + ["Train/gradient_norm", "Train/samples_seen"]
        assert len(names) == 7
        assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, rel=TOLERANCE, abs=TOLERANCE)
    left, right = (checkpoints.load(list_checkpoints(path)[-1]).state for path in (folder, other))
    assert left["model"].keys() == right["model"].keys()
    for name, value in left["model"].items():
        torch.testing.assert_close(value, right["model"][name], rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    assert left["optimizer"].keys() == right["optimizer"].keys()


@pytest.fixture(scope="module")
def alone(phantom_root, tmp_path_factory):
    """One process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(phantom_root, folder, *EVERY_TERM, "train.batch_size=8", "train.max_steps=6")
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_process_and_hand_over(phantom_root, workplace, alone, kind):
    """Two ranks, then one, then two: the file that either writes is the other's, and the course is that of one."""
    folder = workplace / "run"
    train(phantom_root, folder, *EVERY_TERM, *ranks(kind, 4), "train.max_steps=2", "optim.horizon=6", "ckpt.every=2")
    assert {path.name for path in folder.glob("*.pth")} == {"checkpoint_00000002.pth", "checkpoint_final_00000002.pth"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["hardware"]["processes"], config["hardware"]["batch_size"]) == (2, 4)
    train(phantom_root, folder, f"resume={folder}", "train.batch_size=8", "train.max_steps=4")
    train(phantom_root, folder, f"resume={folder}", *ranks(kind, 4), "train.max_steps=6")
    assert_same_course(folder, alone)
    assert run("eval", f"checkpoint={list_checkpoints(folder)[-1]}", "n=16", "hardware=cpu") in (
        0,
        2,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "layer_scale", "tolerance"), [("true", "null", 2e-3), ("selective", "null", 2e-3), ("true", "0.1", 1e-2)]
)
def test_shares_in_bf16_and_checkpointed_train_as_one_process(phantom_root, workplace, kind, layer_scale, tolerance):
    """As ViT-g trains: weights are gathered in bf16, blocks computed again. The order of sums is all that differs; with
    LayerScale, which one process multiplies into float32 weights, the rounding of a projection's weights too."""
    settings = [*EVERY_TERM, f"model.layer_scale={layer_scale}", "train.amp=true", f"train.grad_checkpoint={kind}"]
    settings += ["train.max_steps=4"]
    train(phantom_root, workplace / "one", *settings, "train.batch_size=8")
    train(phantom_root, workplace / "two", *settings, *ranks("fsdp", 4), "monitor.every=2")
    assert (workplace / "two" / "monitor" / "step_00000002" / "heatmap.png").is_file()
    for a, b in zip(metrics(workplace / "one"), metrics(workplace / "two"), strict=True):
        for name in ("loss/dino", "loss/ibot", "loss/koleo", "loss/gram"):
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-4), (a["step"], name)
        assert a["Train/gradient_norm"] == pytest.approx(b["Train/gradient_norm"], rel=2e-2)


@pytest.mark.long
def test_shares_are_resumed_by_any_number_of_ranks(phantom_root, workplace, alone):
    """Two ranks write their shares, one process goes on from them and makes one file, two go on from shares again."""
    folder = workplace / "run"
    sharded = [*ranks("fsdp", 4), "ckpt.sharded=true", "ckpt.every=1", "ckpt.keep_last=2"]
    train(phantom_root, folder, *EVERY_TERM, *sharded, "train.max_steps=3", "optim.horizon=6")
    assert sorted(path.name for path in folder.glob("sharded_*")) == ["sharded_00000001", "sharded_00000002"]
    for path in folder.glob("*_00000003.pth"):  # the file that the end of a run makes
        path.unlink()
    train(phantom_root, folder, f"resume={folder}", "train.batch_size=8", "train.max_steps=2")
    assert checkpoints.load(folder / "checkpoint_00000002.pth").step == 2
    (folder / "checkpoint_00000002.pth").unlink()
    train(phantom_root, folder, f"resume={folder}", *ranks("fsdp", 4), "train.max_steps=6")
    assert_same_course(folder, alone)
    victim = sorted((folder / "sharded_00000005").glob("*.distcp"))[-1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match="sharded_00000005 is damaged"):
        checkpoints.load(folder / "sharded_00000005")
    for path in folder.glob("*_00000006.pth"):
        path.unlink()
    found, warnings = checkpoints.find_latest([folder])
    assert found.path.name == "sharded_00000004"
    assert len(warnings) == 1


def test_a_killed_rank_ends_all_and_the_run_goes_on(phantom_root, workplace):
    folder = workplace / "run"
    settings = [*ranks("ddp", 4), "train.accumulation_steps=1", "ckpt.every=5", "monitor.every=null"]
    process = begin(phantom_root, folder, *settings, "train.max_steps=100000", "optim.horizon=1000")
    try:
        wait_for_step(process, folder, 7)
        victim = rank_of(process.pid, 1)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        _, said = process.communicate(timeout=LIMIT_S)
    finally:
        end(process)
    assert process.returncode == 1
    assert time.monotonic() - killed < 60
    assert said.count("error:") == 1
    assert re.fullmatch(r"error: rank 1 of 2: killed by SIGKILL.*\n", said), said
    assert json.loads((folder / "config.json").read_text())["state"] == "failed"
    last = checkpoints.load(list_checkpoints(folder)[-1]).step
    assert last >= 5
    train(phantom_root, folder, f"resume={folder}", "train.batch_size=8", f"train.max_steps={last + 2}")
    steps = [row["step"] for row in metrics(folder)]
    assert steps == list(range(1, last + 3))


def run_script(code: str, *typed: str, cwd: Path) -> tuple[int, str, str]:
    """Run a training that a script has changed, its ranks in a session of their own; status, output, errors."""
    (cwd / "changed.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "changed.py", *typed],
        cwd=cwd, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        end(process)
    return process.returncode, out, err


FAILS_ON_ONE_RANK = """
import os
from dinoct.evals import features
from dinoct import looks
judge, read = looks.Looks.judge, features.read_slice
step_now = 0

def judged(self, backbone, step):
    global step_now
    step_now = step
    return judge(self, backbone, step)

def broken(*args):
    if os.environ.get("RANK") == "0" and step_now == 2:
        raise OSError(5, "Input/output error")
    return read(*args)

looks.Looks.judge, looks.read_slice, features.read_slice = judged, broken, broken
if __name__ == "__main__":
    from dinoct.train import cli
    cli()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_evaluation_that_fails_on_one_rank_does_not_hold_up_the_others(phantom_root, workplace, kind):
    typed = [*TINY, f"data.root={phantom_root}", "run_dir=run", *ranks(kind, 4)]
    length = ["train.max_steps=4", "eval.every=2", "eval.n=8", "ckpt.every=2"]
    status, out, err = run_script(FAILS_ON_ONE_RANK, *typed, *length, cwd=workplace)
    assert status == 0, err
    assert "judge failed at step 2, training goes on" in out
    assert "Eval/mean_percentile_rank" in metrics(workplace / "run")[3]


LOST_AT_THE_END = """
import os
from dinoct.saving import Saver
saved_step = Saver.saved_step

def lost(self):
    if os.environ.get("RANK") == "1":
        os._exit(9)
    return saved_step(self)

Saver.saved_step = lost
if __name__ == "__main__":
    from dinoct.train import cli
    cli()
"""


def test_a_rank_that_is_lost_behind_the_last_step_costs_nothing_with_ddp(phantom_root, workplace):
    typed = [*TINY, f"data.root={phantom_root}", "run_dir=run", *ranks("ddp", 4), "train.max_steps=3", "ckpt.every=2"]
    status, _, err = run_script(LOST_AT_THE_END, *typed, cwd=workplace)
    assert status == 1
    assert "rank 1 of 2: ended with exit status 9; resume=auto goes on" in err
    assert checkpoints.load(workplace / "run" / "checkpoint_00000003.pth").step == 3


def test_a_stop_is_for_all_ranks(phantom_root, workplace):
    """SIGINT to the whole group, as a terminal sends it: all stop behind the same step, with the state saved."""
    folder = workplace / "run"
    settings = [*ranks("fsdp", 4), "train.accumulation_steps=1", "monitor.every=null", "eval.every=4", "eval.n=8"]
    process = begin(phantom_root, folder, *settings, "train.max_steps=100000", "optim.horizon=1000")
    try:
        wait_for_step(process, folder, 6)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
    finally:
        end(process)
    assert process.returncode == 130, said
    assert "error" not in said
    config = json.loads((folder / "config.json").read_text())
    assert config["state"] == "stopped"
    last = list_checkpoints(folder)[-1]
    assert checkpoints.step_of(last) == config["step"] == metrics(folder)[-1]["step"]
    assert "rng_ranks" in checkpoints.load(last).state


def test_the_ranks_have_time_to_save_when_they_are_stopped():
    """By torch's own way, 30 s if it is told nothing; what the user set stays."""
    from torch.distributed.launcher.api import LaunchConfig

    if not hasattr(LaunchConfig, "shutdown_timeout"):
        pytest.skip("torch 2.11 gives them 30 s")
    with launch._environment():
        assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == launch.STOP_GRACE_S
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7")
        with launch._environment():
            assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 7


def test_an_error_of_all_ranks_is_said_once(phantom_root, workplace):
    said = train(phantom_root, workplace / "run", *ranks("ddp", 4), "model.init_from=nowhere.pth", status=1)
    assert said.count("error:") == 1
    assert "nowhere.pth" in said


@pytest.mark.parametrize(
    ("environment", "overrides", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, [], "2 processes were started, each of which would train alone"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            ["parallel=ddp", "parallel.processes=3"],
            "parallel.processes=3, but 2 were started",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ["parallel=ddp"], "srun started 4 tasks that do not know of each other"),
        ({}, ["parallel=ddp"], "parallel.processes is needed on a machine without a card"),
        ({}, ["parallel=ddp", "parallel.processes=2", "preflight=true"], "preflight looks at one process"),
        ({}, ["parallel=fsdp", "parallel.processes=2", "train.batch_size=auto"], "find the size with parallel=none"),
        ({}, ["ckpt.sharded=true"], "ckpt.sharded=true needs parallel=fsdp"),
        ({}, ["parallel=ddp", "parallel.processes=0"], "parallel.processes must be at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line(phantom_root, workplace, capfd, monkeypatch, environment, overrides, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dinoct.launch.detect_platform", lambda: "cpu")
    assert run("train", *TINY, f"data.root={phantom_root}", *overrides) == 1
    said = capfd.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (workplace / "outputs").exists()


def test_ranks_read_the_slices_that_one_process_reads():
    whole = iter(StreamSampler(start=12, batch_size=6))
    shares = [iter(StreamSampler(start=12, batch_size=2, rank=rank, world=3)) for rank in range(3)]
    for _ in range(4):
        assert next(whole) == [position for share in shares for position in next(share)]


def test_a_resume_keeps_the_effective_batch_whatever_the_ranks():
    one = Hardware("cpu", torch.device("cpu"), "", 0, False, 8, 4, False, 1)
    assert keep_effective_batch(one, 32) is one
    many = keep_effective_batch(replace(one, processes=2, accumulation_steps=4), 32)
    assert (many.accumulation_steps, many.effective_batch) == (2, 32)


def wait_for_step(process: subprocess.Popen, folder, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(metrics_so_far(folder)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate()[1] if process.poll() is not None else "no step within the time limit")


def metrics_so_far(folder) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def rank_of(launcher: int, rank: int) -> int:
    """Process number of a rank that the launcher started: it starts them in order."""
    found = []
    for child in (int(pid) for pid in os.listdir("/proc") if pid.isdigit()):
        try:
            parent = int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[1])
            command = Path(f"/proc/{child}/cmdline").read_text()
        except (OSError, IndexError):
            continue
        if parent == launcher and "spawn_main" in command:
            found.append(child)
    return sorted(found)[rank]
