"""What Hydra calls around a run or a sweep: a look at the folders before, the summary table after."""

from __future__ import annotations

import atexit
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dataparams.report.compare_page import FILE as COMPARE_FILE
from dataparams.report.compare_page import compare
from dataparams.report.files import check_writable


class WritableFolders(Callback):
    """Ends the program with one line if the output folder cannot be written, before anything else happens."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_or_exit(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_or_exit(config.hydra.sweep.dir)


class SweepSummary(Callback):
    """Prints the table of a sweep and the folder's path when it ends, also when some of its jobs failed.

    The table is made from the files of the runs, so it does not matter which launcher ran them.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # A failed job makes Hydra leave without on_multirun_end; the runs that did finish deserve their table too.
        self._print = partial(print_summary, Path(config.hydra.sweep.dir).resolve())
        atexit.register(self._print)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(self._print)
        self._print()


def print_summary(sweep_dir: Path) -> None:
    """Write and print the table of ``sweep_dir``; where no job has finished, say so. Silent where none was started."""
    if not any(path.is_dir() for path in sweep_dir.iterdir()):
        return
    try:
        print(f"\n{compare(sweep_dir)}")
    except FileNotFoundError as error:
        print(f"\n{error}", file=sys.stderr)
    print(f"\nsweep: {sweep_dir}")
    if (sweep_dir / COMPARE_FILE).exists():
        print(f"page: {sweep_dir / COMPARE_FILE}")
    sys.stdout.flush()


def _check_or_exit(folder: str) -> None:
    try:
        check_writable(folder)
    except OSError as error:
        raise SystemExit(f"dataparams: {error}") from None
