"""A checkpoint is whole or it is refused; what it holds is data and never code."""

import errno
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from dinoct import checkpoint as checkpoints
from dinoct.checkpoint import find_latest, link_final, list_checkpoints, load, rotate, save
from dinoct.errors import CheckpointError, DinoctError
from dinoct.lineage import Line
from dinoct.turnback import turn_back

STATE = {"model": {"w": torch.arange(4096, dtype=torch.float32)}, "optimizer": {"w": {"step": torch.tensor(3.0)}}}


def write(folder: Path, step: int) -> Path:
    path = folder / checkpoints.checkpoint_name(step)
    save(path, STATE, {"step": step, "config": {"model": {"name": "x"}}})
    return path


def test_round_trip(tmp_path):
    found = load(write(tmp_path, 7))
    assert (found.step, found.meta["config"]["model"]["name"]) == (7, "x")
    assert torch.equal(found.state["model"]["w"], STATE["model"]["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00000007.pth"]


def test_every_flipped_bit_is_seen_or_harmless(tmp_path):
    path = write(tmp_path, 1)
    whole = path.read_bytes()
    draw = random.Random(0)
    seen = 0
    for _ in range(150):
        broken = bytearray(whole)
        broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            state = load(path).state
        except CheckpointError:
            seen += 1
        else:
            assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert seen > 100


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_cut_files_are_refused(tmp_path, keep):
    path = write(tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="not a dinoct checkpoint, or is cut or damaged"):
        load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.crater),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "ours"])
def test_a_pickle_bomb_does_not_go_off(tmp_path, kind):
    Bomb.crater = tmp_path / "crater"
    path = tmp_path / "checkpoint_00000001.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(Bomb() if kind == "torch" else {"meta": "{}", "state": Bomb()}, path)
    says = "not a dinoct checkpoint" if kind == "pickle" else "it holds Python objects, which could run anything"
    with pytest.raises(CheckpointError, match=says) as error:
        load(path)
    assert str(error.value).isprintable()
    assert not Bomb.crater.exists()


def test_foreign_files_get_one_clear_line(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
    with pytest.raises(CheckpointError, match="is not a dinoct checkpoint") as error:
        load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load(tmp_path / "nothing.pth")


def test_another_format_is_named(tmp_path):
    path = tmp_path / "checkpoint_00000001.pth"
    torch.save({"meta": json.dumps({"format": 99}), "state": {}}, path)
    with pytest.raises(CheckpointError, match="format 99; this dinoct reads 1 to 2"):
        load(path)


def test_rotation_keeps_the_last_and_the_milestones(tmp_path):
    for step in range(100, 1000, 100):
        write(tmp_path, step)
    emergency = tmp_path / "emergency_00000150.pth"
    emergency.write_bytes(b"x")
    rotate(tmp_path, keep_last=2, keep_every=300)
    kept = [checkpoints.step_of(path) for path in list_checkpoints(tmp_path)]
    assert kept == [300, 600, 800, 900]
    assert emergency.exists()


def test_milestones_need_not_be_multiples_of_what_is_saved(tmp_path):
    for step in range(300, 6001, 300):
        (tmp_path / checkpoints.checkpoint_name(step)).touch()
        checkpoints.rotate(tmp_path, keep_last=2, keep_every=1000)
    kept = [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)]
    assert kept == [1200, 2100, 3000, 4200, 5100, 5700, 6000]


def test_the_final_checkpoint_is_a_link(tmp_path):
    path = write(tmp_path, 384)
    final = link_final(path)
    assert final.name == "checkpoint_final_00000384.pth"
    assert final.samefile(path)
    assert list_checkpoints(tmp_path) == [path]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EIO])  # exFAT; FUSE; a folder shared with a VM
def test_where_there_are_no_hard_links_the_final_checkpoint_is_a_copy(tmp_path, monkeypatch, number):
    for name in ("link", "symlink"):
        monkeypatch.setattr(os, name, no_links(number))
    final = link_final(write(tmp_path, 384))
    assert load(final).step == 384
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000384.pth", final.name]


def test_latest_skips_broken_files_and_names_them(tmp_path):
    old, new = tmp_path / "a", tmp_path / "b"
    for folder in (old, new):
        folder.mkdir()
    write(old, 500)
    good, broken = write(new, 100), write(new, 200)
    broken.write_bytes(broken.read_bytes()[:-50])
    found, warnings = find_latest([new, old])
    assert found.path == good
    assert len(warnings) == 1
    assert "checkpoint_00000200.pth" in warnings[0]


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = write(tmp_path, 1)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(path, STATE, {"step": 2})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_going_on_from_the_best_encoder_keeps_it(tmp_path, monkeypatch):
    """Its regular checkpoint is rotated away; a later one, and one of the same step of another branch, are not its."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint_00000002.pth", "checkpoint_00000004.pth", "checkpoint_00000006.pth"):
        (tmp_path / name).write_text(name)
    best = Path("checkpoint_best_00000004.pth")  # as it was typed, and not as the folder has it
    best.write_text("another branch")
    turn_back(tmp_path, best, Line(None, 4))
    assert contents(tmp_path) == {
        "abandoned_00000004.pth": "checkpoint_00000004.pth",
        "abandoned_00000006.pth": "checkpoint_00000006.pth",
        "checkpoint_00000002.pth": "checkpoint_00000002.pth",
        "checkpoint_00000004.pth": "another branch",  # at once: a kill must not send the run elsewhere
        best.name: "another branch",
    }


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def no_links(number: int):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("name", ["abandoned_00000004", "abandoned_best_00000004", "abandoned_final_00000004"])
def test_nothing_is_lost_by_going_on_from_what_was_set_aside(tmp_path, monkeypatch, name, hard_links):
    """Line B stands in the folder, and has files of the names that line A's would take."""
    if not hard_links:
        monkeypatch.setattr(os, "link", no_links(errno.EPERM))
    left = ["checkpoint_00000004.pth", "checkpoint_best_00000004.pth", "checkpoint_final_00000004.pth"]
    left += ["checkpoint_00000005.pth", "checkpoint_best_00000005.pth"]  # of two best a kill left the older
    for each in left:
        (tmp_path / each).write_text(f"B {each}")
    (tmp_path / f"{name}.pth").write_text("A")
    moved, _ = turn_back(tmp_path, tmp_path / f"{name}.pth", Line(None, 4))
    found = contents(tmp_path)
    assert found[f"{name}.pth"] == found["checkpoint_00000004.pth"] == "A"
    assert sorted(found[path.name] for path in moved) == sorted(f"B {each}" for each in left)
    assert len(found) == len(moved) + 2
    assert turn_back(tmp_path, tmp_path / "checkpoint_00000004.pth", Line(None, 4)) == ([], [])


def test_a_disk_that_takes_no_copy_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "emergency_00000001.pth").write_bytes(b"another state")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(os, "link", no_links(errno.EPERM))
    monkeypatch.setattr("shutil.copyfileobj", no_links(errno.ENOSPC))
    with pytest.raises(CheckpointError, match="No space left"):
        turn_back(tmp_path, tmp_path / "emergency_00000001.pth", Line(None, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_has_the_same_state_stays(tmp_path):
    """An emergency's state is that of the last finished step, which may be saved already, and be the best so far."""
    write(tmp_path, 4)
    os.rename(tmp_path / "checkpoint_00000004.pth", tmp_path / "checkpoint_best_00000004.pth")
    save(tmp_path / "emergency_00000004.pth", STATE, {"step": 4, "positions": [1, 2]})
    assert turn_back(tmp_path, tmp_path / "emergency_00000004.pth", Line(None, 4)) == ([], [])
    assert load(tmp_path / "checkpoint_00000004.pth").meta["positions"] == [1, 2]
    assert load(tmp_path / "checkpoint_best_00000004.pth").step == 4


def test_shares_that_a_run_goes_on_from_leave_the_best_of_their_step(tmp_path):
    (tmp_path / "sharded_00000004").mkdir()
    (tmp_path / "sharded_00000006").mkdir()
    (tmp_path / "checkpoint_best_00000004.pth").touch()
    moved, _ = turn_back(tmp_path, tmp_path / "sharded_00000004", Line(None, 4))
    assert [path.name for path in moved] == ["abandoned_sharded_00000006"]
    assert (tmp_path / "checkpoint_best_00000004.pth").exists()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE])
def test_what_the_machine_cannot_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, number):
    """Or a resume would go back to an older one, and set the newest aside."""
    write(tmp_path, 1)
    write(tmp_path, 2)

    def refused(path, *_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("zipfile.ZipFile", refused)
    with pytest.raises(DinoctError, match="cannot be read now") as error:
        find_latest([tmp_path])
    assert not isinstance(error.value, CheckpointError)


def test_a_folder_that_cannot_be_synced_costs_no_checkpoint(tmp_path, monkeypatch):
    """CIFS says EINVAL for a folder."""
    sync = os.fsync
    folders = []

    def refused(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            folders.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refused)
    assert load(write(tmp_path, 1)).step == 1
    assert folders


def test_the_only_file_of_a_step_is_not_deleted_for_being_called_final(tmp_path):
    """The regular one was rotated away when the run went on."""
    (tmp_path / "checkpoint_final_00000004.pth").write_text("A 4")
    for step in (2, 3, 6):
        (tmp_path / checkpoints.checkpoint_name(step)).write_text(f"A {step}")
    os.link(tmp_path / "checkpoint_00000006.pth", tmp_path / "checkpoint_final_00000006.pth")
    turn_back(tmp_path, tmp_path / "checkpoint_00000003.pth", Line(None, 3))
    assert contents(tmp_path) == {
        "checkpoint_00000002.pth": "A 2",
        "checkpoint_00000003.pth": "A 3",
        "abandoned_final_00000004.pth": "A 4",
        "abandoned_00000006.pth": "A 6",
    }


def test_what_a_kill_left_of_a_save_is_swept_away(tmp_path):
    for name in (
        ".checkpoint_00000001.pth.tmp-1",
        ".emergency_00000001.pth.tmp-22",
        "checkpoint_00000001.pth",
        ".lock",
    ):
        (tmp_path / name).touch()
    (tmp_path / ".sharded_00000001.tmp").mkdir()
    (tmp_path / ".sharded_00000001.tmp" / "__0_0.distcp").touch()
    checkpoints.sweep_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint_00000001.pth"]


def test_format_1_is_migrated(tmp_path):
    """What an earlier version wrote still loads, with what it lacks filled in."""
    path = tmp_path / "checkpoint_00000001.pth"
    torch.save({"meta": json.dumps({"format": 1, "step": 1}), "state": STATE}, path)
    found = load(path)
    assert found.meta["format"] == 2
    assert found.meta["anomalies"]["losses"] == []
    assert found.meta["train_patients"] == []
    assert set(checkpoints.MIGRATIONS) == set(range(1, checkpoints.FORMAT))
