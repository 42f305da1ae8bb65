"""PENCIL: labels learned by back-propagation, beside the model and without trusted samples.

What is learned: a label distribution a sample, N x K. In the first epochs the model trains on the given labels; then
each label follows the model's predictions, held back by the given class; at last the labels stand still and the model
trains on them. How to use::

    trainer = L.Trainer(max_epochs=40, callbacks=[Pencil(num_classes=10)])
    trainer.fit(model, train_loader)
    trainer.callbacks[0].corrected_labels()

When it helps: under symmetric label noise, with a model that knows most training labels' true class by the end of the
first stage. When it does not: labels become what the model believes then, so that classes it confuses stay confused,
and a first stage in which wrong labels are memorised leaves nothing to correct.

Suggested settings: the defaults, chosen on digits with 40% wrong labels (40 epochs, 3 seeds: test accuracy at the last
epoch 96.9% against 68.0% in plain training, labels right 60% -> 97%). Keep the model's own rate, although in the second
and third stage its loss is a KL divided by the number of classes, as in the paper. ``top_k`` must be at least 2.

Works with: data parameters (temperatures scale the logits first) and learned learning rates. It replaces the loss, so
that another method that does (ELR, GCE, ...) is refused.

Source: Yi and Wu, CVPR 2019; equations in :mod:`dataparams.functional.pencil`.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch

from dataparams.callbacks.baselines import LossReplacement
from dataparams.callbacks.soft_label_table import SoftLabelCallback
from dataparams.functional.pencil import classification_loss, pencil_loss
from dataparams.loss_call import LossCall
from dataparams.optim import RowOptimizer, RowSGD
from dataparams.tables import ParameterTable


class Pencil(SoftLabelCallback, LossReplacement):
    """Probabilistic end-to-end noise correction (Yi and Wu, CVPR 2019).

    Args:
        num_classes: c, at least 2.
        lr: the labels' rate a visit, at least 0, on the gradient of the sample's own loss; default 10 [our choice]. It
            is the paper's lambda divided by the batch size: 300 to 10000, at 128 samples 2.3 to 78.
        alpha: weight of compatibility with the given label, at least 0; default 0.5 / c [our choice], with which a
            label comes to rest at two thirds of the prediction and one third of the given class. At 1 / c, the paper's
            0.1 for ten classes, the two tie and no label changes its class: the released code, which that value is
            for, has a weaker term.
        beta: weight of the predictions' entropy, at least 0; default 0.4, the paper's.
        init_scale: labels start at softmax(init_scale * one-hot), in (0, 30]; default 10, the paper's K.
        warmup_epochs: epochs of plain training on the given labels: a whole number, or below 1 a share of the
            trainer's ``max_epochs``; default 0.2 (the paper: 70 of 320).
        label_epochs: epochs after that in which labels learn, likewise, at least one; default 0.4 (the paper: 130 of
            320). In the epochs left, labels stand still and the loss is the KL alone.
        **options: ``dtype``, ``top_k``: see :class:`dataparams.callbacks.soft_label_table.SoftLabelCallback`;
            ``criterion``, ``index_key``, ``ids``, ``num_rows``, ``storage``, ``storage_dir``: see
            :class:`dataparams.callbacks.base.MethodCallback`.

    Raises:
        ValueError: an argument out of range; in ``trainer.fit`` a loss that is not cross-entropy over class indices,
            another number of logits, another method that replaces the loss, or shares without ``max_epochs``.
    """

    def __init__(
        self,
        num_classes: int,
        lr: float = 10.0,
        alpha: float | None = None,
        beta: float = 0.4,
        init_scale: float = 10.0,
        warmup_epochs: float = 0.2,
        label_epochs: float = 0.4,
        **options: Any,
    ) -> None:
        if not 0 < init_scale <= 30:
            raise ValueError(f"init_scale must be in (0, 30], got {init_scale}")
        # softmax(scale * one-hot) is a smoothed one-hot
        confidence = 1 / (1 + (num_classes - 1) * math.exp(-init_scale))
        if "level" in options:
            raise ValueError("Pencil learns a label a sample and has no other level")
        super().__init__(num_classes, confidence=confidence, **options)
        alpha = 0.5 / num_classes if alpha is None else alpha
        for name, value in {"alpha": alpha, "beta": beta}.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name, value in {"warmup_epochs": warmup_epochs, "label_epochs": label_epochs}.items():
            if not value >= 0 or (value > 1 and value != int(value)):
                raise ValueError(f"{name} is a whole number of epochs, or a share of all in [0, 1), got {value}")
        self.lr = lr
        self.alpha = alpha
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.label_epochs = label_epochs
        self._epoch = 0
        self._learns = range(0)  # epochs in which labels learn
        self.try_out()

    def make_optimizer(self, table: ParameterTable) -> RowOptimizer:
        """Plain gradient descent, a rate per visit."""
        return RowSGD([table], self.lr, momentum=0.0, grad_scale="instance")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Divide the epochs into stages."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            first = self._count("warmup_epochs", trainer.max_epochs)
            self._learns = range(first, first + max(1, self._count("label_epochs", trainer.max_epochs)))

    def _count(self, name: str, max_epochs: int | None) -> int:
        value = getattr(self, name)
        if value == 0 or value >= 1:
            return int(value)
        if max_epochs is None or max_epochs < 1:
            raise ValueError(
                f"Pencil's {name}={value:g} is a share of the trainer's max_epochs, which is {max_epochs}; set "
                "max_epochs, or give warmup_epochs= and label_epochs= as whole numbers"
            )
        return round(value * max_epochs)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Enter the epoch's stage."""
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch = trainer.current_epoch

    def after(self, call: LossCall) -> None:
        """The stage's loss."""
        target, weight = self._class_targets(call)
        if call.input.dim() != 2 or call.input.shape[1] != self.num_classes:
            raise ValueError(
                f"Pencil with num_classes={self.num_classes} takes one prediction a sample, (B, {self.num_classes}); "
                f"got logits of shape {tuple(call.input.shape)}"
            )
        if self._epoch < self._learns.start:
            return
        learns = self._epoch in self._learns
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            log_labels = self.log_labels_of(call.rows(self.offsets), target)
        logits = call.input.to(torch.promote_types(call.input.dtype, torch.float32))
        if learns:
            losses = pencil_loss(logits, log_labels, target, self.alpha, self.beta)
        else:
            losses = classification_loss(logits, log_labels) / self.num_classes
        call.losses = losses * weight

    def _look_after_rows(self) -> None:
        if self._epoch >= self._learns.start:  # before that, rows are meant to stand still
            super()._look_after_rows()
