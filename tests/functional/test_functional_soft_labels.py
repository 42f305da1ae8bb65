"""Soft labels against autograd: the gradient of a meta loss after one step, by double backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataparams.functional.soft_labels import (
    centered,
    label_gradient,
    logit_gradient,
    smoothed_log_label,
    soft_cross_entropy,
    soft_label,
)

B, K, D, LR = 5, 4, 3, 0.7


def tensors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def meta_loss_after_a_step(labels: Tensor, weights: Tensor, x: Tensor, meta: tuple[Tensor, Tensor]) -> Tensor:
    """L_meta(theta - (LR / B) sum_i grad l_i(theta, y_i)) of a linear model, as a function of the labels."""
    loss = -(labels * F.log_softmax(x @ weights, 1)).sum() / len(x)
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    return F.cross_entropy(meta[0] @ (weights - LR * gradient), meta[1])


def log_prob_tangent(labels: Tensor, weights: Tensor, x: Tensor, meta: tuple[Tensor, Tensor]) -> Tensor:
    """d/de log p(theta + e v), v = grad L_meta(theta'): of a linear model, whose logits change by x v."""
    (gradient,) = torch.autograd.grad(-(labels * F.log_softmax(x @ weights, 1)).sum() / len(x), weights)
    after = (weights - LR * gradient).detach().requires_grad_()
    (v,) = torch.autograd.grad(F.cross_entropy(meta[0] @ after, meta[1]), after)
    change = x @ v
    return change - ((x @ weights.detach()).softmax(1) * change).sum(1, keepdim=True)


def test_label_and_logit_gradients_are_those_of_double_backward():
    target, meta = torch.tensor([0, 3, 1, 1, 2]), (tensors(6, D, seed=3), torch.tensor([0, 1, 2, 3, 0, 2]))
    weights, x = tensors(D, K, seed=1).requires_grad_(), tensors(B, D, seed=2)
    offset = tensors(B, K, seed=4).requires_grad_()
    labels = soft_label(offset, target, confidence=0.8)
    labels.retain_grad()
    meta_loss_after_a_step(labels, weights, x, meta).backward()
    tangent = log_prob_tangent(labels.detach(), weights, x, meta)
    for share in (torch.tensor(LR / B, dtype=torch.float64), torch.full((B,), LR / B, dtype=torch.float64)):
        label_grad = label_gradient(tangent, share)
        assert labels.grad is not None
        assert offset.grad is not None
        assert offset.grad.abs().max() > 1e-3
        torch.testing.assert_close(label_grad, labels.grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(logit_gradient(labels.detach(), label_grad), offset.grad, rtol=0, atol=1e-12)


def test_a_share_by_sample_scales_that_sample():
    tangent = tensors(2, K)
    grad = label_gradient(tangent, torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert torch.equal(grad, torch.stack((2 * tangent[0], torch.zeros(K, dtype=torch.float64))))


def test_a_step_against_the_gradient_lowers_the_meta_loss_and_one_along_it_raises_it():
    target, meta = torch.tensor([0, 3, 1, 1, 2]), (tensors(6, D, seed=3), torch.tensor([0, 1, 2, 3, 0, 2]))
    weights, x = tensors(D, K, seed=1).requires_grad_(), tensors(B, D, seed=2)
    offset = torch.zeros(B, K, dtype=torch.float64)
    labels = soft_label(offset, target)
    grad = label_gradient(log_prob_tangent(labels, weights, x, meta), torch.tensor(LR / B, dtype=torch.float64))
    step = centered(grad) / grad.abs().max()

    def at(sign: float) -> float:
        return meta_loss_after_a_step(soft_label(offset + sign * 0.1 * step, target), weights, x, meta).item()

    assert at(-1) < at(0) < at(1)


def test_the_start_is_the_smoothed_one_hot():
    base = smoothed_log_label(torch.tensor([2, 0]), 5, 0.8, dtype=torch.float64)
    expected = [[0.05, 0.05, 0.8, 0.05, 0.05], [0.8, 0.05, 0.05, 0.05, 0.05]]
    torch.testing.assert_close(base.exp(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(
        soft_label(torch.zeros(2, 5, dtype=torch.float64), torch.tensor([2, 0]), 0.8), base.exp()
    )
    assert soft_label(torch.zeros(1, 5), torch.tensor([1]))[0, 1] == pytest.approx(0.9)
    assert smoothed_log_label(torch.tensor([1]), 3).dtype == torch.float32


def test_an_offset_moves_the_log_odds_by_itself():
    offset = tensors(3, K)
    target = torch.tensor([1, 0, 3])
    log_labels = soft_label(offset, target).log()
    before = smoothed_log_label(target, K, dtype=torch.float64)
    for a in range(K):
        for b in range(K):
            odds = log_labels[:, a] - log_labels[:, b]
            torch.testing.assert_close(odds, before[:, a] - before[:, b] + offset[:, a] - offset[:, b])


def test_a_one_hot_label_is_a_dead_point_and_the_smoothed_one_is_not():
    grad = tensors(1, K)
    one_hot = F.one_hot(torch.tensor([2]), K).double()
    assert not logit_gradient(one_hot, grad).any()
    assert (logit_gradient(soft_label(torch.zeros(1, K, dtype=torch.float64), torch.tensor([2])), grad) != 0).all()
    assert (centered(grad) != 0).all()


def test_centered_rows_sum_to_zero_and_differ_from_the_gradient_by_a_constant():
    grad = tensors(6, K)
    torch.testing.assert_close(centered(grad).sum(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-14)
    difference = grad - centered(grad)
    torch.testing.assert_close(difference, difference[:, :1].expand(-1, K))


@pytest.mark.parametrize("weighted", [False, True])
def test_soft_cross_entropy_is_torch_s(weighted):
    logits, labels = tensors(B, K), tensors(B, K, seed=1).softmax(1)
    weight = tensors(K, seed=2).exp() if weighted else None
    expected = F.cross_entropy(logits, labels, weight, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(F.log_softmax(logits, 1), labels, weight), expected)
    assert soft_cross_entropy(F.log_softmax(logits, 1), F.one_hot(torch.arange(B) % K, K))[2] == pytest.approx(
        -float(F.log_softmax(logits, 1)[2, 2])
    )


def test_a_label_that_is_all_but_certain_stays_finite():
    base = smoothed_log_label(torch.tensor([0]), 1000, 1 - 1e-6)
    assert base.isfinite().all()
    assert base[0, 1] == pytest.approx(math.log(1e-6 / 999), rel=1e-5)


@pytest.mark.parametrize("confidence", [0, 1, -0.1, 1.5, math.nan])
def test_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match="between 0 and 1, both excluded"):
        smoothed_log_label(torch.tensor([0]), 3, confidence)


def test_one_class_is_too_few():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        smoothed_log_label(torch.tensor([0]), 1)
