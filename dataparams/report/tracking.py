"""What the loggers of a run get when it ends: W&B the worst rows as a table, the report and all rows as an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

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


def tracking_loggers(config: DictConfig, sweep: str | None) -> list[Logger]:
    """The loggers of Hydra's group ``logger``; W&B's know the configuration.

    Args:
        config: of the run.
        sweep: its name, or None; the ``group`` of loggers that have one that is null.
    """
    loggers = []
    for node in (config.logger or {}).values():
        in_sweep = {"group": sweep} if sweep is not None and "group" in node and node.group is None else {}
        loggers.append(instantiate(node, _convert_="all", **in_sweep))
        if isinstance(loggers[-1], WandbLogger):
            loggers[-1].log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    return loggers


def sweep_name(run_dir: Path) -> str | None:
    """The name of the sweep's folder where this is one of its jobs, else None."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return run_dir.parent.name


@contextmanager
def finishing(loggers: Sequence[Logger]) -> Iterator[None]:
    """End the W&B runs of these loggers, also after an error, so that the next job of a sweep in this process begins
    one of its own: W&B would go on with the open one."""
    status = 1
    try:
        yield
        status = 0
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=status)


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
