"""Running a command of the docs with little substitutes for the data, the runs and the sizes that it names.

It runs as it is typed: what it names is put where it names it (a tiny run, a phantom), and settings that make it short
stand behind the typed ones. Not run are the network's (`NETWORK`), make and pip (`look_up`), and
benchmarks, whose own parser takes the line (`parse_only`).
"""

import argparse
import configparser
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from commands import REPOSITORY, run
from doc_lines import Line
from hydra.core.override_parser.overrides_parser import OverridesParser

NETWORK = {"idc download", "idc download-from-selection", "pip download"}  # need a network: only known, never run
FROM_PYPI = {"dinoct", "idc-index", "pylidc", "lightly", "lightly-train", "stable-pretraining"}
ANY_NAME = {"AUG": "spatial_strong", "SEED": "0", "FILE_ID": "0" * 16, "SLICE_ID": "0" * 16, "~/myconf": "myconf"}
ANY_NAME |= {"Case_004": "PHANTOM-001", "Case_009": "PHANTOM-002", "101287": "PHANTOM-004", "...": "x"}

ON_CPU = ["hardware.device=cpu", "hardware.num_workers=0"]
QUIET = ["tracker.wandb=disabled", "tracker.tensorboard=false"]
ONE_STEP = [*ON_CPU, *QUIET, "hardware.pin_memory=false", "hardware.threads=1", "train.max_steps=1"]
SMALL = ["model.patch=8", "model.img_size=32", "model.dim=32", "model.depth=1", "model.heads=2", "loss.out_dim=64"]
SMALL += ["loss.hidden_dim=32", "loss.bottleneck_dim=16", "aug.local_size=16", "train.batch_size=8"]
SMALL += ["train.accumulation_steps=1", "monitor.every=null"]
AFTER = {
    "train": [*ONE_STEP, *SMALL],
    "resume": [*ONE_STEP, "train.max_steps=3"],
    "eval": ON_CPU,
    "monitor": ["hardware.device=cpu"],
    "export": [],
    "embed": [*ON_CPU, "prepare.workers=0"],
    "prepare": ["prepare.workers=0", "phantom.patients=4", "phantom.slices=2", "phantom.size=64"],
    "doctor": ["hardware.device=cpu", *QUIET],
}
LEGACY = {"phase5_big_run.py": "train", "phase5_view_retrieval_eval.py": "eval", "phase5_monitor.py": "monitor"}
AS_TYPED = ("check_checkpoint.py", "embed_example.py", "results.py")


class Place:
    """An empty current directory that is furnished with what a command names, and runs it there."""

    def __init__(self, here: Path, *, root: Path, ct: Path, trained: Path):
        self.here, self.root, self.ct, self.trained = here, root, ct, trained

    def run(self, line: Line) -> None:
        """Run a command; fails where it is not known or ends badly."""
        words = [self._named(word) for word in shlex.split(line.text, comments=True)]
        head, *rest = words
        if head == "dinoct-runs":
            self._furnish(rest)
            status = run("runs", *rest)
        elif head.startswith("dinoct-") and head.removeprefix("dinoct-") in AFTER:
            status = self._dinoct(head.removeprefix("dinoct-"), rest)
        elif head == "python":
            status = self._script(rest[0], rest[1:])
        elif head in ("make", "pip") or " ".join(words[:2]) in NETWORK:
            return look_up(words)
        else:
            pytest.fail(f"{line}: tests/doc_commands.py does not know how to run this")
        assert status in ((0, 2) if "eval" in words[min(1, "python" in head)] else (0,)), f"{line}: status {status}"

    def look(self, line: Line) -> None:
        """Compose a command that stands in a sentence: its settings are there, its values have the right type."""
        words = [self._named(word) for word in shlex.split(line.text)]
        command = words[0].removeprefix("dinoct-")
        assert command in (*AFTER, "runs"), f"{line}: there is no such command"
        if command == "runs" and words[1:]:
            return self.run(line)
        if command != "runs":
            typed = [word for word in words[1:] if word != "-m"]
            self._furnish(typed)
            assert run(command, "--cfg", "job", *few(typed, most=1)) == 0, str(line)

    def _named(self, word: str) -> str:
        """A word with the placeholders in it taken for something."""
        for name, value in ANY_NAME.items():
            word = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", value, word)
        word = re.sub(r"(?<![\w/])(LCTSC|NLST)\b", rf"{self.ct}/\1", word)
        return re.sub(r"(?<![\w.])/data/[\w-]+", str(self.ct), word)

    def _dinoct(self, command: str, typed: Sequence[str]) -> int:
        self._furnish(typed)
        keys = {word.split("=", 1)[0] for word in typed}
        if command == "prepare" and "source" in keys:
            folder = next(word for word in typed if word.startswith("data.root=")).removeprefix("data.root=")
            (self.here / folder).unlink()
        elif command == "prepare":
            self._own_root(typed)
        after = AFTER["resume" if "resume" in keys else command]
        launcher = [word for word in typed if word.startswith(("hydra/launcher=", "hydra.launcher."))]
        if launcher:  # what a cluster's launcher is told is composed; the jobs run here
            assert run(command, "--cfg", "hydra", *launcher) == 0
        typed = [word for word in typed if word not in launcher]
        return run(command, *few(typed, most=2), *after)

    def _script(self, path: str, typed: list[str]) -> int:
        script = REPOSITORY / path
        assert script.is_file(), f"there is no {path}"
        self._furnish(typed)
        if script.name in LEGACY:
            return run_script(script, [*typed, *AFTER[LEGACY[script.name]]])
        if script.name in AS_TYPED:
            return run_script(script, typed)
        if script.parent.name == "bench":  # half a minute to hours each: test_docs.py runs some small, marked long
            return parse_only(script, typed)
        pytest.fail(f"tests/doc_commands.py does not know how to run {path}")

    def _furnish(self, words: Sequence[str]) -> None:
        """Put what is named where it is named: data, checkpoints, encoders, runs, sweeps."""
        self._link("data/processed", self.root)
        for word in words:
            key, _, value = word.rpartition("=")
            if key == "data.root" or (key == "" and value == "ROOT"):
                self._link(value, self.root)
            elif value.endswith((".pth", ".safetensors")):
                kept = next(self.trained.glob(f"checkpoint_*{Path(value).suffix}"), None)
                kept = kept or next(self.trained.glob(f"encoder_*{Path(value).suffix}"))
                (self.here / value).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(kept, self.here / value)
                shutil.copy(self.trained / "config.json", (self.here / value).parent)
            elif value == "outputs" or value.startswith(("outputs/runs", "outputs/sweeps")):
                self._runs(self.here / value)
            elif value == "myconf":
                (self.here / "myconf" / "model").mkdir(parents=True)
                shutil.copy(
                    REPOSITORY / "conf" / "model" / "vit-tiny.yaml", self.here / "myconf" / "model" / "mine.yaml"
                )

    def _runs(self, named: Path) -> None:
        """Two runs where a folder of runs, a sweep, or one run is named."""
        depth = len(named.relative_to(self.here).parts)
        parts = {1: ["runs/a", "sweeps/s/0_b"], 2: ["a", "b"] if named.name == "runs" else ["s/0_a", "s/1_b"]}
        for name in parts.get(depth, [""] if "runs" in named.parts else ["0_a", "1_b"]):
            shutil.copytree(self.trained, named / name, dirs_exist_ok=True)

    def _link(self, name: str, target: Path) -> None:
        (self.here / name).parent.mkdir(parents=True, exist_ok=True)
        if not (self.here / name).exists():
            (self.here / name).symlink_to(target)

    def _own_root(self, typed: Sequence[str]) -> None:
        """A copy of the prepared set where the command would change it."""
        folder = self.here / next(word for word in typed if word.startswith("data.root=")).removeprefix("data.root=")
        folder.unlink()
        shutil.copytree(self.root, folder)


def few(typed: Sequence[str], *, most: int) -> list[str]:
    """The overrides with at most so many jobs of a sweep: of its first setting; the others keep their first value."""
    out, parser = [], OverridesParser.create()
    for word in typed:
        name = word.removeprefix("+sweep=")
        if name != word and most > 1:
            params = yaml.safe_load((REPOSITORY / "conf" / "sweep" / f"{name}.yaml").read_text())
            kept = []
            for key, values in params["hydra"]["sweeper"]["params"].items():
                values = str(values).split(",")
                kept.append(f"{key}:'{','.join(values[:most])}'")
                most = 1 if len(values) > 1 else most
            out += [word, f"hydra.sweeper.params={{{','.join(kept)}}}"]
        elif "=" in word and (override := parser.parse_override(word)).is_sweep_override():
            out.append(f"{override.get_key_element()}={','.join(list(override.sweep_string_iterator())[:most])}")
            most = 1
        else:
            out.append(word)
    return out


def look_up(words: Sequence[str]) -> None:
    """What is not run here, make and pip and the network's: the target, the extra, the package must exist."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
        for target in (word for word in words[1:] if "=" not in word):
            assert target in targets, f"the Makefile has no target {target}"
    elif words[0] == "pip":
        setup = configparser.ConfigParser()
        setup.read(REPOSITORY / "setup.cfg")
        for package in (word for word in words[2:] if not word.startswith("-") and word != "."):
            name, _, extras = package.removeprefix(".").rstrip("]").partition("[")
            assert not name or name in FROM_PYPI, f"{name} is not a package that the docs may name"
            for extra in filter(None, extras.split(",")):
                assert extra in setup["options.extras_require"], f"setup.cfg has no extra {extra}"


def run_script(script: Path, typed: Sequence[str]) -> int:
    """Run a script in this process; returns its exit status."""
    before = sys.argv, list(sys.path), set(sys.modules)
    sys.argv = [str(script), *typed]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv, sys.path[:] = before[:2]
        for name in {"common", "recipes"} - before[2]:
            sys.modules.pop(name, None)
    return 0


class _Parsed(Exception):
    pass


def parse_only(script: Path, typed: Sequence[str]) -> int:
    """Let a script's own parser take the line, and stop there."""
    parse: Callable = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise _Parsed

    argparse.ArgumentParser.parse_args = stop
    try:
        run_script(script, typed)
    except _Parsed:
        return 0
    finally:
        argparse.ArgumentParser.parse_args = parse
    return 1
