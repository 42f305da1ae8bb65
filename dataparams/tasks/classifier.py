"""The plain classifier of the command line, the examples and the tests: it knows nothing of data
parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import BinaryCalibrationError, MulticlassAccuracy

from dataparams.tasks.calibration import ECE_BINS


class Classifier(L.LightningModule):
    """Trains a model with cross-entropy and scores it.

    Logs `train_loss` (epoch mean), `val_loss`, `val_accuracy`, and in testing `test_accuracy`,
    `test_nll` and `test_ece`; accuracies and the error are shares in [0, 1].

    Args:
        model: maps images (B, C, H, W) to logits (B, K).
        optimizer: called with the model's parameters; a `functools.partial` of an optimizer class,
            or Hydra's `_partial_: true`.
        scheduler: called with the optimizer, stepped once an epoch; none by default.
    """

    monitor = "val_accuracy"  # what the best epoch is chosen by

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        if not callable(optimizer):
            raise TypeError(
                "optimizer is called with the parameters: give functools.partial(torch.optim.SGD, "
                f"lr=...) or _partial_: true in a config, not {type(optimizer).__name__}"
            )
        self.model = model
        self.criterion = nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(average="micro")
        self.test_accuracy = MulticlassAccuracy(average="micro")
        # The error of the top label is the binary one of (confidence, was it right), which needs no
        # number of classes.
        self.test_ece = BinaryCalibrationError(n_bins=ECE_BINS)
        self._optimizer = optimizer
        self._scheduler = scheduler

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> Any:
        images, labels = batch
        loss = self.criterion(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", self.criterion(logits, labels), batch_size=len(labels))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.test_accuracy(logits, labels)
        confidence, predicted = logits.float().softmax(dim=1).max(dim=1)
        self.test_ece(confidence, (predicted == labels).long())
        self.log("test_accuracy", self.test_accuracy, batch_size=len(labels))
        self.log("test_nll", F.cross_entropy(logits.float(), labels), batch_size=len(labels))
        self.log("test_ece", self.test_ece, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.model.parameters())
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}
