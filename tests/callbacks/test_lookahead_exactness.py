"""The rates' gradients equal double backward for every optimizer and loss, to 1e-10 and better."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    INERT,
    QUIET,
)
from lookahead_reference import (
    MASK,
    OPTIMIZERS,
    SCALES,
    WEIGHT,
    K,
    Loss,
    Temperatures,
    check,
    ignoring,
    plain_cross_entropy,
    samples,
    sgd,
    sigma_of,
    train,
)
from torch import Tensor, nn

from dataparams import LearnableSoftLabels
from dataparams.callbacks import GCE

pytestmark = [*QUIET, INERT]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_double_backward_for_each_optimizer(name: str):
    """Three steps, so that momentum and moments hold something, with batch normalisation in train mode and dropout."""
    meta, loss = samples(11, 2), Loss()
    callback = train(loss, OPTIMIZERS[name], steps=3)
    check(callback, loss, [0, 1, 2], meta)


def test_dampened_momentum_is_exact_after_the_first_step():
    """torch does not dampen the first step; the engine says that it takes it like the others."""
    loss = Loss()
    callback = train(loss, sgd(momentum=0.9, dampening=0.4), steps=3)
    callback.seen = [one for one in callback.seen if one.step > 0]
    check(callback, loss, [1, 2], samples(11, 2))


def questions(generator: torch.Generator) -> Tensor:
    return (torch.rand(24 if generator.initial_seed() == 1 else 11, K, generator=generator) > 0.5).double()


def pixels(generator: torch.Generator) -> Tensor:
    y = torch.randint(K, (24 if generator.initial_seed() == 1 else 11, 2), generator=generator)
    y[::3, 1] = -100
    return y


def smooth(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits, target, WEIGHT, label_smoothing=0.2, reduction=reduction)


def gce(logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
    probability = logits.softmax(1).gather(1, target[:, None])[:, 0]
    return (1 - probability**0.7) / 0.7 / len(target)


LOSSES = {
    "loss_module": Loss(lambda m, b: m.criterion(m(b[0]), b[1]), module=nn.CrossEntropyLoss()),
    "sum": Loss(
        lambda m, b: 0.1 * F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        lambda z, y, i: 0.1 * F.cross_entropy(z, y, reduction="none"),
    ),
    "none": Loss(
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none") * SCALES).sum(),
        lambda z, y, i: F.cross_entropy(z, y, reduction="none") * SCALES,
    ),
    "ignore_index": Loss(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=7),
        lambda z, y, i: F.cross_entropy(z, y, ignore_index=7, reduction="none") / (y != 7).sum(),
        lambda z, y: F.cross_entropy(z, y, ignore_index=7),
        target=ignoring,
    ),
    "class_weights": Loss(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], WEIGHT),
        lambda z, y, i: F.cross_entropy(z, y, reduction="none") * WEIGHT[y] / WEIGHT[y].sum(),
        lambda z, y: F.cross_entropy(z, y, WEIGHT),
    ),
    "smoothed_weights": Loss(
        lambda m, b: smooth(m(b[0]), b[1], "mean"),
        lambda z, y, i: smooth(z, y, "none") / WEIGHT[y].sum(),
        lambda z, y: smooth(z, y, "mean"),
    ),
    "questions": Loss(
        lambda m, b: m.criterion(m(b[0]), b[1]),
        lambda z, y, i: F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1) / y.numel(),
        F.binary_cross_entropy_with_logits,
        target=questions,
        module=nn.BCEWithLogitsLoss(),
    ),
    "regression": Loss(
        lambda m, b: F.mse_loss(m(b[0]), b[1]),
        lambda z, y, i: (z - y).square().sum(1) / y.numel(),
        F.mse_loss,
        target=questions,
    ),
    "pixels": Loss(
        parts=lambda z, y, i: F.cross_entropy(z, y, reduction="none").sum(1) / (y >= 0).sum(),
        target=pixels,
        outputs=2 * K,
    ),
    "masked_pixels": Loss(
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none") * MASK).sum(),
        lambda z, y, i: (F.cross_entropy(z, y, reduction="none") * MASK).sum(1),
        target=pixels,
        outputs=2 * K,
    ),
    "one_number": Loss(
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1]),
        lambda z, y, i: F.binary_cross_entropy_with_logits(z[:, 0], y, reduction="none") / len(y),
        lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y),
        target=lambda generator: questions(generator)[:, 0],
        options={"logits": lambda m, x: m(x)[:, 0]},
    ),
    "temperatures": Loss(
        parts=lambda z, y, i: plain_cross_entropy(z / sigma_of(i), y, i),
        callbacks=lambda meta: [Temperatures(lr=0.0)],
    ),
    "gce": Loss(parts=gce, callbacks=lambda meta: [GCE()]),
    "gce_with_temperatures": Loss(
        parts=lambda z, y, i: gce(z / sigma_of(i), y, i), callbacks=lambda meta: [Temperatures(lr=0.0), GCE()]
    ),
    "normalized": Loss(options={"update": "tanh", "lr": 0.5, "normalize": True, "bounds": (0.0, 3.0)}),
    "class_level": Loss(options={"num_classes": K, "level": "class", "lr": 0.3}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_double_backward_for_each_loss(name: str):
    """Into the second epoch, where the rows have left their start."""
    loss = LOSSES[name]
    callback = train(loss, sgd(momentum=0.9), steps=6)
    check(callback, loss, list(range(6)), samples(11, 2, loss.target))
    assert any(float((one.leaf - 1).abs().max()) > 1e-4 for one in callback.seen)


def start(target: Tensor) -> Tensor:
    """Labels at rest: 0.9 on the given class, in single precision."""
    rest = torch.full((len(target), K), 0.05, dtype=torch.float64)
    return rest.scatter(1, target[:, None], 0.9).log().float().softmax(1).double()


def test_rates_of_soft_labels_equal_double_backward():
    """The rates' gradient where another method has replaced the loss."""
    loss = Loss(
        parts=lambda z, y, i: -(start(y) * z.log_softmax(1)).sum(1) / len(y),
        callbacks=lambda meta: [LearnableSoftLabels(K, lr=0.0, meta=meta)],
    )
    check(train(loss, sgd(momentum=0.9), steps=6), loss, list(range(6)), samples(11, 2))
