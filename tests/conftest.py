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


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared phantom data set: 5 patients, 50 small slices."""
    from dinoct.data.phantom import PhantomSpec, write_phantom
    from dinoct.data.pipeline import PrepareOptions, prepare_dataset
    from dinoct.data.privacy import write_salt

    root = tmp_path_factory.mktemp("phantom")
    write_salt(root, b"phantom " * 4)
    write_phantom(root / "dicom", PhantomSpec(patients=5, slices=8, size=96))
    prepare_dataset([root / "dicom"], root, PrepareOptions(workers=0, val_fraction=0.3))
    return root


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory: runs land in its outputs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
