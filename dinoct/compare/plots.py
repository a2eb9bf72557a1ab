"""Curves of several runs in one figure: a panel per figure, a colour per run, one legend that switches a run in all."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinoct.compare.read import records
from dinoct.errors import ConfigError

PANELS = {  # tag in metrics.jsonl: heading
    "Eval/mean_percentile_rank": "mean percentile rank (0 best, 0.5 chance)",
    "Eval/top1": "top1",
    "loss/total": "loss/total",
    "loss/dino": "loss/dino",
    "loss/gram": "loss/gram",
    "Train/feature_std": "feature std (1: isotropic)",
    "Train/mean_cosine": "mean cosine (1: collapsed)",
    "Train/lr": "learning rate",
    "Train/samples_per_s": "samples per second",
}
POINTS = 1000  # of a curve in a page
FEW = 60  # points that are worth a marker each
PANELS_ABREAST = 3
PANEL_HEIGHT = 260  # px
COLOURS = (  # legible on white and on black
    "#4c78d0", "#e4812c", "#3fa35b", "#d6504f", "#9a6fc4", "#a5745f", "#d770b4", "#8a8a8a", "#a9a422", "#2bb3c0",
)  # fmt: skip
BUTTONS = ("toImage", "zoom2d", "pan2d", "resetScale2d")  # by default plotly offers to send the figure to a cloud
DASHES = ("solid", "dash", "dot", "dashdot")

Curve = tuple[list[int], list[float]]


def look(i: int) -> tuple[str, str]:
    """Colour and dash of the i-th run: forty runs can be told apart."""
    return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]


def read_curves(metrics: Path) -> dict[str, Curve]:
    """Steps and finite values of the tags that have a panel, thinned, with six digits."""
    whole: dict[str, Curve] = {tag: ([], []) for tag in PANELS}
    for record in records(metrics):
        for tag in PANELS:
            if math.isfinite(record.get(tag, math.nan)):
                whole[tag][0].append(int(record["step"]))
                whole[tag][1].append(float(f"{record[tag]:.6g}"))
    return {tag: thin(*curve) for tag, curve in whole.items() if curve[0]}


def thin(steps: Sequence[int], values: Sequence[float], *, most: int = POINTS) -> Curve:
    """At most `most` points of a curve: of each stretch the smallest and the largest, so that no spike is lost."""
    if len(steps) <= most:
        return list(steps), list(values)
    stretches = most // 2 - 1
    keep = {0, len(steps) - 1}
    for i in range(stretches):
        stretch = range(i * len(steps) // stretches, (i + 1) * len(steps) // stretches)
        keep |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    order = sorted(keep)
    return [steps[i] for i in order], [values[i] for i in order]


def figure_html(curves: Mapping[str, Mapping[str, Curve]], *, div_id: str) -> str:
    """The figure as a ``<div>`` with plotly's whole source, which asks nothing of a network.

    Args:
        curves: per name of a run, curves by tag; names must differ.
    Raises:
        ConfigError: without plotly.
    """
    try:
        from plotly.graph_objects import Scatter
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ConfigError("--html needs plotly: pip install 'dinoct[html]'") from error
    tags = [tag for tag in PANELS if any(tag in curve for curve in curves.values())]
    rows = math.ceil(len(tags) / PANELS_ABREAST)
    headings = [PANELS[tag] for tag in tags]
    figure = make_subplots(rows, PANELS_ABREAST, subplot_titles=headings, vertical_spacing=0.3 / rows)
    for i, (name, of_run) in enumerate(curves.items()):
        colour, dash = look(i)
        text = html.escape(name, quote=False)  # plotly reads tags in names, links among them
        for tag, (steps, values) in of_run.items():
            panel = tags.index(tag)
            figure.add_trace(
                Scatter(
                    x=steps,
                    y=values,
                    name=text,
                    legendgroup=str(i),
                    showlegend=tag == next(iter(of_run)),
                    mode="lines+markers" if len(steps) <= FEW else "lines",
                    line={"color": colour, "dash": dash, "width": 1.3},
                    marker={"size": 4},
                    hovertemplate="step %{x}: %{y:.5g}",
                ),
                row=panel // PANELS_ABREAST + 1,
                col=panel % PANELS_ABREAST + 1,
            )
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)", "automargin": True}
    figure.update_xaxes(matches="x", **grid)
    figure.layout.xaxis.matches = None  # the others follow the first
    figure.update_yaxes(**grid)
    figure.update_annotations(font_size=13)
    figure.update_layout(
        height=rows * PANEL_HEIGHT + 60,
        margin={"l": 50, "r": 20, "t": 40, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#888", "size": 11},
        hoverlabel={"namelength": -1},
        showlegend=True,
    )
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": [list(BUTTONS)]}
    return figure.to_html(full_html=False, include_plotlyjs=True, div_id=div_id, config=config)
