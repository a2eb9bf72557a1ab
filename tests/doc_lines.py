"""Commands in README.md and docs/: the lines of fenced blocks, and what stands in backticks."""

import re
import shlex
import shutil
from dataclasses import dataclass

HEADS = ("python", "make", "pip", "idc")  # beside dinoct-...


@dataclass(frozen=True)
class Line:
    """A command and where it stands."""

    file: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.text}"


def is_command(text: str) -> bool:
    head = (shlex.split(text, comments=True) or [""])[0]
    return head.startswith("dinoct-") or head in HEADS


def fenced(text: str, file: str) -> list[Line]:
    """Command lines of the fenced blocks, without their comments; what stands behind ``# or:`` is one too.

    A block is one of commands where it begins with one, or with ``$``: then only lines with ``$`` are, the others are
    output. A block that begins with a program that is not known here is taken for commands as well, so that it fails.
    """
    found: list[Line] = []
    block: list[tuple[int, str]] | None = None
    language = ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            if block:
                found += _of_block(block, language, file)
            language = line.strip().removeprefix("```")
            block = [] if block is None else None
        elif block is not None and line.strip():
            block.append((number, line.strip()))
    return found


def _of_block(block: list[tuple[int, str]], language: str, file: str) -> list[Line]:
    if language in ("python", "yaml", "json", "text"):
        return []
    first = block[0][1]
    if first.startswith("$ "):
        block = [(number, line.removeprefix("$ ")) for number, line in block if line.startswith("$ ")]
    elif not (language or is_command(first) or shutil.which(first.split()[0])):
        return []
    found = []
    for number, line in block:
        command, _, comment = line.partition(" #")
        found += [Line(file, number, command.strip())] if command and not command.startswith("#") else []
        found += [Line(file, number, other) for other in re.findall(r"\bor: (dinoct-.*)", comment)]
    return found


def inline(text: str, file: str) -> list[Line]:
    """What stands in backticks outside of the fenced blocks."""
    found, inside = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            inside = not inside
        elif not inside:
            found += [Line(file, number, span) for span in re.findall(r"`([^`]+)`", line)]
    return found
