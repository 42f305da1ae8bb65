"""Writing a file whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, then rename it to ``path``.

    Whatever goes wrong in between, ``path`` keeps its old content (or stays absent) and nothing half-written remains.
    """
    path = Path(path)
    beside = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix stays: matplotlib reads the format from it
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(values: Mapping[str, object], path: Path | str) -> None:
    """Write ``values`` as JSON. NaN and infinities, which JSON has no word for, become null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    with replacing(path) as beside:
        beside.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n")


def check_writable(folder: Path | str) -> None:
    """Make ``folder`` and write a byte in it.

    Raises:
        OSError: it cannot be made or written; the message names the folder and says what to do.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to the output folder {folder} ({error.strerror or error}): "
            "choose another with hydra.run.dir=DIR (a sweep: hydra.sweep.dir=DIR)"
        ) from error
