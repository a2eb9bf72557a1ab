"""dinoct-runs: tables, files and pages of runs, without Hydra and without torch."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dinoct.errors import DinoctError


def __getattr__(name: str) -> type:
    """`dinoct.runs.SweepSummary`, which conf/train.yaml names; a table alone does not wait for Hydra."""
    if name != "SweepSummary":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dinoct.compare.sweep import SweepSummary

    return SweepSummary


class _Parser(argparse.ArgumentParser):
    """One line and exit status 1, as of all commands: 2 is a failed evaluation."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """A table of the runs in or below a folder, or of several folders; with `show`, all about one run."""
    parser = _Parser(prog="dinoct-runs", description=main.__doc__)
    parser.add_argument("words", nargs="+", metavar="FOLDER | show RUN")
    parser.add_argument("--sort", default="rank", metavar="COLUMN", help="rank, loss, step, name, ... or a setting")
    parser.add_argument("--csv", metavar="FILE", help="write the whole table into FILE; - is the standard output")
    parser.add_argument("--json", metavar="FILE", help="write figures and settings into FILE; - is the standard output")
    parser.add_argument("--html", metavar="FILE", help="write a page with curves and pictures into FILE")
    typed = parser.parse_args(arguments)

    from dinoct.compare.report import compare, show

    try:
        if typed.words[0] == "show":
            show(typed.words[1:])
        else:
            compare(typed.words, sort=typed.sort, csv=typed.csv, json=typed.json, html=typed.html)
    except DinoctError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def cli() -> None:
    """Entry point of ``dinoct-runs``."""
    sys.exit(main())


if __name__ == "__main__":
    cli()
