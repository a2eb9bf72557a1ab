"""One record in three places; what fails beside the run does not end it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TINY, run, start

from dinoct.config import TrackerConfig
from dinoct.lineage import Line
from dinoct.tracking import JsonLines, Tracker, build_tracker
from dinoct.turnback import rewind


def test_rewind_cuts_later_records_and_half_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    rewind(path, Line(None, 0), Line(None, 2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


class Broken:
    def log(self, step, scalars):
        raise ConnectionError("the service died")

    def close(self):
        raise ConnectionError("still dead")


def test_a_dead_tracker_does_not_end_the_run(tmp_path):
    tracker = Tracker(JsonLines(tmp_path / "metrics.jsonl"), [Broken()])
    tracker.log(1, {"a": 1.0})
    tracker.log(2, {"a": 2.0})
    tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.fixture
def logged(tmp_path) -> Path:
    cfg = TrackerConfig(group="sweep1", tags=["demo", "cpu"])
    for first in (0, 2):
        rewound = rewind(tmp_path / "metrics.jsonl", Line(None, 0), Line(None, first))
        tracker = build_tracker(cfg, tmp_path, run_id="abcd1234", config={"optim": {"lr": 0.1}}, rewound=rewound)
        for step in (first + 1, first + 2, first + 3)[: 3 if first == 0 else 2]:
            tracker.log(step, {"loss/total": 1.0 / step, "Train/Entropy_Teacher": 2.0})
        tracker.close()
    return tmp_path


def test_an_offline_run_calls_nobody(phantom_root, workplace):
    """Every request would pass the proxy: W&B's service has one of its own language, and takes it too."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        proxies = {key: address for name in names for key in (name, name.lower())}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k.lower() != "no_proxy"}
        command = [*TINY, f"data.root={phantom_root}", "train.max_steps=2", "tracker.wandb=offline"]
        ended = subprocess.run(
            [sys.executable, "-m", "dinoct.train", *command], env=environment | proxies, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_user_without_a_home_hears_nothing_of_it(phantom_root, workplace, monkeypatch):
    """As in a container that is started with a user's number; W&B and Matplotlib want a place for their caches."""
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setenv("TMPDIR", str(workplace))
    command = [f"data.root={phantom_root}", "train.max_steps=1", "monitor.every=1", "tracker.wandb=offline"]
    process = start("train", *TINY, *command, "run_dir=run", cwd=workplace)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert (workplace / "run" / "monitor" / "step_00000001" / "heatmap.png").exists()
    assert not list(workplace.glob("dinoct-cache-*"))


def test_metrics_of_a_resumed_run_hold_each_step_once(logged):
    steps = [json.loads(line)["step"] for line in (logged / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_tensorboard_has_the_same_tags(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged / "tb")).Reload()
    assert {"loss/total", "Train/Entropy_Teacher"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4]


def test_wandb_offline_runs_read_back(logged):
    """By the official reader: same id in both folders, group, tags, and our own step."""
    files = sorted((logged / "wandb").glob("offline-run-*/run-abcd1234.wandb"))
    assert len(files) == 2
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json"]
    texts = [subprocess.run([*command, file], capture_output=True, text=True, timeout=60).stdout for file in files]
    assert "sweep1" in texts[0]
    assert "demo" in texts[0]
    assert "Train/Entropy_Teacher" in texts[1]


def test_a_server_that_cannot_be_reached_makes_wandb_write_offline(tmp_path, monkeypatch, caplog):
    import wandb

    init, modes = wandb.init, []

    def unreachable(*, mode: str, **settings):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("connection refused")
        return init(mode=mode, **settings)

    monkeypatch.setattr(wandb, "init", unreachable)
    cfg = TrackerConfig(wandb="online", tensorboard=False)
    tracker = build_tracker(cfg, tmp_path, run_id="abcd1234", config={})
    tracker.log(1, {"loss/total": 1.0})
    tracker.close()
    assert modes == ["online", "offline"]
    assert "connection refused" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*/run-abcd1234.wandb"))

    def refused(**_):
        raise wandb.errors.AuthenticationError("invalid key")

    monkeypatch.setattr(wandb, "init", refused)  # a key that is wrong is for the user to know before the run
    with pytest.raises(wandb.errors.AuthenticationError):
        build_tracker(cfg, tmp_path, run_id="abcd1234", config={})


def test_a_job_that_fails_before_its_first_step_leaves_no_tracker_open(phantom_root, workplace, monkeypatch):
    """The next job of a sweep would write into its W&B run."""
    closed, build = [], build_tracker

    def watched(*args, **kwargs):
        tracker = build(*args, **kwargs)
        close = tracker.close
        tracker.close = lambda: (closed.append(1), close())
        return tracker

    monkeypatch.setattr("dinoct.run.build_tracker", watched)
    monkeypatch.setattr("dinoct.run.build_engine", lambda *_, **__: 1 / 0)
    assert run("train", *TINY, f"data.root={phantom_root}", "train.max_steps=1") == 1
    assert closed == [1]


def test_records_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    """A refused write, or half a one, leaves no half line; the records come with the next one that fits."""
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log(1, {"a": 1.0})

    class Full:
        def __init__(self, file):
            self.file = file

        def fileno(self):
            return self.file.fileno()

        def write(self, data):
            self.file.write(data[:7])
            raise OSError(28, "No space left on device")

    whole, lines.file = lines.file, Full(lines.file)
    lines.log(2, {"a": 2.0})
    lines.log(3, {"a": 3.0})
    assert path.read_text().count("\n") == 1
    lines.file = whole
    lines.log(4, {"a": 4.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    lines.close()
