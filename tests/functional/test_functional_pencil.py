"""PENCIL's losses against loops over the paper's sums, and the labels' closed-form gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dataparams.functional.pencil import classification_loss, compatibility_loss, entropy_loss, pencil_loss

B, C = 5, 4


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, label logits and given classes."""
    generator = torch.Generator().manual_seed(seed)
    logits, labels = (torch.randn(B, C, generator=generator, dtype=torch.float64).mul(2) for _ in range(2))
    return logits, labels, torch.randint(C, (B,), generator=generator)


def test_the_three_losses_against_loops():
    logits, labels, target = draw()
    f, y = logits.softmax(1).tolist(), labels.softmax(1).tolist()
    log_labels = labels.log_softmax(1)
    for i in range(B):
        kl = sum(f[i][j] * math.log(f[i][j] / y[i][j]) for j in range(C))
        entropy = -sum(f[i][j] * math.log(f[i][j]) for j in range(C))
        compatibility = -math.log(y[i][int(target[i])])
        assert classification_loss(logits, log_labels)[i].item() == pytest.approx(kl, rel=1e-12)
        assert entropy_loss(logits)[i].item() == pytest.approx(entropy, rel=1e-12)
        assert compatibility_loss(log_labels, target)[i].item() == pytest.approx(compatibility, rel=1e-12)
        total = kl / C + 0.3 * compatibility + 0.2 * entropy / C
        assert pencil_loss(logits, log_labels, target, 0.3, 0.2)[i].item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.4), (0.0, 0.0), (2.0, 1.0)])
def test_the_label_follows_the_prediction_and_the_given_class(alpha: float, beta: float):
    """dL_i/du_i = (y_i - f_i) / c + alpha (y_i - one-hot): the entropy does not reach it."""
    logits, labels, target = draw(1)
    labels.requires_grad_()
    pencil_loss(logits, labels.log_softmax(1), target, alpha, beta).sum().backward()
    f, y = logits.softmax(1), labels.detach().softmax(1)
    expected = (y - f) / C + alpha * (y - torch.eye(C, dtype=torch.float64)[target])
    torch.testing.assert_close(labels.grad, expected, rtol=0, atol=1e-12)


def test_the_prediction_follows_the_label_and_certainty():
    """dL_i/dz_i = f (log f - log y - KL) / c - beta f (log f + H) / c."""
    logits, labels, target = draw(2)
    logits.requires_grad_()
    pencil_loss(logits, labels.log_softmax(1), target, 0.7, 0.4).sum().backward()
    f, log_f, log_y = logits.detach().softmax(1), logits.detach().log_softmax(1), labels.log_softmax(1)
    kl, entropy = (f * (log_f - log_y)).sum(1, keepdim=True), -(f * log_f).sum(1, keepdim=True)
    expected = (f * (log_f - log_y - kl) - 0.4 * f * (log_f + entropy)) / C
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("share", "weight_of_prediction"), [(0.5, 2 / 3), (1.0, 1 / 2), (2.0, 1 / 3)])
def test_a_label_rests_between_the_prediction_and_the_given_class(share: float, weight_of_prediction: float):
    """At alpha = share / c: y = (f + share one-hot) / (1 + share), where the gradient is 0."""
    logits, _, target = draw(3)
    f, one_hot = logits.softmax(1), torch.eye(C, dtype=torch.float64)[target]
    log_labels = (weight_of_prediction * f + (1 - weight_of_prediction) * one_hot).log().requires_grad_()
    pencil_loss(logits, log_labels.log_softmax(1), target, share / C).sum().backward()
    torch.testing.assert_close(log_labels.grad, torch.zeros_like(logits), rtol=0, atol=1e-12)


def test_a_prediction_that_is_the_label_costs_nothing_but_its_entropy():
    logits, _, target = draw(4)
    assert classification_loss(logits, logits.log_softmax(1)).abs().max() < 1e-14
    loss = pencil_loss(logits, logits.log_softmax(1), target, alpha=0.0, beta=1.0)
    torch.testing.assert_close(loss, entropy_loss(logits) / C)


def test_certain_predictions_and_labels_stay_finite():
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    labels = torch.tensor([[-30.0, 30.0, 0.0]], requires_grad=True)
    pencil_loss(logits, labels.log_softmax(1), torch.tensor([1])).sum().backward()
    assert logits.grad is not None
    assert labels.grad is not None
    assert logits.grad.isfinite().all()
    assert labels.grad.isfinite().all()
    assert labels.grad[0, 0] == pytest.approx(-1 / 3)
