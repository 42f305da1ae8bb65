"""Fine-tuning on the meta set: the baseline that every method with a trusted meta set has to beat.

What is learned: nothing a sample. The model trains on the training set, and in the last epochs on the meta set alone,
at a lower rate.

How to use::

    trainer = L.Trainer(max_epochs=25, callbacks=[FineTuneMeta(meta=trusted_loader)])

When it helps: whenever some right labels are at hand. It knows what :class:`InstanceLearningRates` and
:class:`LearnableSoftLabels` know, takes as many updates as plain training, and costs nothing on top. When it does not:
the meta set is small against the model, and the last epochs memorise it.

Suggested settings: the defaults, chosen by noisy-validation accuracy on two seeds of digits that no table uses: it
must begin before wrong labels are memorised, at a rate that still moves the model (a fifth of the epochs at a tenth of
the rate ends 7 points lower). Works with: every other method, which trains as usual until the fine-tuning begins;
its rows and the training dynamics then stand still.

Source: none; the usual recipe.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.meta import MetaCallback


class FineTuneMeta(MetaCallback):
    """Plain training with training dynamics; in the last epochs each training batch gives way to one of the meta set.

    The rate of a fine-tuning step is ``lr_factor`` times what the optimizer, or the scheduler that drives it, has at
    that step. It is changed for the time of the optimizer's step and put back at once, so that schedulers of every
    kind, and loggers, go on as if nothing happened.

    Args:
        epochs: length of the fine-tuning: a share of ``max_epochs``, float in (0, 1), rounded to at least one epoch;
            or a number of epochs, int of at least 1. Default 0.6.
        lr_factor: positive; default 0.3.
        **options: those of :class:`dataparams.callbacks.meta.MetaCallback`. ``meta``, ``meta_fraction``,
            ``meta_batch_size`` and ``seed`` say what to fine-tune on; the others matter to a meta-learned method beside
            this one, which must agree.

    Raises:
        ValueError: an argument out of range, or ``meta="next_batch"``; at the start of a fit, a trainer without
            ``max_epochs``, or with no more of them than there are to fine-tune.
    """

    def __init__(self, epochs: float = 0.6, lr_factor: float = 0.3, **options: Any) -> None:
        super().__init__(**options)
        whole = isinstance(epochs, int)
        if isinstance(epochs, bool) or not (epochs >= 1 if whole else 0 < epochs < 1):
            raise ValueError(f"epochs is a share of max_epochs in (0, 1) or a whole number of epochs, got {epochs!r}")
        if not lr_factor > 0:
            raise ValueError(f"lr_factor must be positive, got {lr_factor}")
        if self.meta == "next_batch":
            raise ValueError("meta='next_batch' is training data, so there is nothing to fine-tune on; give a meta set")
        self.epochs = epochs
        self.lr_factor = lr_factor
        self._first_epoch = 0
        self._rates: list[tuple[dict[str, Any], Any]] = []  # of groups whose rate is lowered right now
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say when the fine-tuning begins."""
        super().on_fit_start(trainer, pl_module)
        total = trainer.max_epochs
        if total is None or total < 1:
            raise ValueError("FineTuneMeta takes the last epochs, so the trainer needs max_epochs")
        count = self.epochs if isinstance(self.epochs, int) else max(1, round(self.epochs * total))
        if count >= total:
            raise ValueError(f"fine-tuning for {count} of max_epochs={total} leaves no epoch to train before it")
        self._first_epoch = total - count
        rank_zero_info(f"FineTuneMeta: the meta set alone from epoch {self._first_epoch} on, counted from 0")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the optimizers' steps. No look-ahead is needed."""
        MethodCallback.on_train_start(self, trainer, pl_module)

        def lower(optimizer: Optimizer, *unused: Any) -> None:
            if self._fine_tunes(trainer):
                self._lower(optimizer)

        def put_back(*unused: Any) -> None:
            self._put_back()

        # Not on_before_optimizer_step: a step that a gradient scaler skips would leave the rate low for the scheduler.
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(lower))
            self._handles.append(optimizer.register_step_post_hook(put_back))

    def replace_batch(self, trainer: L.Trainer, batch: Any) -> Any:
        """In the last epochs, the meta set's next batch."""
        if not self._fine_tunes(trainer):
            return None
        assert self._session is not None
        batches = self._leader()._batches
        assert batches is not None
        return self._session.tracker.to_device(trainer, batches.next())

    def _fine_tunes(self, trainer: L.Trainer) -> bool:
        return trainer.current_epoch >= self._first_epoch

    def _lower(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            self._rates.append((group, group["lr"]))
            group["lr"] = group["lr"] * self.lr_factor

    def _put_back(self) -> None:
        while self._rates:
            group, rate = self._rates.pop()
            group["lr"] = rate

    def _leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._put_back()  # after an exception inside a step
        super()._leave()
        if self._batches is not None:
            self._batches.close()
