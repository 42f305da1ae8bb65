"""PENCIL in training: against a loop over its equations, its stages, and on real digits."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    CLASSES,
    INERT,
    QUIET,
    SAMPLES,
    Model,
    Numbered,
    StepModel,
    assert_same,
    fit,
    make_loader,
    make_trainer,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dataparams import DataParameters
from dataparams.callbacks import ELR, GCE, LabelSmoothing
from dataparams.callbacks.pencil import Pencil
from dataparams.report.rows import build_rows
from dataparams.tasks import Classifier, DigitsData, SmallCNN

pytestmark = [*QUIET, INERT]
SETTINGS = {"lr": 20.0, "alpha": 0.05, "beta": 0.3, "init_scale": 4.0}


def by_hand(
    epochs: int, warmup: int, label: int, s: dict[str, float], weight: Tensor | None = None
) -> tuple[Model, Tensor]:
    """The paper's three stages, written out."""
    model, data = Model(nn.CrossEntropyLoss(weight)), Numbered()
    ([optimizer], [scheduler]) = model.configure_optimizers()
    u = s["init_scale"] * F.one_hot(data.y, CLASSES).float()
    for epoch in range(epochs):
        for index in torch.arange(SAMPLES).split(7):
            z, given, n = model.net(data.x[index, :-1]), data.y[index], len(index)
            w = torch.ones(n) if weight is None else weight[given]
            rows = u[index].clone().requires_grad_()
            f, y = z.softmax(1), rows.softmax(1)
            losses = (f * (f / y).log()).sum(1) / CLASSES
            if epoch < warmup:
                losses = -z.log_softmax(1)[range(n), given]
            elif epoch < warmup + label:
                compatibility, entropy = -y[range(n), given].log(), -(f * f.log()).sum(1)
                losses = losses + s["alpha"] * compatibility + s["beta"] * entropy / CLASSES
            optimizer.zero_grad()
            ((losses * w).sum() / w.sum()).backward()
            optimizer.step()
            if warmup <= epoch < warmup + label:
                assert rows.grad is not None
                u[index] -= s["lr"] * rows.grad * n
        scheduler.step()
    return model, u


def learned(callback: Pencil) -> Tensor:
    return callback.offsets.values


def test_training_equals_a_loop_over_the_equations():
    callback = Pencil(CLASSES, warmup_epochs=1, label_epochs=2, **SETTINGS)
    model = fit(callback, make_loader(batch_size=7), max_epochs=4)
    reference, u = by_hand(4, 1, 2, SETTINGS)
    assert_same(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)
    offsets = u - 4.0 * F.one_hot(Numbered().y, CLASSES)
    torch.testing.assert_close(learned(callback), offsets, rtol=1e-4, atol=1e-5)
    assert offsets.abs().mean() > 0.5
    frame = callback.to_frame()
    assert frame["soft_label"].tolist() == u.argmax(1).tolist()
    given = u.softmax(1)[range(SAMPLES), Numbered().y]
    torch.testing.assert_close(torch.tensor(frame["soft_label_given"].to_numpy()).float(), given, rtol=1e-4, atol=1e-5)


def test_the_first_stage_is_plain_training_bit_for_bit():
    callback = Pencil(CLASSES, warmup_epochs=3, label_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # rows that stand still are no reason for a warning there
        warnings.filterwarnings("ignore", ".*LeafSpec")
        warnings.filterwarnings("ignore", ".*many workers")
        model = fit(callback, max_epochs=3)
    assert_same(model.state_dict(), fit([], max_epochs=3).state_dict())
    assert not learned(callback).any()
    assert callback.corrected_labels().tolist() == Numbered().y.tolist()


class Snapshots(L.Callback):
    def __init__(self) -> None:
        self.offsets: list[Tensor] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        method = next(callback for callback in trainer.callbacks if isinstance(callback, Pencil))  # type: ignore[attr-defined]
        self.offsets.append(learned(method).clone())


@pytest.mark.parametrize(
    ("options", "learns"),
    [
        ({}, [False] * 2 + [True] * 4 + [False] * 4),
        ({"warmup_epochs": 0, "label_epochs": 3}, [True] * 3 + [False] * 7),
        ({"warmup_epochs": 0.5, "label_epochs": 0.01}, [False] * 5 + [True] + [False] * 4),
        ({"warmup_epochs": 1, "label_epochs": 99}, [False] + [True] * 9),
    ],
)
def test_labels_move_in_the_epochs_of_the_second_stage_only(options: dict[str, Any], learns: list[bool]):
    seen = Snapshots()
    fit([Pencil(CLASSES, **options), seen], max_epochs=10)
    before = [torch.zeros(SAMPLES, CLASSES), *seen.offsets]
    assert [not torch.equal(a, b) for a, b in zip(before, seen.offsets, strict=False)] == learns


def test_class_weights_weigh_samples_as_the_criterion_does():
    weight = torch.tensor([1.0, 3.0, 0.5])
    callback = Pencil(CLASSES, warmup_epochs=1, label_epochs=2, **SETTINGS)
    model = fit(callback, make_loader(batch_size=7), model=Model(nn.CrossEntropyLoss(weight)), max_epochs=4)
    reference, u = by_hand(4, 1, 2, SETTINGS, weight)
    assert_same(model.state_dict(), reference.state_dict(), rtol=1e-3, atol=1e-4)
    offsets = u - 4.0 * F.one_hot(Numbered().y, CLASSES)
    torch.testing.assert_close(learned(callback), offsets, rtol=1e-3, atol=1e-4)


def test_ignored_samples_carry_no_loss_and_keep_their_label():
    data = Numbered()
    x, y = data.x[:, :-1], data.y.clone()
    kept = torch.arange(SAMPLES) % 4 != 1
    y[~kept] = -100

    def step(model: Any, batch: Any) -> Tensor:
        return model.loss(model.net(batch[0]), batch[1])

    def train(inputs: Tensor, labels: Tensor) -> Any:
        callback = Pencil(CLASSES, warmup_epochs=1, label_epochs=2)
        loader = make_loader(TensorDataset(inputs, labels), batch_size=SAMPLES)
        return callback, fit(callback, loader, model=StepModel(step, loss=nn.CrossEntropyLoss()), max_epochs=4)

    (ours, our_model), (theirs, their_model) = train(x, y), train(x[kept], y[kept])
    assert_same(our_model.state_dict(), their_model.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(learned(ours)[kept], learned(theirs), rtol=1e-4, atol=1e-5)
    assert not learned(ours)[~kept].any()
    assert (ours.corrected_labels()[~kept] == -1).all()


def test_a_rate_of_zero_leaves_the_labels():
    callback = Pencil(CLASSES, lr=0.0, warmup_epochs=0, label_epochs=2)
    fit(callback)
    assert not learned(callback).any()


def test_temperatures_scale_the_logits_first():
    alone, beside = (Pencil(CLASSES, warmup_epochs=0, label_epochs=2) for _ in range(2))
    model = fit(alone)
    assert_same(fit([DataParameters(lr=0.0), beside]).state_dict(), model.state_dict())
    assert_same(learned(beside), learned(alone))
    fit([DataParameters(lr=5.0), beside := Pencil(CLASSES, warmup_epochs=0, label_epochs=2)])
    assert not torch.equal(learned(beside), learned(alone))


# -- on real data --------------------------------------------------------------------------------------------------


def fit_digits(**options: Any) -> dict[str, float]:
    """40% wrong labels; the shares of right labels after training."""
    L.seed_everything(0, verbose=False)
    data = DigitsData(batch_size=32, noise="symmetric", noise_rate=0.4, seed=0)
    model = Classifier(SmallCNN(1, 10, 16, 8), functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    callback = Pencil(10, **options)
    make_trainer(callback, max_epochs=15, num_sanity_val_steps=0, limit_val_batches=0).fit(model, datamodule=data)
    frame = callback.to_frame()
    return callback.summary(build_rows(frame, frame, np.asarray(data.true_labels), data.is_corrupt))


def test_labels_of_real_digits_are_corrected():
    shares = fit_digits()
    assert shares["labels_right_last"] > 0.9  # 0.6 were given
    assert shares["labels_recovered_last"] > 0.8
    assert shares["labels_kept_last"] > 0.97


def test_compatibility_at_one_over_the_classes_ties_and_corrects_nothing():
    """The paper's 0.1 for ten classes, under the paper's equation; see the docstring of alpha."""
    assert fit_digits(alpha=0.1)["labels_recovered_last"] < 0.05


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [GCE, ELR, LabelSmoothing])
def test_another_method_that_replaces_the_loss_is_refused(other: Any):
    for callbacks in ([Pencil(CLASSES, warmup_epochs=0), other()], [other(), Pencil(CLASSES, warmup_epochs=0)]):
        with pytest.raises(ValueError, match="both replace the loss"):
            fit(callbacks)


def test_other_losses_and_logits_are_refused_before_the_first_step_also_in_the_first_stage():
    def step(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model.logits(batch[0]), batch[0][:, :CLASSES])

    with pytest.raises(ValueError, match=r"Pencil needs cross-entropy over class indices, but F\.mse_loss"):
        fit(Pencil(CLASSES, warmup_epochs=1), model=StepModel(step))
    with pytest.raises(ValueError, match=r"num_classes=5 takes one prediction a sample, \(B, 5\); got .* \(8, 3\)"):
        fit(Pencil(5, warmup_epochs=1))

    def frames(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model.logits(batch[0]).T[None], batch[1][None])

    explicit = Pencil(CLASSES, warmup_epochs=1, num_rows=SAMPLES, index_key=lambda batch: [0])
    with pytest.raises(ValueError, match=r"got logits of shape \(1, 3, 8\)"):
        fit(explicit, model=StepModel(frames))


def test_shares_of_an_unknown_number_of_epochs_are_refused():
    with pytest.raises(ValueError, match=r"warmup_epochs=0\.2 is a share of the trainer's max_epochs, which is -1"):
        fit(Pencil(CLASSES), max_epochs=-1, max_steps=2)
    callback = Pencil(CLASSES, warmup_epochs=0, label_epochs=1)
    fit(callback, max_epochs=-1, max_steps=2)
    assert learned(callback).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"alpha": -0.1}, "alpha must be at least 0"),
        ({"beta": math.nan}, "beta must be at least 0"),
        ({"init_scale": 0.0}, r"init_scale must be in \(0, 30\]"),
        ({"init_scale": 31.0}, "init_scale"),
        ({"warmup_epochs": -1}, "warmup_epochs is a whole number of epochs, or a share"),
        ({"label_epochs": 1.5}, "label_epochs is a whole number of epochs, or a share"),
        ({"level": "class"}, "has no other level"),
        ({"dtype": "int8"}, "'float32' or 'float16'"),
        ({"top_k": 3}, "less than the number of classes"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Pencil(**{"num_classes": CLASSES, **options})
