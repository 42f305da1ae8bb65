"""Generalised cross-entropy against its closed form and its two limits."""

import pytest
import torch
import torch.nn.functional as F

from dataparams.functional import generalized_cross_entropy


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_value_and_gradient(q):
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 0, 0])
    losses = generalized_cross_entropy(logits, target, q)
    p = logits.detach().softmax(1)
    p_target = p.gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(losses, (1 - p_target**q) / q)
    losses.sum().backward()
    # p_y^q times the gradient of cross-entropy
    torch.testing.assert_close(logits.grad, p_target[:, None] ** q * (p - F.one_hot(target, 4)))


def test_limits_are_cross_entropy_and_absolute_error():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 0])
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(generalized_cross_entropy(logits, target, 1e-9), cross_entropy, rtol=1e-7, atol=0)
    absolute = (logits.softmax(1) - F.one_hot(target, 4)).abs().sum(1) / 2
    torch.testing.assert_close(generalized_cross_entropy(logits, target, 1.0), absolute)


def test_dense_targets():
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    dense = generalized_cross_entropy(logits, target)
    assert dense.shape == target.shape
    one = generalized_cross_entropy(logits[1:, :, 2, 3], target[1:, 2, 3])
    torch.testing.assert_close(dense[1:, 2, 3], one)


def test_a_hopeless_sample_keeps_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    generalized_cross_entropy(logits, torch.tensor([1])).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
