"""Before a run: what it would take is printed, nothing is left behind; and the batch size that fits a card is found."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from commands import TINY, run
from hydra import compose, initialize_config_module

from dinoct.checkup import batchsize, machine, pace, preflight
from dinoct.checkup.batchsize import fit_batch, largest_that_fits, split_update, synthetic_batch, trial
from dinoct.checkup.machine import Space
from dinoct.checkup.pace import Pace, extrapolate, predict
from dinoct.config import CkptConfig, TrainConfig, to_object
from dinoct.data.batch import collate
from dinoct.data.views import ViewMaker
from dinoct.errors import DinoctError
from dinoct.hardware import Hardware
from dinoct.models.ssl import SelfDistillation
from dinoct.plan import RunPlan


def look_ahead(root, *overrides: str) -> int:
    return run("train", *TINY, f"data.root={root}", "preflight=true", *overrides)


def files(folder) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --- preflight=true -------------------------------------------------------------------------------------------------


def test_it_reports_and_leaves_nothing_but_the_picture(phantom_root, workplace, capfd):
    typed = ["tracker.wandb=offline", "aug=multicrop", "aug.local_size=16", "train.max_steps=500", "ckpt.every=100"]
    assert look_ahead(phantom_root, *typed) == 0
    out = capfd.readouterr().out
    assert set(files(workplace)) == {"outputs/preflight/views.png"}
    for words in (
        "auto: ",
        "memory: about",
        "5 steps with 8 slices, behind 3 to warm up",
        "for 500 steps",
        "waiting for data: ",
        "checkpoints: ",
        "up to 5 at once",
        "views of the first slices: outputs/preflight/views.png",
        "preflight passed",
    ):
        assert words in out
    assert b"Software" not in (workplace / "outputs/preflight/views.png").read_bytes()


def test_a_run_without_end_is_told_per_100_000_steps_and_workers_are_timed_alone(phantom_root, workplace, capfd):
    assert look_ahead(phantom_root, "train.max_steps=null", "hardware.num_workers=1") == 0
    out = capfd.readouterr().out
    assert "for 100,000 steps (train.max_steps is null)" in out
    assert "the loader alone gives" in out


def test_a_checkpoint_to_go_on_from_is_left_alone(phantom_root, workplace, capfd):
    typed = [f"data.root={phantom_root}", "run_dir=run", "train.max_steps=2", "optim.horizon=9"]
    assert run("train", *TINY, *typed) == 0
    before = files(workplace)
    capfd.readouterr()
    here = ["hardware=cpu", "hardware.num_workers=0", "train.max_steps=9", "preflight=true"]
    assert run("train", "resume=run", *here) == 0
    out = capfd.readouterr().out
    assert "resuming at step 2" in out
    assert "for 7 steps" in out
    assert "preflight" not in out.split("changed:")[1].splitlines()[0]
    after = files(workplace)
    assert after.pop("outputs/preflight/views.png")
    assert after == before


def test_a_slow_machine_is_scaled_up_and_said_so(phantom_root, workplace, capfd, monkeypatch):
    monkeypatch.setattr(pace, "BUDGET_S", 1e-6)
    assert look_ahead(phantom_root, "train.max_steps=3") == 0
    assert "scaled up from one step with 1 slice" in capfd.readouterr().out


def test_less_to_compute_again_is_named_where_it_fits(phantom_root, workplace, capfd):
    assert look_ahead(phantom_root, "train.grad_checkpoint=true", "train.max_steps=3") == 0
    said = capfd.readouterr().out
    assert "steps would be shorter with train.grad_checkpoint=false (" in said
    assert "train.compile" not in said  # on the CPU it is hardly worth its time
    assert look_ahead(phantom_root, "train.max_steps=3") == 0
    assert "shorter" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("free", "typed", "says"),
    [
        (40e9, [], ["false (34.2 GB", "train.compile=true"]),
        (20e9, [], ["selective (17.4 GB", "train.compile=true"]),
        (8e9, [], ["train.compile=true"]),
        (40e9, ["train.compile=true"], ["false (34.2 GB"]),
        (40e9, ["train.grad_checkpoint=false", "train.compile=true"], []),
        (40e9, ["train.grad_checkpoint=false", "parallel=fsdp"], []),
    ],
)
def test_a_card_is_told_what_it_has_room_for(monkeypatch, free, typed, says):
    """`free` is what the card has behind a step, with 6.2 GB of weights, gradients and moments in it."""
    monkeypatch.setattr(preflight, "card_memory", lambda: Space(int(free), int(free + 6.2e9)))
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        cfg = to_object(compose("train", overrides=["experiment=phase5a", *typed]))
    hardware = SimpleNamespace(platform="cuda", batch_size=64, amp=True)
    options = preflight.faster(cfg, hardware, parameters=preflight.student_parameters(cfg))
    assert len(options) == len(says)
    for option, words in zip(options, says, strict=True):
        assert words in option


@pytest.mark.parametrize(
    ("name", "room", "says"),
    [
        ("ram", Space(10**6, 10**9), ["the memory has 0.0 of 1.0 GB free", "train.batch_size=4"]),
        ("disk", Space(10**4, 10**9), ["the disk has", "ckpt.keep_last", "run_dir"]),
    ],
)
def test_what_plainly_does_not_suffice_fails(phantom_root, workplace, capfd, monkeypatch, name, room, says):
    monkeypatch.setattr(preflight, name, lambda *_: room)
    assert look_ahead(phantom_root) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: preflight: ")
    assert len(err.splitlines()) == 1
    for words in says:
        assert words in err
    assert not (workplace / "outputs" / "runs").exists()


def test_a_memory_that_takes_no_copy_of_the_state_is_told_of(phantom_root, workplace, capfd, monkeypatch):
    monkeypatch.setattr(preflight, "ram", lambda: Space(2 * 10**9, 4 * 10**9))
    assert look_ahead(phantom_root) == 0
    assert "no room for a copy of the state" in capfd.readouterr().out


def test_a_step_that_is_not_finite_fails_and_saves_nothing(phantom_root, workplace, capfd, monkeypatch):
    forward = SelfDistillation.forward

    def poisoned(self, batch, **kwargs):
        terms = forward(self, batch, **kwargs)
        terms.scalars["loss/total"] = terms.total.detach() * float("nan")
        return terms

    monkeypatch.setattr(SelfDistillation, "forward", poisoned)
    assert look_ahead(phantom_root) == 1
    assert "error: preflight: step 1: loss/total is not finite\n" in capfd.readouterr().err
    assert set(files(workplace)) == {"outputs/preflight/views.png"}


@pytest.mark.parametrize(
    "typed", [["preflight=true", "replay=x.pth"], ["-m", "preflight=True", "seed=0,1"], ["+sweep=lr", "preflight=true"]]
)
def test_it_stands_alone(workplace, capfd, typed):
    assert run("train", *typed) == 1
    assert "does not go with" in capfd.readouterr().err
    assert list(workplace.iterdir()) == []


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_workers_hide_the_loading_and_no_workers_do_not():
    assert predict(compute=2.0, data=1.0, ahead=True) == (2.0, 0.0)
    assert predict(compute=1.0, data=4.0, ahead=True) == (4.0, 0.75)
    assert predict(compute=1.0, data=1.0, ahead=False) == (2.0, 0.5)


def test_what_an_update_costs_for_itself_is_not_multiplied():
    """3 s for itself and 2 s per slice: 1 slice takes 5 s, 4 take 11 s, 256 take 515 s and not 1,280."""
    found = extrapolate(Pace(5.0, 0.0, ""), 1, Pace(11 / 4, 0.0, ""), 4, 256)
    assert found.elapsed * 256 == pytest.approx(515)
    disturbed = extrapolate(Pace(20.0, 0.0, ""), 1, Pace(3.0, 1.0, ""), 4, 256)
    assert disturbed.elapsed == 3.0


def test_the_disk_must_hold_what_the_rotation_keeps_and_the_next_one():
    ckpt, gigabyte = CkptConfig(every=100, keep_last=5, keep_every=1000), 10**9

    def line(free: int, steps: int | None, judged: bool = False) -> str:
        return preflight.check_disk(ckpt, gigabyte, Space(free * gigabyte, 99 * gigabyte), steps, judged=judged)

    with pytest.raises(DinoctError, match=r"up to 6 at once take 6\.0 GB"):
        line(6, None)
    assert "ckpt.keep_every=1000 keeps 100 more per 100,000 steps, 100.0 GB" in line(7, None)
    assert "up to 3 at once take 3.0 GB" in line(4, 250)
    assert "up to 4 at once take 4.0 GB" in line(5, 250, judged=True)  # the best one too


# --- train.batch_size=auto ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "limit"), [(37, 256), (37, 20), (256, 256), (999, 250), (8, 64), (5, 64), (0, 64), (9, 5)]
)
def test_the_search_finds_the_largest_multiple_of_8(most, limit):
    tried = []

    def fits(n):
        tried.append(n)
        return n <= most

    found = largest_that_fits(fits, limit)
    best = [n for n in range(8, limit + 1, 8) if n <= most]
    small = [n for n in {1, 2, 4, limit} if n <= min(most, limit)]
    assert found == max(best or small, default=0)
    assert len(tried) == len(set(tried)) <= 11
    assert max(tried) <= max(8, min(limit, 2 * most + 8))  # nothing far beyond the memory is tried


def test_37_is_32():
    assert largest_that_fits(lambda n: n <= 37, 256) == 32


@pytest.mark.parametrize("effective", [8, 64, 256, 1000])
def test_the_effective_batch_stays_whatever_fits(effective):
    for found in range(1, effective + 1):
        batch, accumulation = split_update(effective, found)
        assert 1 <= batch <= found
        if effective >= 64:
            assert abs(batch * accumulation - effective) <= effective / 15
    assert split_update(256, 200) == (128, 2)
    assert split_update(256, 48) == (48, 5)
    assert split_update(256, 5) == (5, 51)


def config(*overrides: str) -> TrainConfig:
    with initialize_config_module("dinoct.conf", version_base="1.3"):
        return to_object(compose("train", overrides=[*TINY, "train.batch_size=auto", *overrides]))


SIZES = ["loss.ibot.weight=1", "model.drop_path=0.3", "aug.local_crops=2", "aug.local_size=16"]


def test_a_trial_has_the_shapes_of_a_real_batch(phantom_root):
    from dinoct.data.dataset import SliceViews, open_split

    cfg = config(*SIZES, f"data.root={phantom_root}")
    index, _, store, _ = open_split(cfg.data)
    views = SliceViews(index, store, ViewMaker(cfg.aug, cfg.model, cfg.loss.ibot), seed=0)
    real, synthetic = collate([views[i] for i in range(3)]), synthetic_batch(cfg, 3)
    for name in ("global_crops", "local_crops", "masks", "groups"):
        assert getattr(synthetic, name).shape == getattr(real, name).shape
        assert getattr(synthetic, name).dtype == getattr(real, name).dtype
    assert len(synthetic.masked) >= len(real.masked)


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_no_trace(monkeypatch, fails):
    """Drop path draws from the generators and centring sums up: both are as before, also when memory runs out."""
    cfg = config(*SIZES)
    model, optimizer, hardware = parts(cfg)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    losses, held = SelfDistillation._losses, []

    def look(self, *args):
        held.append(all(p.grad is not None for p in self.student.parameters() if p.requires_grad))
        return losses(self, *args)

    monkeypatch.setattr(SelfDistillation, "_losses", look)
    if fails:
        no_memory_behind(monkeypatch, 4)
        with pytest.raises(torch.OutOfMemoryError):
            trial(model, cfg, hardware, 8)
    else:
        trial(model, cfg, hardware, 8)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.dino_center_sum.count_nonzero() == model.ibot_center_count == 0
    assert optimizer.state == {}
    assert held == [True]  # the gradient of the micro-batches before, which the memory must hold too


def parts(cfg: TrainConfig):
    from dinoct.optim import build_optimizer

    torch.manual_seed(0)
    model = SelfDistillation(cfg.model, cfg.loss)
    optimizer = build_optimizer(model.student, depth=cfg.model.depth, cfg=cfg.optim)
    return model, optimizer, Hardware("cuda", torch.device("cpu"), "a card", 0, False, 64, 4, False, 1)


def no_memory_behind(monkeypatch, most: int) -> list[int]:
    """A forward of more than `most` slices runs out of memory, half-way; returns the list of sizes tried."""
    forward, tried = SelfDistillation.forward, []

    def hungry(self, batch, **kwargs):
        tried.append(len(batch.groups))
        terms = forward(self, batch, **kwargs)
        if len(batch.groups) > most:
            terms.gram.backward(retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return terms

    monkeypatch.setattr(SelfDistillation, "forward", hungry)
    return tried


@pytest.fixture
def card(monkeypatch):
    """The allocator's figures of a card with all its memory free."""
    for name, value in {
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "mem_get_info": (10**9, 10**9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    set_card(monkeypatch, integrated=False)


def set_card(monkeypatch, *, integrated: bool) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(is_integrated=integrated))


def test_a_card_in_the_hosts_memory_has_no_more_than_the_host(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (120 * 10**9, 62 * 10**9))
    monkeypatch.setattr(machine, "ram", lambda: Space(50 * 10**9, 125 * 10**9))
    assert machine.card_memory().free == 120 * 10**9
    set_card(monkeypatch, integrated=True)
    assert machine.card_memory() == Space(50 * 10**9, 62 * 10**9)


def plan_of(cfg: TrainConfig, *, before: dict | None = None, typed: tuple[str, ...] = ()) -> RunPlan:
    checkpoint = SimpleNamespace(meta={"hardware": before}) if before else None
    return RunPlan(cfg, "dinoct-train", {}, None, checkpoint=checkpoint, typed=frozenset(typed))


def test_on_a_card_the_largest_batch_is_found_by_trial(card, monkeypatch):
    cfg = config("train.accumulation_steps=null")
    model, _, hardware = parts(cfg)
    tried = no_memory_behind(monkeypatch, 37)
    found = fit_batch(plan_of(cfg), hardware, model, slices=1000)
    assert (found.batch_size, found.accumulation_steps) == (32, 8)
    assert found.reasons["batch_size"].startswith("auto: 32 slices fit, tried up to 256")
    assert tried == [8, 16, 32, 64, 48, 40]
    assert fit_batch(plan_of(cfg), hardware, model, slices=20).batch_size == 16
    fixed = replace(cfg, train=replace(cfg.train, accumulation_steps=16))
    found = fit_batch(plan_of(fixed), hardware, model, slices=1000)
    assert (found.batch_size, found.accumulation_steps) == (16, 16)


def test_some_of_the_card_stays_free(card, monkeypatch):
    cfg = config("train.accumulation_steps=null")
    model, _, hardware = parts(cfg)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 930_000_000)
    with pytest.raises(
        DinoctError, match=r"not one slice fits the memory of the card\. Try train\.grad_checkpoint=true"
    ):
        fit_batch(plan_of(cfg), hardware, model, slices=1000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 910_000_000)
    assert fit_batch(plan_of(cfg), hardware, model, slices=16).batch_size == 16


def test_a_resume_keeps_the_effective_batch_and_on_the_same_card_the_batch(card, monkeypatch):
    cfg = config("train.accumulation_steps=null")
    model, _, hardware = parts(cfg)
    tried = no_memory_behind(monkeypatch, 37)
    same = {"platform": "cuda", "card": "a card", "batch_size": 88, "accumulation_steps": 3}
    found = fit_batch(plan_of(cfg, before=same), hardware, model, slices=1000)
    assert (found.batch_size, found.accumulation_steps, tried) == (88, 3, [])
    other = same | {"platform": "rocm", "card": "another", "batch_size": 64, "accumulation_steps": 1}
    found = fit_batch(plan_of(cfg, before=other), hardware, model, slices=1000)
    assert (found.batch_size, found.accumulation_steps) == (32, 2)
    four = same | {"batch_size": 64, "accumulation_steps": 1, "processes": 4}  # of four ranks: 256 slices
    found = fit_batch(plan_of(cfg, before=four), hardware, model, slices=1000)
    assert (found.batch_size, found.accumulation_steps) == (32, 8)
    again = fit_batch(plan_of(cfg, before=same, typed=("train.batch_size",)), hardware, model, slices=1000)
    assert again.batch_size == 32


def test_an_error_that_is_none_of_memory_is_not_hidden(card, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(batchsize, "trial", broken)
    cfg = config()
    model, _, hardware = parts(cfg)
    with pytest.raises(RuntimeError, match="no kernel image"):
        fit_batch(plan_of(cfg), hardware, model, slices=1000)


def test_on_the_cpu_auto_is_the_presets_and_says_why(phantom_root, workplace, capfd):
    typed = [*TINY, f"data.root={phantom_root}", "run_dir=run", "train.batch_size=auto", "hardware.batch_size=16"]
    assert run("train", *typed, "train.max_steps=1", "optim.horizon=4") == 0
    assert "16             auto: hardware=cpu; not tried out on the CPU" in capfd.readouterr().out
    config = json.loads((workplace / "run" / "config.json").read_text())
    assert (config["hardware"]["batch_size"], config["config"]["train"]["batch_size"]) == (16, "auto")
    here = ["hardware=cpu", "hardware.num_workers=0", "hardware.batch_size=8", "train.max_steps=2"]
    assert run("train", "resume=run", *here) == 0
    config = json.loads((workplace / "run" / "config.json").read_text())
    machine = config["history"][-1]["hardware"]
    assert (machine["batch_size"], machine["accumulation_steps"]) == (8, 2)  # the effective batch is the same
    samples = [json.loads(line)["Train/samples_seen"] for line in (workplace / "run/metrics.jsonl").open()]
    assert samples == [16, 32]


@pytest.mark.parametrize("value", ["abc", "8.5", "0", "true"])
def test_a_batch_size_that_is_none_is_one_line(workplace, capfd, value):
    assert run("train", *TINY, f"train.batch_size={value}") == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "train.batch_size" in err
    assert "64" not in err
