"""Comparing runs: tables, files and the page, from run folders in whatever state they were left."""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import TINY, run

from dinoct.compare.differ import labels, sort_runs, telling, unfair
from dinoct.compare.plots import thin
from dinoct.compare.read import find_runs, read_duration, read_run
from dinoct.compare.table import fitting
from dinoct.runs import main

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c63680000000082008177cd72b60000000049454e44ae426082"
)


def make(folder: Path, *, records=(), state="done", settings=None, log=(), **config) -> Path:
    """A run folder by hand; `settings` are dotted, other keywords go to config.json."""
    nested: dict = {"optim": {"lr": 0.001}, "seed": 0, "run_dir": str(folder)}
    for key, value in (settings or {}).items():
        *path, name = key.split(".")
        here = nested
        for part in path:
            here = here.setdefault(part, {})
        here[name] = value
    content = {
        "state": state,
        "created": "2026-01-03T12:00:00",
        "git_commit": "0123456789ab",
        "data_manifest_hash": "0123456789abcdef",
        "choices": {"aug": "spatial_strong"},
        "config": nested,
        "history": [{"at": "2026-01-03T12:00:00", "git_commit": config.get("git_commit", "0123456789ab")}],
    } | config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if log:
        (folder / "train.log").write_text("".join(f"{stamp},000 INFO x\n" for stamp in log))
    return folder


def record(step: int, loss: float, rank: float | None = None) -> dict:
    figures = {"loss/total": loss, "loss/dino": loss, "loss/gram": 0.001, "Train/feature_std": 0.8, "Train/lr": 1e-3}
    return {"step": step} | figures | ({} if rank is None else {"Eval/mean_percentile_rank": rank, "Eval/top1": 0.1})


@pytest.fixture
def runs(tmp_path) -> Path:
    """Four runs: a (best at first), b (best), c (failed, never judged), d (nothing in its metrics yet)."""
    top = tmp_path / "runs"
    make(
        top / "a", records=[record(1, 9, 0.2), record(2, 5, 0.3)], settings={"optim.lr": 0.01, "note": "=HYPERLINK(1)"}
    )
    make(top / "b", records=[record(1, 8), record(10, 7, 0.1)], log=["2026-01-03 12:00:01", "2026-01-03 13:05:00"])
    make(
        top / "c", records=[record(3, 6)], state="failed", error="loss/total is not finite", settings={"optim.lr": -0.5}
    )
    make(top / "d", state="running")
    return top


def table(arguments: list, capsys) -> list[dict]:
    """What `dinoct-runs ... --csv -` says."""
    assert main([*map(str, arguments), "--csv", "-"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("rank", "b a c d"),  # the best of the run, not the last
        ("last rank", "b a c d"),
        ("loss", "a c b d"),
        ("step", "d a c b"),
        ("name", "a b c d"),
        ("optim.lr", "c b d a"),
        ("lr", "c b d a"),
        ("state", "a b c d"),
        ("duration", "b a c d"),
    ],
)
def test_sorted_by_any_column(runs, capsys, column, order):
    assert [row["run"] for row in table([runs, "--sort", column], capsys)] == order.split()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sort", "lrr"], ["--sort lrr", "optim.lr", "feature std", "duration"]),
        (["--csv", "/nowhere/x.csv"], ["/nowhere/x.csv cannot be written"]),
        (["--csv", "-", "--json", "-"], ["only one of them may be -"]),
    ],
)
def test_typed_wrong(runs, capsys, arguments, says):
    assert main([str(runs), *arguments]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    for words in says:
        assert words in err


def test_a_wrong_flag_is_no_failed_evaluation(capsys):
    with pytest.raises(SystemExit) as end:
        main(["outputs", "--sorted"])
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: unrecognized arguments: --sorted")


def test_folders_without_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert main([str(tmp_path / "nowhere")]) == 1
    (tmp_path / "config.json").write_text('{"architectures": ["ViT"]}')  # somebody else's
    assert main([str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_csv_is_exact_and_runs_no_formula(runs, capsys):
    rows = {row["run"]: row for row in table([runs], capsys)}
    assert rows["a"]["note"] == "'=HYPERLINK(1)"
    assert rows["c"]["optim.lr"] == "-0.5"  # a number, and no formula
    assert (rows["a"]["rank"], rows["a"]["last rank"]) == ("0.2", "0.3")
    assert rows["d"]["loss"] == ""
    assert float(rows["b"]["duration_s"]) == 3900
    assert "run_dir" not in rows["a"]  # differs always, and says nothing


def test_json_holds_the_figures_in_order(runs, capsys):
    (runs / "a" / "metrics.jsonl").open("a").write('{"step": 3, "loss/total": NaN}\n')
    assert main([str(runs), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["runs"]
    assert [entry["name"] for entry in found] == ["b", "a", "c", "d"]
    assert (found[1]["rank"], found[1]["rank_step"], found[1]["last"]["loss/total"]) == (0.2, 1, None)
    assert found[0]["settings"] == {"optim.lr": 0.001}
    assert found[2]["state"] == "failed"


def test_states(tmp_path):
    def state(folder: Path, *, later: float) -> str:
        return read_run(folder, now=time.time() + later).state

    running = make(tmp_path / "r", records=[record(1, 1)], state="running")
    assert state(running, later=60) == "running"
    assert state(running, later=700) == "stalled"
    os.utime(running / "metrics.jsonl", (time.time() + 690, time.time() + 690))
    assert state(running, later=700) == "running"
    for name in ("stopped", "failed", "done"):
        assert state(make(tmp_path / name, state=name), later=7000) == name


def test_a_cut_line_and_lines_of_something_else_are_passed_over(tmp_path):
    folder = make(tmp_path / "r", records=[record(5, 2.5, 0.2)])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(
            b'7\nnull\n{"loss/total": 1}\n{"step": 6, "loss/total": "x", "loss/gram": true}\n{"step": 7, "los\xc3'
        )
    found = read_run(folder)
    assert (found.step, found.last["loss/total"], found.last["loss/gram"], found.best_rank) == (6, 2.5, 0.001, 0.2)


ODD_CONFIGS = [
    {"hardware": "x", "environment": [1], "choices": 3, "parameters": "many", "step": {}},
    {"history": [{"hardware": 5, "changes": 7, "at": []}, 1], "parameters": math.nan},
    {"config": {"optim": {"lr": math.nan}, "seed": [[1]]}},
]


@pytest.mark.parametrize("changes", ODD_CONFIGS, ids=str)
def test_a_run_of_other_types_than_expected_is_shown(runs, capsys, changes):
    make(runs / "odd", records=[record(1, 2)], **changes)
    for typed in ([runs], [runs, "--html", runs / "x.html"], ["show", runs / "odd"]):
        assert main([*map(str, typed)]) == 0
    capsys.readouterr()
    assert main([str(runs), "--json", "-"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


HUGE = "1" * 400
ODD_LINES = ['{"step": NaN, "loss/total": 1}', '{"step": 1e999}', "[" * 99_999, f'{{"step": 5, "loss/total": {HUGE}}}']


@pytest.mark.parametrize("line", ODD_LINES, ids=lambda line: line[:20])
def test_a_record_without_a_step_or_of_no_number_is_passed_over(runs, capsys, line):
    folder = make(runs / "²", records=[record(4, 2.5)])  # a name of a digit that is no number
    (folder / "metrics.jsonl").open("a").write(f"{line}\n")
    rows = {row["run"]: row for row in table([runs], capsys)}
    assert rows["²"]["loss"] == "2.5"
    assert main(["show", str(folder)]) == 0


def test_a_config_that_cannot_be_read_is_odd(runs, capsys):
    for name, text in (("deep", "[" * 99_999), ("cut", '{"config": {')):
        (make(runs / name, records=[record(4, 2.5)]) / "config.json").write_text(text)
    assert main([str(runs)]) == 0
    out = capsys.readouterr().out
    for name in ("deep", "cut"):
        assert f"{name} odd: its config.json cannot be read" in out
    assert main(["show", str(runs / "cut")]) == 0


def test_time_between_sessions_does_not_count(tmp_path):
    log = tmp_path / "train.log"
    stamps = ("01-03 12:00:01", "01-03 12:10:00", "01-05 09:00:00", "01-05 09:00:30")
    log.write_text("".join(f"2026-{stamp},123 INFO x\n  Traceback\n" for stamp in stamps))
    assert read_duration(log, ["2026-01-03T12:00:00", "2026-01-05T09:00:00"]) == 630
    assert read_duration(log, ["2026-01-03T12:00:00", "2026-01-04T00:00:00", "2026-01-05T09:00:00"]) == 630
    assert read_duration(tmp_path / "none", ["2026-01-03T12:00:00"]) is None


def test_runs_are_found_two_levels_down_and_named_apart(tmp_path):
    make(tmp_path / "outputs" / "runs" / "20260103")
    for i in (10, 2):
        make(tmp_path / "outputs" / "sweeps" / "s" / f"{i}_optim.lr_{i}", sweep="s", settings={"optim.lr": i})
    found = sort_runs(find_runs([tmp_path / "outputs"]), "run")
    assert labels(found) == ["runs/20260103", "sweeps/s/2", "sweeps/s/10"]
    one, two = tmp_path / "outputs" / "runs", tmp_path / "outputs"
    assert len(find_runs([one, two, one / "20260103"])) == 3
    make(tmp_path / "more" / "20260103")
    assert len({run.name for run in find_runs([one, tmp_path / "more"])}) == 2


def test_a_choice_stands_for_the_settings_below_it(tmp_path):
    def one(name: str, aug: str, flip: float, crops: int, command: str = "dinoct-train") -> None:
        settings = {"aug.flip": flip, "aug.name": aug, "aug.crops": crops}
        make(tmp_path / name, choices={"aug": aug, "tracker": name}, settings=settings, command=command)

    one("0", "multicrop", 0.5, 8)
    one("1", "intensity_only", 0.0, 0)
    assert telling(find_runs([tmp_path])) == ["aug"]
    one("2", "multicrop", 0.5, 4)  # differs within the choice
    assert telling(find_runs([tmp_path])) == ["aug", "aug.crops"]
    shutil.rmtree(tmp_path / "2")
    one("3", "spatial_strong", 0.1, 0, command="dinoct-train aug.flip=0.1")  # was typed
    assert telling(find_runs([tmp_path])) == ["aug", "aug.flip"]


def test_an_unfair_comparison_is_named(runs, capsys):
    assert unfair(find_runs([runs])) == []
    make(runs / "e", data_manifest_hash="feedfeedfeedfeed", git_commit="ba9876543210-dirty")
    make(runs / "f", records=[record(1, 1, 0.4)], settings={"probe.seed": 1})
    assert main([str(runs)]) == 0
    err = capsys.readouterr().err
    for words in ("feedfeedfeedfeed in 1", "0123456789abcdef in 5", "ba9876543210-dirty in 1", "(probe.seed)"):
        assert words in err


def test_code_whose_steps_were_taken_again_made_nothing_of_a_run(tmp_path):
    """A start that ended before a checkpoint, and a branch that was turned back from."""
    starts = [("0123456789ab", 0), ("aaaaaaaaaaaa", 6), ("bbbbbbbbbbbb", 9), ("0123456789ab", 6), ("cccccccccccc", 8)]
    history = [
        {"at": f"2026-01-0{i}T12:00:00", "git_commit": code, "from_step": step}
        for i, (code, step) in enumerate(starts, 1)
    ]
    make(tmp_path / "a", history=history[:4])
    make(tmp_path / "b")
    assert unfair(find_runs([tmp_path])) == []
    make(tmp_path / "c", history=history)
    assert "0123456789ab, cccccccccccc in 1" in unfair(find_runs([tmp_path]))[0]


def test_code_of_a_branch_that_a_run_is_not_of_made_nothing_of_it(tmp_path):
    """a went to 9, b from 6 to 8, and the run went on from a's 9."""
    starts = [("a", "0123456789ab", 0), ("b", "aaaaaaaaaaaa", 6), ("c", "0123456789ab", 9)]
    history = [{"at": "x", "start": name, "git_commit": code, "from_step": step} for name, code, step in starts]
    make(tmp_path / "a", history=history, starts=[[0, "a"], [9, "c"]])
    make(tmp_path / "b")
    assert unfair(find_runs([tmp_path])) == []
    make(tmp_path / "c", history=history[:2], starts=[[0, "a"], [6, "b"]])
    assert "0123456789ab, aaaaaaaaaaaa in 1" in unfair(find_runs([tmp_path]))[0]


def test_the_table_fits_the_terminal(runs, capsys, monkeypatch):
    from dinoct.compare import table as runtable

    make(runs / ("a_long_name_" * 8), settings={"loss.koleo.weight": 0.25, "loss.gram.weight": 0.1})
    for width in (80, 160):
        monkeypatch.setattr(runtable.console, "_width", width)
        assert main([str(runs)]) == 0
        out = capsys.readouterr().out
        lines = out.split("no room for")[0].splitlines()
        assert max(map(len, lines[1:])) <= width
        assert "koleo" in out
        assert "c failed: loss/total is not finite" in out
    assert "feature" in out


def test_the_important_columns_stay():
    assert fitting({"run": 10, "rank": 6, "loss": 30, "std": 5}, ["run", "rank", "loss", "std"], 25) == {
        "run",
        "rank",
        "std",
    }


class Page(HTMLParser):
    """Text, addresses and the rows of the first table of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.addresses, self.tags, self.words, self.rows, self.inside = [], [], [], [], None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.words.append(data)
        if self.rows and self.inside in ("td", "span", "button"):
            self.rows[-1].append(data)


@pytest.fixture
def compared(runs, capsys) -> Path:
    """The page of four runs and one whose name and settings are hostile."""
    make(runs / "<script>alert(1)<_script>", records=[record(i, 10 - i / 999) for i in range(1, 3001)],
         settings={"note": "</script><img src=http://example.invalid>"}, sweep=None)  # fmt: skip
    for step in (1, 20):
        monitor = runs / "b" / "monitor" / f"step_{step:08d}"
        monitor.mkdir(parents=True)
        (monitor / "heatmap.png").write_bytes(PNG)
    with open(runs / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss/to')
    file = runs.parent / "compare.html"
    assert main([str(runs), "--html", str(file)]) == 0
    return file


def test_the_page_is_whole_and_asks_nothing_of_a_network(compared):
    page = Page(compared.read_text())
    words = " ".join(page.words)
    assert [row[0] for row in page.rows[1:6]] == ["b", "a", "<script>alert(1)<_script>", "c", "d"]
    assert page.tags.count("script") == compared.read_text().count("<script")
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 1  # the newest picture alone
    assert "step_00000020" in words
    assert "c lr=-0.5 failed: loss/total is not finite" in words
    assert "</script><img" in words  # as text
    assert "default-src 'none'" in compared.read_text()


def test_pictures_are_limited_and_the_page_says_so(runs, tmp_path):
    for i in range(14):
        monitor = make(runs / f"x{i}") / "monitor" / "step_00000001"
        monitor.mkdir(parents=True)
        (monitor / "input.png").write_bytes(PNG)
    assert main([str(runs), "--html", str(tmp_path / "x.html")]) == 0
    page = Page((tmp_path / "x.html").read_text())
    assert len(page.addresses) == 12
    assert "Pictures of the first 12 of 14 runs" in " ".join(page.words)


def test_a_page_without_records(tmp_path):
    make(tmp_path / "runs" / "a")
    assert main([str(tmp_path / "runs"), "--html", str(tmp_path / "x.html")]) == 0
    assert "No run has a record" in (tmp_path / "x.html").read_text()


def test_without_plotly_one_line_names_the_extra(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    assert main([str(runs), "--html", "x.html"]) == 1
    assert capsys.readouterr().err == "error: --html needs plotly: pip install 'dinoct[html]'\n"


def test_a_thinned_curve_keeps_its_spikes():
    values = [0.0] * 50_000
    values[12_345], values[40_001] = 7.0, -3.0
    steps, kept = thin(range(50_000), values)
    assert len(steps) <= 1000
    assert (steps[0], steps[-1]) == (0, 49_999)
    assert steps == sorted(set(steps))
    assert dict(zip(steps, kept, strict=True))[12_345] == 7
    assert dict(zip(steps, kept, strict=True))[40_001] == -3


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_the_page_in_a_browser(compared, tmp_path):
    """Scripts run under the page's own policy without a word on the console, and every curve is drawn."""
    flags = "--headless=new --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        ["chromium", *flags.split(), profile, compared.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert ":CONSOLE" not in done.stderr
    assert done.stdout.count('class="trace scatter') == 4 * 5 + 2 * 2  # four runs have records, two were judged
    assert done.stdout.count('class="legendtoggle"') == 4
    buttons = set(re.findall(r'class="modebar-btn[^>]* data-title="([^"]+)"', done.stdout))
    assert {title.split()[0] for title in buttons} == {"Download", "Zoom", "Pan", "Reset"}  # none that sends
    assert "alert(1)" in done.stdout


def test_a_job_that_was_refused_stands_in_the_sweeps_table(phantom_root, workplace, capfd):
    arguments = [*TINY, f"data.root={phantom_root}", "train.max_steps=1", "loss.gram.weight=0,1"]
    assert run("train", "-m", *arguments) == 1
    out = capfd.readouterr().out
    (sweep,) = (workplace / "outputs" / "sweeps").iterdir()
    done, refused = csv.DictReader((sweep / "summary.csv").read_text().splitlines())
    assert (done["state"], done["step"], done["loss.gram.weight"]) == ("done", "1", "1.0")
    assert (refused["state"], refused["loss.gram.weight"], refused["rank"]) == ("failed", "0.0", "")
    assert float(done["rank"]) < 1
    assert "0 failed: loss.gram.weight=0 is refused" in " ".join(out.split())
    assert main(["outputs"]) == 0
    out = capfd.readouterr().out
    assert f"sweeps/{sweep.name}/1" in out.replace("\n", "")
    assert main(["show", str(sweep / refused["run"])]) == 0
    assert "loss.gram.weight = 0" in capfd.readouterr().out
