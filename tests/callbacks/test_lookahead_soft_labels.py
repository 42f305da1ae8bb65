"""The soft labels' gradients equal double backward for every loss, to 1e-10 and better."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    INERT,
    QUIET,
)
from lookahead_reference import (
    SCALES,
    SIGMA,
    WEIGHT,
    Labels,
    Loss,
    Temperatures,
    check,
    ignoring,
    samples,
    sgd,
    sigma_of,
    train,
)
from torch import Tensor

from dataparams import InstanceLearningRates

pytestmark = [*QUIET, INERT]


def soft(labels: Tensor, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
    return -(labels * logits.log_softmax(1)).sum() / len(target)


class FixedRates(InstanceLearningRates):
    """Fixed factors, a different one a sample."""

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        super().prepare(num_rows, trainer)
        self.table.values.copy_(SIGMA)


LABELS = {
    "plain": Loss(total=soft),
    "sum": Loss(
        lambda m, b: 0.1 * F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        total=lambda q, z, y, i: 0.1 * len(y) * soft(q, z, y, i),
    ),
    "none": Loss(
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none") * SCALES).sum(),
        total=lambda q, z, y, i: -(SCALES[:, None] * q * z.log_softmax(1)).sum(),
    ),
    "class_weights": Loss(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], WEIGHT),
        meta=lambda z, y: F.cross_entropy(z, y, WEIGHT),
        total=lambda q, z, y, i: -(WEIGHT * q * z.log_softmax(1)).sum() / WEIGHT[y].sum(),
    ),
    "ignore_index": Loss(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=7),
        meta=lambda z, y: F.cross_entropy(z, y, ignore_index=7),
        total=lambda q, z, y, i: -((y != 7)[:, None] * q * z.log_softmax(1)).sum() / (y != 7).sum(),
        target=ignoring,
    ),
    "temperatures": Loss(
        total=lambda q, z, y, i: soft(q, z / sigma_of(i), y, i), callbacks=lambda meta: [Temperatures(lr=0.0)]
    ),
    "rates": Loss(
        total=lambda q, z, y, i: soft(q * SIGMA.float().double()[i][:, None], z, y, i),
        callbacks=lambda meta: [FixedRates(meta=meta, lr=0.0, normalize=False)],
    ),
    "class_level": Loss(total=soft, options={"level": "class"}),
}


@pytest.mark.parametrize("update", ["sgd", "max"])
@pytest.mark.parametrize("name", LABELS)
def test_soft_labels_equal_double_backward(name: str, update: str):
    """d M / d u through the softmax, or d M / d y less its mean, into the second epoch."""
    loss, lr = LABELS[name], {"sgd": 3.0, "max": 0.5}[update]
    callback = train(loss, sgd(momentum=0.9, nesterov=True), steps=6, kind=Labels, update=update, lr=lr)
    check(callback, loss, list(range(6)), samples(11, 2, loss.target))
    largest = torch.cat([one.leaf.max(1).values for one in callback.seen])
    assert (largest - 0.9).abs().max() > 1e-3  # labels have left their start
