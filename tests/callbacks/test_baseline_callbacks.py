"""The robust baselines against loops written from their papers, and together with data parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
)
from scipy.special import lambertw
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dataparams import DataParameters
from dataparams.callbacks import ELR, GCE, LabelSmoothing, SuperLoss

pytestmark = [*QUIET, INERT]


# exactly at the branch point scipy returns NaN
FLOOR = -2 / math.e * (1 - 1e-12)


def superloss(logits: Tensor, y: Tensor, state: Any, lam: float = 1.0, tau: float = math.log(CLASSES)) -> Tensor:
    losses = F.cross_entropy(logits, y, reduction="none")
    beta = np.maximum(FLOOR, (losses.detach().double().numpy() - tau) / lam)
    sigma = torch.from_numpy(np.exp(-lambertw(beta / 2).real)).float()
    return ((losses - tau) * sigma + lam * sigma.log() ** 2).mean()


def gce(logits: Tensor, y: Tensor, state: Any, q: float = 0.7) -> Tensor:
    return ((1 - logits.softmax(1).gather(1, y[:, None]) ** q) / q).mean()


def smoothing(logits: Tensor, y: Tensor, state: Any, s: float = 0.1) -> Tensor:
    target = (1 - s) * F.one_hot(y, CLASSES) + s / CLASSES
    return -(target * logits.log_softmax(1)).sum(1).mean()


def elr(logits: Tensor, y: Tensor, state: Any, beta: float = 0.7, lam: float = 3.0) -> Tensor:
    averages, index = state
    p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    averages[index] = beta * averages[index] + (1 - beta) * (p / p.sum(1, keepdim=True)).detach()
    return F.cross_entropy(logits, y) + lam * (1 - (averages[index] * p).sum(1)).log().mean()


def by_hand(loss: Callable[..., Tensor], **options: float) -> tuple[Model, Tensor]:
    model, data, averages = Model(), Numbered(), torch.zeros(SAMPLES, CLASSES)
    ([optimizer], [scheduler]) = model.configure_optimizers()
    for _ in range(4):
        for index in torch.arange(SAMPLES).split(7):
            optimizer.zero_grad()
            loss(model.net(data.x[index, :-1]), data.y[index], (averages, index), **options).backward()
            optimizer.step()
        scheduler.step()
    return model, averages


CASES: dict[str, tuple[Any, Any, dict[str, float]]] = {
    "superloss": (SuperLoss, superloss, {}),
    "superloss, lam and tau": (SuperLoss, superloss, {"lam": 0.3, "tau": 0.8}),
    "gce": (GCE, gce, {}),
    "gce, mean absolute error": (GCE, gce, {"q": 1.0}),
    "elr": (ELR, elr, {}),
    "elr, beta and lam": (ELR, elr, {"beta": 0.4, "lam": 1.0}),
}


@pytest.mark.parametrize(("method", "loss", "options"), CASES.values(), ids=list(CASES))
def test_training_equals_a_loop_over_the_equations(method: Any, loss: Any, options: dict[str, float]):
    callback = method(**options)
    model = fit(callback, make_loader(batch_size=7), max_epochs=4)
    reference, averages = by_hand(loss, **options)
    assert_same(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)
    if method is ELR:
        torch.testing.assert_close(callback.state_dict()["averages"], averages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("s", [0.1, 0.4])
def test_label_smoothing_equals_torchs_own(s: float):
    reference = fit([], make_loader(batch_size=7), model=Model(nn.CrossEntropyLoss(label_smoothing=s)), max_epochs=4)
    model = fit(LabelSmoothing(s), make_loader(batch_size=7), max_epochs=4)
    assert_same(model.state_dict(), reference.state_dict(), rtol=1e-5, atol=1e-6)
    assert_same(by_hand(smoothing, s=s)[0].state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)


def test_elr_averages_move_towards_the_predictions_of_repeated_samples():
    """A sample three times in a batch is averaged once, with its mean prediction."""
    callback, model = ELR(), Model()
    before = model.net(Numbered().x[:, :-1]).softmax(1).detach()
    fit(callback, DataLoader(Numbered(), batch_sampler=[[4, 4, 4, 7]]), model=model, max_epochs=1)  # type: ignore[arg-type]
    averages = callback.state_dict()["averages"]
    torch.testing.assert_close(averages[[4, 7]], 0.3 * before[[4, 7]], rtol=1e-4, atol=1e-6)
    assert averages.count_nonzero() == 2 * CLASSES


METHODS: dict[str, Callable[[], Any]] = {"superloss": SuperLoss, "gce": GCE, "elr": ELR, "smoothing": LabelSmoothing}


@pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))
def test_standing_temperatures_leave_the_baseline_as_it_is(make: Any):
    alone, beside = make(), make()
    model = fit(alone)
    assert_same(fit([DataParameters(lr=0.0), beside]).state_dict(), model.state_dict())
    assert_same(beside.state_dict(), alone.state_dict())


@pytest.mark.parametrize("make", [SuperLoss, GCE, LabelSmoothing])
@pytest.mark.parametrize("length", [0, 5])
def test_ignored_elements_carry_no_loss(make: Any, length: int):
    """The same parameters as without the ignored samples (or frames) in the batch."""
    data = Numbered()
    x, y = data.x[:, :-1], data.y.clone()
    kept = torch.arange(SAMPLES) % 4 != 1
    y[~kept] = -100

    def step(model: Any, batch: Any) -> Tensor:
        logits = model.net(batch[0])
        if length:  # the batch's samples as frames of one
            return model.loss(logits.T[None], batch[1][None])
        return model.loss(logits, batch[1])

    def train(inputs: Tensor, labels: Tensor) -> Any:
        callback = make(num_rows=SAMPLES, index_key=lambda batch: [0]) if length else make()
        loader = make_loader(TensorDataset(inputs, labels), batch_size=SAMPLES)
        return fit(callback, loader, model=StepModel(step, loss=nn.CrossEntropyLoss()), max_epochs=4)

    ours, theirs = train(x, y), train(x[kept], y[kept])
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [ELR, GCE, LabelSmoothing, SuperLoss])
def test_other_losses_are_refused(make: Any):
    def step(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model.logits(batch[0]), batch[0][:, :CLASSES])

    with pytest.raises(ValueError, match=rf"{make.__name__}.*F\.mse_loss"):
        fit(make(), model=StepModel(step))


def test_superloss_takes_any_loss_once_tau_is_given():
    def step(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model.logits(batch[0])[:, 0], batch[0][:, 1])

    def by_paper(model: Any, batch: Any) -> Tensor:
        losses = (model.logits(batch[0])[:, 0] - batch[0][:, 1]) ** 2
        sigma = np.exp(-lambertw(np.maximum(FLOOR, losses.detach().double().numpy() - 0.5) / 2).real)
        return ((losses - 0.5) * torch.from_numpy(sigma).float()).mean()

    ours, theirs = fit(SuperLoss(tau=0.5), model=StepModel(step)), fit([], model=StepModel(by_paper))
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SuperLoss(lam=0.0), "lam must be positive"),
        (lambda: GCE(q=0.0), r"q must be in \(0, 1\]"),
        (lambda: GCE(q=1.1), r"q must be in \(0, 1\]"),
        (lambda: ELR(beta=1.0), r"beta must be in \[0, 1\)"),
        (lambda: ELR(lam=-1.0), "lam must be at least 0"),
        (lambda: LabelSmoothing(1.0), r"smoothing must be in \[0, 1\)"),
    ],
    ids=["lam", "q", "q above", "beta", "elr lam", "smoothing"],
)
def test_arguments_are_checked_where_they_are_given(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
