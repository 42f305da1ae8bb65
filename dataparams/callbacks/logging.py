"""What is said about rows while they train: statistics, and metrics and histograms to whichever loggers there are."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

CHUNK = 1 << 22  # rows looked at together: a table in a file may be larger than memory


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
    values = values.detach().flatten()
    values = values[:: max(1, values.numel() // CHUNK)].float().cpu()
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, values, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            import wandb  # an optional dependency, there when its logger is

            histogram = wandb.Histogram(np_histogram=np.histogram(values.numpy(), bins=64))
            logger.experiment.log({f"{name}_histogram": histogram, "trainer/global_step": trainer.global_step})


def row_statistics(values: Tensor, init: float) -> dict[str, Tensor]:
    """Mean, standard deviation, extremes and travel (mean distance from ``init``) of rows, as float64 scalars."""
    sums = torch.zeros(3, dtype=torch.float64, device=values.device)
    extremes = []
    for chunk in values.flatten().split(CHUNK):
        moved = chunk.double() - init
        sums += torch.stack((moved.sum(), moved.square().sum(), moved.abs().sum()))
        extremes += torch.aminmax(moved)
    mean, square, travel = sums / values.numel()
    low, high = torch.aminmax(torch.stack(extremes))
    spread = (square - mean.square()).clamp(min=0).sqrt()
    return {"mean": mean + init, "std": spread, "min": low + init, "max": high + init, "travel": travel}


def mean_travel(values: Tensor, init: float, visited: Tensor | None) -> Tensor:
    """Mean distance from ``init`` over the visited rows; infinite where there are none."""
    total = torch.zeros(2, dtype=torch.float64, device=values.device)
    visited = torch.ones(len(values), dtype=torch.bool, device=values.device) if visited is None else visited
    rows = max(1, CHUNK // max(1, values[0].numel()))
    for chunk, mask in zip(values.split(rows), visited.to(values.device).split(rows), strict=True):
        distance = (
            (chunk.double() - init).abs().flatten(1).mean(1) if chunk.dim() > 1 else (chunk.double() - init).abs()
        )
        total += torch.stack(((distance * mask).sum(), mask.sum()))
    return torch.where(total[1] > 0, total[0] / total[1], torch.inf)
