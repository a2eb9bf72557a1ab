"""A run that went on from one step in several ways: its regular files and its records are those of one line."""

import json
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import TINY, losses, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinoct import checkpoint as checkpoints
from dinoct.compare.read import read_figures
from dinoct.lineage import Line, line_to
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


def test_the_best_encoder_of_a_branch_that_was_left_is_kept_for_it(phantom_root, workplace, monkeypatch):
    """It is of a time before the branches parted, and the other one found a better."""
    from dinoct import looks

    given = iter([0.20, 0.30, 0.40, 0.10, 0.05, 0.35])  # A at 2, 4 and 6, B at 6 and 8, A at 8
    monkeypatch.setattr(looks, "judge", lambda *_, **__: {"mean_percentile_rank": next(given), "top1": 0.0, "n": 4})
    folder = workplace / "r"
    every = ["eval.every=2", "ckpt.every=2", "ckpt.keep_last=2", "optim.horizon=9"]
    assert run("train", *TINY, f"data.root={phantom_root}", f"run_dir={folder}", "train.max_steps=6", *every) == 0
    best = checkpoints.load(folder / "checkpoint_best_00000002.pth").state["model"]
    assert run("train", "resume=r/checkpoint_00000004.pth", "optim.lr=0.1", "train.max_steps=8", *HERE) == 0
    names = sorted(path.name for path in folder.glob("*best*"))
    assert names == ["abandoned_best_00000002.pth", "checkpoint_best_00000008.pth"]
    assert run("train", "resume=r/abandoned_00000006.pth", "train.max_steps=8", *HERE) == 0
    assert [path.name for path in folder.glob("checkpoint_best*")] == ["checkpoint_best_00000002.pth"]
    assert same(checkpoints.load(folder / "checkpoint_best_00000002.pth").state["model"], best)
    assert read_figures(folder / "metrics.jsonl")[1:] == (0.20, 2)


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


@pytest.mark.parametrize("steps", [[], [60], [60, 70], [70, 80]])
@pytest.mark.parametrize("writes", range(12))
def test_a_kill_among_the_renames_leaves_a_folder_that_goes_on(tmp_path, monkeypatch, writes, steps):
    """From the checkpoint that was named, or until that has its name from the other branch; nothing is lost."""
    last, left, names = branches(tmp_path), [writes], {"replace": os.replace, "link": os.link}
    for step in steps:
        write(tmp_path, f"checkpoint_{step:08d}.pth", A, B)
    before = set(contents(tmp_path).values())

    def counted(name):
        def call(*paths):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            names[name](*paths)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(name))
        with suppress(KeyboardInterrupt):
            turn_back(tmp_path, last, line(60, A))
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    of_b = f"checkpoint_{max([50, *steps]):08d}"
    assert contents(tmp_path)[newest.name] in ("abandoned_00000060", of_b)
    turn_back(tmp_path, last, line(60, A))
    found = contents(tmp_path)
    assert set(found.values()) == before
    of_line = {name: state for name, state in TAKEN_UP.items() if name.startswith("checkpoint_")}
    assert {name: state for name, state in found.items() if name.startswith("checkpoint_")} == of_line
    assert steps or found == TAKEN_UP
    assert turn_back(tmp_path, tmp_path / "checkpoint_00000060.pth", line(60, A)) == ([], [])


def test_what_rotation_dropped_is_not_taken_up_again(tmp_path):
    """A plain resume finds the file that the run had gone on from under its abandoned name alone."""
    write(tmp_path, "abandoned_00000040.pth", A)
    last = write(tmp_path, "checkpoint_00000080.pth", A, [40, "c"])
    assert turn_back(tmp_path, last, line(80, A, [40, "c"])) == ([], [])


def test_a_branch_that_came_to_the_same_state_is_another_one(tmp_path):
    """As where a run went back and forth with no setting changed: the next start must not set its file aside."""
    state = {"weights": torch.ones(1)}
    for name, starts in (("abandoned_00000040", [A]), ("checkpoint_00000040", [A, B])):
        checkpoints.save(tmp_path / f"{name}.pth", state, {"step": 40, "starts": starts})
    turned = turn_back(tmp_path, tmp_path / "abandoned_00000040.pth", line(40, A))
    assert [path.name for path in turned.left] == ["abandoned_00000040x.pth"]
    regular = tmp_path / "checkpoint_00000040.pth"
    assert line_to(regular, 40) == line(40, A)
    assert turn_back(tmp_path, regular, line(40, A)) == ([], [])


def test_the_last_file_of_a_finished_branch_is_taken_up_too(tmp_path):
    """Its regular name was rotated away when the run went on."""
    write(tmp_path, "abandoned_final_00000040.pth", A)
    last = write(tmp_path, "abandoned_00000060.pth", A, [40, "b"])
    assert [path.name for path in turn_back(tmp_path, last, line(60, A, [40, "b"])).taken_up] == [
        "checkpoint_final_00000040.pth"
    ]


def test_a_branch_of_an_earlier_version_is_told_from_one_of_this(tmp_path):
    """Its files and records name no start; those of the branch that was begun since do."""
    path = tmp_path / "metrics.jsonl"
    old, new = Line(None, 60), line(50, B)
    assert went(path, Line(None, 0), Line(None, 0), "a", 60)[-1] == (60, "a")
    checkpoints.save(tmp_path / "abandoned_00000060.pth", {"name": torch.zeros(1)}, {"step": 60})
    write(tmp_path, "checkpoint_00000040.pth", B)
    a = went(path, Line(None, 0), Line(None, 20), "b", 50)[:2]
    turned = turn_back(tmp_path, tmp_path / "abandoned_00000060.pth", old)
    assert [path.name for path in turned.left] == ["abandoned_00000040.pth"]
    back = went(path, new, old, "c", 70)
    assert back == [*a, (30, "a"), (40, "a"), (50, "a"), (60, "a"), (70, "c")]
    assert went(path, line(0, C), new, "d", 50) == [*a, (30, "b"), (40, "b"), (50, "b")]


def test_a_start_that_ended_before_it_was_written_down_costs_no_record(tmp_path):
    """The records were rewound already, and config.json still names the line that they were of before."""
    path = tmp_path / "metrics.jsonl"
    a = went(path, Line(None, 0), Line((), 0), "a", 70)
    b = went(path, line(0, A), line(20, A), "b", 50)
    rewind(path, line(0, A, B), line(70, A))
    assert went(path, line(0, A, B), line(70, A), "c", 70) == a
    assert went(path, line(0, A, [70, "c"]), line(50, A, B), "d", 50) == b


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


def went(path: Path, was: Line, now: Line, name: str, until: int) -> list[tuple[int, str]]:
    """Go on from the end of a line, and log every ten steps."""
    rewind(path, was, now)
    with path.open("a") as file:
        for step in range(now.step + 10, until + 1, 10):
            file.write(json.dumps({"step": step, "by": name}) + "\n")
    return [(row["step"], row["by"]) for row in map(json.loads, path.read_text().splitlines())]


def test_records_follow_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    a = went(path, Line(None, 0), Line((), 0), "a", 60)
    b = went(path, line(0, A), line(20, A), "b", 50)
    assert b == [*a[:2], (30, "b"), (40, "b"), (50, "b")]
    assert went(path, line(0, A, B), line(60, A), "c", 80) == [*a, (70, "c"), (80, "c")]
    assert went(path, line(0, A, C), line(50, A, B), "d", 50) == b
    assert went(path, line(0, A, B, [50, "d"]), line(80, A, C), "e", 80) == [*a, (70, "c"), (80, "c")]
    path.unlink()  # what was set aside is not lost with it
    assert went(path, line(0, A, C, [80, "e"]), line(50, A, B), "f", 50) == b[2:]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_way_a_run_went_its_folder_is_of_one_line(tmp_path, seed):
    """Eight starts, each from any of the files: the records and the regular files are those that led there."""
    draw, path = random.Random(seed), tmp_path / "metrics.jsonl"
    now, history, led_to = Line((), 0), [], {}  # the records that led to each checkpoint, by its step and start
    for _ in range(8):
        starts, last = now.then(), now.step + draw.randint(1, 6)
        for step in range(now.step + 1, last + 1):
            history = [*history, (step, starts[-1][1])]
            with path.open("a") as file:
                file.write(json.dumps(dict(zip(("step", "by"), history[-1], strict=True))) + "\n")
            if step == last or draw.random() < 0.4:
                meta, state = {"step": step, "starts": starts}, {"weights": torch.tensor([len(led_to)])}
                checkpoints.save(tmp_path / checkpoints.checkpoint_name(step), state, meta)
                led_to[history[-1]] = history
        chosen = draw.choice(sorted(tmp_path.glob("*.pth")))
        now = line_to(chosen, int(chosen.stem.rstrip("x")[-8:]))
        turn_back(tmp_path, chosen, now)
        rewind(path, line(0, *starts), now)
        history = led_to[now.step, now.start_of(now.step)]
        assert [(row["step"], row["by"]) for row in map(json.loads, path.read_text().splitlines())] == history
        regular = {checkpoints.step_of(path): path for path in checkpoints.list_checkpoints(tmp_path)}
        assert {(step, line_to(path, step).start_of(step)) for step, path in regular.items()} == led_to.keys() & history


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
