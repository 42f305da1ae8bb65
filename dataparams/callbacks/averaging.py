"""An exponential moving average of the weights, evaluated beside the raw weights in the same run."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torchmetrics import MeanMetric


def ramped_ema(decay: float, average: Tensor, current: Tensor, num_averaged: int | Tensor) -> Tensor:
    """The next average: a decay of (1 + t) / (10 + t) after t updates, until that reaches ``decay``.

    The ramp forgets the first, untrained weights (Tan and Le, EfficientNet, ICML 2019, by way of TensorFlow's
    ``ExponentialMovingAverage(num_updates=...)``).
    """
    ramp = (1 + num_averaged) / (10 + num_averaged)
    return average + (current - average) * (1 - min(decay, float(ramp)))


class AveragedWeights(WeightAveraging):
    """Lightning's weight averaging, except that validation and the end of the fit keep the raw weights.

    Lightning's own callback swaps the average in wherever the model is evaluated, so that one run shows one of the
    two. Here the averaged copy sees every validation batch right after the model and logs ``val_accuracy_ema`` next to
    ``val_accuracy``. In checkpoints ``state_dict`` holds the average, ``current_model_state`` the raw weights, as in
    Lightning. For modules that map ``batch[0]`` to logits, or by a method ``class_scores`` to scores, and have labels
    in ``batch[1]``.

    Args:
        decay: in [0, 1); 0.995 averages over the last 200 or so steps.
    """

    def __init__(self, decay: float = 0.995) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema must lie in [0, 1), got {decay}")
        self.decay = decay
        super().__init__(avg_fn=partial(ramped_ema, decay))
        self._accuracy = MeanMetric()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._accuracy = MeanMetric().to(pl_module.device)

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._average_model is None or dataloader_idx > 0:
            return
        inputs, labels = batch[0], batch[1]
        average = self._average_model.module.eval()
        scores = getattr(average, "class_scores", average)(inputs)
        self._accuracy.update((scores.argmax(dim=1) == labels).float())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average_model is not None:
            pl_module.log("val_accuracy_ema", self._accuracy.compute(), sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights in the module."""
