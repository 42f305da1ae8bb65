"""Where the real data lie: the folder that DATAPARAMS_DATA names, or `shared/data` beside the
repository.
"""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets; skips the test where there is none."""
    folder = Path(os.environ.get("DATAPARAMS_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no data folder: DATAPARAMS_DATA is not set and ../shared/data is absent")
    return folder


@pytest.fixture
def require(data_dir: Path):
    """Call with a path inside the data folder: skips where it is absent, else returns the
    folder.
    """

    def need(relative: str) -> Path:
        if not (data_dir / relative).exists():
            pytest.skip(f"the data folder has no {relative}")
        return data_dir

    return need
