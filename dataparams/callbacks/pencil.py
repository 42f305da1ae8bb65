"""PENCIL: labels learned by back-propagation, beside the model and without trusted samples.

What is learned: a label distribution a sample, N x K. For the first epochs the model trains on the given labels; then
each label follows the model's predictions and is held back by the given class; at last the labels stand and the model
trains on them. How to use::

    trainer = L.Trainer(max_epochs=40, callbacks=[Pencil(num_classes=10)])
    trainer.fit(model, train_loader)
    trainer.callbacks[0].corrected_labels()

When it helps: under symmetric label noise, with a model that by the end of the first stage predicts most training
labels' true class. When it does not: what the model believes then is what the labels become, so that classes that it
confuses from the start stay confused.

Suggested settings: the defaults, measured on digits with 40% wrong labels. The first stage must end before wrong labels
are memorised.

Works with: data parameters (temperatures scale the logits first), learned learning rates. It replaces the loss, so that
another method that does (ELR, GCE, ...) is refused.

Source: Yi and Wu, CVPR 2019; equations in :mod:`dataparams.functional.pencil`.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
"""
