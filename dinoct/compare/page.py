"""A page that compares runs: one file, no network. Everything that comes from a file of a run is escaped."""

import base64
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import dinoct
from dinoct.compare.differ import (
    cell,
    commits,
    data_hash,
    differing_choices,
    differing_settings,
    labels,
    telling,
    unfair,
)
from dinoct.compare.plots import figure_html, look, read_curves
from dinoct.compare.read import ODD, Run
from dinoct.compare.table import headings, is_text, printable, readable, reason, shown

MOST_PICTURES = 12  # runs; a picture is about 100 kB
LONGEST_NAME = 60  # characters in the legend
FIGURE = "curves"
STYLE = """
:root { color-scheme: light dark; --fg: #1c1c1c; --bg: #fff; --line: #d4d4d4; --soft: #f3f3f3; --odd: #fff0c2; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e6e6e6; --bg: #161616; --line: #3c3c3c; --soft: #222; --odd: #4d3f10; }
}
body { font: 14px/1.45 system-ui, sans-serif; color: var(--fg); background: var(--bg); margin: 1.5rem; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.hint { opacity: .75; }
.note, figcaption { overflow-wrap: anywhere; }
.note { padding: .5rem .8rem; margin: .6rem 0; }
.odd, .note { background: var(--odd); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--soft); white-space: nowrap; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.name { overflow-wrap: anywhere; min-width: 18rem; }
td.name ~ td { white-space: nowrap; }
th button { all: unset; cursor: pointer; font: inherit; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
figure { margin: 0 0 1.2rem; }
figure img { max-width: 100%; height: 300px; object-fit: contain; background: #fff; }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sort")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.ariaSort === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.ariaSort = down === 1 ? "ascending" : "descending";
    const key = row => row.cells[i].dataset.v;
    const order = (a, b) => a === "" || b === "" ? (a === "") - (b === "")
      : down * (isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b);
    body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
  }));
}
const dark = matchMedia("(prefers-color-scheme: dark)"), figure = document.getElementById("curves");
const paint = () => {
  const ink = dark.matches ? "#ddd" : "#333";
  if (figure) Plotly.relayout(figure, {"font.color": ink, "modebar.color": "#888", "modebar.activecolor": ink});
};
dark.addEventListener("change", paint);
paint();
"""
POLICY = (  # held by the browser: nothing is fetched, and nothing is sent
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)


def page(runs: Sequence[Run], title: str) -> str:
    """The page as HTML: table, curves, pictures, origins, settings that differ.

    Args:
        runs: in the order of the table.
        title: what was looked through.
    Raises:
        ConfigError: without plotly.
    """
    by_name = dict(zip(legend_names(runs), runs, strict=True))
    curves = {name: read_curves(run.folder / "metrics.jsonl") for name, run in by_name.items()}
    parts = [
        f"<h1>Runs in {_text(title)}</h1>",
        f'<p class="hint">generated {time.strftime("%Y-%m-%d %H:%M:%S")} by dinoct {dinoct.__version__}, '
        f"{len(runs)} runs</p>",
        *(_note(f"Unfair: {sentence}") for sentence in unfair(runs)),
        _overview(runs),
        *(_note(f"{n} {run.state}: {reason(run)}") for n, run in by_name.items() if run.state in ("failed", ODD)),
        "<h2>Curves</h2>",
        *_plots(curves),
        *_pictures(by_name),
        *_origins(runs),
        *_settings(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dinoct: {_text(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def legend_names(runs: Sequence[Run]) -> list[str]:
    """Names that say what differs, ``3 aug=multicrop, seed=1``, each once."""
    short, keys = headings(runs), telling(runs)
    names = []
    for run, label in zip(runs, labels(runs), strict=True):
        says = ", ".join(f"{short[key]}={shown(key, cell(run, key))}" for key in keys if cell(run, key) is not None)
        name = printable(f"{label} {says}".strip())
        name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        names.append(name if name not in names else f"{len(names)}: {name}")
    return names


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _table(head: Iterable[str], rows: Iterable[str], *, kind: str = "") -> str:
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    top = f"<thead><tr>{''.join(head)}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{top}\n<tbody>{body}</tbody></table></div>'


def _overview(runs: Sequence[Run]) -> str:
    names, rows = headings(runs), []
    for i, (run, texts) in enumerate(zip(runs, readable(runs), strict=True)):
        cells = []
        for key in names:
            value = cell(run, key)
            dot = f'<span class="dot" style="background:{look(i)[0]}"></span>' if key == "run" else ""
            kind = "" if is_text(runs, key) else ' class="n"'
            known = "" if value is None else _text(value)
            cells.append(f'<td{kind} data-v="{known}" title="{known}">{dot}{_text(texts[key])}</td>')
        rows.append("".join(cells))
    head = (
        f'<th title="{_text(key)}"><button type="button">{_text(name)}</button></th>' for key, name in names.items()
    )
    return _table(head, rows, kind="sort")


def _plots(curves: dict[str, dict]) -> list[str]:
    if not any(curves.values()):
        return ["<p>No run has a record in metrics.jsonl yet.</p>"]
    hint = (
        "All over the step. A click on a run in the legend hides it in all plots, a double click shows it alone; "
        "dragging zooms. Long curves are thinned, their extremes stay."
    )
    return [f'<p class="hint">{hint}</p>', figure_html(curves, div_id=FIGURE)]


def newest_pictures(folder: Path) -> list[Path]:
    """input.png and heatmap.png of the last monitor/step_* that has any."""
    for step in sorted((folder / "monitor").glob("step_*"), reverse=True):
        found = [path for path in (step / "input.png", step / "heatmap.png") if path.is_file()]
        if found:
            return found
    return []


def _pictures(by_name: dict[str, Run]) -> list[str]:
    found = [(name, paths) for name, run in by_name.items() if (paths := newest_pictures(run.folder))]
    if not found:
        return []
    parts = ["<h2>Pictures</h2>"]
    if len(found) > MOST_PICTURES:
        parts.append(_note(f"Pictures of the first {MOST_PICTURES} of {len(found)} runs that have some."))
    for name, paths in found[:MOST_PICTURES]:
        images = "".join(
            f'<img alt="{path.stem} of {_text(name)}" src="data:image/png;base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}"> '
            for path in paths
        )
        parts.append(f"<figure><figcaption>{_text(name)}, {_text(paths[0].parent.name)}</figcaption>{images}</figure>")
    return parts


def _origins(runs: Sequence[Run]) -> list[str]:
    """Where each run comes from; what is not as in most of the others is marked."""
    rows: dict[str, list[str]] = {
        "git commit": [commits(run) for run in runs],
        "data": [data_hash(run) for run in runs],
        "machine": [_machine(run) for run in runs],
        "torch": [str(run.config["environment"].get("torch", "-")) for run in runs],
        "created": [str(run.config.get("created", "-")) for run in runs],
    }
    usual = {key: Counter(values).most_common(1)[0][0] for key, values in rows.items() if key != "created"}
    body = []
    for i, run in enumerate(runs):
        cells = [f'<td class="name">{_text(run.name)}</td>']
        for key, values in rows.items():
            odd = run.begun and values[i] != usual.get(key, values[i])
            cells.append(f'<td class="odd">≠ {_text(values[i])}</td>' if odd else f"<td>{_text(values[i])}</td>")
        body.append("".join(cells))
    head = (f"<th>{name}</th>" for name in ("run", *rows))
    return ["<h2>Where they come from</h2>", "<p class='hint'>≠: not as in most of the runs.</p>", _table(head, body)]


def _machine(run: Run) -> str:
    machine = run.config["hardware"]
    return f"{machine.get('platform', '-')} ({machine.get('card', '-')})"


def _settings(runs: Sequence[Run]) -> list[str]:
    keys = [*differing_choices(runs), *differing_settings(runs)]
    if not keys:
        return ["<h2>Settings that differ</h2>", "<p>None.</p>"]
    rows = [
        f"<th>{_text(key)}</th>" + "".join(f"<td>{_text(shown(key, cell(run, key)))}</td>" for run in runs)
        for key in keys
    ]
    head = ["<th>setting</th>", *(f"<th>{_text(label)}</th>" for label in labels(runs))]
    return ["<h2>Settings that differ</h2>", _table(head, rows)]
