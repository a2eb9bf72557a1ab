"""Sweeps as a cluster's jobs: submitit's launcher on this machine, and a job that is started again."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from commands import TINY, metrics, run, start

from dinoct.stopping import StopRequest, hand_on

SWEEP = ["-m", *TINY, "train.max_steps=3", "ckpt.every=1", "optim.lr=1e-3", "hydra.sweep.dir=sweep"]


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_launchers_signal_stops_the_run_and_is_handed_on(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.requested
            assert heard == []
        hand_on(143)
        assert heard == []
        hand_on(stop.exit_status)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_that_nobody_listens_to_is_left_alone():
    with StopRequest():
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize("saved", [1, 0, 3])  # 0: no checkpoint yet; 3: it was done
def test_a_requeued_job_goes_on_in_its_folder(phantom_root, workplace, monkeypatch, saved):
    """Both times it is the same job of the same scheduler, which is all that a requeued job knows of itself."""
    typed = [*SWEEP, f"data.root={phantom_root}"]
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert run("train", *typed) == 0
    (folder,) = (path for path in (workplace / "sweep").iterdir() if path.is_dir())
    assert len(folder.name) < 255  # the overrides above are more
    for path in folder.glob("checkpoint_*.pth"):
        if path.name != f"checkpoint_{saved:08d}.pth":
            path.unlink()  # as if the job had ended after this one
    assert run("train", *typed) == 0
    after = config(folder)
    assert after["state"] == "done"
    assert after["history"][-1]["from_step"] == saved
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3]
    assert (folder / "checkpoint_final_00000003.pth").exists()


def test_another_job_does_not_go_on_in_the_folder(phantom_root, workplace, monkeypatch, capfd):
    typed = [*SWEEP, f"data.root={phantom_root}"]
    assert run("train", *typed) == 0
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert run("train", *typed) == 1
    assert "holds a run already" in capfd.readouterr().err


def test_a_sweep_goes_on_with_what_is_left_of_it(phantom_root, workplace, capfd):
    """Of its jobs one was done, one was killed behind its second step, one had no checkpoint, one had not begun."""
    typed = ["-m", *TINY, "train.max_steps=3", "ckpt.every=1", f"data.root={phantom_root}", "hydra.sweep.dir=sweep"]
    assert run("train", *typed, "seed=0,1,2") == 0
    done, killed, empty = sorted(path for path in (workplace / "sweep").iterdir() if path.is_dir())
    whole = {folder: metrics(folder) for folder in (done, killed, empty)}
    for path in [*empty.glob("checkpoint_*"), *killed.glob("checkpoint_[bf]*"), killed / "checkpoint_00000003.pth"]:
        path.unlink()
    assert run("train", *typed, "seed=0,1,2,3") == 1
    assert "holds a sweep already: resume=auto goes on with it" in capfd.readouterr().err
    for folder in (killed, empty):
        (folder / "config.json").write_text(json.dumps(config(folder) | {"state": "running"}))
    before = (done / "config.json").read_text()
    # the machine is another one, a value was put in between, and the order is another
    assert run("train", *typed, "seed=2,3,1,0", "resume=auto", "ckpt.keep_last=2") == 0
    said = capfd.readouterr().out
    assert said.count("done before: ") == 1
    assert said.count("resuming at step 2 from") == 1
    assert said.count("has these settings: this job begins") == 1
    assert [config(folder)["history"][-1]["from_step"] for folder in (killed, empty)] == [2, 0]
    assert (done / "config.json").read_text() == before
    folders = [path for path in (workplace / "sweep").iterdir() if (path / "config.json").exists()]
    assert sorted(config(folder)["config"]["seed"] for folder in folders) == [0, 1, 2, 3]
    assert len([path for path in (workplace / "sweep").iterdir() if path.is_dir()]) == 4
    for folder, rows in whole.items():
        again = metrics(folder)
        assert [row["step"] for row in again] == [1, 2, 3]
        assert [row["loss/total"] for row in again] == [row["loss/total"] for row in rows]
        assert again[-1]["Eval/mean_percentile_rank"] == rows[-1]["Eval/mean_percentile_rank"]


def test_going_on_takes_no_other_jobs_weights(phantom_root, workplace, capfd):
    """What tells two jobs apart may stand behind the end of the folder's name, which is cut."""
    typed = ["-m", *TINY, f"data.root={phantom_root}", "train.max_steps=1", "hydra.sweep.dir=sweep"]
    assert run("train", *typed, "train.warmup=1,2") == 1  # no such setting: no run began
    assert run("train", *typed, "train.batch_size=4,6") == 0
    assert run("train", *typed, "train.batch_size=6,8", "resume=auto") == 1
    assert "holds a run already: take its place in the order of the values" in capfd.readouterr().err
    assert run("train", *typed, "train.batch_size=4,6,8", "resume=auto") == 0
    folders = [path for path in sorted((workplace / "sweep").iterdir()) if (path / "config.json").exists()]
    assert [config(folder)["config"]["train"]["batch_size"] for folder in folders] == [4, 6, 8]
    assert [len(config(folder)["history"]) for folder in folders] == [1, 1, 1]


def test_a_sweep_from_a_checkpoint_goes_on_from_there(phantom_root, workplace):
    here = [*TINY, f"data.root={phantom_root}"]
    assert run("train", *here, "train.max_steps=2", "run_dir=first") == 0
    typed = ["-m", *here, "train.max_steps=4", "hydra.sweep.dir=sweep"]
    assert run("train", *typed, "optim.lr=1e-3,2e-3", "resume=first") == 0
    folders = [path for path in sorted((workplace / "sweep").iterdir()) if path.is_dir()]
    (folders[1] / "config.json").write_text(json.dumps(config(folders[1]) | {"state": "failed"}))
    for path in folders[1].glob("checkpoint_*"):
        path.unlink()
    assert run("train", *typed, "optim.lr=1e-3,2e-3,3e-3", "resume=auto") == 0
    folders = [path for path in sorted((workplace / "sweep").iterdir()) if path.is_dir()]
    assert [config(folder)["history"][-1]["from_step"] for folder in folders] == [2, 2, 2]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["-m", "resume=auto", "seed=0"], "name it, hydra.sweep.dir=outputs/sweeps/ID"),
        (["+sweep=lr", "resume=auto"], "name it, hydra.sweep.dir=outputs/sweeps/ID"),
        (["-m", "resume=auto", "seed=0", "hydra.sweep.dir=swep"], "no run has begun in hydra.sweep.dir=swep"),
    ],
)
def test_going_on_with_a_sweep_needs_its_name(workplace, capfd, typed, says):
    assert run("train", *typed) == 1
    assert says in capfd.readouterr().err
    assert not list(workplace.iterdir())


def test_a_sweep_is_not_started_by_torchrun(workplace, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert run("train", "-m", "seed=0,1") == 1
    assert "parallel.processes=N starts the processes of each job" in capfd.readouterr().err


def test_the_launcher_for_slurm_takes_what_the_guide_names(workplace, capfd):
    settings = {"partition": "gpu", "timeout_min": 1440, "gpus_per_node": 1, "cpus_per_task": 9, "max_num_timeout": 20}
    typed = [f"hydra.launcher.{key}={value}" for key, value in settings.items()]
    look = ["--cfg", "hydra", "-p", "hydra.launcher"]
    assert run("train", *look, "hydra/launcher=submitit_slurm", *typed) == 0
    out = capfd.readouterr().out
    assert "SlurmLauncher" in out
    for key, value in settings.items():
        assert f"{key}: {value}\n" in out


RANKS = ["parallel=ddp", "parallel.processes=2", "train.batch_size=4"]


@pytest.mark.long
@pytest.mark.parametrize("extra", [[], RANKS], ids=["one process", "two ranks"])
def test_two_jobs_of_the_local_launcher_of_which_one_is_preempted(phantom_root, workplace, extra):
    typed = ["-m", "hydra/launcher=submitit_local", *TINY, f"data.root={phantom_root}", "train.max_steps=200"]
    typed += ["optim.lr=1e-3,2e-3", "ckpt.every=1000", "hydra.sweep.dir=sweep", *extra]
    sweep = start("train", *typed, cwd=workplace)
    deadline = time.monotonic() + 120
    while not (begun := [p for p in workplace.glob("sweep/*/metrics.jsonl") if len(p.read_text()) > 2000]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    folder = begun[0].parent
    job = config(folder)["job"].split()[1]
    (task,) = Path(f"/proc/{job}/task/{job}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # as Slurm does before it takes the machine away
    out, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, err
    assert "sweep sweep" in out
    runs = [path for path in sorted((workplace / "sweep").iterdir()) if (path / "config.json").exists()]
    assert [config(path)["state"] for path in runs] == ["done", "done"]
    assert {config(path)["config"]["tracker"]["group"] for path in runs} == {"sweep"}
    for path in runs:
        assert [row["step"] for row in metrics(path)] == list(range(1, 201))
        assert "hydra/launcher=submitit_local" in config(path)["command"]
    first, second = config(folder)["history"]
    assert first["from_step"] == 0
    assert 0 < second["from_step"] < 200
    assert len((workplace / "sweep" / "summary.csv").read_text().splitlines()) == 3
