"""What the loggers of a run get when it ends: W&B the worst rows as a table, the report and all rows as an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger, WandbLogger

MOST_ROWS = 10_000  # what W&B's own tables show at most


def log_report(
    loggers: Sequence[Logger], rows: pd.DataFrame, files: Sequence[Path], results: Mapping[str, Any] | None = None
) -> None:
    """Hand a finished run to its W&B loggers, if any; nothing here needs the network where they are offline.

    The table ``rows`` holds the most suspicious samples by ``mean_loss``, the artifact ``report-<run id>`` the
    files, the summary the numbers of the run. TensorBoard and CSV have no place for either; they
    have the curves, and TensorBoard the histograms of the rows.

    Args:
        loggers: of the trainer.
        rows: the table of samples.
        files: the report and the table; those that are there.
        results: numbers and texts for the run's summary.
    """
    own = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if not own:
        return
    import wandb  # an optional dependency, there when its logger is

    for logger in own:
        run = logger.experiment
        run.log({"rows": wandb.Table(dataframe=worst(rows))})
        artifact = wandb.Artifact(f"report-{run.id}", type="report")
        for path in files:
            if path.exists():
                artifact.add_file(str(path))
        run.log_artifact(artifact)
        run.summary.update(dict(results or {}))


def finish(loggers: Sequence[Logger]) -> None:
    """End the W&B runs of these loggers, so that the next job of a sweep in this process begins one of its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def worst(rows: pd.DataFrame, count: int = MOST_ROWS) -> pd.DataFrame:
    """The most suspicious rows by ``mean_loss``, in columns that a table of W&B can hold."""
    chosen = rows.sort_values("mean_loss", ascending=False, kind="stable") if "mean_loss" in rows else rows
    chosen = chosen.head(count).reset_index(drop=True)
    plain = {}
    for name in chosen:
        values: Any = chosen[name]
        if pd.api.types.is_bool_dtype(values) or pd.api.types.is_integer_dtype(values):
            plain[name] = values.astype(object).where(values.notna(), None)
        elif pd.api.types.is_numeric_dtype(values):
            plain[name] = values.astype("float64")
        else:
            plain[name] = values.astype(str)
    return pd.DataFrame(plain)
