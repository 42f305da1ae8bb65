"""Learnable soft labels: a distribution over classes for each sample or class, learned from what it did for a meta set.

What is learned: a soft label per sample (``level="instance"``, N x K: corrects wrong labels) or per given class
(``level="class"``, K x K: regularises, for clean data), from ``confidence`` on the given label. Wherever the label's
change would have lowered the meta loss after the model's step, the label goes.

How to use::

    callback = LearnableSoftLabels(num_classes=10, meta=trusted_loader)
    L.Trainer(callbacks=[callback]).fit(model, train_loader)
    callback.corrected_labels()                  # (N,) the class with the largest learned label
    callback.corrected_dataset(train_set)        # the same samples with those labels, to train on
    callback.label_matrix()                      # K x K: mean learned label by given class

When it helps: wrong labels beside a small set of right ones; most with very few of them, where fine-tuning has little
to go by. When it does not: without a meta set that can be trusted; a *noisy* one teaches the labels its noise
(``meta="split"`` of noisy data is such a set). Clean data.

Suggested settings: the defaults. Adam on the label's logits is about ten times too slow for runs of tens of epochs.
N x K floats may be large: ``dtype="float16"``, ``top_k=10``, ``storage="mmap"``; the size is stated at set-up.

Works with: temperatures, :class:`InstanceLearningRates` (one look-ahead for both). Not with the methods that replace
the loss (ELR, GCE, ...). Cost: that of :class:`InstanceLearningRates`.

Source: :mod:`dataparams.functional.soft_labels`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dataparams.callbacks.meta import MetaCallback
from dataparams.callbacks.soft_label_table import SoftLabelCallback
from dataparams.functional.lookahead import inner_products
from dataparams.functional.soft_labels import centered, label_gradient, logit_gradient, soft_cross_entropy
from dataparams.loss_call import LossCall
from dataparams.objective import Stage
from dataparams.optim import RowAdam, RowOptimizer, RowScaleFree, RowSGD
from dataparams.tables import ParameterTable

Update = Literal["max", "sign", "adam", "sgd"]
RATES: dict[Update, float] = {"max": 1.0, "sign": 0.5, "adam": 0.1, "sgd": 1000.0}
# A class is visited at every step, a sample once an epoch: at the samples' rate a class's label ends as a one-hot.
CLASS_RATES: dict[Update, float] = {"max": 0.02, "sign": 0.01, "adam": 0.01, "sgd": 20.0}


class LearnableSoftLabels(SoftLabelCallback, MetaCallback):
    """Soft labels learned from a meta set.

    Args:
        num_classes: number of classes K, at least 2.
        level: ``"instance"`` (default) or ``"class"``.
        update: ``"max"`` (default): the gradient with respect to the label, less its mean over classes, over its
            largest entry; ``"sign"`` of the same; ``"adam"`` and ``"sgd"`` on the gradient with respect to the label's
            logits, which vanishes for classes without probability.
        lr: rate of the update, at least 0; default 1 for max: one visit can move a logit by 1. 0.5 for sign, 0.1 for
            adam, 1000 for sgd. For ``level="class"``, whose rows are visited at every step, 0.02, 0.01, 0.01 and 20.
        prior: share of the way back to the initial label that a visited label goes, in [0, 1); default 0. For adam and
            sgd it is a weight decay of the logits' offsets.
        **options: ``confidence``, ``dtype``, ``top_k`` (see :class:`SoftLabelCallback`); ``meta``, ``every_n_steps``,
            ... (see :class:`dataparams.callbacks.meta.MetaCallback`).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_classes: int,
        level: Literal["instance", "class"] = "instance",
        update: Update = "max",
        *,
        lr: float | None = None,
        prior: float = 0.0,
        **options: Any,
    ) -> None:
        if update not in RATES:
            raise ValueError(f"update must be one of {', '.join(RATES)}, got {update!r}")
        if not 0 <= prior < 1:
            raise ValueError(f"prior must be in [0, 1), got {prior}")
        self.update: Update = update
        self.lr = (CLASS_RATES if level == "class" else RATES)[update] if lr is None else lr
        self.prior = prior
        super().__init__(num_classes, level, **options)
        self.try_out()

    def make_optimizer(self, table: ParameterTable) -> RowOptimizer:
        """The update rule; members of a class in a batch are summed."""
        if self.update == "adam":
            return RowAdam([table], self.lr, weight_decay=self.prior)
        if self.update == "sgd":
            return RowSGD([table], self.lr, momentum=0.0, weight_decay=self.prior)
        return RowScaleFree([table], self.lr, self.update, weight_decay=self.prior)

    def stages(self) -> list[Stage]:
        """Replace the losses by those of the soft labels."""
        return [_SoftLabels(self)]

    @property
    def own_target_key(self) -> str | int | None:
        """That of the batch; a function of it says nothing about a sample."""
        key = self.meta_options["target_key"]
        if callable(key):
            raise ValueError(
                "target_key is a function of the batch; say where a sample holds its target: target_key=..."
            )
        return key

    def given_classes(self, call: LossCall) -> Tensor:
        """Class indices, ``(B,)``, 0 where ignored.

        Raises:
            ValueError: another loss than cross-entropy over one class index a sample, or labels outside the classes.
        """
        criterion, given = call.criterion, call.given
        if criterion.kind not in ("cross_entropy", "nll") or given.is_floating_point() or given.dim() != 1:
            raise ValueError(
                f"LearnableSoftLabels needs cross-entropy over one class index a sample, but {criterion.name} was "
                f"given a target of shape {tuple(given.shape)} and type {given.dtype}"
            )
        if call.input.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"LearnableSoftLabels has num_classes={self.num_classes}, but {criterion.name} was given logits of "
                f"shape {tuple(call.input.shape)}"
            )
        return torch.where(call.valid, given, torch.zeros_like(given))


class _SoftLabels:
    """Stage 2: cross-entropy against the learned label in place of the given one."""

    position = 2

    def __init__(self, method: LearnableSoftLabels) -> None:
        self.method = method

    def before(self, call: LossCall) -> None:
        pass

    def after(self, call: LossCall) -> None:
        method = self.method
        given = method.given_classes(call)
        index = call.index if method.level == "instance" else given
        offsets = method.offsets
        labels = method.labels_of(offsets.read(index.to(offsets.values.device)).to(call.input.device), given)
        weight = call.criterion.weight
        log_probs = call.input.float().log_softmax(1) if call.input.element_size() < 4 else call.input.log_softmax(1)
        call.losses = soft_cross_entropy(log_probs, labels.to(log_probs.dtype), weight) * call.valid
        lookahead = method._session.lookahead if method._session is not None else None
        if lookahead is None or not log_probs.requires_grad:
            return
        logits = call.logits.detach()

        def log_softmax(point: dict[str, Tensor]) -> Tensor:
            value = point["logits"]
            for transform in call.transforms:
                value = transform(value)
            return value.log_softmax(1)

        def read(tangent: Tensor) -> None:
            moving = inner_products(log_softmax, {"logits": logits.to(tangent.dtype)}, {"logits": tangent})
            share = call.share(len(labels)).expand(len(labels))
            gradient = label_gradient(moving, share) * (1 if weight is None else weight)
            counted = call.valid if call.weight is None else call.valid * call.weight  # of learned rates, say
            gradient = gradient * counted[:, None]
            if method.update in ("adam", "sgd"):
                gradient = logit_gradient(labels.to(gradient.dtype), gradient)
            else:
                gradient = centered(gradient)
            method.push(offsets, index, gradient.detach(), call.valid)

        lookahead.watch(call, read, same=True)
