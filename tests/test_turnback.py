"""A run that went on from one step in several ways: its regular files and its records are those of one line."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from commands import TINY, losses, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinoct import checkpoint as checkpoints
from dinoct.compare.read import read_figures
from dinoct.lineage import Line
from dinoct.turnback import rewind, turn_back

HERE = ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]


def test_a_branch_that_was_left_and_taken_up_again_is_whole(phantom_root, workplace, monkeypatch, capfd):
    """Of the one that is left for it no checkpoint, record or best rank counts, those of earlier steps neither."""
    from dinoct import looks

    given = iter([0.40, 0.30, 0.35, 0.05, 0.33])  # A at 2, 4 and 6, B at 4, A at 8
    monkeypatch.setattr(looks, "judge", lambda *_, **__: {"mean_percentile_rank": next(given), "top1": 0.0, "n": 4})
    folder = workplace / "r"
    every = ["eval.every=2", "ckpt.every=2", "ckpt.keep_last=9", "optim.horizon=9", "tracker.tensorboard=true"]
    assert run("train", *TINY, f"data.root={phantom_root}", f"run_dir={folder}", "train.max_steps=6", *every) == 0
    first, whole = states(folder), losses(folder)
    turned = [f"resume={folder / 'checkpoint_00000002.pth'}", "optim.lr=0.1", "train.max_steps=5", "eval.every=4"]
    assert run("train", *turned, *HERE) == 0
    second, other = states(folder), losses(folder)
    assert (min(second), max(second), len(other)) == (2, 5, 5)
    capfd.readouterr()
    again = [f"resume={folder / 'abandoned_00000006.pth'}", "train.max_steps=8"]
    assert run("train", *again, *HERE) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "renamed: abandoned_00000004x.pth" in said
    assert "of the branch that this run goes on with, renamed: checkpoint_00000004.pth" in said

    third = states(folder)
    assert sorted(third) == [2, 4, 6, 8]
    assert all(same(third[step], first[step]) for step in first)
    assert [path.name for path in folder.glob("checkpoint_best_*")] == ["checkpoint_best_00000004.pth"]
    assert [path.name for path in folder.glob("checkpoint_final_*")] == ["checkpoint_final_00000008.pth"]
    assert same(checkpoints.load(folder / "checkpoint_best_00000004.pth").state["model"], first[4])
    assert same(checkpoints.load(folder / "abandoned_00000005.pth").state["model"], second[5])
    assert losses(folder)[:6] == whole
    assert read_figures(folder / "metrics.jsonl")[1:] == (0.30, 4)
    curve = EventAccumulator(str(folder / "tb")).Reload().Scalars("loss/total")
    assert [(event.step, event.value) for event in curve] == [(step, pytest.approx(v)) for step, v, _ in losses(folder)]

    assert run("train", f"resume={folder / 'abandoned_00000005.pth'}", "train.max_steps=5", *HERE) == 0
    assert losses(folder) == other
    assert all(same(state, second[step]) for step, state in states(folder).items())


def states(folder: Path) -> dict[int, dict]:
    return {
        checkpoints.step_of(path): checkpoints.load(path).state["model"]
        for path in checkpoints.list_checkpoints(folder)
    }


def same(state: dict, other: dict) -> bool:
    return all(torch.equal(state[name], other[name]) for name in other)


A, B, C = [0, "a"], [20, "b"], [60, "c"]


def write(folder: Path, name: str, *starts: list) -> Path:
    """A checkpoint whose state tells its first name."""
    path = folder / name
    checkpoints.save(path, {"name": torch.tensor(list(name.encode()))}, {"step": 0, "starts": list(starts)})
    return path


def contents(folder: Path) -> dict[str, str]:
    found = {path.name: checkpoints.load(path).state["name"] for path in folder.glob("*.pth")}
    return {name: bytes(state.tolist()).decode().removesuffix(".pth") for name, state in found.items()}


def line(step: int, *starts: list) -> Line:
    return Line.of({"starts": starts}, step)


def branches(folder: Path) -> Path:
    """A went to 60 and was left at 20 for B, which went to 50; returns A's last."""
    for step in (20, 40, 60):
        write(folder, f"{'abandoned' if step > 20 else 'checkpoint'}_{step:08d}.pth", A)
    for name in ("checkpoint_00000040", "checkpoint_best_00000040", "checkpoint_00000050", "checkpoint_final_00000050"):
        write(folder, f"{name}.pth", A, B)
    return folder / "abandoned_00000060.pth"


TAKEN_UP = {
    "checkpoint_00000020.pth": "checkpoint_00000020",
    "checkpoint_00000040.pth": "abandoned_00000040",
    "checkpoint_00000060.pth": "abandoned_00000060",
    "abandoned_00000060.pth": "abandoned_00000060",
    "abandoned_00000040x.pth": "checkpoint_00000040",
    "abandoned_best_00000040.pth": "checkpoint_best_00000040",
    "abandoned_00000050.pth": "checkpoint_00000050",
    "abandoned_final_00000050.pth": "checkpoint_final_00000050",
}


@pytest.mark.parametrize("renames", range(8))
def test_a_kill_among_the_renames_leaves_a_folder_that_goes_on(tmp_path, monkeypatch, renames):
    last, replace, left = branches(tmp_path), os.replace, [renames]

    def counted(old, new):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if renames < 6 else nullcontext():
        patch.setattr(os, "replace", counted)
        turn_back(tmp_path, last, line(60, A))
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    assert newest.name in ("checkpoint_00000050.pth", "checkpoint_00000060.pth")
    turn_back(tmp_path, last, line(60, A))
    assert contents(tmp_path) == TAKEN_UP
    assert turn_back(tmp_path, tmp_path / "checkpoint_00000060.pth", line(60, A)) == ([], [])


def test_files_of_an_earlier_version_keep_their_names(tmp_path):
    """They do not say which starts led to them: those that lie before the checkpoint may be of its line."""
    for name in ("checkpoint_00000020", "abandoned_00000030", "checkpoint_00000040", "checkpoint_best_00000040"):
        checkpoints.save(tmp_path / f"{name}.pth", {}, {"step": 0})
    last = write(tmp_path, "checkpoint_00000060.pth", [50, "a"])
    before = sorted(tmp_path.iterdir())
    assert turn_back(tmp_path, last, line(60, [50, "a"])) == ([], [])
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "checkpoint_00000040.pth").write_bytes(b"cut")
    assert turn_back(tmp_path, last, line(60, [50, "a"])) == ([], [])


def test_records_follow_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def went(was: Line, now: Line, name: str, until: int) -> list[tuple[int, str]]:
        """Go on from the end of a line, and log every ten steps."""
        rewind(path, was, now)
        with path.open("a") as file:
            file.writelines(
                json.dumps({"step": step, "by": name}) + "\n" for step in range(now.step + 10, until + 1, 10)
            )
        return [(row["step"], row["by"]) for row in map(json.loads, path.read_text().splitlines())]

    a = went(Line(None, 0), Line((), 0), "a", 60)
    b = went(line(0, A), line(20, A), "b", 50)
    assert b == [*a[:2], (30, "b"), (40, "b"), (50, "b")]
    assert went(line(0, A, B), line(60, A), "c", 80) == [*a, (70, "c"), (80, "c")]
    assert went(line(0, A, C), line(50, A, B), "d", 50) == b
    assert went(line(0, A, B, [50, "d"]), line(80, A, C), "e", 80) == [*a, (70, "c"), (80, "c")]
    path.unlink()  # what was set aside is not lost with it
    assert went(line(0, A, C, [80, "e"]), line(50, A, B), "f", 50) == b[2:]


def test_records_that_a_kill_found_between_two_files_are_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)))
    before, replace = path.read_text(), os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: replace(old, new) if "abandoned" in str(new) else kill())
        with pytest.raises(KeyboardInterrupt):
            rewind(path, line(0, A), line(20, A))
    assert path.read_text() == before
    rewind(path, line(0, A), line(20, A))
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [10, 20]
    assert (tmp_path / "abandoned_metrics.jsonl").read_text() == '{"start": "a", "step": 30}\n'


def kill() -> None:
    raise KeyboardInterrupt
