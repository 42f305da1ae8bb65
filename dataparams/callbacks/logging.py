"""Metrics and histograms to whichever loggers the trainer has."""

from __future__ import annotations

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor


def log_metrics(trainer: L.Trainer, metrics: dict[str, Tensor]) -> None:
    """Send scalars to every logger, at the step of the batch that just ended."""
    if not metrics or not trainer.is_global_zero:
        return
    values = {name: float(value) for name, value in metrics.items()}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=max(trainer.global_step - 1, 0))


def log_histogram(trainer: L.Trainer, name: str, values: Tensor) -> None:
    """Send a histogram to the loggers that have them (TensorBoard, W&B)."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, values.detach().float().cpu(), trainer.global_step)
        elif isinstance(logger, WandbLogger):
            import wandb  # an optional dependency, there when its logger is

            histogram = wandb.Histogram(np_histogram=np.histogram(values.detach().float().cpu().numpy(), bins=64))
            logger.experiment.log({f"{name}_histogram": histogram, "trainer/global_step": trainer.global_step})
