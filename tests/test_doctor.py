"""The doctor names what is missing and what to do, changes nothing, and fails only for what a run would fail for."""

import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from commands import run
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinoct.checkup import machine, machine_lines, report
from dinoct.checkup.findings import FAIL, OK, WARN
from dinoct.config import DataConfig, HardwareConfig
from dinoct.data.index import SliceIndex
from dinoct.data.splits import SplitManifest


@pytest.fixture(autouse=True)
def no_key(tmp_path_factory, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))


def lines(out: str) -> dict[str, str]:
    """Last line of the report per check, with its level in front and the remedy behind."""
    found, last = {}, ""
    for line in out.splitlines():
        if line.startswith((OK, WARN, FAIL)):
            last = line[6:20].strip()
            found[last] = line[:5].strip() + " " + line[20:].strip()
        elif "->" in line:
            found[last] += " " + line.strip()
    return found


def test_a_prepared_set_passes_and_nothing_is_left(phantom_root, workplace, capfd):
    assert run("doctor", f"data.root={phantom_root}", "hardware=cpu") == 0
    said = lines(capfd.readouterr().out)
    assert said["data"].startswith("ok")
    rows = len((phantom_root / "_index" / "index.csv").read_text().splitlines()) - 1
    assert f"{rows} slices of" in said["data"]
    assert "5 patients" in said["data"]
    assert "val30_seed0.json" in said["split"]
    assert "all with the right checksum" in said["store"]
    assert "flash kernel for float32" in said["attention"]
    assert {"versions", "torch", "card", "bf16", "processor", "memory", "disk", "disk speed", "W&B"} <= set(said)
    assert list(workplace.iterdir()) == []


def test_one_held_out_patient_is_a_warning(phantom_root, workplace):
    """What he cannot prove is said before a run, and not behind it."""
    index = SliceIndex.load(phantom_root / "_index" / "index.csv")
    alone = [index.patient_name(0)]
    patients = [index.patient_name(i) for i in range(len(index))]
    split = SplitManifest.decide(patients, dataset_id="x", seed=0, fraction=0.1, val_patients=alone)
    split.of_index(index).save(workplace / "one.json")
    cfg = DataConfig(root=str(phantom_root), split_manifest=str(workplace / "one.json"))
    found = {finding.name: finding for finding in report.data(cfg, named=True)}
    assert found["split"].level == WARN
    assert "split.val_fraction" in found["split"].todo


def test_data_that_are_not_there_fail_only_where_they_were_named(workplace, capfd):
    assert run("doctor", "hardware=cpu") == 0
    assert "WARN data/processed is not prepared -> dinoct-prepare" in lines(capfd.readouterr().out)["data"]
    assert run("doctor", "hardware=cpu", "data.root=/nowhere") == 1
    captured = capfd.readouterr()
    assert lines(captured.out)["data"].startswith("FAIL data.root: there is no index at /nowhere")
    assert "1 failed" in captured.out
    assert captured.err == ""


def test_a_damaged_store_is_found(phantom_root, workplace, capfd):
    shutil.copytree(phantom_root, workplace / "set", ignore=shutil.ignore_patterns("dicom", "_private"))
    for path in (workplace / "set" / "store").glob("*.b2nd"):
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 400] = bytes(400)
        path.write_bytes(content)
    assert run("doctor", "hardware=cpu", "data.root=set") == 1
    said = lines(capfd.readouterr().out)
    assert "damaged" in said.get("store", said["data"])


def test_every_slice_can_be_verified(phantom_root, workplace, capfd):
    """A copy on a node's own disk: one bit of one slice is enough."""
    shutil.copytree(phantom_root, workplace / "set", ignore=shutil.ignore_patterns("dicom", "_private"))
    assert run("doctor", "hardware=cpu", "data.root=set", "verify=true") == 0
    rows = len((phantom_root / "_index" / "index.csv").read_text().splitlines()) - 1
    assert f"all {rows} slices have the right checksum" in lines(capfd.readouterr().out)["store"]
    first, second, *_ = sorted((workplace / "set" / "store").glob("*.b2nd"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.unlink()
    assert run("doctor", "hardware=cpu", "data.root=set", "verify=true") == 1
    said = lines(capfd.readouterr().out)["store"]
    assert said.startswith(f"FAIL 2 series of the store are damaged or missing: {first.stem}, {second.stem}")


@pytest.fixture
def rocm(monkeypatch):
    """torch as AMD's build shows itself on a machine with a card; no kernel can run here."""
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Radeon 8060S")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * 10**9, 96 * 10**9))
    set_architecture(monkeypatch, "gfx1151")
    monkeypatch.delenv("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", raising=False)
    monkeypatch.setattr(machine_lines, "AMD", machine.MEMINFO)


def test_on_rocm_the_variable_for_fused_attention_is_named(rocm, workplace, capfd):
    assert run("doctor", "hardware=rocm_strix") == 0
    said = lines(capfd.readouterr().out)
    assert said["torch"].startswith("ok")
    assert "(ROCm 7.1.0)" in said["torch"]
    assert "Radeon 8060S (rocm, hardware.device=rocm)" in said["card"]
    assert said["card memory"].startswith("WARN 30.0 of 96.0 GB free -> other processes")
    assert said["attention"].startswith("WARN math (slow)")
    assert "-> export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1" in said["attention"]
    assert "not run" in said["attention"]


def set_architecture(monkeypatch, name: str) -> None:
    properties = SimpleNamespace(gcnArchName=name, is_integrated=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def test_a_data_centre_card_needs_no_variable(rocm, monkeypatch):
    """AOTriton's kernels are experimental on consumer cards and APUs alone."""
    set_architecture(monkeypatch, "gfx942:sramecc+:xnack-")
    assert machine_lines.rocm_attention(amp=True).level == OK


def test_with_the_variable_set_nothing_is_asked_for(rocm, monkeypatch):
    monkeypatch.setenv("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")
    finding = machine_lines.rocm_attention(amp=True)
    assert (finding.level, finding.todo) == (OK, "")
    assert "not run" in finding.text


def test_a_torch_that_does_not_fit_the_driver_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine_lines, "NVIDIA", machine.MEMINFO)
    build = next(machine_lines.torch_build())
    assert build.level == WARN
    assert "CUDA build" in build.todo


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_fails(workplace, capfd):
    assert run("doctor", "hardware=rocm_strix") == 1
    said = lines(capfd.readouterr().out)
    assert said["card"].startswith("FAIL hardware.device=rocm was asked for")
    assert "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1" in said["attention"]


def test_the_kernel_of_attention_is_the_one_that_ran():
    cpu = torch.device("cpu")
    assert machine_lines.attention_kernel(cpu, torch.float32) == "flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert machine_lines.attention_kernel(cpu, torch.float32) == "math"


def test_compiling_is_tried_out(tmp_path):
    """In a process of its own: torch remembers the compiler that it found."""
    environment = os.environ | {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    code = "import torch; from dinoct.checkup.machine_lines import compiling; print(compiling(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "torch.compile cannot work here (InvalidCxxCompiler: No working C++ compiler" in done.stdout
    assert "train.compile=false and optim.moments=float32 go without it" in done.stdout
    assert "install a C++ compiler" in done.stdout


def test_compiling_that_works_says_so(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no compiler
    finding = machine_lines.compiling(torch.device("cpu"))
    assert (finding.level, finding.todo) == (OK, "")
    assert "train.compile=true makes steps shorter" in finding.text


def test_limits_of_a_container_count(tmp_path, monkeypatch):
    for name, text in {
        "memory.max": "3000000000",
        "memory.current": "1500000000",
        "memory.stat": "anon 1000000000\ninactive_file 500000000",
        "cpu.max": "50000 100000",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.ram().total == 3_000_000_000
    assert machine.ram().free <= 2_000_000_000
    assert machine.usable_cores() == 0.5
    assert next(machine_lines.memory()).level == WARN
    (finding,) = machine_lines.processor(HardwareConfig(device="cpu", num_workers=8, threads=4))
    assert (finding.level, finding.todo) == (WARN, "hardware.threads=1 hardware.num_workers=1")
    (tmp_path / "memory.max").write_text("max")
    (tmp_path / "cpu.max").write_text("max 100000")
    free = machine.ram().free
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "none")
    assert free == pytest.approx(machine.ram().free, rel=0.2)  # no limit: what the machine has
    assert machine.usable_cores() >= 1


def test_small_shared_memory_is_named(monkeypatch):
    monkeypatch.setattr(machine, "disk", lambda path: machine.Space(64 * 10**6, 64 * 10**6))
    *_, shared = machine_lines.memory()
    assert shared.level == WARN
    assert "--shm-size" in shared.todo


def test_a_disk_is_measured_and_left_as_it_was(tmp_path):
    write, read = machine.disk_speed(tmp_path, size=2**20)
    assert write > 0
    assert read > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_fails(tmp_path, monkeypatch):
    def refuse(folder):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine, "disk_speed", refuse)
    *_, speed = machine_lines.disks(tmp_path / "outputs" / "runs")
    assert speed.level == FAIL
    assert "Read-only file system" in speed.text
    monkeypatch.setattr(machine, "disk", lambda path: machine.Space(10**6, 10**9))
    (full,) = machine_lines.disks(tmp_path)
    assert full.level == FAIL


def test_missing_decoders_name_what_brings_them(monkeypatch):
    import pydicom.pixels

    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda _: SimpleNamespace(available_plugins=("pydicom",)))
    found = {finding.text.split(":")[0]: finding for finding in report.decoders()}
    assert found["JPEG-LS"].level == FAIL
    assert "dinoct[gdcm]" in found["JPEG Lossless and 12-bit JPEG"].todo
    assert found["uncompressed, RLE"].level == OK


def test_the_key_of_wandb_is_needed_online_and_never_printed(workplace, capfd, monkeypatch):
    typed = ["hardware=cpu", "tracker.wandb=online"]
    assert run("doctor", *typed) == 1
    assert lines(capfd.readouterr().out)["W&B"].endswith("no key is set -> wandb login, or tracker.wandb=offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert run("doctor", *typed) == 0
    captured = capfd.readouterr()
    assert "a key is set" in captured.out
    assert "0123456789abcdef" not in captured.out + captured.err


def test_a_key_in_netrc_counts(tmp_path, monkeypatch):
    assert not report.has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789abcdef\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert report.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not report.has_key()


def test_a_check_that_breaks_does_not_end_the_report(workplace, capfd, monkeypatch):
    def broken():
        raise RuntimeError("out of order")
        yield

    monkeypatch.setattr(report, "memory", broken)
    assert run("doctor", "hardware=cpu") == 1
    said = lines(capfd.readouterr().out)
    assert said["memory"] == "FAIL RuntimeError: out of order"
    assert "W&B" in said


@pytest.mark.parametrize(
    ("typed", "says"), [("data.rot=x", "did you mean data.root"), ("hardware=strix", "rocm_strix")]
)
def test_typed_wrong(workplace, capfd, typed, says):
    assert run("doctor", typed) == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert says in err
