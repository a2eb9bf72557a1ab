"""Fixtures that several rooms of the tests share."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """The folder of real CT: DINOCT_REAL_CT, or ../shared/ct beside the project. Skips where neither is there."""
    folder = Path(os.environ.get("DINOCT_REAL_CT") or REPOSITORY.parent / "shared" / "ct")
    if not (folder / "truth.csv").is_file():
        pytest.skip(f"no real CT at {folder}: set DINOCT_REAL_CT")
    return folder
