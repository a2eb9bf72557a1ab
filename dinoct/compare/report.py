"""What dinoct-runs does: a table, files and a page of runs, or all about one."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dinoct.compare.differ import column_of, every_column, sort_runs, unfair
from dinoct.compare.read import find_runs, read_run
from dinoct.compare.table import as_csv, as_json, describe_run, print_table
from dinoct.console import console
from dinoct.durable import replacing_text
from dinoct.errors import ConfigError


def show(folders: Sequence[str]) -> None:
    """Print all about one run.

    Raises:
        ConfigError: if it is not one run folder.
    """
    if len(folders) != 1:
        raise ConfigError("show takes one run folder: dinoct-runs show outputs/runs/ID")
    if not Path(folders[0]).is_dir():
        raise ConfigError(f"there is no folder {folders[0]}; the folder of a sweep's job has its overrides in its name")
    run = read_run(Path(folders[0]))
    if run is None:
        raise ConfigError(f"{folders[0]} is not a run folder (it has no config.json)")
    for line in describe_run(run):
        console.print(line, markup=False)


def compare(
    folders: Sequence[str], *, sort: str, csv: str | None = None, json: str | None = None, html: str | None = None
) -> None:
    """Read the runs in `folders`, sort them by a column, and show them in every form that has a file.

    The table is printed too, unless a file is ``-``, the standard output.

    Raises:
        ConfigError: if there are no runs or no such column, or a file cannot be written.
    """
    files = [file for file in (csv, json, html) if file is not None]
    if len(set(files)) < len(files):
        raise ConfigError("--csv, --json and --html write to different files; only one of them may be -")
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"there is no folder {folder}")
    title = " ".join(folders)
    runs = find_runs([Path(folder) for folder in folders])
    if not runs:
        raise ConfigError(f"there is no run in {title}")
    column = column_of(runs, sort)
    runs = sort_runs(runs, column)
    if "-" not in files:
        print_table(runs, title, sorted_by=column)
    for sentence in unfair(runs):
        print(f"unfair: {sentence}", file=sys.stderr)
    if csv:
        write(csv, as_csv(runs, every_column(runs)))
    if json:
        write(json, as_json(runs))
    if html:
        from dinoct.compare.page import page

        write(html, page(runs, title))


def write(file: str, text: str) -> None:
    """Write into a file, or to the standard output for ``-``.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        if file == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        elif (path := Path(file)).is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout, a named pipe
            path.write_text(text, encoding="utf-8")
        else:
            with replacing_text(path) as target:
                target.write(text)
    except BrokenPipeError:  # `| head` took what it wanted; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
