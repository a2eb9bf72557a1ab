"""AdamW with moments in 8 bits: the same run, less memory, checkpoints that need no torchao, and the way back."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from commands import TINY, losses, run, start

from dinoct import checkpoint as checkpoints
from dinoct import moments
from dinoct.config import OptimConfig
from dinoct.guard import FiniteGuard
from dinoct.memory import MOMENTS_8BIT
from dinoct.optim import apply_schedule, build_optimizer, load_optimizer_state, optimizer_state

pytest.importorskip("torchao")
EIGHT = "optim.moments=8bit"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """torchao's step through torch.compile, but for the compiler, which a machine need not have."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def train(root, folder, *overrides: str) -> int:
    return run("train", *TINY, f"data.root={root}", f"run_dir={folder}", *overrides)


def trained(kind: str, *, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A matrix that is brought to 8 bits, one that is too small and a bias, behind some updates."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
    optimizer = build_optimizer(model, depth=1, cfg=OptimConfig(moments=kind))
    for step in range(steps):
        apply_schedule(optimizer, lr=1e-3, weight_decay=0.04 + 0.01 * step, frozen=False)
        model.zero_grad(set_to_none=True)
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(("steps", "most"), [(1, 1e-5), (20, 0.03)])
def test_updates_are_those_of_float32_within_what_8_bits_hold(steps, most):
    """The first is the same: what it moves by is made before anything is brought to 8 bits."""
    begin, float32, eight = (
        trained(kind, steps=n)[0] for kind, n in (("float32", 0), ("float32", steps), ("8bit", steps))
    )
    for old, a, b in zip(begin.parameters(), float32.parameters(), eight.parameters(), strict=True):
        moved, apart = (a - old).norm().item(), (a - b).norm().item()
        assert moved > 0
        assert apart < most * moved
    assert steps == 1 or not torch.equal(float32[0].weight, eight[0].weight)


def test_on_a_card_the_host_waits_for_the_verdict():
    """torchao's step cannot be told on the device to do nothing: a step that is not finite must not begin."""
    card = torch.device("cuda")
    assert FiniteGuard(card, trained("float32", steps=0)[1]).deferred
    guard = FiniteGuard(card, trained("8bit", steps=0)[1])
    assert guard.put(torch.tensor(False), note := object()) is note


def test_moments_of_the_two_kinds_become_each_other():
    """Float32 moments in 8 bits and back: within the width of a code; in 8 bits they come back bit for bit."""
    state = optimizer_state(trained("float32", steps=5)[1])
    model, optimizer = trained("8bit", steps=0)
    load_optimizer_state(optimizer, state)
    lowered = optimizer_state(optimizer)
    assert set(lowered["0.weight"]) == {"step"} | {f"exp_avg{s}.{p}" for s in ("", "_sq") for p in moments.PARTS}
    assert set(lowered["2.weight"]) == {"step", "exp_avg", "exp_avg_sq"}  # 1,024 numbers stay float32
    again = build_optimizer(model, depth=1, cfg=OptimConfig(moments="8bit"))
    load_optimizer_state(again, lowered)
    for name, parts in optimizer_state(again).items():
        assert all(torch.equal(value, lowered[name][key]) for key, value in parts.items())
    plain = build_optimizer(model, depth=1, cfg=OptimConfig())
    load_optimizer_state(plain, lowered)
    for name, back in optimizer_state(plain).items():
        for key, value in back.items():
            assert value.dtype == torch.float32
            assert (value - state[name][key]).norm() <= 0.02 * state[name][key].norm()


def test_a_run_takes_less_and_learns_alike(phantom_root, workplace):
    for folder, kind in (("plain", "float32"), ("small", "8bit")):
        assert train(phantom_root, workplace / folder, "train.max_steps=12", f"optim.moments={kind}") == 0
    found, expected = losses(workplace / "small"), losses(workplace / "plain")
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=2e-3)
    assert found != expected
    plain, small = (checkpoints.load(workplace / folder / "checkpoint_00000012.pth") for folder in ("plain", "small"))
    weights, saved = 0, 0
    for name, state in plain.state["optimizer"].items():
        if "exp_avg.codes" in small.state["optimizer"][name]:
            parts = small.state["optimizer"][name].items()
            weights += state["exp_avg"].numel()
            saved += 2 * state["exp_avg"].nbytes - sum(value.nbytes for key, value in parts if "qmap" not in key)
    assert saved + 4 * len(plain.state["optimizer"]) == pytest.approx(MOMENTS_8BIT * weights, rel=0.01)


def test_it_resumes_bit_for_bit(phantom_root, workplace):
    assert train(phantom_root, workplace / "whole", EIGHT, "train.max_steps=8", "ckpt.every=4") == 0
    assert train(phantom_root, workplace / "cut", EIGHT, "train.max_steps=4", "optim.horizon=8") == 0
    here = ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1", "train.max_steps=8"]
    assert run("train", f"resume={workplace / 'cut'}", *here) == 0
    whole, cut = (checkpoints.load(workplace / name / "checkpoint_00000008.pth") for name in ("whole", "cut"))
    assert losses(workplace / "whole") == losses(workplace / "cut")
    for name, value in whole.state["model"].items():
        assert torch.equal(value, cut.state["model"][name]), name
    for name, state in whole.state["optimizer"].items():
        assert all(torch.equal(value, cut.state["optimizer"][name][key]) for key, value in state.items()), name


def test_its_checkpoints_need_no_torchao(phantom_root, workplace, monkeypatch, capfd):
    assert train(phantom_root, workplace / "run", EIGHT, "train.max_steps=4", "optim.horizon=8") == 0
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("dinoct.validate.find_spec", lambda name: None)
    path = workplace / "run" / "checkpoint_00000004.pth"
    assert run("export", f"checkpoint={path}", f"out={workplace / 'encoder.safetensors'}") == 0
    here = ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1", "train.max_steps=8"]
    capfd.readouterr()
    assert run("train", f"resume={path}", *here) == 1
    assert capfd.readouterr().err == (
        "error: optim.moments=8bit needs torchao: pip install 'dinoct[lowbit]', or optim.moments=float32\n"
    )
    assert run("train", f"resume={path}", *here, "optim.moments=float32", f"run_dir={workplace / 'on'}") == 0
    assert json.loads((workplace / "on" / "config.json").read_text())["config"]["optim"]["moments"] == "float32"
    state = checkpoints.load(workplace / "on" / "checkpoint_00000008.pth").state["optimizer"]
    assert all(set(found) == {"step", "exp_avg", "exp_avg_sq"} for found in state.values())


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["optim.moments=4bit"], "optim.moments must be one of float32, 8bit, not 4bit"),
        ([EIGHT, "parallel=fsdp"], "optim.moments=8bit and parallel=fsdp do not go together"),
        (["optim.betas=[0.9,1.0]"], "optim.betas must be from 0 to below 1"),
    ],
)
def test_typed_wrong(phantom_root, workplace, capfd, typed, says):
    assert train(phantom_root, workplace / "run", *typed) == 1
    assert capfd.readouterr().err.startswith(f"error: {says}")
    assert not (workplace / "run").exists()


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torchao compiles its step, and no C++ compiler is here")
def test_compiled_it_is_the_same_run(phantom_root, workplace):
    """As a user has it: in a process of its own, through the compiler; killed on its way and resumed."""
    typed = [*TINY, f"data.root={phantom_root}", EIGHT, "train.max_steps=30", "ckpt.every=10"]
    assert train(phantom_root, workplace / "eager", EIGHT, "train.max_steps=30", "ckpt.every=10") == 0
    process = start("train", *typed, f"run_dir={workplace / 'run'}", cwd=workplace)
    for line in process.stdout:
        if "saved checkpoint_00000010" in line:
            process.kill()
            break
    process.communicate()
    here = ["hardware=cpu", "hardware.num_workers=0", "hardware.threads=1"]
    done = start("train", f"resume={workplace / 'run'}", *here, cwd=workplace)
    out, err = done.communicate()
    assert done.returncode == 0, out + err
    assert "Warning" not in err
    found, expected = losses(workplace / "run"), losses(workplace / "eager")
    assert [row[0] for row in found] == list(range(1, 31))
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=1e-3)
