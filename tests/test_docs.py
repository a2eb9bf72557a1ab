"""Every command that README.md and docs/ show: it runs, or where it stands in a sentence, it composes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import REPOSITORY, TINY, run
from doc_commands import Place, look_up
from doc_lines import Line, fenced, inline, is_command

from dinoct import config
from dinoct.typed import option_keys

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(REPOSITORY)): page.read_text(encoding="utf-8") for page in PAGES}


def once(lines: list[Line]) -> list[Line]:
    """Each text once, where it stands first."""
    return list({line.text: line for line in reversed(lines)}.values())[::-1]


BLOCKS = once([line for name, text in TEXTS.items() for line in fenced(text, name)])
SPANS = once([line for name, text in TEXTS.items() for line in inline(text, name)])


@pytest.fixture(scope="module")
def root(ct, tmp_path_factory):
    """A prepared set of them, with the split under its usual name."""
    from dinoct.data.pipeline import PrepareOptions, prepare_dataset

    folder = tmp_path_factory.mktemp("prepared")
    prepare_dataset([ct], folder, PrepareOptions(workers=0, val_fraction=0.3))
    (folder / "_splits" / "val30_seed0.json").rename(folder / "_splits" / "val10_seed0.json")
    return folder


@pytest.fixture(scope="module")
def ct(phantom_root, tmp_path_factory):
    """The phantom's DICOM in two collections, the first with a mask of two slices."""
    folder = tmp_path_factory.mktemp("ct")
    for patient in sorted((phantom_root / "dicom").iterdir()):
        shutil.copytree(patient, folder / ("LCTSC" if patient.name < "PHANTOM-003" else "NLST") / patient.name)
    series = next(path.parent for path in sorted((folder / "LCTSC").rglob("*.dcm")))
    files = sorted(path.name for path in series.iterdir())[:2]
    np.savez(series / "lung_mask.npz", mask=np.ones((2, 96, 96), np.uint8), files=files)
    return folder


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run of two steps, judged and exported."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", *TINY, f"data.root={root}", f"run_dir={folder}", "train.max_steps=2") == 0
    checkpoint = folder / "checkpoint_00000002.pth"
    assert run("export", f"checkpoint={checkpoint}") == 0
    quick = ["hardware.device=cpu", "hardware.num_workers=0"]
    assert run("eval", f"checkpoint={checkpoint}", *quick) in (0, 2)
    (folder / "checkpoint_final_00000002.pth").unlink()
    return folder


@pytest.fixture
def place(workplace, root, ct, trained):
    return Place(workplace, root=root, ct=ct, trained=trained)


@pytest.mark.parametrize("line", BLOCKS, ids=str)
def test_a_command_of_a_block_runs(place, line):
    place.run(line)


@pytest.mark.parametrize("line", [span for span in SPANS if span.text.startswith("dinoct-")], ids=str)
def test_a_command_in_a_sentence_composes(place, line):
    place.look(line)


@pytest.mark.parametrize("line", [s for s in SPANS if is_command(s.text) and s.text[:6] != "dinoct"], ids=str)
def test_another_command_in_a_sentence_is_there(place, line):
    words = shlex.split(line.text)
    place.run(line) if words[0] == "python" else look_up(words)


def test_settings_and_scripts_that_a_sentence_names_are_there():
    schemas = [getattr(config, f"{name}Config") for name in ("Train", "Prepare", "Eval", "Monitor")]
    schemas += [config.ExportConfig, config.EmbedConfig, config.DoctorConfig]
    known = {key for schema in schemas for key in option_keys(schema)} | {"experiment", "sweep"}
    for line in SPANS:
        for word in line.text.split():
            key, equals, value = word.partition("=")
            if equals and value != "True" and re.fullmatch(r"[+~]?[a-z_.]+", key):
                assert key.strip("+~") in known or key.startswith("hydra"), f"{line}: no setting {key}"
            if word.startswith("scripts/") and "*" not in word:
                assert (REPOSITORY / word).exists(), f"{line}: no {word}"


def test_the_commands_are_found():
    heads = {line.text.split()[0] for line in BLOCKS}
    assert {"dinoct-prepare", "dinoct-train", "dinoct-eval", "dinoct-monitor", "dinoct-runs", "make"} <= heads
    text = "```\n$ dinoct-x a=1\nout\n```\n```\nls x  # or: dinoct-y\n```\n```\nok    no command\n```\nsee `dinoct-z`\n"
    found = [(line.number, line.text) for line in fenced(text, "f")]
    assert found == [(2, "dinoct-x a=1"), (6, "ls x"), (6, "dinoct-y")]
    assert [line.text for line in inline(text, "f")] == ["dinoct-z"]


@pytest.mark.parametrize("text", ["ls x", "dinoct-trian a=1", "idc delete x", "python scripts/new.py"])
def test_a_command_that_is_not_known_fails_with_its_place(place, text):
    with pytest.raises((pytest.fail.Exception, AssertionError), match=r"a\.md:7|scripts/new\.py"):
        place.run(Line("a.md", 7, text))


@pytest.mark.parametrize(
    "text",
    ["dinoct-train optim.lrr=1", "dinoct-eval checkpoint=run/a.pth m=1", "make nothing", "pip install 'dinoct[x]'"],
)
def test_a_command_that_is_wrong_fails(place, text):
    with pytest.raises(AssertionError):
        place.run(Line("a.md", 7, text))


@pytest.mark.long
@pytest.mark.parametrize(
    "typed",
    [
        "prepare.py --slices 4 --repeats 1",
        "store.py --slices 4 --reads 20",
        "views.py --slices 2 --crops 2",
        "step.py --threads 1 --rounds 1 --steps 1",
        "gpu_all.py --smoke",
    ],
)
def test_a_benchmark_runs_with_its_smallest_sizes(workplace, typed):
    script, *arguments = typed.split()
    path = REPOSITORY / "scripts" / "bench" / script
    commands = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, path, *arguments], cwd=workplace, env=commands, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| --- |" in done.stdout.replace("|---|", "| --- |")
