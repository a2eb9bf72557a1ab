"""A finding of ``dinoct-doctor``: what is so, how bad that is, and what to do."""

from dataclasses import dataclass

from dinoct.console import console

OK, WARN, FAIL = "ok", "WARN", "FAIL"
STYLES = {OK: None, WARN: "yellow", FAIL: "bold red"}


@dataclass(frozen=True)
class Finding:
    level: str  # OK | WARN | FAIL
    name: str
    text: str
    todo: str = ""


def show(finding: Finding) -> str:
    """Print a finding, with what to do about it on a line of its own; returns its level."""
    style = STYLES[finding.level]
    console.print(f"{finding.level:<4}  {finding.name:<13} {finding.text}", style=style, markup=False)
    if finding.todo:
        console.print(f"{'':<20}-> {finding.todo}", style=style, markup=False)
    return finding.level
