"""What the benchmarks share: where the CT comes from, and a table."""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dinoct.data.dicom import Rejected, read_headers

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "ct"


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, help="folder of CT DICOM (default: ../shared/ct, else a phantom)")


@contextmanager
def source_folder(given: Path | None) -> Iterator[Path]:
    """The folder of CT to measure on; a phantom of 24 patients where there is none."""
    if given or SHARED.is_dir():
        yield given or SHARED
        return
    from dinoct.data.phantom import PhantomSpec, write_phantom

    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder), PhantomSpec(patients=24, slices=20, size=512))
        yield Path(folder)


def slice_files(source: Path) -> list[Path]:
    """Return the files of the source that hold one axial 512 x 512 slice, in patients as they come."""
    good = []
    for path in sorted(source.rglob("*")):
        if "odd" not in path.parts and path.is_file():
            found = read_headers(str(path))
            if not isinstance(found, Rejected) and len(found) == 1 and found[0].rows == found[0].cols == 512:
                good.append(path)
    return good


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")
